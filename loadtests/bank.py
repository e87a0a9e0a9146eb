"""What attached adapters cost a step: step times of the engine's runner with and without them, in one process.

    python loadtests/bank.py --rounds 7

Random adapters of 5% capacity, nothing in common with real ones but their size. *Shut* ones are in every
request's selection and never fire, as the gates on English; of the *fired* ones each request selects one, which
fires on every token in every layer, as the gates on mixed traffic of four languages. A round takes all contenders,
each with all workloads, so that what slows the machine down slows all of them down. A ratio is time with adapters
to time with none, the median of the rounds. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from provenance import provenance

from nr_serve.assemble import load_tokenizer, model_folder
from nr_serve.config import ServeConfig
from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.request import AnswerText, Request
from nr_serve.engine.runner import Runner
from nr_serve.engine.scheduler import Piece
from nr_serve.evaluate.tables import markdown
from nr_serve.neutral.format import Adapter, AdapterInfo, Block
from nr_serve.neutral.registry import Version
from nr_serve.tokenizer import Detokenizer, Tokenizer

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
        return f"{self.attached} {'fired' if self.fired else 'shut'}" if self.attached else "none"


@dataclass(frozen=True)
class Workload:
    """A step of so many pieces of one length, after a context of so many tokens each."""

    pieces: int
    count: int
    context: int = 0

    @property
    def name(self) -> str:
        """As the tables call it."""
        return f"{'decode' if self.count == 1 else 'prefill'} {self.pieces} x {self.count}"


CONTENDERS = (Contender(0), Contender(8), Contender(64), Contender(4, fired=True))
WORKLOADS = (Workload(1, 1, 64), Workload(8, 1, 64), Workload(32, 1, 64), Workload(1, 512), Workload(4, 128))


class Bench:
    """A runner of the default base, with slots for the adapters of any contender."""

    def __init__(self, threads: int | None) -> None:
        rows = max(each.pieces for each in WORKLOADS)
        model = model_folder("default")
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

    def step_times(self, contender: Contender, workload: Workload, steps: int) -> list[float]:
        """Seconds of each of so many steps, all alike; one before them does not count."""
        requests = [self._request(contender, workload, row) for row in range(workload.pieces)]
        labels = [0] * len(requests)
        if workload.context:
            self.runner.run([Piece(r, 0, workload.context) for r in requests], labels)
        pieces = [Piece(r, workload.context, workload.count) for r in requests]
        seconds = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            self.runner.run(pieces, labels)
            seconds.append(time.perf_counter() - started)
        return seconds[1:]

    def _request(self, contender: Contender, workload: Workload, row: int) -> Request:
        length = workload.context + workload.count
        vocabulary = self.runner.info.vocab_size
        ids = torch.randint(0, vocabulary, (length,), generator=self.generator).tolist()
        submit = Submit(str(row), tuple(ids), Sampling(temperature=0))
        text = AnswerText(Detokenizer(self.tokenizer, ()), ())
        request = Request(submit=submit, eos_ids=frozenset(), seed=0, text=text, arrival=row)
        size = self.runner.page_size
        pages = -(-length // size)
        request.row, request.pages = row, list(range(row * pages, (row + 1) * pages))
        slots = [row % contender.attached] if contender.fired else range(contender.attached)
        request.selection = tuple(Version(str(slot), "", None, 0.0, slot=slot) for slot in slots)
        return request

    def _adapter(self, bias: float) -> Adapter:
        """Gates that look at nothing but their bias."""
        bank, g = self.runner.bank, self.generator

        def block() -> Block:
            w_in, w_gate = torch.randn(2, WIDTH, bank.d, generator=g) / bank.d**0.5
            w_out = 0.1 * torch.randn(bank.d, WIDTH, generator=g) / WIDTH**0.5
            return Block(torch.zeros(bank.d), torch.tensor(bias), w_in, w_gate, w_out)

        info = AdapterInfo("", "", bank.layers, bank.d, carry=CARRY)
        return Adapter(info, tuple(block() for _ in range(bank.layers)), version="", nbytes=0)


Times = dict[tuple[Workload, Contender], list[float]]
"""Median seconds a step of each round."""


def measure(bench: Bench, rounds: int, steps: int) -> Times:
    """All contenders in all workloads, in an order that turns from round to round."""
    times: Times = {(w, c): [] for w in WORKLOADS for c in CONTENDERS}
    for number in range(rounds):
        turn = number % len(CONTENDERS)
        for contender in CONTENDERS[turn:] + CONTENDERS[:turn]:
            bench.attach(contender)
            for workload in WORKLOADS:
                # A prompt's step is long enough to be measured by fewer.
                own = steps if workload.count == 1 else -(-steps // 4)
                times[workload, contender].append(statistics.median(bench.step_times(contender, workload, own)))
        print(f"bank: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return times


def ratios(times: Times, workload: Workload, contender: Contender) -> list[float]:
    """Time with the contender's adapters to time with none, by round."""
    return [a / b for a, b in zip(times[workload, contender], times[workload, CONTENDERS[0]], strict=True)]


def table(times: Times) -> list[list[str]]:
    """A row a workload: milliseconds with none, then ratios, median (least-most)."""
    header = ["STEP", "NONE, MS", *(c.name.upper() for c in CONTENDERS[1:])]
    return [header, *(_row(times, workload) for workload in WORKLOADS)]


def _row(times: Times, workload: Workload) -> list[str]:
    none = f"{1000 * statistics.median(times[workload, CONTENDERS[0]]):.1f}"
    found = [ratios(times, workload, contender) for contender in CONTENDERS[1:]]
    return [workload.name, none, *(f"{statistics.median(r):.3f} ({min(r):.3f}-{max(r):.3f})" for r in found)]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a contender in a round")
    parser.add_argument("--threads", type=int, help="as --threads of nr-serve serve")
    args = parser.parse_args(argv)
    times = measure(Bench(args.threads), args.rounds, args.steps)
    print("\n".join(markdown(table(times))))
    result = {
        "seconds": {w.name: {c.name: times[w, c] for c in CONTENDERS} for w in WORKLOADS},
        "ratios": {
            w.name: {c.name: statistics.median(ratios(times, w, c)) for c in CONTENDERS[1:]} for w in WORKLOADS
        },
        "width": WIDTH,
        "carry": CARRY,
    }
    print(json.dumps(result | provenance(__file__, argv)))


if __name__ == "__main__":
    main()
