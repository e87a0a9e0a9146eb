"""Prompts that begin alike share pages, and every answer is still the naive loop's."""

import random
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import pytest
import torch

from nr_serve.engine.adapters.adapters import Adapters
from nr_serve.engine.cache.neutrality import Attachments, Footprint, Opened
from nr_serve.engine.messages import LoadAdapter, Output, PatchAdapter, PrefixTokens, Sampling, Submit
from nr_serve.engine.model.opened import opened_by_page
from nr_serve.engine.scheduler import Piece
from nr_serve.neutral.bank import Bank
from tests import tiny
from tests.unit.stepped import engine, load

PAGE = 4
NAMES = ("a", "b", "c", "d", "e")


class Watched(Adapters):
    """Notes which adapters, at which thresholds, each request was admitted with."""

    def __init__(self, bank: Bank) -> None:
        super().__init__(bank)
        self.used: dict[str, list] = {}

    def admit(self, request, *, may_copy: bool) -> bool:
        admitted = super().admit(request, may_copy=may_copy)
        if admitted and request.id not in self.used:
            self.used[request.id] = [
                replace(v.payload, info=replace(v.payload.info, threshold=v.threshold)) for v in request.selection
            ]
        return admitted


@dataclass
class Traffic:
    """Random requests with common beginnings, while adapters come, go and are turned."""

    seed: int
    carry: float
    pages: int = 40
    budget: int = 24
    answers: dict[str, list] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)
    """What each request was said to have found in the prefix cache."""
    asked: dict[str, Submit] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)
    """Requests beside which a threshold of their own changed: the naive loop knows one threshold."""
    prefix: PrefixTokens = field(default_factory=PrefixTokens)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.base = tiny.model()
        self.naive = tiny.Naive(self.base)
        self.core, self.adapters = engine(
            self.base, pages=self.pages, budget=self.budget, running=6, page_size=PAGE, kind=Watched
        )
        beginnings = random.Random(self.seed)
        self.beginnings = [[beginnings.randrange(290) for _ in range(28)] for _ in range(3)]
        # Of several kinds of gate: on a page or two of tokens they often stay shut, so that prefixes are neutral.
        self.made = [
            tiny.adapter(
                self.base,
                seed=i,
                carry=self.carry if i % 3 else 0.0,
                scale=20.0,
                threshold=self._high(),
                gate=("relu", "relu1")[i % 2],
            )
            for i in range(8)
        ]
        for name in NAMES[:3]:
            load(self.adapters, name, self.rng.choice(self.made))

    def run(self, requests: int) -> None:
        rng = self.rng
        while requests or not self.core.idle:
            self._change_something()
            for _ in range(min(requests, rng.choice([0, 0, 1, 3]))):
                requests -= 1
                self._ask()
            if rng.random() < 0.02 and self.answers:
                self.core.abort(rng.choice(sorted(self.answers)))
            self.adapters.copy_some(seconds=0)
            events = self.core.step()
            if events.report is not None:
                self._count(events.report.prefix)
            for output in events.outputs:
                self._take(output)
        self.core.check()

    def wrong(self) -> list[str]:
        """Answers that are not what the naive loop says."""
        return [name for name in self.whole() if not self._is_exact(name)]

    def whole(self) -> list[str]:
        asked = self.asked
        return [n for n in asked if len(self.answers.get(n, ())) == asked[n].sampling.max_tokens]

    def _is_exact(self, name: str) -> bool:
        if name in self.turned:
            return True
        prompt, answer = self.asked[name].prompt_ids, self.answers[name]
        got = [token.id for token in answer]
        logprobs_TV = self.naive.logits([*prompt, *got], self.adapters.used[name]).log_softmax(-1)[
            len(prompt) - 1 : -1
        ]
        own = [token.logprob for token in answer]
        return got == logprobs_TV.argmax(-1).tolist() and own == pytest.approx(
            logprobs_TV.amax(-1).tolist(), abs=1e-4
        )

    def _high(self) -> float:
        return self.rng.uniform(1.0, 2.2)

    def _ask(self) -> None:
        rng, name = self.rng, str(len(self.asked))
        beginning = rng.choice(self.beginnings)[: rng.choice([9, 14, 28, 28])]
        prompt = (*beginning, *(rng.randrange(290) for _ in range(rng.choice([0, 0, 2, 9]))))
        sampling = Sampling(max_tokens=rng.randint(1, 12), temperature=0, logprobs=0, ignore_eos=True)
        adapters = rng.choice([(), None, None, ("a",), ("b",), ("a", "b"), ("c", "d"), ("e",)])
        submit = Submit(name, prompt, sampling, adapters, gates=rng.random() < 0.1)
        if self.core.add(submit) is None:
            self.asked[name] = submit

    def _change_something(self) -> None:
        rng, name = self.rng, self.rng.choice(NAMES)
        roll = rng.random()
        if roll < 0.05:
            message = LoadAdapter(name, path=None, replace=True, threshold=self._high())
            self.adapters.load(message, rng.choice(self.made), Future(), 0.0)
        elif roll < 0.08 and name in self.adapters.registry:
            self.adapters.unload(name)
        elif roll < 0.13 and name in self.adapters.registry:
            version = self.adapters.registry.get(name)
            everyone = [*self.core.scheduler.running, *self.core.scheduler.waiting]
            self.turned |= {r.id for r in everyone if version in (r.selection or ())}
            self.adapters.patch(PatchAdapter(name, threshold=self._high()), Future())

    def _count(self, more: PrefixTokens) -> None:
        so_far = self.prefix
        self.prefix = PrefixTokens(
            so_far.asked + more.asked, so_far.found + more.found, so_far.neutral + more.neutral
        )

    def _take(self, output: Output) -> None:
        if output.error is None:
            self.answers.setdefault(output.request_id, []).extend(output.tokens)
            told = self.told.setdefault(output.request_id, output.cached_tokens)
            assert output.cached_tokens == told, "what it found of its own pages, once preempted, is no news"
            if output.prompt is not None:
                assert len(output.prompt) == len(self.asked[output.request_id].prompt_ids)


@pytest.mark.parametrize("carry", [0.0, 0.6])
@pytest.mark.parametrize(("pages", "budget"), [(40, 24), (18, 7), (200, 64)])
def test_answers_from_shared_pages_equal_the_naive_loop(pages, budget, carry):
    traffic = Traffic(pages, carry, pages=pages, budget=budget)
    traffic.run(150)
    assert traffic.wrong() == []
    assert len(traffic.whole()) - len(traffic.turned) > 70
    assert traffic.prefix.found > traffic.prefix.asked / 10
    assert traffic.prefix.neutral > 50
    if pages < 20:
        assert traffic.core.scheduler.preemptions > 5


NEEDED = {
    "the selection was attached": (
        Footprint, "serves", lambda f, s: f.acted <= s and f.would_act.isdisjoint(s)
    ),
    "who acted is selected": (
        Footprint, "serves", lambda f, s: s <= f.attached and f.would_act.isdisjoint(s)
    ),
    "who would have acted is not selected": (Footprint, "serves", lambda f, s: f.acted <= s <= f.attached),
    "a carried state is recalled": (Bank, "recall_row", lambda bank, row, page: bank.forget_row(row)),
    "another threshold is another attachment": (
        Attachments, "put", lambda a, slot: a._in_slot[slot] if slot in a._in_slot else PUT(a, slot)
    ),
}  # fmt: skip
PUT = Attachments.put


@pytest.mark.parametrize("rule", NEEDED)
def test_the_traffic_above_shows_when_a_rule_is_dropped(rule, monkeypatch):
    monkeypatch.setattr(*NEEDED[rule])
    traffic = Traffic(200, 0.6, pages=200, budget=64)
    traffic.run(150)
    assert traffic.wrong() != []


@pytest.mark.parametrize("longest", [1, 15])
@pytest.mark.parametrize("seed", range(5))
def test_what_opened_is_told_page_by_page(seed, longest):
    rng = random.Random(seed)
    pieces = [Piece(None, rng.randrange(10), rng.randint(1, longest)) for _ in range(5)]
    g = torch.Generator().manual_seed(seed)
    tokens = sum(piece.count for piece in pieces)
    open_TS = torch.randint(0, 3, (tokens, 6), generator=g) * (torch.rand(tokens, 6, generator=g) < 0.2)
    open_TS[: pieces[0].count] = 0
    selected_TS = torch.rand(tokens, 6, generator=g) < 0.5
    expected, at = [], 0
    for piece in pieces:
        by_page: dict[int, tuple[set, set]] = {}
        for position in range(piece.start, piece.start + piece.count):
            acted, observed = by_page.setdefault(position // PAGE, (set(), set()))
            for slot in range(6):
                if open_TS[at, slot]:
                    (acted if selected_TS[at, slot] else observed).add(slot)
            at += 1
        expected.append(tuple(Opened(*map(frozenset, opened)) for opened in by_page.values()))
    assert opened_by_page(pieces, open_TS, selected_TS, PAGE) == expected
    assert opened_by_page(pieces, torch.zeros_like(open_TS), selected_TS, PAGE) == [()] * 5


def test_a_reused_prompt_is_said_once_and_counted_and_without_the_cache_nothing_is_reused():
    for reused, settings in ((16, {}), (0, {"prefix_cache": False})):
        core, adapters = engine(tiny.model(), pages=40, budget=24, running=6, page_size=PAGE, **settings)
        load(adapters, "a", tiny.adapter(tiny.model(), seed=0, carry=0.6, threshold=50.0))
        answers, found = [], 0
        for name, selection in (("1", ()), ("2", ("a",))):
            sampling = Sampling(max_tokens=3, temperature=0, logprobs=0, ignore_eos=True)
            assert core.add(Submit(name, tuple(range(20)), sampling, selection)) is None
            while not core.idle:
                events = core.step()
                answers += events.outputs
                found += events.report.prefix.found
        assert [output.cached_tokens for output in answers] == [0, 0, 0, reused, reused, reused]
        assert found == reused
        assert [o.tokens[0].id for o in answers[:3]] == [o.tokens[0].id for o in answers[3:]]
        core.check()
