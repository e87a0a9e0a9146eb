"""A base with hosted blocks and the adapters to measure on it, attached as each measurement asks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nr_serve.errors import BadRequest
from nr_serve.neutral.format import Adapter, Base, read_adapter
from nr_serve.train.attach import AdapterModule, Attached
from nr_serve.train.base import FrozenBase, load_base
from nr_serve.train.measure import SourceResult, measure
from nr_serve.train.pack import Windows


class Hosted:
    """Adapters by name beside one base; none is attached at first. The base must be unhosted."""

    def __init__(self, base: FrozenBase, adapters: Mapping[str, Adapter]) -> None:
        self.base, self.adapters = base, dict(adapters)
        self.attached = Attached(base.model, [])
        self._modules = {name: AdapterModule.from_file(adapter) for name, adapter in adapters.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter's name."""
        return tuple(self.adapters)

    @property
    def versions(self) -> dict[str, str]:
        """Version of each adapter, by name."""
        return {name: adapter.version for name, adapter in self.adapters.items()}

    def attach(self, names: Iterable[str]) -> None:
        """Attach exactly these adapters."""
        self.attached.adapters = [self._modules[name] for name in names]

    def measure(self, names: Sequence[str], texts: Mapping[str, Windows]) -> dict[str, SourceResult]:
        """Loss and fired shares of each text with exactly these adapters attached; says on stderr how far it is."""
        self.attach(names)
        beside = ", ".join(names) or "none"
        results: dict[str, SourceResult] = {}
        for i, (source, windows) in enumerate(texts.items(), start=1):
            say(f"attached: {beside}; text {i} of {len(texts)}: {source}")
            results |= measure(self.base.model, self.attached, {source: windows})
        return results


def load(files: Sequence[Path], base: str) -> Hosted:
    """Load a base and adapters for it. An adapter's name is its file's.

    Raises BadRequest if two have the same name, UnsupportedBase, BadAdapterFile for a file that does not fit.
    """
    names = [path.stem for path in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadRequest(f"two adapters have the same name: {', '.join(twice)}", param="adapters")
    frozen = load_base(base)
    identity = Base(frozen.name, frozen.fingerprint, frozen.layers, frozen.d)
    return Hosted(frozen, {name: read_adapter(path, identity) for name, path in zip(names, files, strict=True)})


def say(message: str) -> None:
    """Progress, on stderr."""
    print(f"evaluate: {message}", file=sys.stderr, flush=True)
