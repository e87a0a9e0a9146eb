"""The engine without its thread, over a tiny random base, stepped by hand."""

from concurrent.futures import Future
from functools import partial

from nr_serve.config import ServeConfig
from nr_serve.engine import core as core_module
from nr_serve.engine.adapters.adapters import Adapters
from nr_serve.engine.adapters.canary import Canary
from nr_serve.engine.adapters.probe_text import probe_requests
from nr_serve.engine.core import Core
from nr_serve.engine.messages import AdapterView, LoadAdapter, PatchAdapter, Sampling, StepEvents, Submit
from nr_serve.engine.model.runner import Runner
from tests import tiny

PROMPT = tuple(range(30, 50))
ANSWER = 12
TEXTS = {"one": list(range(10, 110)), "two": [7, 200, 31, 5] * 9, "three": list(range(290, 220, -1))}


def engine(
    base,
    *,
    pages: int,
    budget: int,
    running: int,
    page_size: int = 4,
    slots: int = 4,
    slot_width: int = 16,
    kind=Adapters,
    **settings,
) -> tuple[Core, Adapters]:
    config = ServeConfig(
        pages=pages,
        page_size=page_size,
        slots=slots,
        slot_width=slot_width,
        max_running=running,
        max_waiting=1000,
        max_batch_tokens=budget,
        **settings,
    )
    tokenizer = tiny.tokenizer()
    runner = Runner(base, tokenizer, config, "tiny")
    adapters = kind(runner.bank)
    return Core(runner, adapters, tokenizer, config), adapters


def load(adapters: Adapters, name: str, adapter, *, state: str = "attached") -> None:
    answer: Future = Future()
    adapters.load(LoadAdapter(name, path=None), adapter, answer, 0.0)
    adapters.copy_some(seconds=60)
    assert answer.result(timeout=0).state == state


class Device:
    """A runner as on a GPU, where a step that is launched is under way until its results are waited for."""

    def __init__(self, runner) -> None:
        self._runner, self.under_way = runner, False
        self.overlaps = self.tries_apart = True

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def launch(self, pieces, labels):
        assert not self.under_way
        results, self.under_way = self._runner.launch(pieces, labels), True

        def wait():
            self.under_way = False
            return results()

        return wait

    def run(self, pieces, labels):
        assert not self.under_way
        return self._runner.run(pieces, labels)


class Server:
    """An engine with what its requests were answered, and what the naive loop would answer."""

    def __init__(self, *, slots=2, budget=32, canary=None) -> None:
        self.base = tiny.model()
        self.naive = tiny.Naive(self.base)
        kind = partial(Adapters, canary=canary)
        self.core, self.adapters = engine(self.base, pages=200, budget=budget, running=8, slots=slots, kind=kind)
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, object] = {}
        self.prompts: dict[str, tuple] = {}
        self.copies: list[str] = []
        self._record_copies()

    def _record_copies(self) -> None:
        bank = self.adapters._bank
        attach = bank.attach

        def recording(slot, adapter, threshold):
            self.copies.append(adapter.version)
            return attach(slot, adapter, threshold)

        bank.attach = recording

    def load(self, name, adapter, *, finish=True, **options) -> Future:
        answer: Future = Future()
        self.adapters.load(LoadAdapter(name, path=None, **options), adapter, answer, 0.0)
        if finish:
            self.adapters.copy_some(seconds=60)
        return answer

    def patch(self, name, **dials) -> Future:
        answer: Future = Future()
        self.adapters.patch(PatchAdapter(name, **dials), answer)
        return answer

    def made(self, seed, **options):
        return tiny.adapter(self.base, seed, **options)

    def ask(self, name, adapters=None, *, selected="", gates=False, tokens=ANSWER) -> None:
        sampling = Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
        submit = Submit(name, PROMPT, sampling, adapters, selected, gates=gates, cache_salt=name)
        assert self.core.add(submit) is None

    def step(self, *, copy=True) -> StepEvents:
        if copy:
            self.adapters.copy_some(seconds=0)
        events = self.core.step()
        for output in events.outputs:
            self.tokens.setdefault(output.request_id, []).extend(t.id for t in output.tokens)
            if output.prompt is not None:
                self.prompts[output.request_id] = output.prompt
            if output.finish_reason is not None:
                self.ended[output.request_id] = output.error or output.finish_reason
        return events

    def finish(self) -> None:
        for _ in range(500):
            if self.core.idle and not self.adapters.busy:
                self.core.check()
                return
            self.step()
        raise AssertionError("somebody waits for ever")

    def answer(self, name, adapters=None, **options) -> list[int]:
        """What the request was answered once everybody was."""
        self.ask(name, adapters, **options)
        self.finish()
        return self.tokens[name]

    def expected(self, *adapters) -> list[int]:
        return self.naive.greedy(PROMPT, ANSWER, adapters)[0]

    def view(self, name):
        return self.adapters.view(self.adapters.registry.get(name))

    def state(self, name):
        return next((v.state for v in self.adapters.views() if v.name == name), None)

    def slot(self, name):
        return self.adapters.registry.get(name).slot


def error_of(answer: Future) -> Exception:
    error = answer.exception(timeout=0)
    assert error is not None
    return error


class Probed(Server):
    """A stepped engine with a canary; every piece of probe text that it runs is noted."""

    def __init__(self, *, max_leak=None, **options) -> None:
        texts: dict = {}  # filled once there is a runner that tells where they go
        super().__init__(canary=Canary(texts, max_leak), **options)
        self.pieces: list[tuple[str, int]] = []
        self.runner = self.core._runner
        self.run, self.runner.run = self.runner.run, self.watched
        row, pages = self.runner.probe_row, self.runner.probe_pages
        texts |= probe_requests(TEXTS, longest=512, row=row, pages=pages)

    def watched(self, pieces, labels):
        for piece in pieces:
            if piece.trial is not None:
                assert piece is pieces[-1]
                alone = len(pieces) == 1
                assert piece.count <= (core_module.TRIAL_TOKENS if alone else core_module.TRIAL_TOKENS_BESIDE)
                self.pieces.append((piece.request.selection[0].name, piece.count))
        return self.run(pieces, labels)

    def neutrality(self, name):
        return self.view(name).neutrality

    def load(self, name, adapter, *, finish=True, **options):
        answer = super().load(name, adapter, finish=False, **options)
        if finish:
            self.work()
        return answer

    def begin(self, name, adapter, **options) -> AdapterView:
        """Load, and step until it is answered; its measurement may go on."""
        answer = self.load(name, adapter, finish=False, **options)
        while not answer.done():
            self.step()
        return answer.result(timeout=0)

    def work(self) -> None:
        """Copy and measure all there is."""
        while self.adapters.busy:
            self.step()
