"""What attached adapters cost a step: step times of the engine's runner with and without them, in one process.

    python loadtests/bank.py --pairs 40

Random adapters of 5% capacity, nothing in common with real ones but their size. *Shut* ones are in every
request's selection and never fire, as the gates on English; of the *fired* ones each request selects one, which
fires on every token in every layer, as the gates on mixed traffic of four languages. Single steps with and without
them take turns, so that what slows the machine down slows both. A ratio is a step's time with adapters to that of
its neighbour with none. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from provenance import provenance
from random_blocks import random_blocks

from nr_serve.assemble import load_tokenizer
from nr_serve.config import ServeConfig
from nr_serve.default_model import model_folder
from nr_serve.engine.adapters.registry import Version
from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.model.runner import Runner
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Piece
from nr_serve.evaluate.tables import markdown
from nr_serve.logs import say
from nr_serve.neutral.format import Adapter, AdapterInfo
from nr_serve.tokenizer import Tokenizer

WIDTH = 128
"""Of a block: 5% of the default base's parameters."""

CARRY = 0.5


@dataclass(frozen=True)
class Contender:
    """So many adapters attached, in the first slots."""

    attached: int
    fired: bool = False

    @property
    def name(self) -> str:
        """As the tables call it."""
        return f"{self.attached} {'fired' if self.fired else 'shut'}"


@dataclass(frozen=True)
class Workload:
    """A step of `pieces` pieces of one length, each after a context of the same length."""

    pieces: int
    count: int
    context: int = 0

    @property
    def name(self) -> str:
        """As the tables call it."""
        return f"{'decode' if self.count == 1 else 'prefill'} {self.pieces} x {self.count}"


NONE = Contender(0)
CONTENDERS = (Contender(8), Contender(64), Contender(4, fired=True))
Pair = tuple[float, float]
"""Seconds of a step with no adapter, and of its neighbour with a contender's."""

WORKLOADS = (Workload(1, 1, 64), Workload(8, 1, 64), Workload(32, 1, 64), Workload(1, 512), Workload(4, 128))


class Bench:
    """A runner of a base, with slots for the adapters of any contender."""

    def __init__(self, base: str, threads: int | None) -> None:
        rows = max(each.pieces for each in WORKLOADS)
        model = model_folder(base)
        self.tokenizer: Tokenizer = load_tokenizer(model)
        slots = max(each.attached for each in CONTENDERS)
        config = ServeConfig(slots=slots, slot_width=WIDTH, max_running=rows, pages=2048, threads=threads)
        self.runner = Runner.load(model, self.tokenizer, config, "base")
        self.generator = torch.Generator().manual_seed(0)

    def attach(self, contender: Contender) -> None:
        """Have the contender's adapters in the first slots and no others."""
        bank = self.runner.bank
        for slot in sorted(bank.attached):
            bank.detach(slot)
        adapter = self._adapter(bias=0.1 if contender.fired else -100.0)
        for slot in range(contender.attached):
            for _ in bank.attach(slot, adapter, 0.0):
                pass

    def pairs(self, contender: Contender, workload: Workload, count: int) -> list[Pair]:
        """Seconds of `count` pairs of steps, all alike; one pair before them does not count."""
        pieces = {c: self._pieces(c, workload) for c in (NONE, contender)}
        measured = []
        for number in range(count + 1):
            order = (NONE, contender) if number % 2 else (contender, NONE)
            seconds = {c: self._step(c, pieces[c]) for c in order}
            measured.append((seconds[NONE], seconds[contender]))
        return measured[1:]

    def _step(self, contender: Contender, pieces: list[Piece]) -> float:
        with contextlib.nullcontext() if contender.attached else self._none_attached():
            started = time.perf_counter()
            self.runner.run(pieces, [0] * len(pieces))
            return time.perf_counter() - started

    @contextlib.contextmanager
    def _none_attached(self) -> Iterator[None]:
        """The bank does nothing meanwhile, without its weights being copied again afterwards."""
        bank = self.runner.bank
        attached, bank.attached = bank.attached, set()
        try:
            yield
        finally:
            bank.attached = attached

    def _pieces(self, contender: Contender, workload: Workload) -> list[Piece]:
        """A step's pieces; what comes before them is computed."""
        requests = [self._request(contender, workload, row) for row in range(workload.pieces)]
        if workload.context:
            self._step(contender, [Piece(r, 0, workload.context) for r in requests])
        return [Piece(r, workload.context, workload.count) for r in requests]

    def _request(self, contender: Contender, workload: Workload, row: int) -> Request:
        length = workload.context + workload.count
        vocabulary = self.runner.info.vocab_size
        ids = torch.randint(0, vocabulary, (length,), generator=self.generator).tolist()
        submit = Submit(str(row), tuple(ids), Sampling(temperature=0))
        pages = -(-length // self.runner.page_size)
        request = Request.outside(submit, row=row, pages=range(row * pages, (row + 1) * pages))
        slots = [row % contender.attached] if contender.fired else range(contender.attached)
        request.selection = tuple(Version(str(slot), "", None, 0.0, slot=slot) for slot in slots)
        return request

    def _adapter(self, bias: float) -> Adapter:
        """Gates that look at nothing but their bias."""
        bank = self.runner.bank
        info = AdapterInfo("", "", bank.layers, bank.d, carry=CARRY)
        blocks = random_blocks(bank.layers, bank.d, WIDTH, bias, self.generator)
        return Adapter(info, blocks, version="", nbytes=0)


Times = dict[tuple[Workload, Contender], list[Pair]]


def measure(bench: Bench, pairs: int) -> Times:
    """All contenders in all workloads."""
    times: Times = {}
    for contender in CONTENDERS:
        bench.attach(contender)
        for workload in WORKLOADS:
            # A prompt's step is long enough to be measured by fewer. Quartiles need two.
            count = max(2, pairs if workload.count == 1 else pairs // 4)
            times[workload, contender] = bench.pairs(contender, workload, count)
            say("bank", f"{contender.name}, {workload.name}")
    return times


def ratios(pairs: list[Pair]) -> list[float]:
    """Lower quartile, median and upper quartile of the time with adapters to the time with none."""
    return statistics.quantiles([own / none for none, own in pairs], n=4, method="inclusive")


def table(times: Times) -> list[list[str]]:
    """A row a workload: milliseconds with none, then ratios, median (lower-upper quartile)."""
    header = ["STEP", "NONE, MS", *(c.name.upper() for c in CONTENDERS)]
    return [header, *(_row(times, workload) for workload in WORKLOADS)]


def _row(times: Times, workload: Workload) -> list[str]:
    none = statistics.median(none for c in CONTENDERS for none, _ in times[workload, c])
    found = [ratios(times[workload, contender]) for contender in CONTENDERS]
    return [
        workload.name,
        f"{1000 * none:.1f}",
        *(f"{median:.3f} ({low:.3f}-{up:.3f})" for low, median, up in found),
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--pairs", type=int, default=40, help="of decode steps with and without a contender")
    parser.add_argument("--threads", type=int, help="as --threads of nr-serve serve")
    args = parser.parse_args(argv)
    times = measure(Bench(args.model, args.threads), args.pairs)
    print("\n".join(markdown(table(times))))
    result = {
        "seconds": {w.name: {c.name: times[w, c] for c in CONTENDERS} for w in WORKLOADS},
        "ratios": {w.name: {c.name: ratios(times[w, c]) for c in CONTENDERS} for w in WORKLOADS},
        "width": WIDTH,
        "carry": CARRY,
    }
    print(json.dumps(result | provenance(__file__, argv)))


if __name__ == "__main__":
    main()
