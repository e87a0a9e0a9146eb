"""What a text gives with some adapters attached: measured once, then kept in the user's cache.

A reading is kept under all that decides it: the base, what is attached, the windows, and the arithmetic. So the
base is measured once for all adapters, and a measurement that was stopped goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers

from nr_serve import __version__
from nr_serve.disk import cache_folder
from nr_serve.evaluate.hosted import Hosted
from nr_serve.logs import say
from nr_serve.train.attach import Attached
from nr_serve.train.base import FrozenBase
from nr_serve.train.measure import SourceResult, measure
from nr_serve.train.tensor_cache import TensorCache, Tensors, digest
from nr_serve.train.text.pack import Windows

FORMAT = 2
"""Raised when measuring changes: readings kept by another format are not taken."""


def in_turn(texts: Mapping[str, Windows]) -> Iterator[tuple[str, Windows, str]]:
    """Each source, its windows, and how far one is with it: `text 3 of 17: da.ddtp`."""
    for i, (source, windows) in enumerate(texts.items(), start=1):
        yield source, windows, f"text {i} of {len(texts)}: {source}"


def read_hosted(hosted: Hosted, names: Sequence[str], windows: Windows, place: str) -> SourceResult:
    """A text's reading with exactly the adapters `names` attached; `place` says on stderr how far one is."""
    hosted.attach(names)
    versions = [hosted.versions[name] for name in names]
    return read_text(hosted.base, hosted.attached, versions, windows, f"{place}; {beside(names)}")


def read_text(
    base: FrozenBase, attached: Attached, versions: Sequence[str], windows: Windows, place: str
) -> SourceResult:
    """A text's reading as the base and what is attached to it are now; `versions` tell that from all else."""
    what = ["text", list(windows.ids_NT.shape), digest((windows.ids_NT, windows.offset_NT))]

    def make() -> Tensors:
        return _tensors(measure(base.model, attached, {"text": windows})["text"])

    return _result(once(base, versions, what, make, place))


def once(
    base: FrozenBase, versions: Sequence[str], what: Sequence[Any], make: Callable[[], Tensors], place: str
) -> Tensors:
    """What `make` measures of `what` (plain values), or measured in an earlier call under these `versions`."""
    fresh = False

    def measured() -> Tensors:
        nonlocal fresh
        fresh = True
        say("evaluate", place)
        return make()

    packages = [torch.__version__, transformers.__version__, __version__]
    arithmetic = [str(base.model.dtype), base.device.type, *packages]
    key = [FORMAT, base.fingerprint, list(versions), list(what), arithmetic]
    tensors = TensorCache(cache_folder() / "measured").get(key, measured)
    if not fresh:
        say("evaluate", f"{place} (measured before)")
    return tensors


def _tensors(result: SourceResult) -> Tensors:
    by_layer = [[math.nan if share is None else share for share in layers] for layers in result.fired_by_layer]
    floats = {"loss": result.loss, "fired": result.fired, "by_layer": by_layer, "nats": result.nats_N}
    counts = {"tokens": result.tokens, "labels": result.labels_N}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in floats.items()} | {
        name: torch.tensor(value, dtype=torch.int64) for name, value in counts.items()
    }


def _result(kept: Tensors) -> SourceResult:
    return SourceResult(
        loss=float(kept["loss"]),
        tokens=int(kept["tokens"]),
        fired=tuple(kept["fired"].tolist()),
        fired_by_layer=tuple(
            tuple(None if math.isnan(share) else share for share in layers) for layers in kept["by_layer"].tolist()
        ),
        nats_N=tuple(kept["nats"].tolist()),
        labels_N=tuple(kept["labels"].tolist()),
    )


def beside(names: Sequence[str]) -> str:
    """What is attached, for a message."""
    return f"attached: {', '.join(names) or 'none'}"
