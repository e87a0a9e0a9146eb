"""Measurements of a text with some adapters attached: made once, then kept in the user's cache.

The cache key contains everything that a reading depends on: the base, the attached adapters, the windows and the
arithmetic. So the base is measured once for all adapters, and a measurement that was stopped continues where it
was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import transformers
from pydantic import TypeAdapter
from pydantic_core import to_json

from nr_serve import __version__
from nr_serve.disk import cache_folder
from nr_serve.errors import UnsupportedBase
from nr_serve.evaluate.hosted import Hosted, Subject
from nr_serve.logs import say
from nr_serve.train.digest import digest
from nr_serve.train.file_cache import FileCache
from nr_serve.train.measure import SourceResult, measure
from nr_serve.train.text.pack import Windows

FORMAT = 3
"""Increased when measuring changes, so that readings of another format are not used."""
_Reading = TypeVar("_Reading")


def in_turn(texts: Mapping[str, Windows]) -> Iterator[tuple[str, Windows, str]]:
    """Each source, its windows, and a label for messages, such as `text 3 of 17: da.ddtp`."""
    for i, (source, windows) in enumerate(texts.items(), start=1):
        yield source, windows, f"text {i} of {len(texts)}: {source}"


def measure_hosted(hosted: Hosted, names: Sequence[str], windows: Windows, place: str) -> SourceResult:
    """A text's reading with exactly the adapters `names` attached; `place` is printed on stderr.

    Raises UnsupportedBase if the base alone has no finite loss, which no change can be told from.
    """
    reading = measure_text(hosted.attach(names), windows, place)
    if not names and not math.isfinite(reading.loss):
        raise UnsupportedBase(f"the base alone has a loss of {reading.loss} on {place}")
    return reading


def measure_text(subject: Subject, windows: Windows, place: str) -> SourceResult:
    """A text's reading; `place` is printed on stderr."""
    what = ["text", list(windows.ids_NT.shape), digest((windows.ids_NT, windows.offset_NT))]

    def make() -> SourceResult:
        return measure(subject.base.model, subject.attached, {"text": windows})["text"]

    return once(subject, what, make, TypeAdapter(SourceResult), place)


def once(
    subject: Subject,
    what: Sequence[Any],
    make: Callable[[], _Reading],
    form: TypeAdapter[_Reading],
    place: str,
) -> _Reading:
    """The result of `make`, or that of an earlier call for the same subject and the same `what` (plain values).

    The result is kept as JSON; `form` reads it. `place` is printed on stderr.
    """
    base, fresh, place = subject.base, False, f"{place}; {subject.label}"

    def measured() -> _Reading:
        nonlocal fresh
        fresh = True
        say("evaluate", place)
        return make()

    packages = [torch.__version__, transformers.__version__, __version__]
    arithmetic = [str(base.model.dtype), base.device.type, *packages]
    key = [FORMAT, base.contents, list(subject.versions), list(what), arithmetic]
    reading = FileCache(cache_folder() / "measured").get(key, measured, _dump, form.validate_json)
    if not fresh:
        say("evaluate", f"{place} (measured before)")
    return reading


def _dump(reading: object) -> bytes:
    return to_json(reading, inf_nan_mode="constants")  # an adapter may give NaN, which is kept
