"""nr-serve: one frozen base language model, many neutral-residue adapters, one server."""

from importlib.metadata import version

__version__ = version("nr-serve")
