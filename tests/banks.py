"""Small banks: random adapters, steps, and the definition summed naively in float64, request by request."""

from dataclasses import dataclass, field

import pytest
import torch

from nr_serve.neutral import math
from nr_serve.neutral.bank import Bank
from nr_serve.neutral.cpu_bank import CpuBank
from nr_serve.neutral.format import Adapter, AdapterInfo, Block
from nr_serve.neutral.step import StepTokens, Totals
from tests.compiled import operators_or_skip

D, LAYERS, SLOTS, WIDTH, ROWS, PAGES = 8, 3, 4, 6, 5, 3
LABELS = 7


def small(kind, dtype=torch.float32, **other) -> Bank:
    """A bank of that kind, empty."""
    shape = {"layers": LAYERS, "d": D, "slots": SLOTS, "width": WIDTH, "rows": ROWS, "pages": PAGES} | other
    return kind(**shape, labels=LABELS, device=torch.device("cpu"), dtype=dtype)


def cpu_bank(**shape) -> CpuBank:
    """Of the compiled operator."""
    operators = operators_or_skip()
    return CpuBank(operators.residues, multiplies=operators.multiply is not None, **shape)


def adapter(seed: int, *, carry=0.0, widths=(WIDTH,) * LAYERS, bias=0.0) -> Adapter:
    """Random; a width of 0 leaves that layer's block out."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=g)

    blocks = tuple(
        Block(rand(D) / D**0.5, bias + 0.3 * rand(), rand(h, D), rand(h, D), rand(D, h)) if h else None
        for h in widths
    )
    info = AdapterInfo("tiny", "", LAYERS, D, carry=carry, gate=("relu", "relu1")[seed % 2])
    return Adapter(info, blocks, f"v{seed}", nbytes=0)


def attach(to: Bank, slot: int, what: Adapter, threshold=0.0) -> None:
    for _ in to.attach(slot, what, threshold):
        pass


def tokens(pieces, labels=None, ends=()) -> StepTokens:
    """`pieces`: (row, length, selected slots), laid end to end; `ends`: (token of the step, page that it ends)."""
    lengths = [n for _, n, _ in pieces]
    selected_PS = torch.zeros(len(pieces), SLOTS, dtype=torch.bool)
    for i, (_, _, slots) in enumerate(pieces):
        selected_PS[i, list(slots)] = True
    of_T = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(lengths))
    return StepTokens(
        offset_T=torch.cat([torch.arange(n) for n in lengths]),
        row_T=torch.tensor([row for row, _, _ in pieces])[of_T],
        last_P=torch.tensor(lengths).cumsum(0) - 1,
        selected_TS=selected_PS[of_T],
        label_T=torch.tensor(labels or [0] * len(pieces))[of_T],
        longest=max(lengths),
        end_E=torch.tensor([token for token, _ in ends]) if ends else None,
        page_E=torch.tensor([page for _, page in ends]) if ends else None,
    )


def singles(selected_TS: torch.Tensor) -> StepTokens:
    """Single tokens, each of a row of its own."""
    count = len(selected_TS)
    return StepTokens(
        offset_T=torch.zeros(count, dtype=torch.long),
        row_T=torch.arange(count),
        last_P=torch.arange(count),
        selected_TS=selected_TS,
        label_T=torch.zeros(count, dtype=torch.long),
        longest=1,
    )


def step(on: Bank, pieces, x_LTd, y_LTd, labels=None):
    """One step. Each layer's y with residues, and the layers fired."""
    out, open_TS = observed_step(on, pieces, x_LTd, y_LTd, labels)
    return out, open_TS * tokens(pieces).selected_TS


def observed_step(on: Bank, pieces, x_LTd, y_LTd, labels=None, ends=()):
    """One step. Each layer's y with residues, and the layers open, whether selected or not."""
    on.begin(tokens(pieces, labels, ends))
    # y may be reused, so the bank gets a copy; with a batch dimension in front, as models have it.
    out = [on.add_residues(i, x_LTd[i][None], y_LTd[i].clone()[None])[0] for i in range(LAYERS)]
    open_TS = on.end()
    return torch.stack(out), torch.zeros(y_LTd.shape[1], SLOTS, dtype=torch.int32) if open_TS is None else open_TS


@dataclass(eq=False)
class NaiveSlot:
    """An adapter in a slot as the definition sees it: every row's logits since both began."""

    adapter: Adapter
    threshold: float
    z: dict = field(default_factory=lambda: {(layer, row): [] for layer in range(LAYERS) for row in range(ROWS)})

    def gates(self, layer: int, row: int, x_nd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(m - threshold, g) of new tokens of a row, float64 [n]: the whole row is carried again each time."""
        block = self.adapter.blocks[layer]
        if block is None:
            return torch.full((len(x_nd),), -1.0), torch.zeros(len(x_nd), dtype=torch.float64)
        z = self.z[layer, row]
        z.extend((x_nd.double() @ block.gate.double() + block.bias.double()).tolist())
        m = math.carry(torch.tensor(z).double(), self.adapter.info.carry)[-len(x_nd) :]
        return m - self.threshold, math.block_gate(m, self.threshold, self.adapter.info.ceiling)


class NaiveBank:
    """The same calls, one token, slot and layer at a time."""

    def __init__(self) -> None:
        self.slots: dict[int, NaiveSlot] = {}
        self.pages: dict[int, dict[tuple[NaiveSlot, int], list[float]]] = {}
        self.fired = torch.zeros(LAYERS, SLOTS)
        self.seen = torch.zeros(LAYERS, SLOTS)
        self.mass = torch.zeros(SLOTS, dtype=torch.float64)
        self.cross = torch.zeros(LABELS, SLOTS)
        self.smallest_margin = torch.inf

    def forget_row(self, row: int) -> None:
        for slot in self.slots.values():
            for layer in range(LAYERS):
                slot.z[layer, row] = []

    def keep_page(self, page: int, row: int, after: int) -> None:
        """The page ends `after` tokens before the row's last."""
        own = {(slot, layer): slot.z[layer, row] for slot in self.slots.values() for layer in range(LAYERS)}
        self.pages[page] = {key: z[: len(z) - after] for key, z in own.items()}

    def recall_row(self, row: int, page: int) -> None:
        for slot in self.slots.values():
            for layer in range(LAYERS):
                slot.z[layer, row] = list(self.pages.get(page, {}).get((slot, layer), []))

    def step(self, pieces, x_LTd, y_LTd, labels):
        out = y_LTd.double().clone()
        open_TS = torch.zeros(y_LTd.shape[1], SLOTS, dtype=torch.int32)
        start = 0
        for (row, n, selected), label in zip(pieces, labels, strict=True):
            own = slice(start, start + n)
            start += n
            for s, slot in self.slots.items():
                for layer in range(LAYERS):
                    over_n, g_n = slot.gates(layer, row, x_LTd[layer, own])
                    # 0 is a text's first token at threshold 0: exactly so, however it is computed.
                    margins = over_n[over_n != 0].abs().tolist()
                    self.smallest_margin = min([self.smallest_margin, *margins])
                    self.cross[label, s] += int((over_n > 0).sum())
                    open_TS[own, s] += (over_n > 0).int()
                    block = slot.adapter.blocks[layer]
                    if s not in selected or block is None:
                        continue
                    weights = (block.w_in.double(), block.w_gate.double(), block.w_out.double())
                    out[layer, own] += math.residue(x_LTd[layer, own].double(), g_n, *weights)
                    self.fired[layer, s] += int((g_n > 0).sum())
                    self.seen[layer, s] += n
                    self.mass[s] += g_n.sum()
        return out, open_TS


def counters(totals: Totals) -> tuple:
    return totals.fired_LS, totals.seen_LS, totals.mass_S, totals.cross_KS


def assert_totals(fast: Bank, naive: NaiveBank, *, seen: bool) -> None:
    totals = fast.read_totals()
    assert totals.fired_LS == naive.fired.int().tolist()
    assert totals.mass_S == pytest.approx(naive.mass.tolist(), rel=1e-4, abs=1e-4)
    assert totals.cross_KS == naive.cross.int().tolist()
    if seen:
        assert totals.seen_LS == naive.seen.int().tolist()
    for counter in (naive.fired, naive.seen, naive.mass, naive.cross):
        counter.zero_()
    assert not any(torch.tensor(counter).any() for counter in counters(fast.read_totals()))
