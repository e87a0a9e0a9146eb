"""The engine without its thread: takes requests, and steps. A step is three verbs: schedule, run, apply.

Torch-free: everything with tensors is behind `RunnerLike`.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from nr_serve.config import ServeConfig
from nr_serve.engine.adapters.adapters import Adapters
from nr_serve.engine.adapters.canary import Probe
from nr_serve.engine.cache.pages import PagePool
from nr_serve.engine.cache.prefix_cache import PrefixCache
from nr_serve.engine.messages import (
    EngineInfo,
    EngineStatistics,
    Output,
    StepEvents,
    StepReport,
    Submit,
)
from nr_serve.engine.outputs import OutputWriter, Unwritten
from nr_serve.engine.request import AnswerText, Ending, Request
from nr_serve.engine.scheduler import Piece, Result, Schedule, Scheduler
from nr_serve.errors import BadRequest, NrError, QueueFull
from nr_serve.tokenizer import Detokenizer, Tokenizer

log = logging.getLogger(__name__)
MAX_FAILED_STEPS = 5  # in a row, before the engine gives up
TRIAL_TOKENS = 64  # of a piece on trial in its own forward pass: new requests should not wait long
TRIAL_TOKENS_BESIDE = 2  # of a piece on trial in a step with requests: too few to slow their streams


class RunnerLike(Protocol):
    """What the core needs from a runner."""

    info: EngineInfo
    pages: int
    recalls_pages: bool
    """Whether it keeps the gate states that a request needs to reuse pages that another request computed."""
    tries_apart: bool
    """Whether a piece on trial needs a forward pass of its own."""
    overlaps: bool
    """Whether the host is free between `launch` and the results, for a GPU computes meanwhile."""

    def launch(self, pieces: Sequence[Piece], labels: Sequence[int]) -> Callable[[], list[Result]]:
        """As `run`, but returns what waits for the device and gives the results; the next pass comes after it."""
        ...

    def run(self, pieces: Sequence[Piece], labels: Sequence[int]) -> list[Result]:
        """Run one forward pass, with a piece on trial last or alone. Returns one result per piece.

        `labels`: for each piece, the row of the bank's cross statistics that its gates count in.
        """
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way."""

    schedule: Schedule
    pieces: list[Piece]
    """Single tokens first, then chunks by length: the batch groups pieces of the same length."""
    labels: list[int]
    probe: Probe | None
    launched: Callable[[], list[Result]] | None
    """What gives the pieces' results; None: they have not been run yet."""
    started: float
    preempted: int
    """Preemptions before it."""


class Core:
    """Owns the requests. Not thread-safe: `EngineLoop` calls it from one thread."""

    def __init__(self, runner: RunnerLike, adapters: Adapters, tokenizer: Tokenizer, config: ServeConfig) -> None:
        pool = PagePool(runner.pages, config.page_size)
        self.scheduler = Scheduler(
            pool,
            max_running=config.max_running,
            max_batch_tokens=config.max_batch_tokens,
            admit=adapters.admit,
            delays=adapters.delays,
            prefix_cache=PrefixCache(pool, adapters.registry.attachments) if runner.recalls_pages else None,
        )
        self._runner = runner
        self._adapters = adapters
        self._tokenizer = tokenizer
        self._writer = OutputWriter(tokenizer)
        self._max_model_len = runner.info.max_model_len
        self._vocab_size = runner.info.vocab_size
        self._eos_ids = frozenset(runner.info.eos_ids)
        self._max_waiting = config.max_waiting
        self._requests: dict[str, Request] = {}
        self._unwritten: list[Unwritten] = []
        self._arrivals = 0
        self._failed_steps = 0

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs, and no output is to be made."""
        return not self._requests and not self._unwritten

    def add(self, submit: Submit) -> Output | None:
        """Queue a request. Returns an output only if the request is refused at once."""
        try:
            self._check_submit(submit)
        except NrError as error:
            return Output(submit.request_id, finish_reason="error", error=error)
        self._arrivals += 1
        sampling = submit.sampling
        detokenizer = Detokenizer(self._tokenizer, submit.prompt_ids, special_tokens=sampling.special_tokens)
        request = Request(
            submit=submit,
            eos_ids=self._eos_ids,
            seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
            text=AnswerText(detokenizer, sampling.stop, include_stop=sampling.include_stop),
            arrival=self._arrivals,
        )
        self._requests[request.id] = request
        self.scheduler.add(request)
        return None

    def abort(self, request_id: str) -> None:
        """Drop a request, if it is known (any more), and take back what it holds. There is no output of it."""
        self._unwritten = [each for each in self._unwritten if each.request.id != request_id]
        request = self._requests.get(request_id)
        if request is not None:
            self._drop(request)

    def abort_all(self, error: NrError) -> StepEvents:
        """Fail every request with `error`. Frees nothing, as that could fail too: the engine is ending."""
        written = self.write().outputs
        failed = tuple(Output(name, finish_reason="error", error=error) for name in self._requests)
        self._requests.clear()
        return StepEvents((*written, *failed))

    def step(self, *, measures: bool = True) -> StepEvents:
        """Launch a step, finish it, and write all of its outputs."""
        events = self.finish(self.launch(measures=measures))
        return replace(events, outputs=(*events.outputs, *self.write().outputs))

    def launch(self, *, measures: bool = True) -> Step:
        """Schedule a mixed batch and launch its forward pass, on a GPU; `finish` must be next, but for `write`.

        Without `measures`, no adapter's leak is measured in the same step as requests.
        """
        started, preempted = time.perf_counter(), self.scheduler.preemptions
        schedule = self.scheduler.schedule()
        pieces = sorted(schedule.pieces, key=lambda piece: piece.count)
        labels = self._adapters.labels([piece.request for piece in pieces])
        probe, apart = None, self._runner.tries_apart or not pieces
        if measures or not pieces:
            probe = self._adapters.next_probe(TRIAL_TOKENS if apart else TRIAL_TOKENS_BESIDE)
        launched = None
        if self._runner.overlaps and pieces and (probe is None or apart):
            launched = self._launch(pieces, labels)
        return Step(schedule, pieces, labels, probe, launched, started, preempted)

    def finish(self, step: Step) -> StepEvents:
        """Take a step's results. Returns the outputs that are known; the others come from `write`.

        On a CPU it runs the forward pass, and writes, for there is nothing to do meanwhile.
        """
        results, tried = self._run(step)
        outputs = self._apply(step, results)
        if step.probe is not None and tried is not None:
            self._adapters.take_result(step.probe, tried)
        if not self._runner.overlaps:
            outputs += self.write().outputs
        report = self._report(step) if step.pieces else None
        changed, loads_failed = self._adapters.take_rejected()
        return StepEvents(tuple(outputs), report, changed, loads_failed)

    def write(self) -> StepEvents:
        """Make the outputs that no step made yet, while a GPU computes the next step."""
        unwritten, self._unwritten = self._unwritten, []
        return StepEvents(tuple(map(self._write, unwritten)))

    def statistics(self) -> EngineStatistics:
        """The adapters' counts and the gauges, as they are between two steps."""
        scheduler, registry = self.scheduler, self._adapters.registry
        return EngineStatistics(
            adapters={view.name: view for view in self._adapters.views()},
            slots_used=registry.slots_used,
            slots_total=registry.slots,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=scheduler.pool.used,
            pages_total=scheduler.pool.total,
        )

    def check(self) -> None:
        """Check, while idle, that no page, row or slot is lost. Raises RuntimeError."""
        self.scheduler.check()
        self._adapters.registry.check()

    def _check_submit(self, submit: Submit) -> None:
        longest = len(submit.prompt_ids) + submit.sampling.max_tokens
        if not submit.prompt_ids:
            raise BadRequest("the prompt is empty", param="prompt")
        if longest > self._max_model_len:
            raise BadRequest(
                f"the prompt's {len(submit.prompt_ids)} tokens and max_tokens {submit.sampling.max_tokens} "
                f"exceed the {self._max_model_len} tokens this server takes",
                param="max_tokens",
            )
        if max(submit.prompt_ids) >= self._vocab_size:  # a tokenizer may have more tokens than the base
            raise BadRequest(
                f"the prompt has the token {max(submit.prompt_ids)}; the base knows those below {self._vocab_size}",
                param="prompt",
            )
        if submit.request_id in self._requests:
            raise BadRequest(f"request id {submit.request_id!r} is in use")
        if len(self.scheduler.waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self.scheduler.waiting)} requests wait already; try again later")
        self._adapters.check_selection(submit.adapters)

    def _launch(self, pieces: list[Piece], labels: list[int]) -> Callable[[], list[Result]]:
        """What gives the pieces' results; if they could not be launched, it raises why."""
        try:
            return self._runner.launch(pieces, labels)
        except Exception as error:  # noqa: BLE001 - raised where failed steps are handled
            failure = error

        def fail() -> list[Result]:
            raise failure

        return fail

    def _run(self, step: Step) -> tuple[list[Result] | NrError, Result | None]:
        """Run the pieces, and the piece on trial. Returns the pieces' results and the trial's."""
        pieces, labels, trial = step.pieces, step.labels, None if step.probe is None else step.probe.piece
        if trial is None or not pieces or self._runner.tries_apart:
            run = step.launched or partial(self._runner.run, pieces, labels)
            results = self._run_requests(run, len(pieces)) if pieces else []
            return results, None if trial is None else self._try(trial)
        try:
            *together, tried = self._runner.run([*pieces, trial], [*labels, 0])
        except Exception:  # the trial must not fail other requests: they run again without it
            log.exception("a step with an adapter on trial failed")
            again = self._run_requests(partial(self._runner.run, pieces, labels), len(pieces))
            # If they fail without the trial too, the trial is not to blame: it is repeated later.
            return again, None if isinstance(again, NrError) else _not_run()
        self._failed_steps = 0
        return together, tried

    def _try(self, trial: Piece) -> Result:
        try:
            (tried,) = self._runner.run([trial], [0])
        except Exception:
            log.exception("an adapter could not be run on a probe text")
            return _not_run()
        return tried

    def _run_requests(self, run: Callable[[], list[Result]], requests: int) -> list[Result] | NrError:
        try:
            results = run()
        except Exception:
            # A failure of this batch must not stop the server: the batch's requests fail, others go on. If every
            # step fails, the device is lost, and only a new process will help.
            self._failed_steps += 1
            if self._failed_steps == MAX_FAILED_STEPS:
                raise
            log.exception("a step over %d requests failed", requests)
            return NrError("the step that computed this request failed; the server's log says why")
        self._failed_steps = 0
        return results

    def _apply(self, step: Step, results: list[Result] | NrError) -> list[Output]:
        """Advance the step's requests by its results. Returns the outputs of those that failed."""
        outputs = []
        for request, error in step.schedule.refused:
            del self._requests[request.id]
            self._adapters.release(request)
            outputs.append(Output(request.id, finish_reason="error", error=error))
        pieces = [piece for piece in step.pieces if self._known(piece.request)]
        if isinstance(results, NrError):
            return outputs + [self._fail(piece.request, results) for piece in pieces]
        if len(pieces) < len(step.pieces):  # an answer could not be written while the step ran
            results = [each for piece, each in zip(step.pieces, results, strict=True) if self._known(piece.request)]
        # Advance all pieces first: a request that ends may free a slot, which then no longer names what opened in
        # it.
        for piece, result in zip(pieces, results, strict=True):
            if result.error is None:
                self.scheduler.advance(piece, result.opened)
        for piece, result in zip(pieces, results, strict=True):
            try:
                self._take(piece, result)
            except NrError as error:
                outputs.append(self._fail(piece.request, error))
            except Exception:  # in a tokenizer, say: one answer must not stop the others
                log.exception("an answer could not be written")
                outputs.append(self._fail(piece.request, _unwritten()))
        return outputs

    def _take(self, piece: Piece, result: Result) -> None:
        """Take one request's result. Raises its error, or BadRequest if the request's grammar is stuck."""
        request = piece.request
        if result.error is not None:
            raise result.error
        gates = self._adapters.shares(result.fired, request.selection or ())
        prompt = self._writer.add_prompt(piece, result, gates)
        if not piece.samples:
            return
        text: str | None = None
        ending: Ending | None = Ending("length")  # a request that asked for no token ends at once
        if result.token is not None:
            ending = request.append(result.token)
            if request.sampling.stop:  # only its text tells whether it goes on
                text, ending = request.write(result.token, ending)
        if ending is not None:
            self._drop(request)
        own = gates[-1] if gates else None
        self._unwritten.append(Unwritten(request, result.token, result.logprob, own, prompt, ending, text))

    def _write(self, new: Unwritten) -> Output:
        try:
            return self._writer.output(new)
        except Exception:
            log.exception("an answer could not be written")
            return self._fail(new.request, _unwritten())

    def _known(self, request: Request) -> bool:
        return self._requests.get(request.id) is request

    def _fail(self, request: Request, error: NrError) -> Output:
        if self._known(request):  # it may have ended with the token that cannot be written
            self._drop(request)
        return Output(request.id, finish_reason="error", error=error)

    def _drop(self, request: Request) -> None:
        del self._requests[request.id]
        self.scheduler.drop(request)
        self._adapters.release(request)

    def _report(self, step: Step) -> StepReport:
        # A preempted request computes its answer's tokens again, many at once: that is prefill.
        pieces = step.pieces
        decode = sum(piece.count == 1 and piece.start >= piece.request.prompt_length for piece in pieces)
        return StepReport(
            seconds=time.perf_counter() - step.started,
            prefill_tokens=sum(piece.count for piece in pieces) - decode,
            decode_tokens=decode,
            requests=len(pieces),
            preemptions=self.scheduler.preemptions - step.preempted,
            prefix=self.scheduler.take_prefix_counts(),
        )


def _unwritten() -> NrError:
    return NrError("this answer could not be written; the server's log says why")


def _not_run() -> Result:
    return Result(None, error=NrError("it could not be run on the probe texts; the log says why"))
