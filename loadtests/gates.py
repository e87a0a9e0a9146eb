"""How well fitted gates tell a language apart on the frozen stream, without training anything.

    python loadtests/gates.py --corpus corpus --target hu --target da --plots plots

One forward pass over all text keeps the inputs of every fifth layer's FFN. Then, for each target and layer, a gate
is fitted for every carry, solver and number of background languages, its threshold set for every percentile (one
for all classes), and what it does is counted on held-out text. As in training, even windows fit and odd windows set
the threshold.

The background languages come in a seeded order: a smaller background is the start of a larger one. Some languages
and some sources of the base's own language are in no fit; on them it shows how a gate does on what it never met.

Shares are of token-layers. Reckoned at 8 minutes for one target on 2 free cores (default base, 30 languages), 2 of
them for the forward pass; a further target takes 5 more, and text read for the first time a minute or two. Memory:
some 8 bytes a token and width of the stream, and the base (2 GB in all); on disk 2 bytes a token, width and layer.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import Tensor

from nr_serve.evaluate.plots import panels
from nr_serve.evaluate.tables import Rows, markdown
from nr_serve.train.attach import Attached, window_inputs
from nr_serve.train.base import load_base
from nr_serve.train.gates import SOLVERS, causal_mean
from nr_serve.train.pack import Windows, join
from nr_serve.train.recipe import Gate
from nr_serve.train.text import read_heldout

BATCH_WINDOWS = 16
TARGET_TIMES = 4
"""The target has so many times the text of another class, as in training."""

SHOWN_PERCENTILE = 99.5
"""The percentile of the table and the plots; the JSON document has all."""


@dataclass(frozen=True)
class Class:
    """The windows of one class of text among all: rows [first, first + count)."""

    first: int
    count: int

    def head(self, count: int) -> Class:
        """Its first windows, at most `count`."""
        return Class(self.first, min(count, self.count))

    def rows(self) -> Tensor:
        """Their numbers."""
        return torch.arange(self.first, self.first + self.count)


@dataclass(frozen=True)
class Setting:
    """One gate of the grid, in every kept layer."""

    target: str
    carry: float
    solver: str
    background: int
    """Background languages fitted against."""
    percentile: float


@dataclass(frozen=True)
class Plan:
    """Which text plays which part."""

    targets: Sequence[str]
    background: Sequence[str]
    """Languages in the order in which they join the background."""
    kept_out: Sequence[str]
    """Languages in no fit."""
    original: Sequence[str]
    """Sources of the base's own language that every gate is fitted against."""
    unfitted: Sequence[str]
    """Those that none is."""

    def fitted(self, target: str, background: int) -> list[str]:
        """The classes that a target's gate is fitted against."""
        return [*self.original, *[name for name in self.background if name != target][:background]]


class Text:
    """All windows of all classes: those that fit, by class, and the held-out ones that report."""

    def __init__(self) -> None:
        self.fit: dict[str, Class] = {}
        self.report: dict[str, Class] = {}
        self._parts: list[Windows] = []
        self._count = 0

    def add(self, part: dict[str, Class], name: str, windows: Windows) -> None:
        """Lay a class's windows behind all others."""
        part[name] = Class(self._count, len(windows))
        self._parts.append(windows)
        self._count += len(windows)

    def windows(self) -> Windows:
        """All of them."""
        return join(self._parts)


def read_text(corpus: Path, tokenizer: Any, plan: Plan, window: int, tokens: int) -> Text:
    """About `tokens` tokens of each class to fit, `TARGET_TIMES` so many of a target, and `tokens` held out.

    Every source of a language has an equal part in it.
    """
    text = Text()
    for name in [*plan.original, *plan.targets, *[n for n in plan.background if n not in plan.targets]]:
        times = TARGET_TIMES if name in plan.targets else 1
        text.add(
            text.fit, name, _read(corpus, f"{_glob(plan, name)}.train.txt*", tokenizer, window, times * tokens)
        )
    for name in [*text.fit, *plan.unfitted, *plan.kept_out]:
        text.add(text.report, name, _read(corpus, f"{_glob(plan, name)}.heldout.txt*", tokenizer, window, tokens))
    return text


def _glob(plan: Plan, name: str) -> str:
    return name if name in plan.original or name in plan.unfitted else f"{name}.*"


def _read(corpus: Path, glob: str, tokenizer: Any, window: int, tokens: int) -> Windows:
    """Windows of the sources that match, in a shuffled order, so that even and odd ones are of every source."""
    count = max(2, tokens // window)
    sources = read_heldout(corpus, [glob], tokenizer, window, count)
    each = -(-count // len(sources))
    pooled = join(windows.take(slice(each)) for windows in sources.values())
    order = list(range(len(pooled)))
    random.Random(glob).shuffle(order)
    return pooled.take(order[:count])


class Stream:
    """The inputs of some layers' FFNs on all windows, float16, a file a layer."""

    def __init__(self, folder: Path, layers: Sequence[int], windows: Windows, d: int) -> None:
        self.layers, self.windows = layers, windows
        self.shape = (*windows.ids_NT.shape, d)
        size = windows.ids_NT.numel() * d
        self._kept = {
            i: torch.from_file(str(folder / f"{i}.f16"), shared=True, size=size, dtype=torch.float16).view(
                self.shape
            )
            for i in layers
        }

    @torch.no_grad()
    def fill(self, model: Any) -> None:
        """One forward pass of the base over all windows. Hosts the base."""
        attached = Attached(model, [])
        rows = slice(0)

        def keep(layer: int, x_Td: Tensor) -> None:
            if layer in self._kept:
                self._kept[layer][rows] = x_Td.view(-1, *self.shape[1:])

        attached.before = keep
        for at in range(0, self.shape[0], BATCH_WINDOWS):
            rows = slice(at, at + BATCH_WINDOWS)
            part = self.windows.take(rows)
            attached.begin(part.offset_NT)
            model.model(part.ids_NT, use_cache=False, **window_inputs(part.offset_NT))
            _say(f"forward pass: {min(at + BATCH_WINDOWS, self.shape[0])} of {self.shape[0]} windows")

    def carried(self, layer: int, a: float) -> Tensor:
        """The causal mean of a layer's inputs, [N, T, d], float32."""
        return causal_mean(self._kept[layer].float(), self.windows.offset_NT, a)


def fit(
    u_NTd: Tensor, target: Class, others: Mapping[str, Class], solver: str, gate: Gate
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [N, T] by a gate fitted on the classes' even windows, and those of each other class's odd ones."""
    classes = [target, *others.values()]
    even = [each.rows()[::2] for each in classes]
    shares = [gate.target_weight, *[(1 - gate.target_weight) / len(others)] * len(others)]
    length = u_NTd.shape[1]
    weight_M = torch.cat(
        [torch.full((len(rows) * length,), share / len(rows)) for rows, share in zip(even, shares, strict=True)]
    ).double()
    y_M = torch.zeros_like(weight_M)
    y_M[: len(even[0]) * length] = 1
    w_d, b = SOLVERS[solver](u_NTd[torch.cat(even)].flatten(0, 1), y_M, weight_M, gate.ridge)
    m_NT = u_NTd @ w_d.float() + b.float()
    return m_NT, {name: m_NT[each.rows()[1::2]].flatten() for name, each in others.items()}


Shares = dict[str, float]
"""Class -> share of its held-out tokens that fired."""


def study(stream: Stream, text: Text, plan: Plan, args: argparse.Namespace) -> dict[Setting, list[Shares]]:
    """What fired in each kept layer, by setting."""
    counted: dict[Setting, list[Shares]] = {}
    for layer in stream.layers:
        for a in args.carry:
            _say(f"layer {layer}, carry {a:g}")
            u_NTd = stream.carried(layer, a)
            for target in plan.targets:
                for setting, shares in _fits(u_NTd, a, target, text, plan, args):
                    counted.setdefault(setting, []).append(shares)
    return counted


def _fits(
    u_NTd: Tensor, a: float, target: str, text: Text, plan: Plan, args: argparse.Namespace
) -> Iterator[tuple[Setting, Shares]]:
    """One target's gates of one layer and carry."""
    windows = max(2, args.tokens // args.window)
    for background, solver in product(_sizes(plan, target, args.background), args.solver):
        others = {name: text.fit[name].head(windows) for name in plan.fitted(target, background)}
        m_NT, odd = fit(u_NTd, text.fit[target], others, solver, Gate(ridge=args.ridge))
        for percentile in args.percentile:
            threshold = max(float(m_T.quantile(percentile / 100)) for m_T in odd.values())
            fired_NT = (m_NT > threshold).float()
            shares = {name: float(fired_NT[each.rows()].mean()) for name, each in text.report.items()}
            yield Setting(target, a, solver, background, percentile), shares


def _sizes(plan: Plan, target: str, wanted: Sequence[int | None]) -> list[int]:
    """The sizes of the background, each once; None is all languages."""
    most = len([name for name in plan.background if name != target])
    return sorted({most if size is None else min(size, most) for size in wanted})


def summarise(counted: Mapping[Setting, Sequence[Shares]], plan: Plan) -> list[dict[str, Any]]:
    """A row a setting: the share of the target found, and of each kind of other text fired, over all layers."""
    rows = []
    for setting, layers in counted.items():
        shares = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
        rows.append(
            vars(setting)
            | {
                "found": shares[setting.target],
                "fitted": _misfire(shares, plan.fitted(setting.target, setting.background)),
                "unfitted": _misfire(shares, plan.unfitted),
                "kept_out": _misfire(shares, plan.kept_out),
            }
        )
    return rows


def _misfire(shares: Shares, names: Sequence[str]) -> dict[str, Any]:
    worst = max(names, key=lambda name: shares[name])
    return {"worst": shares[worst], "worst_on": worst, "mean": sum(shares[name] for name in names) / len(names)}


def table(rows: Sequence[Mapping[str, Any]], percentile: float) -> Rows:
    """The rows of one percentile."""
    header = ["TARGET", "SOLVER", "CARRY", "LANGUAGES", "FOUND"]
    kinds = {"fitted": "FITTED AGAINST", "unfitted": "ORIGINAL, NOT FITTED", "kept_out": "KEPT OUT"}
    body = [
        [row["target"], row["solver"], f"{row['carry']:g}", f"{row['background']}", f"{row['found']:.1%}"]
        + [f"{row[kind][which]:.3%}" for kind in kinds for which in ("worst", "mean")]
        for row in rows
        if row["percentile"] == percentile
    ]
    return [[*header, *(f"{text}: {which}" for text in kinds.values() for which in ("WORST", "MEAN"))], *body]


def plot(folder: Path, rows: Sequence[Mapping[str, Any]], target: str, percentile: float) -> Path:
    """Found and fired on the languages kept out, against the size of the background, a line a carry."""
    shown = [row for row in rows if row["target"] == target and row["percentile"] == percentile]
    pictures: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in shown:
        for what, share in (("found", row["found"]), ("fired on languages kept out", row["kept_out"]["mean"])):
            lines = pictures.setdefault(f"{row['solver']}: {what}", {})
            lines.setdefault(f"carry {row['carry']:g}", []).append((row["background"], share))
    path = folder / f"gates-{target}.svg"
    title = f"Gates fitted for {target}, percentile {percentile:g}"
    panels(path, pictures, title=title, x_label="background languages")
    return path


def make_plan(corpus: Path, args: argparse.Namespace) -> Plan:
    """The parts of all text in a corpus folder. What is not named is drawn by the seed."""
    rng = random.Random(args.seed)
    languages, sources = _listed(corpus, args.original)
    absent = [name for name in [*args.target, *args.kept_out] if name not in languages]
    absent += [name for name in args.unfitted if name not in sources]
    if absent:
        raise SystemExit(f"no text to fit and to report on for {', '.join(absent)} in {corpus}")
    if set(args.target) & set(args.kept_out):
        raise SystemExit("a target cannot be kept out of every fit")
    others = [name for name in languages if name not in args.target]
    kept_out = args.kept_out or rng.sample(others, min(4, len(others) // 3))
    unfitted = args.unfitted or rng.sample(sources, min(2, len(sources) // 2))
    original = [name for name in sources if name not in unfitted]
    if not (original and unfitted and kept_out):
        raise SystemExit(f"{corpus} has too few languages or too few sources of {args.original}")
    background = [name for name in languages if name not in kept_out]
    rng.shuffle(background)
    return Plan(args.target, background, kept_out, original, unfitted)


def _listed(corpus: Path, original: str) -> tuple[list[str], list[str]]:
    """The other languages, and the sources of the base's own, that have text of both kinds."""

    def sources(part: str) -> set[str]:
        return {".".join(path.name.split(".")[:2]) for path in corpus.glob(f"*.*.{part}.txt*")}

    both = sources("train") & sources("heldout")
    languages = {name.split(".")[0] for name in both} - {original}
    return sorted(languages), sorted(name for name in both if name.split(".")[0] == original)


def main(argv: list[str] | None = None) -> None:
    """Read, pass, fit, print."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    plan = make_plan(args.corpus, args)
    base = load_base(args.model)
    text = read_text(args.corpus, base.tokenizer, plan, args.window, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(Path(folder), range(0, base.layers, args.layers), text.windows(), base.d)
        stream.fill(base.model)
        counted = study(stream, text, plan, args)
    rows = summarise(counted, plan)
    shown = min(args.percentile, key=lambda percentile: abs(percentile - SHOWN_PERCENTILE))
    print("\n".join(markdown(table(rows, shown))))
    if args.plots is not None:
        args.plots.mkdir(parents=True, exist_ok=True)
        for target in plan.targets:
            plot(args.plots, rows, target, shown)
    result = {
        "base": base.name,
        "layers": list(stream.layers),
        "plan": vars(plan),
        "tokens": {"fit": _tokens(text.fit, args.window), "report": _tokens(text.report, args.window)},
        "target_weight": Gate().target_weight,
        "rows": rows,
    }
    print(json.dumps(result | provenance(__file__, argv)))


def _tokens(part: Mapping[str, Class], window: int) -> dict[str, int]:
    return {name: each.count * window for name, each in part.items()}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of text, as fetch-corpus leaves it")
    parser.add_argument("--target", action="append", required=True, help="a language; may be repeated")
    parser.add_argument("--model", default="default")
    parser.add_argument("--original", default="en", help="the base's own language")
    parser.add_argument("--unfitted", action="append", default=[], help="a source of it in no fit (default: 2)")
    parser.add_argument("--kept-out", action="append", default=[], help="a language in no fit (default: 4)")
    parser.add_argument("--layers", type=int, default=5, help="keep the first of every so many layers")
    parser.add_argument("--tokens", type=int, default=2048, help="of each class; of a target four times so many")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--carry", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.8, 0.9])
    parser.add_argument("--solver", nargs="+", choices=sorted(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--background", type=_size, nargs="+", default=[0, 2, 4, 8, 16, None], help="or `all`")
    parser.add_argument("--percentile", type=float, nargs="+", default=[98.0, 99.0, 99.5, 99.8, 99.9])
    parser.add_argument("--ridge", type=float, default=Gate().ridge)
    parser.add_argument("--plots", type=Path, help="folder for a plot a target")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _size(written: str) -> int | None:
    return None if written == "all" else int(written)


def _say(message: str) -> None:
    print(f"gates: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
