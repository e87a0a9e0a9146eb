"""What adapters may be called, and how metrics name what requests select. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

from nr_serve.errors import BadRequest

OTHER = "other"
"""Label value that selections without their own label share."""
MOST_JOINED = 61
"""Most selections of several adapters with their own label value: clients may combine adapters freely."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Pattern of adapter names. A name is also used as a file name, so it can never lead out of its folder."""


def is_name(text: str) -> bool:
    """Whether all of `text` is a name that matches `NAME`."""
    return re.fullmatch(NAME, text) is not None


def check_adapter_name(name: str, base: str | None = None, *, param: str | None = "name") -> None:
    """Raise BadRequest unless an adapter may have this name beside a base called `base`."""
    if not is_name(name):
        raise BadRequest(
            "an adapter's name is 1 to 64 letters, digits, dots, hyphens and underscores, "
            "and starts with a letter or a digit",
            param=param,
        )
    if name == base:
        raise BadRequest(f"`{name}` is the base's name; give the adapter another", param=param)


def base_name(model: str | Path) -> str:
    """A base's name: that of its folder, even for `.`, or the last part of its name on the hub."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else path.name


def adapter_entry(entry: str) -> tuple[str, Path]:
    """Name and file of `NAME=FILE`, or of a file whose own name is used; a path may contain `=`."""
    name, equals, file = entry.partition("=")
    if not equals or "/" in name:
        return Path(entry).stem, Path(entry)
    return name or Path(file).stem, Path(file)
