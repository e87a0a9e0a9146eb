"""Step times of the engine in this process, without HTTP: prefill of a prompt, and decode by batch.

    python loadtests/steps.py --dtype bfloat16 --batch 1 8 32 --context 128 --prefill 1024

A step's time is from one hand-over of the engine to the next, so it holds all that the engine does between two
tokens. Prompts are random tokens, made anew each time. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from provenance import provenance

from nr_serve.assemble import load_tokenizer
from nr_serve.config import ServeConfig
from nr_serve.default_model import model_folder
from nr_serve.engine.loop import EngineLoop
from nr_serve.engine.messages import Sampling, StepEvents, StepReport, Submit
from nr_serve.evaluate.tables import markdown

Delivered = tuple[float, StepEvents]


class Engine:
    """The engine, and when it handed over what."""

    def __init__(self, config: ServeConfig, seed: int) -> None:
        """Return once it is ready. Raises SystemExit with the reason if it cannot be."""
        model = model_folder(config.model)
        self.delivered: queue.SimpleQueue[Delivered] = queue.SimpleQueue()
        self._rng, self._names = random.Random(seed), 0
        self.loop = EngineLoop(
            config,
            model,
            load_tokenizer(model),
            lambda events: self.delivered.put((time.perf_counter(), events)),
        )
        self.loop.start()
        while self.loop.status == "loading":
            time.sleep(0.05)
        if self.loop.info is None or self.loop.status != "ready":
            raise SystemExit(self.loop.failure)
        self.vocab_size = self.loop.info.vocab_size

    def steps(self, requests: int, prompt: int, tokens: int) -> list[tuple[float, StepReport]]:
        """Seconds and report of each step, until all of that many requests have ended."""
        for _ in range(requests):
            self._names += 1
            ids = tuple(self._rng.randrange(self.vocab_size) for _ in range(prompt))
            sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            self.loop.submit(Submit(f"r{self._names}", ids, sampling))
        left, before, seen = requests, time.perf_counter(), []
        while left:
            at, events = self.delivered.get()
            for output in events.outputs:
                if output.error is not None:
                    raise SystemExit(str(output.error))
                left -= output.finish_reason is not None
            if events.report is not None:
                seen.append((at - before, events.report))
            before = at
        return seen


def main(argv: list[str] | None = None) -> None:
    """Measure, print."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    settings = {"model": args.model, "dtype": args.dtype, "adapter": args.adapter}
    engine = Engine(ServeConfig(**settings), args.seed)
    try:
        engine.steps(1, 8, 4)  # warm-up
        rows = [measure_decode(engine, batch, args.context, args.steps) for batch in args.batch]
        rows += [measure_prefill(engine, tokens, args.repeats) for tokens in args.prefill]
    finally:
        engine.loop.stop()
    table = [
        [row["kind"], str(row["batch"]), str(row["tokens"]), f"{1e3 * row['seconds']:.1f}", f"{row['rate']:.1f}"]
        for row in rows
    ]
    print("\n".join(markdown([["KIND", "BATCH", "TOKENS", "MS", "TOKENS/S"], *table])))
    print(json.dumps({**provenance(__file__, argv), "dtype": args.dtype, "adapters": args.adapter, "rows": rows}))


def measure_decode(engine: Engine, batch: int, context: int, steps: int) -> dict[str, Any]:
    """The median step in which all of a batch decode, behind `context` tokens and those written meanwhile."""
    # While prompts are read those read first decode already; these steps do not count.
    reading = -(-batch * context // 128) + 2
    seen = engine.steps(batch, context, steps + reading)
    whole = [s for s, report in seen if report.decode_tokens == batch and report.prefill_tokens == 0]
    seconds = statistics.median(whole)
    return {"kind": "decode", "batch": batch, "tokens": context, "seconds": seconds, "rate": batch / seconds}


def measure_prefill(engine: Engine, tokens: int, repeats: int) -> dict[str, Any]:
    """The median time to read one prompt, all its pieces, and write a token."""
    runs = [sum(s for s, _ in engine.steps(1, tokens, 1)) for _ in range(repeats)]
    seconds = statistics.median(runs)
    return {"kind": "prefill", "batch": 1, "tokens": tokens, "seconds": seconds, "rate": tokens / seconds}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--adapter", action="append", default=[], help="FILE or NAME=FILE; may be repeated")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128, help="tokens before each in a decode step")
    parser.add_argument("--steps", type=int, default=24, help="decode steps, at least")
    parser.add_argument("--prefill", type=int, nargs="*", default=[1024])
    parser.add_argument("--repeats", type=int, default=3, help="of a prefill")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
