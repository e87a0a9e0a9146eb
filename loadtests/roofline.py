"""What a step must read and compute, and how long that takes at the machine's measured ceilings.

    python loadtests/roofline.py --batch 1 8 32 --context 128 --adapters 8 --fired 1
    python loadtests/roofline.py --batch 8 --context 128 --measured 62
    python loadtests/roofline.py --prefill 1024 --ceilings 20 400

Bytes are the least there can be: each weight once a step, each key and value once, read or written; activations are
left out. A multiply-add is two operations. A part of a step takes the longer of its two times, the parts run one
after another. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch.utils.benchmark import Timer
from transformers import AutoConfig

from nr_serve.default_model import model_folder
from nr_serve.evaluate.tables import markdown


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    layers: int
    d: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a configuration of transformers."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            d=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
        )


@dataclass(frozen=True)
class Step:
    """One forward pass: `sequences` pieces of `tokens` tokens each, behind `context` tokens, a logit row each."""

    sequences: int
    tokens: int
    context: int
    attached: int = 0
    fired: int = 0
    """Adapters whose blocks run, each on an equal share of the tokens."""
    width: int = 128
    """Of their blocks: h."""


@dataclass(frozen=True)
class Cost:
    """What a part of a step moves and computes."""

    part: str
    bytes: int
    operations: int

    def seconds(self, ceilings: Ceilings) -> float:
        """Time at the ceilings."""
        return max(self.bytes / ceilings.bytes_a_second, self.operations / ceilings.operations_a_second)


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do."""

    bytes_a_second: float
    operations_a_second: float


def costs(shape: Shape, step: Step, itemsize: int) -> list[Cost]:
    """The parts of a step, numbers of `itemsize` bytes."""
    rows = step.sequences * step.tokens
    q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    projections = shape.layers * shape.d * (2 * q + 2 * kv)
    ffn = shape.layers * 3 * shape.d * shape.ffn
    head = shape.vocab * shape.d
    # A token sees all before it and itself: on average (tokens + 1) / 2 of its own piece.
    seen = step.sequences * (step.tokens * step.context + step.tokens * (step.tokens + 1) // 2)
    cached = step.sequences * (step.context + step.tokens) * 2 * kv * shape.layers
    gates = step.attached * shape.layers * shape.d
    blocks = shape.layers * 3 * shape.d * step.width
    return [
        Cost("projections", projections * itemsize, 2 * projections * rows),
        Cost("attention", cached * itemsize, 4 * q * seen * shape.layers),
        Cost("ffn", ffn * itemsize, 2 * ffn * rows),
        Cost("head", head * itemsize, 2 * head * step.sequences),
        Cost("gates", gates * itemsize, 2 * gates * rows),
        Cost("blocks", step.fired * blocks * itemsize, 2 * blocks * rows if step.fired else 0),
    ]


def measure_ceilings(dtype: torch.dtype, device: str) -> tuple[Ceilings, dict[int, float]]:
    """The machine's ceilings, and operations a second of skinny products by their rows, none of it from a cache."""
    stream = torch.ones(2**28 // dtype.itemsize, dtype=dtype, device=device)  # 256 MiB: larger than caches
    target = torch.empty_like(stream)
    copied = 2 * stream.nbytes / _seconds("target.copy_(stream)", stream=stream, target=target)
    read = stream.nbytes / _seconds("stream.amax()", stream=stream)
    n = 2048
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    large = 2 * n**3 / _seconds("a @ b", a=a, b=b)
    weights = stream.view(-1, n, n)
    skinny = {}
    for rows in (1, 8, 32, 128):
        x = torch.randn(rows, n, dtype=dtype, device=device)
        seconds = _seconds("for w in weights: x @ w.T", x=x, weights=weights)
        skinny[rows] = 2 * rows * weights.numel() / seconds
        # A product with one row reads every weight once: often the best stream there is.
        read = max(read, weights.nbytes / seconds)
    return Ceilings(max(copied, read), max(large, *skinny.values())), skinny


def _seconds(statement: str, **names: Any) -> float:
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1).median


def main(argv: list[str] | None = None) -> None:
    """Count, measure the ceilings, print."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    folder = args.model if Path(args.model).exists() else model_folder(args.model)
    shape = Shape.of(AutoConfig.from_pretrained(folder).get_text_config())
    dtype = getattr(torch, args.dtype)
    skinny: dict[int, float] = {}
    if args.ceilings is not None:
        ceilings = Ceilings(args.ceilings[0] * 1e9, args.ceilings[1] * 1e9)
    else:
        ceilings, skinny = measure_ceilings(dtype, args.device)
    print(f"ceilings: {ceilings.bytes_a_second / 1e9:.1f} GB/s, {ceilings.operations_a_second / 1e9:.0f} GFLOP/s")
    for rows, rate in skinny.items():
        print(f"products of {rows} rows: {rate / 1e9:.0f} GFLOP/s, {dtype.itemsize * rate / 2e9 / rows:.1f} GB/s")
    adapters = {"attached": args.adapters, "fired": args.fired, "width": args.width}
    steps = [Step(batch, 1, args.context, **adapters) for batch in args.batch]
    steps += [Step(1, tokens, 0, **adapters) for tokens in args.prefill]
    found = [_report(shape, step, dtype.itemsize, ceilings, args.measured) for step in steps]
    print("\n".join(_table(found)))
    document = {"shape": asdict(shape), "dtype": args.dtype, "ceilings": asdict(ceilings), "skinny": skinny}
    print(json.dumps({**provenance(__file__, argv), **document, "steps": found}))


def _report(shape: Shape, step: Step, itemsize: int, ceilings: Ceilings, measured: float | None) -> dict[str, Any]:
    parts = costs(shape, step, itemsize)
    predicted = 1e3 * sum(part.seconds(ceilings) for part in parts)
    row: dict[str, Any] = {"step": asdict(step), "milliseconds": predicted, "parts": [asdict(p) for p in parts]}
    row |= {key: sum(getattr(p, key) for p in parts) for key in ("bytes", "operations")}
    return row if measured is None else row | {"measured": measured, "share": predicted / measured}


def _table(found: Sequence[dict[str, Any]]) -> list[str]:
    head = ["SEQUENCES", "TOKENS", "CONTEXT", "MB", "GFLOP", "MS AT THE CEILINGS", "SHARE REACHED"]
    rows = [
        [
            *(str(row["step"][key]) for key in ("sequences", "tokens", "context")),
            *(f"{row['bytes'] / 1e6:.1f}", f"{row['operations'] / 1e9:.2f}", f"{row['milliseconds']:.2f}"),
            f"{row['share']:.0%}" if "share" in row else "-",
        ]
        for row in found
    ]
    return markdown([head, *rows])


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="a folder, or a config.json, with the shape")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="*", default=[], help="decode steps of N sequences")
    parser.add_argument("--context", type=int, default=128, help="tokens before each in a decode step")
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="prefill steps of N tokens")
    parser.add_argument("--adapters", type=int, default=0, help="adapters attached")
    parser.add_argument("--fired", type=int, default=0, help="adapters whose blocks run")
    parser.add_argument("--width", type=int, default=128, help="of the adapters' blocks")
    parser.add_argument("--ceilings", type=float, nargs=2, help="GB/s and GFLOP/s (default: measured here)")
    parser.add_argument("--measured", type=float, help="milliseconds that the step took")
    args = parser.parse_args(argv)
    if not args.batch and not args.prefill:
        parser.error("give --batch or --prefill")
    if args.fired > args.adapters:
        parser.error("--fired cannot exceed --adapters")
    if args.measured is not None and len(args.batch) + len(args.prefill) > 1:
        parser.error("--measured is of one step")
    return args


if __name__ == "__main__":
    main()
