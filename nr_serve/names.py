"""What adapters may be called, and how metrics name what requests select. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

from nr_serve.errors import BadRequest

OTHER = "other"
"""The label of selections that are not told apart."""
MOST_JOINED = 61
"""Selections of several adapters that are told apart: clients may join any."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What an adapter may be called. It is a file's name too, and never one that leads out of its folder."""


def is_name(text: str) -> bool:
    """Whether it is a name as `NAME` has it, all of it."""
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
    """The name of a base's folder, even of `.`, or the last part of a hub's name."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else path.name


def adapter_entry(entry: str) -> tuple[str, Path]:
    """Name and file of `NAME=FILE`, or of a file that lends its own name; a `=` in the path is a part of it."""
    name, equals, file = entry.partition("=")
    if not equals or "/" in name:
        return Path(entry).stem, Path(entry)
    return name or Path(file).stem, Path(file)
