"""Random steps and changes of a bank equal the naive sum."""

import random
from collections.abc import Iterator

import pytest
import torch

from tests.banks import (
    LABELS,
    LAYERS,
    PAGES,
    ROWS,
    SLOTS,
    WIDTH,
    D,
    NaiveBank,
    NaiveSlot,
    adapter,
    assert_totals,
    observed_step,
)


class Walk:
    """Changes and steps, in random order, of a bank and of the naive one beside it."""

    def __init__(self, fast, seed: int) -> None:
        self.fast, self.naive = fast, NaiveBank()
        self.rng, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        # Half of the walks select slots that are empty or being written too: they must add nothing.
        self.reckless = seed % 2 == 1
        self.copying: dict[int, tuple[Iterator[None], NaiveSlot]] = {}
        self.adapters = 1000 * seed
        self.steps = self.opened = 0

    def attach(self) -> None:
        slot = self.rng.randrange(SLOTS)
        if slot in self.copying:
            return
        what, threshold = self.random_adapter(), self.rng.choice([0.0, 0.0, 0.4, 0.2])
        self.fast.detach(slot)
        self.naive.slots.pop(slot, None)
        self.copying[slot] = (self.fast.attach(slot, what, threshold), NaiveSlot(what, threshold))

    def random_adapter(self):
        rng = self.rng
        widths = [rng.choice([0, 1, 2, WIDTH]) for _ in range(LAYERS)]
        widths[rng.randrange(LAYERS)] = rng.randint(1, WIDTH)
        self.adapters += 1
        carry, bias = rng.choice([0.0, 0.5, 0.9]), rng.choice([-1.0, 0.0, 0.5])
        return adapter(self.adapters, carry=carry, widths=widths, bias=bias)

    def copy_a_piece(self) -> None:
        for slot, (pieces, waiting) in list(self.copying.items()):
            if next(pieces, "done") == "done":
                self.naive.slots[slot] = waiting
                del self.copying[slot]

    def detach(self) -> None:
        slot = self.rng.randrange(SLOTS)
        if slot not in self.copying:
            self.fast.detach(slot)
            self.naive.slots.pop(slot, None)

    def turn(self) -> None:
        if self.naive.slots:
            slot = self.rng.choice(sorted(self.naive.slots))
            self.naive.slots[slot].threshold = self.rng.choice([0.0, 0.3, 0.8])
            self.fast.set_threshold(slot, self.naive.slots[slot].threshold)

    def forget(self) -> None:
        row = self.rng.randrange(ROWS)
        self.fast.forget_row(row)
        self.naive.forget_row(row)

    def recall(self) -> None:
        row, page = self.rng.randrange(ROWS), self.rng.randrange(PAGES)
        self.fast.recall_row(row, page)
        self.naive.recall_row(row, page)

    def step(self) -> None:
        rng = self.rng
        selectable = list(range(SLOTS)) if self.reckless else list(self.naive.slots)
        pieces = [
            (row, rng.choice([1, 1, 1, 2, 9]), rng.sample(selectable, rng.randint(0, len(selectable))))
            for row in rng.sample(range(ROWS), rng.randint(1, ROWS))
        ]
        labels = [rng.randrange(LABELS) for _ in pieces]
        T = sum(n for _, n, _ in pieces)
        x_LTd, y_LTd = torch.randn(2, LAYERS, T, D, generator=self.g)
        ends = list(zip(rng.sample(range(T), min(T, PAGES)), range(PAGES), strict=False))
        ends = rng.sample(ends, rng.randint(0, len(ends)))
        got, open_TS = observed_step(self.fast, pieces, x_LTd, y_LTd, labels, ends)
        want, want_open_TS = self.naive.step(pieces, x_LTd, y_LTd, labels)
        last_of = [(row, k) for row, n, _ in pieces for k in reversed(range(n))]
        for t, page in ends:
            self.naive.keep_page(page, *last_of[t])
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
        if self.naive.slots:
            assert torch.equal(open_TS, want_open_TS)
        self.steps += 1
        self.opened += bool((want != y_LTd.double()).any())

    def check_totals(self) -> None:
        assert_totals(self.fast, self.naive, seen=not self.reckless)


@pytest.mark.parametrize("seed", range(4))
def test_random_steps_and_changes_equal_the_naive_sum(bank, seed):
    """Attach (with steps between its pieces), detach, replace, dials, new rows, chunks of any length."""
    walk = Walk(bank(), seed)
    moves = {walk.attach: 12, walk.detach: 3, walk.turn: 3, walk.forget: 6, walk.recall: 8, lambda: None: 68}
    for _ in range(110):
        walk.rng.choices(list(moves), list(moves.values()))[0]()
        walk.copy_a_piece()
        walk.step()
        if walk.rng.random() < 0.1:
            walk.check_totals()
    walk.check_totals()
    assert walk.opened > walk.steps / 3, "too few gates opened to show a mistake"
    assert walk.naive.smallest_margin > 2e-7, "a gate stood on its threshold: the counts are a matter of luck"
