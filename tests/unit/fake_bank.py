"""A bank without tensors, and adapters whose leak on the probe texts is known: fast enough for long walks."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

from nr_serve.engine.adapters.canary import Probe
from nr_serve.engine.messages import Leak, Sampling, Submit
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Result
from nr_serve.errors import BadAdapterFile
from nr_serve.neutral.step import Totals

LAYERS = 5
LENGTHS = {"one": 7, "two": 4}


@dataclass(frozen=True)
class FakeAdapter:
    """Its carried logit is the same in all layers; `wild_from`: the token of text "two" on which it becomes NaN."""

    version: str
    wild_from: int | None = None
    threshold: float = 0.0
    depth: int = LAYERS
    h: int = 16
    nbytes: int = 1000

    @property
    def info(self) -> SimpleNamespace:
        return SimpleNamespace(threshold=self.threshold, domain="", carry=0.0)

    def fired(self, text: str, threshold: float) -> list[int]:
        """Layers fired on each token of a probe text."""
        draw = random.Random(f"{self.version} {text}")
        return [LAYERS if draw.random() > threshold else 0 for _ in range(LENGTHS[text])]

    def leaks(self, threshold: float) -> dict[str, Leak]:
        return {text: Leak(sum(self.fired(text, threshold)), n * LAYERS, n) for text, n in LENGTHS.items()}

    def worst(self, threshold: float) -> float:
        return max(leak.rate for leak in self.leaks(threshold).values())


def texts() -> dict[str, Request]:
    """The probe texts, as the canary takes them."""
    return {name: request(name, tokens=n) for name, n in LENGTHS.items()}


def request(name: str, adapters: tuple[str, ...] | None = None, *, tokens: int = 1, selected: str = "") -> Request:
    submit = Submit(name, (1,) * tokens, Sampling(max_tokens=1), adapters, selected)
    return Request(submit=submit, eos_ids=frozenset(), seed=0, text=None, arrival=0)


def ran(probe: Probe, slots: int) -> Result:
    """What running a piece of probe text gives. Other slots open too: they are not on trial."""
    piece = probe.piece
    version, text = piece.request.selection[0], piece.request.id
    adapter, end = version.payload, piece.start + piece.count
    if text == "two" and adapter.wild_from is not None and end > adapter.wild_from:
        return Result(None, error=BadAdapterFile("not finite"))
    fired = adapter.fired(text, piece.trial)[piece.start : end]
    return Result(None, fired=tuple(tuple(n if s == version.slot else 99 for s in range(slots)) for n in fired))


@dataclass
class FakeBank:
    """Which adapter acts in which slot, and what steps counted there."""

    slots: int
    layers: int = LAYERS
    labels: int = 100
    within: dict[int, FakeAdapter] = field(default_factory=dict)
    """Whole in its slot, whether shut or not."""

    def __post_init__(self) -> None:
        self.thresholds = [math.inf] * self.slots
        self._clear()

    def check_fits(self, adapter: FakeAdapter) -> None:
        pass

    def attach(self, slot: int, adapter: FakeAdapter, threshold: float) -> Iterator[None]:
        self.detach(slot)
        self.within.pop(slot, None)
        for _ in range(self.layers):
            yield
        self.within[slot] = adapter
        self.thresholds[slot] = threshold

    def detach(self, slot: int) -> None:
        self.thresholds[slot] = math.inf

    def set_threshold(self, slot: int, threshold: float) -> None:
        assert slot in self.within, "it is not all there"
        self.thresholds[slot] = threshold

    def acts(self, slot: int) -> tuple[FakeAdapter, float] | None:
        """The adapter in the slot and its threshold; None if it is shut."""
        return None if self.thresholds[slot] == math.inf else (self.within[slot], self.thresholds[slot])

    def count(self, slots: list[int], label: int, tokens: int) -> None:
        """A request's tokens in a step: all its gates fire, and every other slot's that is not shut."""
        for slot in range(self.slots):
            if self.thresholds[slot] == math.inf:
                continue
            self._cross[label][slot] += tokens
            for layer in range(self.layers) if slot in slots else ():
                self._fired[layer][slot] += tokens
                self._seen[layer][slot] += tokens
            self._mass[slot] += tokens if slot in slots else 0

    def read_totals(self) -> Totals:
        totals = Totals(self._fired, self._seen, self._mass, self._cross)
        self._clear()
        return totals

    def _clear(self) -> None:
        self._fired = [[0] * self.slots for _ in range(self.layers)]
        self._seen = [[0] * self.slots for _ in range(self.layers)]
        self._mass = [0.0] * self.slots
        self._cross = [[0] * self.slots for _ in range(self.labels)]
