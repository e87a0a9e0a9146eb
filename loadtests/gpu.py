"""Decode, prefill and training on one GPU, beside what its memory and its matrix units can do.

    python loadtests/gpu.py
    TRITON_INTERPRET=1 python loadtests/gpu.py --tiny --device cpu    # that the script works; no graphs

Bases are random weights of Llama-3.1-8B's and SmolLM2-135M's shape, in bfloat16; adapters are random too, of 5% of
the base, their gates shut or open by their bias. Times are medians. Ceilings are measured first: a copy's bytes,
read and written, a second, and a square product's operations a second. After each part the document of all that was
found is printed again, in one line of JSON: the last line is the whole.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from gpu_engine import PAGE, SHAPES, Engine, random_model
from provenance import provenance

from nr_serve.engine.adapters.adapters import COPY_SECONDS
from nr_serve.logs import say
from nr_serve.neutral import block_width
from nr_serve.train.attach import Attached
from nr_serve.train.blocks import AdapterModule, is_gate
from nr_serve.train.methods import inject_lora, rank_for

_say = partial(say, "gpu")
TRAINED_CAPACITY = 0.2


def timed(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of a call, after two that do not count."""
    return statistics.median([_seconds(run, device) for _ in range(rounds + 2)][2:])


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ceilings(args: argparse.Namespace) -> dict[str, float]:
    """Bytes and operations a second."""
    numbers, side = (2**20, 256) if args.tiny else (2**31, 8192)
    source = torch.zeros(numbers, dtype=torch.bfloat16, device=args.device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), args.device, args.rounds)
    a = torch.randn(side, side, device=args.device).to(torch.bfloat16)
    product = timed(lambda: a @ a, args.device, args.rounds)
    return {"bytes_a_second": 2 * source.nbytes / copy, "operations_a_second": 2 * side**3 / product}


def decode(engine: Engine, args: argparse.Namespace, ceiling: dict[str, float], batch: int) -> dict[str, Any]:
    """One batch: no adapter, 8 shut, 4 open, interleaved over the rounds by whole medians, twice."""
    context = args.context
    seconds: dict[str, list[float]] = {"none": [], "shut": [], "open": []}
    for _ in range(1 if args.tiny else 2):
        for name, slots in (("none", 0), ("shut", 8), ("open", 4)):
            engine.detach_all()
            for slot in range(slots):
                engine.attach(slot, fires=name == "open", seed=slot)
            pieces = engine.pieces(batch, context - 1, 1)
            seconds[name].append(timed(lambda pieces=pieces: engine.decode(pieces), args.device, args.rounds))  # type: ignore[misc]
    engine.detach_all()
    none, shut, opened = (statistics.median(seconds[name]) for name in ("none", "shut", "open"))
    needed = engine.weight_bytes + batch * context * engine.kv_bytes_a_token
    extra = 4 * engine.adapter_bytes / ceiling["bytes_a_second"]
    return {
        "batch": batch, "context": context, "seconds": {"none": none, "shut": shut, "open": opened},
        "share_of_bandwidth": needed / none / ceiling["bytes_a_second"],
        "shut_to_none": shut / none,
        "open_to_ceilings_extra": (opened - none) / extra,
        "open_to_predicted_step": opened / (none + extra),
    }  # fmt: skip


def prefill(engine: Engine, args: argparse.Namespace, ceiling: dict[str, float]) -> dict[str, Any]:
    """A prompt in one piece, no adapter and 4 open."""
    config, length = engine.model.config, args.prompt
    head = engine.model.get_output_embeddings().weight.numel()
    own_embedding = 0 if config.tie_word_embeddings else head
    products = 2 * (engine.parameters - head - own_embedding) * length
    attention = 2 * config.num_hidden_layers * config.hidden_size * length**2  # causal: half of 4 L d T^2
    found = {}
    for name, slots in (("none", 0), ("open", 4)):
        engine.detach_all()
        for slot in range(slots):
            engine.attach(slot, fires=True, seed=slot)
        pieces = engine.pieces(1, 0, length)
        found[name] = timed(lambda pieces=pieces: engine.prefill(pieces), args.device, args.rounds)  # type: ignore[misc]
    engine.detach_all()
    blocks = 4 * 2 * 3 * engine.width * engine.bank.d * engine.bank.layers * length
    rate = ceiling["operations_a_second"]
    return {
        "tokens": length, "seconds": found,
        "share_of_products": (products + attention) / found["none"] / rate,
        "share_of_products_open": (products + attention + blocks) / found["open"] / rate,
    }  # fmt: skip


def swaps(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """100 adapters through one slot: graphs captured before and after, and whether each swap changed the answer."""
    engine.detach_all()
    engine.attach(0, fires=True, seed=0)
    pieces = engine.pieces(1, args.context - 1, 1)

    def answer() -> torch.Tensor:
        engine.decode(pieces)  # no gate opens on the first token that an adapter sees
        return engine.decode(pieces).clone()

    before = answer()
    captured, last, changed = engine.graphs.captured, before, 0
    count = 4 if args.tiny else 100
    for seed in range(1, count + 1):
        engine.attach(0, fires=True, seed=seed)
        logits = answer()
        changed += not torch.equal(logits, last)
        last = logits
    engine.attach(0, fires=True, seed=0)
    back = torch.equal(answer(), before)
    new = engine.graphs.captured - captured
    return {"swaps": count, "changed": changed, "same_as_at_first": back, "new_captures": new}


def stalls(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Decode steps while adapters are copied from the host's memory, as the server does it between steps."""
    engine.detach_all()
    engine.attach(0, fires=True, seed=0)
    batch = max([size for size in args.batch if size <= 64], default=min(args.batch))
    pieces = engine.pieces(batch, args.context - 1, 1)
    alone = [_seconds(lambda: engine.decode(pieces), args.device) for _ in range(args.rounds)]

    def copy_and_decode(copying: Iterator[None]) -> bool:
        ends = time.perf_counter() + COPY_SECONDS
        whole = all(time.perf_counter() < ends for _ in copying)
        engine.decode(pieces)
        return whole

    beside = []
    for seed in range(args.rounds):
        copying, whole = engine.attaching(1, fires=True, seed=seed, memory=torch.device("cpu")), False
        while not whole:
            started = time.perf_counter()
            whole = copy_and_decode(copying)
            _wait(args.device)
            beside.append(time.perf_counter() - started)
        engine.bank.detach(1)
    engine.detach_all()
    median = statistics.median(alone)
    return {
        "batch": batch, "loads": args.rounds, "steps_a_load": len(beside) / args.rounds, "alone": median,
        "beside_to_alone": statistics.median(beside) / median, "longest_to_alone": max(beside) / median,
        "longest_alone_to_alone": max(alone) / median,
    }  # fmt: skip


def training(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of blocks, with all gates open or half, against PEFT's LoRA of as many parameters."""
    found: dict[str, Any] = {"shape": shape}
    for method in ("neutral", "half", "lora"):
        rate, parameters = _trained(shape, args, method)
        _give_back()
        found[method] = {"tokens_a_second": rate, "parameters": parameters}
    for method in ("neutral", "half"):
        found[f"{method}_to_lora"] = found[method]["tokens_a_second"] / found["lora"]["tokens_a_second"]
    return found


def _trained(shape: str, args: argparse.Namespace, method: str) -> tuple[float, int]:
    dtype = torch.float32 if args.tiny else torch.bfloat16
    model = random_model(shape, args.device, dtype).requires_grad_(False).train()
    config, windows = model.config, args.windows
    parameters = sum(p.numel() for p in model.parameters())
    layers, d = config.num_hidden_layers, config.hidden_size
    h = block_width(TRAINED_CAPACITY, parameters=parameters, d=d, layers=layers)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    offset_BT = torch.arange(args.window, device=args.device).expand(windows, -1)
    begin: Callable[[], object] = lambda: None  # noqa: E731
    if method != "lora":
        # A random gate without a carry is open on about half of the tokens.
        kind = "none" if method == "neutral" else "relu1"
        adapter = AdapterModule.fresh([h] * layers, d, carry=0.0, seed=0, kind=kind).to(args.device)
        attached = Attached(model, [adapter])
        begin = lambda: attached.begin(offset_BT)  # noqa: E731
        for name, parameter in adapter.named_parameters():
            parameter.requires_grad_(not is_gate(name))
        trained = [p for p in adapter.parameters() if p.requires_grad]
    else:
        rank = rank_for(model, 3 * h * d * layers)
        trained = inject_lora(model, rank, rank)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
    ids = torch.randint(0, config.vocab_size, (windows, args.window), device=args.device)

    def step() -> None:
        begin()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=not args.tiny):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, args.device, args.rounds)
    return ids.numel() / seconds, sum(p.numel() for p in trained)


def main(argv: list[str] | None = None) -> None:
    """Measure, print."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    if args.device.type == "cpu":
        _say("no CUDA: kernels run by Triton's interpreter, steps are not captured, no figure means anything")
    report = Report(
        {**provenance(__file__, argv if argv is not None else sys.argv[1:]), "bases": {}},
        ends=time.perf_counter() + args.seconds,
    )
    if args.device.type == "cuda":
        report.found["device"] = torch.cuda.get_device_name()
    report.measure(report.found, "ceilings", lambda: ceilings(args))
    # What the others are held against. Without it, to nothing.
    ceiling = report.found.get("ceilings") or {"bytes_a_second": math.nan, "operations_a_second": math.nan}
    for shape in args.shape:
        found: dict[str, Any] = {"decode": {}}
        report.found["bases"][shape] = found
        report.measure(found, "engine", partial(_measure_base, report, shape, args, ceiling, found))
        _give_back()
    report.measure(report.found, "training", lambda: _train_largest(args))
    if report.failed:
        raise SystemExit("failed or left out: " + ", ".join(report.failed))


class Report:
    """What was found so far: printed whole after each part, so that nothing is lost with what comes after it."""

    def __init__(self, found: dict[str, Any], *, ends: float) -> None:
        """`ends`: when no further part is begun."""
        self.found, self.failed = found, list[str]()
        self._ends = ends

    def measure(self, into: dict[str, Any], name: str, part: Callable[[], Any]) -> None:
        """Run a part; one that fails, or comes too late, takes none of the others with it."""
        started = time.perf_counter()
        if started > self._ends:
            self.failed.append(f"{name} (no time)")
            return
        try:
            found = part()
            if found is not None:
                into[name] = found
        except Exception as error:  # noqa: BLE001 - told, and the other parts are measured
            self.failed.append(name)
            into[name + "_error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            _give_back()
        _say(f"{name}: {time.perf_counter() - started:.0f} s: {into.get(name, into.get(name + '_error'))}")
        print(json.dumps(self.found | {"failed": self.failed}), flush=True)


def _measure_base(
    report: Report, shape: str, args: argparse.Namespace, ceiling: dict[str, float], found: dict[str, Any]
) -> None:
    """All that is measured of one base."""
    engine = Engine(shape, args, args.batch, max(args.context, args.prompt // max(args.batch) + PAGE))
    for batch in args.batch:
        report.measure(found["decode"], str(batch), partial(decode, engine, args, ceiling, batch))
    report.measure(found, "swaps", lambda: swaps(engine, args))
    report.measure(found, "stalls", lambda: stalls(engine, args))
    # One prompt over all pages, which lie in a row.
    engine.pages_each = engine.pages - 1
    report.measure(found, "prefill", lambda: prefill(engine, args, ceiling))


def _give_back() -> None:
    """The memory of what was measured."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _train_largest(args: argparse.Namespace) -> dict[str, Any]:
    """The first shape that fits."""
    for shape in args.train_shape:
        try:
            return training(shape, args)
        except torch.cuda.OutOfMemoryError as error:
            _say(f"{shape} does not fit in training: {error}")
            _give_back()
    raise SystemExit("no shape fits in training")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that the script works")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["llama-3.1-8b", "smollm2-135m"])
    parser.add_argument("--train-shape", nargs="+", choices=list(SHAPES), default=["llama-3.1-8b", "llama-3.2-1b"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, default=512, help="tokens before each that is decoded, and itself")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prefill")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window in training")
    parser.add_argument("--windows", type=int, default=8, help="windows per step")
    parser.add_argument("--seconds", type=float, default=360, help="no further part is begun after this many")
    parser.add_argument("--rounds", type=int, default=20, help="calls timed; their median counts")
    args = parser.parse_args(argv)
    if args.device.type == "cpu" and not args.tiny:
        parser.error("a CPU can only run --tiny")
    if args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("on a CPU set TRITON_INTERPRET=1: it is read when triton is imported")
    if args.tiny:
        tiny = {"shape": ["tiny"], "train_shape": ["tiny"], "batch": [2], "context": 20, "prompt": 24}
        vars(args).update(tiny | {"window": 16, "windows": 2, "rounds": 1})
    return args


if __name__ == "__main__":
    main()
