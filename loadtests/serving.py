"""Servers beside each other under the same load: throughput, time to first token, inter-token latency, memory.

    python loadtests/serving.py --concurrency 1 8 32 --contender 'ours=nr-serve serve --port {port}' \\
        --contender 'vllm=vllm serve "$BASE" --port {port}' --save loadtests/results/serving.json

A contender is a URL or a command; ratios are the first one's to each other's. All are ready before the first is
measured, and all but the one that is measured are paused (SIGSTOP). They go on when this ends, unless SIGKILL ends
it: what was paused then stays so until `kill -CONT PID`. A round measures every contender under every load, on the
same prompts, beginning with another contender each time; no prompt comes twice. What slows the machine down for a
while then shows in the spread of the ratios; what one process has of luck, such as where its memory lies, with
`--starts`. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import signal
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
from contenders import Contender, started
from load import Answer, at_concurrency, at_rate, summarise
from prompts import Prompt, Texts, own_english, read_texts
from provenance import provenance

from nr_serve.assemble import load_tokenizer
from nr_serve.default_model import model_folder
from nr_serve.evaluate.tables import markdown

MIXED = ("en", "hu", "da", "sk")
SHOWN = ("throughput", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "itl_mean", "memory_mib")
Load = tuple[str, float]
"""("concurrency", how many) or ("rate", requests a second)."""


def main(argv: list[str] | None = None) -> None:
    """Start, measure in rounds, print."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that paused servers are let go
        signal.signal(number, lambda *_: sys.exit("terminated"))
    texts = _texts(args)
    models = dict(entry.split("=", 1) for entry in args.model)
    measurements = []
    for start in range(args.starts):
        with contextlib.ExitStack() as stack:
            contenders = []
            for named in args.contender:
                contender = stack.enter_context(started(named, models.get(named.partition("=")[0]), args.wait))
                print(f"{contender.name} is ready", flush=True)
                contenders.append(contender)
            rounds = range(start * args.rounds, (start + 1) * args.rounds)
            measurements += measure(contenders, texts, args, rounds)
    summary = compare(measurements)
    print("\n".join(tables(summary)))
    document = {
        **provenance(__file__, argv),
        "contenders": {c.name: {"source": c.source, "fields": sorted(c.extras)} for c in contenders},
        "measurements": measurements,
        "summary": summary,
    }
    text = json.dumps(document)
    if args.save is not None:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(text + "\n", encoding="utf-8")
    print(text)


def measure(
    contenders: Sequence[Contender], texts: Texts, args: argparse.Namespace, rounds: Iterable[int]
) -> list[dict[str, Any]]:
    """Every contender under every load, in rounds of these numbers; a line each."""
    loads = [("concurrency", c) for c in args.concurrency] + [("rate", r) for r in args.rate]
    measured = []
    for number in rounds:
        for kind, size in loads:
            # At least two waves, so that answers also start beside running ones.
            count = max(args.requests, 2 * int(size)) if kind == "concurrency" else args.requests
            warm_up = texts.take(int(size) if kind == "concurrency" else 1, args.prompt_tokens)
            prompts = texts.take(count, args.prompt_tokens)
            shift = number % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                own = _run(contender, (kind, size), warm_up, prompts, args)
                measured.append({"round": number, "contender": contender.name, kind: size} | own)
                shown = " ".join(f"{key} {own[key]:.1f}" for key in SHOWN if own[key] is not None)
                print(f"round {number} {contender.name} {kind} {size:g}: {shown}", flush=True)
    return measured


def _run(
    contender: Contender, load: Load, warm_up: Sequence[Prompt], prompts: Sequence[Prompt], args: argparse.Namespace
) -> dict[str, Any]:
    """One measurement, after a short unmeasured load of the same kind."""
    with contender.running():
        asyncio.run(_ask_all(contender, load, warm_up, 2, args))
        before = _own_seconds()
        answers = asyncio.run(_ask_all(contender, load, prompts, args.tokens, args))
        own = _own_seconds() - before
    summary: dict[str, Any] = summarise(answers)
    return summary | {"memory_mib": contender.memory_mib(), "client_cpu_share": own / summary["seconds"]}


async def _ask_all(
    contender: Contender, load: Load, prompts: Sequence[Prompt], tokens: int, args: argparse.Namespace
) -> list[Answer]:
    bodies = [contender.body(prompt.text, prompt.language, tokens) | args.sampling for prompt in prompts]
    kind, size = load
    # A connection a request: llama.cpp's server ends one that is kept without a word, between two of its answers.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=contender.url, timeout=600, limits=limits, trust_env=False) as http:
        if kind == "concurrency":
            return await at_concurrency(http, bodies, int(size))
        return await at_rate(http, bodies, size, args.seed)


def _own_seconds() -> float:
    """Processor time this process used so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def compare(measurements: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By load and contender: medians over the rounds, and the first contender's ratios to it, round by round."""
    first = measurements[0]["contender"]
    cells: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for each in measurements:
        kind = "concurrency" if "concurrency" in each else "rate"
        cells.setdefault((kind, each[kind], each["contender"]), []).append(each)
    rows = []
    for (kind, size, name), own in sorted(cells.items(), key=lambda cell: cell[0][:2]):
        row: dict[str, Any] = {"contender": name, kind: size, "rounds": len(own)}
        row |= {key: statistics.median(e[key] for e in own) for key in SHOWN if own[0][key] is not None}
        if name != first:
            pairs = list(zip(cells[kind, size, first], own, strict=True))
            row["ratios"] = {key: _spread([a[key] / b[key] for a, b in pairs]) for key in SHOWN[:5]}
        rows.append(row)
    return rows


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def tables(summary: Sequence[dict[str, Any]]) -> list[str]:
    """The medians, then the ratios with their spread, as Markdown."""
    head = ["LOAD", "SERVER", "TOKENS/S", "TTFT P50 MS", "P99", "ITL P50 MS", "P99", "MEAN", "MIB"]
    rows = [
        [_load(row), row["contender"], *(f"{row[key]:.1f}" if key in row else "-" for key in SHOWN)]
        for row in summary
    ]
    ratio_head = ["LOAD", "FIRST TO", "TOKENS/S", "TTFT P50", "P99", "ITL P50", "P99"]
    ratios = [
        [_load(row), row["contender"], *(_ratio(row["ratios"][key]) for key in SHOWN[:5])]
        for row in summary
        if "ratios" in row
    ]
    return ["", *markdown([head, *rows]), *(["", *markdown([ratio_head, *ratios])] if ratios else []), ""]


def _load(row: dict[str, Any]) -> str:
    return f"{row['concurrency']} at once" if "concurrency" in row else f"{row['rate']:g} a second"


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['least']:.2f}..{spread['most']:.2f})"


def _texts(args: argparse.Namespace) -> Texts:
    tokenizer = load_tokenizer(model_folder(args.base))
    if args.corpus is not None:
        return Texts(read_texts(args.corpus, MIXED if args.prompts == "mixed" else MIXED[:1]), tokenizer, args.seed)
    if args.prompts == "mixed":
        raise SystemExit("--prompts mixed needs a --corpus")
    return Texts(own_english(), tokenizer, args.seed)


def _fields(text: str) -> dict[str, Any]:
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError("it must be a JSON object")
    return fields


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--contender", action="append", required=True, help="NAME=URL, or NAME=COMMAND with {port}; may be repeated"
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="NAME=MODEL for a contender's requests; {language} stands for the prompt's (default: its first)",
    )
    parser.add_argument("--concurrency", type=int, nargs="*", default=[])
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="requests a second")
    parser.add_argument(
        "--requests", type=int, default=6, help="requests a measurement, or two waves if that is more"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=1, help="how often commands are started, for --rounds each")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument(
        "--sampling",
        type=_fields,
        default={"temperature": 0},
        help='how tokens are chosen: fields of each request, as JSON (default: {"temperature": 0})',
    )
    parser.add_argument("--prompts", choices=["english", "mixed"], default="english")
    parser.add_argument(
        "--corpus", type=Path, help="folder of LANGUAGE.*.heldout.txt (default: this project's pages)"
    )
    parser.add_argument("--base", default="default", help="model whose tokenizer cuts the prompts")
    parser.add_argument("--wait", type=float, default=600, help="seconds a contender may take to get ready")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="where to keep the JSON document")
    args = parser.parse_args(argv)
    if not args.concurrency and not args.rate:
        parser.error("give --concurrency or --rate")
    if min(args.rounds, args.starts) < 1:
        parser.error("--rounds and --starts must be at least 1")
    return args


if __name__ == "__main__":
    main()
