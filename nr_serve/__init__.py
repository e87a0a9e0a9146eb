"""nr-serve: one frozen base language model, many neutral-residue adapters, one server."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nr_serve.offline import Server as Server

__version__ = version("nr-serve")
__all__ = ["Server", "__version__"]


def __getattr__(name: str) -> Any:
    """`Server`, imported on first use, so that commands that do not need it start at once."""
    if name == "Server":
        from nr_serve.offline import Server

        return Server
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
