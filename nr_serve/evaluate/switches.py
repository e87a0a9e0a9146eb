"""Language switches inside a text: how many tokens late a gate opens and shuts, and what the lateness costs.

Each window is one document: a stretch of the base's own language, then a stretch of text that the adapter learned,
then the continuation of the first text. The carry runs through both switches.

Shape suffixes: N windows, S tokens per stretch, T = 3 S tokens per window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from nr_serve.errors import BadRequest
from nr_serve.evaluate.difference import Difference, difference
from nr_serve.evaluate.hosted import Hosted, Subject
from nr_serve.evaluate.readings import once
from nr_serve.evaluate.roles import assign_roles
from nr_serve.train.digest import digest
from nr_serve.train.measure import evaluating, read_parts
from nr_serve.train.text.pack import Windows

OPEN = 0.9
"""A gate counts as open once its rate reaches this share of its steady rate on text that it learned."""

SHUT = 0.05
"""A gate counts as shut once less than this share of its layers fires."""


@dataclass(frozen=True)
class SwitchText:
    """Windows that switch to one adapter's text and back."""

    ids_NT: Tensor
    original: tuple[str, ...]
    """Sources of the first and the last stretches."""
    own: tuple[str, ...]
    """Sources of the middle stretches."""


@dataclass(frozen=True)
class Steady:
    """Mean gate rate over the second half of each stretch."""

    original: float
    own: float
    original_again: float


@dataclass(frozen=True)
class Switch:
    """Measurements of one adapter, attached alone."""

    windows: int
    original: Sequence[str]
    """Sources of the first and the last stretches."""
    own: Sequence[str]
    """Sources of the middle stretches."""
    rates: Sequence[float]
    """Share of the adapter's layers that fired, by the token's position in its window."""
    steady: Steady
    tokens_to_open: int | None
    """Tokens of the adapter's text read before the first token with an open gate; None if it never opens."""
    tokens_to_shut: int | None
    """Tokens read after the adapter's text before the first token with a shut gate; None if it never shuts."""
    own_difference: Difference
    """Change of the loss on the middle stretch, without its first token; smaller if the gate opens late."""
    before: float
    """Loss of the base alone on the last stretch, without its first token; nats per token."""
    after: float
    """Loss with the adapter attached on the last stretch, without its first token; nats per token."""
    difference: Difference
    """Change from `before` to `after`."""
    after_by_place: Sequence[tuple[float, float]]
    """The same two losses by the token's place in the last stretch, from its second token on."""


@dataclass(frozen=True)
class SwitchReport:
    """Every adapter's switches."""

    stretch: int
    """Tokens per stretch."""
    adapters: Mapping[str, Switch]

    def document(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)


def switch_texts(
    hosted: Hosted, texts: Mapping[str, Windows], windows: int, beginning: int = 0
) -> dict[str, SwitchText]:
    """The switching windows of each adapter, up to `windows` for each source that it learned.

    `texts`: windows of 2 S tokens by source. Of the base's own language only those within one document are taken,
    and cut in two where the other text is put in, without the `beginning` tokens that the tokenizer puts before
    every text. Raises BadRequest if there is none, or none of an adapter's text.
    """
    roles = assign_roles(texts, hosted.adapters, {})
    needed = windows * sum(bool(role.own) for role in roles.values())
    whole = {name: _within_a_document(texts[name]) for name, role in roles.items() if role.kind == "original"}
    original = {name: text.spread(needed) for name, text in whole.items() if len(text)}
    learned = {}
    for adapter in hosted.names:
        own = {name: texts[name].spread(windows) for name, role in roles.items() if adapter in role.own}
        for what, found in (("the base's own language", whole), (f"what {adapter} learned", own)):
            if not found:
                raise BadRequest(f"no source of {what} is among those to measure", param="source")
        learned[adapter] = own
    if not original:
        raise BadRequest("no document in the base's own language is as long as two stretches", param="stretch")
    return {adapter: _splice(original, own, beginning) for adapter, own in learned.items()}


def _within_a_document(text: Windows) -> Windows:
    return text.take((text.offset_NT[:, 1:] != 0).all(1).nonzero()[:, 0].tolist())


def _splice(original: Mapping[str, Windows], own: Mapping[str, Windows], beginning: int) -> SwitchText:
    middle, around = (_round_robin([iter(text.ids_NT) for text in texts.values()]) for texts in (own, original))
    rows = []
    for middle_T, around_T in zip(middle, around, strict=False):
        before_S, after_S = around_T.chunk(2)
        rows.append(torch.cat([before_S, middle_T[beginning:][: len(before_S)], after_S]))
    return SwitchText(torch.stack(rows), tuple(original), tuple(own))


def _round_robin(sources: Iterable[Iterator[Tensor]]) -> Iterator[Tensor]:
    """One item of each source in turn, until all have ended."""
    return (piece for turn in zip_longest(*sources) for piece in turn if piece is not None)


def switches(hosted: Hosted, texts: Mapping[str, SwitchText]) -> SwitchReport:
    """Measure each adapter, attached alone, on its switching windows."""
    measured = {}
    for i, (name, text) in enumerate(texts.items(), start=1):
        measured[name] = _measure(hosted, name, text, f"language switches, {i} of {len(texts)}: {name}")
    return SwitchReport(next(iter(texts.values())).ids_NT.shape[1] // 3, measured)


@dataclass(frozen=True)
class _Losses:
    """Losses on one stretch, without its first token."""

    loss: float
    nats_N: tuple[float, ...]
    labels_N: tuple[int, ...]
    by_place: tuple[float, ...]
    """Loss by the token's place, from the second on."""


@dataclass(frozen=True)
class _Reading:
    rates: tuple[float, ...]
    own: _Losses
    again: _Losses


def _measure(hosted: Hosted, name: str, text: SwitchText, place: str) -> Switch:
    before, after = (_read(hosted, names, text.ids_NT, place) for names in ((), (name,)))
    steady = steady_rates(after.rates)
    stretch = len(after.rates) // 3
    own, again = after.rates[stretch : 2 * stretch], after.rates[2 * stretch :]
    return Switch(
        windows=len(text.ids_NT),
        original=text.original,
        own=text.own,
        rates=after.rates,
        steady=steady,
        tokens_to_open=_first(rate > 0 and rate >= OPEN * steady.own for rate in own),
        tokens_to_shut=_first(rate < SHUT for rate in again),
        own_difference=difference(before.own, after.own),
        before=before.again.loss,
        after=after.again.loss,
        difference=difference(before.again, after.again),
        after_by_place=list(zip(before.again.by_place, after.again.by_place, strict=True)),
    )


def steady_rates(rates: Sequence[float]) -> Steady:
    """The mean rate over the second half of each of three stretches."""
    stretch = len(rates) // 3
    halves = [rates[end - (stretch - stretch // 2) : end] for end in (stretch, 2 * stretch, 3 * stretch)]
    return Steady(*map(fmean, halves))


def _first(reached: Iterator[bool]) -> int | None:
    return next((i for i, one in enumerate(reached) if one), None)


def _read(hosted: Hosted, names: Sequence[str], ids_NT: Tensor, place: str) -> _Reading:
    """Rates and losses of the windows with these adapters, at most one, attached; `place` is printed on stderr."""
    subject = hosted.attach(names)
    what = ["switches", list(ids_NT.shape), digest((ids_NT,))]
    return once(subject, what, partial(_read_now, subject, ids_NT), TypeAdapter(_Reading), place)


def _read_now(subject: Subject, ids_NT: Tensor) -> _Reading:
    model = subject.base.model
    count, length = ids_NT.shape
    fired_T = torch.zeros(length, dtype=torch.float64, device=subject.base.device)
    parts = []
    blocks = 0

    def on_gates(_: int, __: int, g_M: Tensor) -> None:
        fired_T.add_((g_M > 0).view(-1, length).sum(0))

    with evaluating(model):
        windows = Windows(ids_NT, torch.arange(length).expand_as(ids_NT))
        for record, nats_NT, _ in read_parts(model, subject.attached, windows, on_gates):
            blocks = sum(record.blocks)
            parts.append(nats_NT)
    rates = (fired_T / (count * max(1, blocks))).tolist()
    nats_NT = torch.cat(parts)
    return _Reading(tuple(rates), _losses(nats_NT, 1), _losses(nats_NT, 2))


def _losses(nats_NT: Tensor, place: int) -> _Losses:
    """Losses on stretch 0, 1 or 2 of each window, given each token's loss on the next token."""
    stretch = nats_NT.shape[1] // 3
    own_NT = nats_NT[:, place * stretch : (place + 1) * stretch - 1]
    nats = own_NT.sum(1).tolist()
    labels = (stretch - 1,) * len(nats)
    return _Losses(sum(nats) / sum(labels), tuple(nats), labels, tuple(own_NT.mean(0).tolist()))
