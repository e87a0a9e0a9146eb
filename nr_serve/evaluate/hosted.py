"""A base with hosted blocks and the adapters to measure on it, attached as each measurement asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nr_serve.neutral.format import Adapter
from nr_serve.train.attach import Attached
from nr_serve.train.blocks import AdapterModule
from nr_serve.train.frozen_base import FrozenBase, best_device, load_base, read_adapters


@dataclass(frozen=True)
class Subject:
    """What is measured: a base and what is attached to it now."""

    base: FrozenBase
    attached: Attached
    versions: tuple[str, ...]
    """Identify what is attached, for results that are kept."""
    label: str
    """Names it in messages."""


class Hosted:
    """Adapters by name beside one base; none is attached at first. The base must not host blocks yet."""

    def __init__(self, base: FrozenBase, adapters: Mapping[str, Adapter]) -> None:
        self.base, self.adapters = base, dict(adapters)
        self.attached = Attached(base.model, [])
        self._modules = {name: AdapterModule.from_file(a).to(base.device) for name, a in adapters.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter's name."""
        return tuple(self.adapters)

    @property
    def versions(self) -> dict[str, str]:
        """Version of each adapter, by name."""
        return {name: adapter.version for name, adapter in self.adapters.items()}

    def attach(self, names: Sequence[str]) -> Subject:
        """Attach exactly the adapters with these names: the subject to measure until others are attached."""
        self.attached.adapters = [self._modules[name] for name in names]
        versions = self.versions
        return Subject(
            self.base,
            self.attached,
            tuple(versions[name] for name in names),
            f"attached: {', '.join(names) or 'none'}",
        )


def load(files: Sequence[Path], base: str, dtype: str = "float32") -> Hosted:
    """Load a base in `dtype`, and adapters for it, on a GPU if there is one. An adapter has its file's name.

    Raises BadRequest if two have the same name, UnsupportedBase, BadAdapterFile for a file that does not fit.
    """
    frozen = load_base(base, dtype, best_device())
    return Hosted(frozen, read_adapters(files, frozen))
