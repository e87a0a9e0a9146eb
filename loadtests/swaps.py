"""What loads cost those who read: streams' gaps between tokens with a load at a time, and how long a load takes.

    python loadtests/swaps.py --streams 8 --tokens 400 --rounds 3

The engine in this process, without HTTP. In each round `--streams` streams are read to their end twice, once in
peace and once while an adapter is loaded every `--every` seconds, each in the place of the one before. The
adapters are random, `--width` wide (by default 5% of the base's parameters), and never fire. *New* ones are
measured on the probe texts once published, beside the streams; of *known* ones, loaded before, the measurement
is kept. `idle` is a load while nothing runs. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from load import percentile
from provenance import provenance
from random_blocks import random_blocks
from steps import Engine

from nr_serve.config import ServeConfig
from nr_serve.engine.messages import AdapterView, EngineInfo, LoadAdapter, ReadStatistics, Sampling, Submit
from nr_serve.evaluate.tables import markdown
from nr_serve.logs import say
from nr_serve.neutral.format import AdapterInfo, write_adapter

KINDS = ("new", "known")


@dataclass(frozen=True)
class Reading:
    """Seconds between the tokens of all streams, and of each load from request to published."""

    gaps: list[float]
    loads: list[float]


class Swaps:
    """An engine, and files of adapters for it."""

    def __init__(self, engine: Engine, folder: Path, width: int) -> None:
        assert engine.loop.info is not None
        self.engine, self.folder, self.width = engine, folder, width
        self.info: EngineInfo = engine.loop.info
        self.written = 0

    def file(self) -> Path:
        """A new adapter's file.

        Made on a thread that ends: while another one lives that torch computed on, steps take twice as long.
        """
        with ThreadPoolExecutor(1) as once:
            return once.submit(self._write).result()

    def _write(self) -> Path:
        self.written += 1
        generator = torch.Generator().manual_seed(self.written)
        d, layers = self.info.d, self.info.layers
        path = self.folder / f"{self.written}.safetensors"
        info = AdapterInfo(self.info.model, self.info.fingerprint, layers, d, carry=0.5)
        write_adapter(path, info, random_blocks(layers, d, self.width, -100.0, generator, torch.bfloat16))
        return path

    def load(self, path: Path) -> float:
        """Seconds from the request to published, while nothing runs."""
        started = time.perf_counter()
        view: AdapterView = self.engine.loop.call(LoadAdapter("swapped", path, replace=True)).result()
        seconds = time.perf_counter() - started
        assert view.state == "attached"
        self.settle()
        return seconds

    def settle(self) -> None:
        """Wait until nothing is measured any more."""
        while any(view.measuring for view in self.engine.loop.call(ReadStatistics()).result().adapters.values()):
            time.sleep(0.05)

    def read(self, streams: int, tokens: int, files: list[Path], every: float) -> Reading:
        """Read `streams` streams to their end; load the files meanwhile, one every `every` seconds."""
        for number in range(streams):
            sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            prompt = tuple((number * 31 + place) % self.info.vocab_size for place in range(8))
            self.engine.loop.submit(Submit(f"s{number}", prompt, sampling))
        waiting, last, gaps = list(files), dict[str, float](), list[float]()
        done: queue.SimpleQueue[float] = queue.SimpleQueue()
        futures, left, due = [], streams, time.perf_counter() + every

        def loaded(started: float) -> Any:
            return lambda _: done.put(time.perf_counter() - started)

        while left:
            at, events = self.engine.delivered.get()
            if waiting and at >= due:
                future = self.engine.loop.call(LoadAdapter("swapped", waiting.pop(), replace=True))
                future.add_done_callback(loaded(time.perf_counter()))
                futures.append(future)
                due += every
            for output in events.outputs:
                if output.error is not None:
                    raise SystemExit(str(output.error))
                if output.request_id in last:
                    gaps.append(at - last[output.request_id])
                last[output.request_id] = at
                left -= output.finish_reason is not None
        for future in futures:
            future.result()
        self.settle()
        return Reading(gaps, [done.get() for _ in futures])


def measure(swaps: Swaps, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a round and kind of load."""
    rows = []
    known = [swaps.file(), swaps.file()]
    for path in known:
        swaps.load(path)
    swaps.read(args.streams, 8, [], args.every)  # warm-up
    for number in range(args.rounds):
        for kind in KINDS:
            files = [swaps.file() if kind == "new" else known[i % 2] for i in range(args.loads)]
            idle = swaps.load(swaps.file() if kind == "new" else known[0])
            order = (False, True) if number % 2 else (True, False)
            read = {on: swaps.read(args.streams, args.tokens, files if on else [], args.every) for on in order}
            row = {"round": number, "kind": kind, "idle": idle, "loads": read[True].loads}
            for on, name in ((False, "without"), (True, "with")):
                row[name] = {f"p{p}": percentile(read[on].gaps, p) for p in (50, 99)}
            row["ratios"] = {p: row["with"][p] / row["without"][p] for p in ("p50", "p99")}
            rows.append(row)
            say("swaps", f"round {number}, {kind}")
    return rows


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Medians over the rounds, by kind of load; milliseconds."""

    def median(kind: str, *path: str) -> float:
        return statistics.median(float(_at(row, path)) for row in rows if row["kind"] == kind)

    head = ["ADAPTERS", "IDLE LOAD", "LOAD", "P50 WITHOUT", "P99 WITHOUT", "P99 WITH", "P50 RATIO", "P99 RATIO"]
    body = []
    for kind in KINDS:
        loads = [seconds for row in rows if row["kind"] == kind for seconds in row["loads"]]
        seconds = [median(kind, "idle"), statistics.median(loads) if loads else float("nan")]
        seconds += [median(kind, "without", "p50"), median(kind, "without", "p99"), median(kind, "with", "p99")]
        ratios = [median(kind, "ratios", p) for p in ("p50", "p99")]
        body.append([kind, *(f"{1e3 * s:.1f}" for s in seconds), *(f"{r:.2f}" for r in ratios)])
    return [head, *body]


def _at(row: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        row = row[name]
    return row


def main(argv: list[str] | None = None) -> None:
    """Measure, print."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=int, help="as --threads of nr-serve serve")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--loads", type=int, default=8, help="at most, while the streams are read")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two loads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128, help="of the adapters' blocks")
    args = parser.parse_args(argv)
    config = {"model": args.model, "dtype": args.dtype, "threads": args.threads, "slots": 4}
    engine = Engine(ServeConfig(**config), 0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(Swaps(engine, Path(folder), args.width), args)
    finally:
        engine.loop.stop()
    print("\n".join(markdown(table(rows))))
    print(json.dumps({**provenance(__file__, argv), "dtype": args.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
