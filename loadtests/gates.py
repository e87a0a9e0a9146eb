"""How well fitted gates tell a language apart on the frozen stream, without training anything.

    python loadtests/gates.py --corpus corpus --target sk --relative cs --plots plots

One forward pass over all text keeps the inputs of every fifth layer's FFN on disk. Then gates are fitted for the
target as training fits them, by the trainer's own functions, but to whole texts alone, and what they do is counted
on held-out text. From one reference (logistic, the recipe's carry, all background languages, one percentile for all
classes), one thing is varied at a time: solver and carry together, the number of background languages, the
percentile.

The background languages come in a seeded order: a smaller background is the start of a larger one. Close relatives
come last, so the largest background but them shows what they are worth. Some languages and some sources of the
base's own language are in no fit; on them it shows how a gate does on what it never met.

Shares are of token-layers. Reckoned at 25 minutes on 2 free cores (default base, 25 languages), 3 of them for the
forward pass; text read for the first time takes a minute or two more. Memory: the tokens of one fit a few times
over in float32, and the base: some 2 GB, and three more for each doubling of --tokens. On disk, where $TMPDIR says,
2 bytes a token, width and layer: some 1 GB. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gates_text import Class, Plan, Text, make_plan, read_text
from provenance import provenance
from torch import Tensor

from nr_serve.evaluate.plots import panels
from nr_serve.evaluate.tables import Rows, markdown
from nr_serve.logs import say
from nr_serve.train.attach import Attached
from nr_serve.train.blocks import AdapterModule
from nr_serve.train.frozen_base import load_base
from nr_serve.train.gates import Fitter
from nr_serve.train.recipe import Blocks, Gate
from nr_serve.train.solvers import SOLVERS
from nr_serve.train.text.lead_in import GateText
from nr_serve.train.text.pack import Windows

_say = partial(say, "gates")
BATCH_WINDOWS = 16
CARRY = Blocks(h=1).carry
"""The recipe's."""


@dataclass(frozen=True)
class Setting:
    """How one gate is fitted, in every kept layer."""

    solver: str
    carry: float
    background: int
    """Background languages fitted against."""
    percentile: float

    def __str__(self) -> str:
        against = f"against {self.background} languages"
        return f"{self.solver}, carry {self.carry:g}, {against}, percentile {self.percentile:g}"


class Stream:
    """The inputs of some layers' FFNs on all windows, float16, a file per layer."""

    def __init__(self, folder: Path, layers: Sequence[int], windows: Windows, d: int) -> None:
        self.layers, self.windows, self.d = layers, windows, d
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
            model.model(part.ids_NT, use_cache=False, position_ids=part.offset_NT)
            _say(f"forward pass: {min(at + BATCH_WINDOWS, self.shape[0])} of {self.shape[0]} windows")

    def rows(self, layer: int, rows: Sequence[slice]) -> Tensor:
        """A layer's inputs on those windows, laid end to end, [T, d], float32."""
        return torch.cat([self._kept[layer][each].flatten(0, 1) for each in rows]).float()


Shares = dict[str, float]
"""Class -> share of its held-out tokens that fired."""


@torch.no_grad()
def fit(stream: Stream, text: Text, plan: Plan, setting: Setting, ridge: float, layer: int) -> Shares:
    """What one layer's gate does on held-out text, fitted to whole texts as training fits it."""
    rows = {name: text.fit[name].rows for name in [plan.target, *plan.fitted(setting.background)]}
    classes = {name: GateText.whole(stream.windows.take(each)) for name, each in rows.items()}
    adapter = AdapterModule.fresh([int(i == layer) for i in range(layer + 1)], stream.d, setting.carry, seed=0)
    p = setting.percentile
    gate = Gate(init=setting.solver, percentile=p, background_percentile=p, ridge=ridge)
    Fitter(adapter, classes, plan.target, gate).fit(layer, stream.rows(layer, list(rows.values())))
    return {name: _fired(stream, adapter, layer, each.rows) for name, each in text.report.items()}


def _fired(stream: Stream, adapter: AdapterModule, layer: int, rows: slice) -> float:
    module = adapter.layer(layer)
    assert module is not None
    offset_T = stream.windows.offset_NT[rows].flatten()
    return float((module.carried(stream.rows(layer, [rows]), offset_T, adapter.carry) > 0).double().mean())


def settings(plan: Plan, args: argparse.Namespace) -> list[Setting]:
    """The reference first, the nearest to the recipe's defaults; then all that differ from it in one thing."""
    most, gate = len(plan.background), Gate()
    solver = gate.init if gate.init in args.solver else args.solver[0]
    percentile = min(args.percentile, key=lambda p: abs(p - gate.percentile))
    reference = Setting(solver, min(args.carry, key=lambda a: abs(a - CARRY)), most, percentile)
    varied = [replace(reference, solver=solver, carry=a) for a in args.carry for solver in args.solver]
    sizes = {min(size, most) for size in args.background} | {plan.unrelated}
    varied += [replace(reference, background=size) for size in sorted(sizes)]
    varied += [replace(reference, percentile=percentile) for percentile in args.percentile]
    return list(dict.fromkeys([reference, *varied]))


def study(stream: Stream, text: Text, plan: Plan, args: argparse.Namespace) -> dict[Setting, list[Shares]]:
    """What fired in each kept layer, by setting."""
    asked = settings(plan, args)
    counted: dict[Setting, list[Shares]] = {setting: [] for setting in asked}
    for i, layer in enumerate(stream.layers):
        for j, setting in enumerate(asked):
            _say(f"fit {i * len(asked) + j + 1} of {len(stream.layers) * len(asked)}: layer {layer}, {setting}")
            counted[setting].append(fit(stream, text, plan, setting, args.ridge, layer))
    return counted


def summarise(counted: Mapping[Setting, Sequence[Shares]], plan: Plan) -> list[dict[str, Any]]:
    """A row a setting: the share of the target found, and of all other text fired, means over all layers."""
    rows = []
    for setting, layers in counted.items():
        shares = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
        kinds = {"fitted": plan.fitted(setting.background), "unfitted": plan.unfitted, "kept_out": plan.kept_out}
        kinds |= {"relatives": plan.relatives} if plan.relatives else {}
        found = shares.pop(plan.target)
        told = {"found": found, "leak": shares, "relative": setting.background > plan.unrelated}
        rows.append(asdict(setting) | told | {kind: _misfire(shares, names) for kind, names in kinds.items()})
    return rows


def _misfire(shares: Shares, names: Sequence[str]) -> dict[str, Any]:
    worst = max(names, key=lambda name: shares[name])
    return {"worst": shares[worst], "worst_on": worst, "mean": sum(shares[name] for name in names) / len(names)}


KINDS = {"fitted": "FITTED AGAINST", "unfitted": "ORIGINAL, NOT FITTED", "kept_out": "KEPT OUT"}


def table(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """A row a setting."""
    kinds = KINDS | ({"relatives": "RELATIVES"} if "relatives" in rows[0] else {})
    header = ["SOLVER", "CARRY", "LANGUAGES", "RELATIVE IN", "PERCENTILE", "FOUND"]
    body = [
        [row["solver"], f"{row['carry']:g}", f"{row['background']}", "yes" if row["relative"] else "no"]
        + [f"{row['percentile']:g}", f"{row['found']:.1%}"]
        + [f"{row[kind][which]:.3%}" for kind in kinds for which in ("worst", "mean")]
        for row in rows
    ]
    return [[*header, *(f"{text}: {which}" for text in kinds.values() for which in ("WORST", "MEAN"))], *body]


def leak_table(rows: Sequence[Mapping[str, Any]], plan: Plan) -> Rows:
    """What the reference gate fires on, by class."""
    reference = rows[0]
    parts = {"original": plan.original, "original, not fitted": plan.unfitted, "kept out": plan.kept_out}
    part = {name: kind for kind, names in parts.items() for name in names}
    shares = sorted(reference["leak"].items(), key=lambda item: -item[1])
    body = [[name, part.get(name, "background"), f"{share:.3%}"] for name, share in shares]
    return [["CLASS", "PART", "FIRED"], *body]


def plot(folder: Path, rows: Sequence[Mapping[str, Any]], target: str) -> Path:
    """Found, and fired on the languages kept out, by each thing that is varied; and one by the other."""
    shown = {"found": lambda row: row["found"], "fired on languages kept out": lambda row: row["kept_out"]["mean"]}
    pictures: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (what, read), x in product(shown.items(), ("carry", "background", "percentile")):
        free = {x, "solver"} if x == "carry" else {x}
        fixed = [key for key in ("solver", "carry", "background", "percentile") if key not in free]
        same = [row for row in rows if all(row[key] == rows[0][key] for key in fixed)]
        lines = pictures.setdefault(f"{what}, by {x}", {})
        for row in sorted(same, key=lambda row: row[x]):
            lines.setdefault(row["solver"], []).append((row[x], read(row)))
    found, fired = (pictures[f"{what}, by percentile"] for what in shown)
    pictures["found, by fired on them, over percentiles"] = {
        solver: [(leak, share) for (_, leak), (_, share) in zip(fired[solver], line, strict=True)]
        for solver, line in found.items()
    }
    path = folder / f"gates-{target}.svg"
    panels(path, pictures, title=f"Gates fitted for {target}", x_label="", columns=3)
    return path


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
    print("\n".join([*markdown(table(rows)), "", *markdown(leak_table(rows, plan))]))
    if args.plots is not None:
        args.plots.mkdir(parents=True, exist_ok=True)
        plot(args.plots, rows, plan.target)
    result = {
        "base": base.name,
        "layers": list(stream.layers),
        "plan": vars(plan),
        "tokens": {"fit": _tokens(text.fit, args.window), "report": _tokens(text.report, args.window)},
        "target_weight": Gate().target_weight,
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "rows": rows,
    }
    print(json.dumps(result | provenance(__file__, argv)))


def _tokens(part: Mapping[str, Class], window: int) -> dict[str, int]:
    return {name: each.count * window for name, each in part.items()}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of text, as fetch-corpus leaves it")
    parser.add_argument("--target", required=True, help="the language to tell from all others")
    parser.add_argument("--relative", action="append", default=[], help="a close relative of it; may be repeated")
    parser.add_argument("--model", default="default", help="base: a folder, a hub name, or `default`")
    parser.add_argument("--original", default="en", help="the base's own language")
    parser.add_argument("--unfitted", action="append", default=[], help="a source of it in no fit (default: 2)")
    parser.add_argument("--kept-out", action="append", default=[], help="a language in no fit (default: 4)")
    parser.add_argument("--layers", type=_positive, default=5, help="keep the first of every N layers")
    parser.add_argument(
        "--tokens", type=_positive, default=2048, help="of each class; of a target four times as many"
    )
    parser.add_argument("--window", type=_positive, default=128, help="tokens read at once")
    parser.add_argument("--carry", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.8, 0.9], help="0 to below 1")
    parser.add_argument(
        "--solver", nargs="+", choices=sorted(SOLVERS), default=list(SOLVERS), help="how a gate is fitted"
    )
    parser.add_argument("--background", type=int, nargs="+", default=[0, 1, 3, 6, 12, 24], help="languages in it")
    parser.add_argument(
        "--percentile",
        type=float,
        nargs="+",
        default=[95.0, 99.0, 99.5, 99.9],
        help="of the logit on other classes",
    )
    parser.add_argument("--ridge", type=float, default=Gate().ridge, help="penalty, as in a recipe")
    parser.add_argument("--plots", type=Path, help="folder for a plot")
    parser.add_argument(
        "--seed", type=int, default=0, help="draws what is kept out and the order of the background"
    )
    return parser.parse_args(argv)


def _positive(written: str) -> int:
    number = int(written)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{written} is less than 1")
    return number


if __name__ == "__main__":
    main()
