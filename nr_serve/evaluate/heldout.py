"""Held-out loss and fired shares of attached adapters, by source of text.

Measured through the same hosted blocks that train.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nr_serve.errors import BadRequest
from nr_serve.neutral.format import Adapter, Base, read_adapter
from nr_serve.train.attach import AdapterModule, Attached
from nr_serve.train.base import FrozenBase, load_base
from nr_serve.train.measure import measure
from nr_serve.train.text import Windows, read_heldout


@dataclass(frozen=True)
class SourceReport:
    """One source of text, before and after the adapters were attached."""

    before: float
    """Loss of the base alone, nats a token."""
    after: float
    """Loss with every adapter attached, nats a token."""
    tokens: int
    """Tokens read."""
    fired: Mapping[str, float]
    """Share of token-layers that fired, by adapter's name."""

    @property
    def change(self) -> float:
        """Change of the loss as a share of the base's."""
        return self.after / self.before - 1


@dataclass(frozen=True)
class Report:
    """What attaching some adapters does to each source of text."""

    base: str
    base_fingerprint: str
    adapters: Mapping[str, str]
    """Version of each adapter, by name."""
    window: int
    """Tokens a window."""
    sources: Mapping[str, SourceReport]

    def to_json(self) -> str:
        """The report as one JSON document."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def evaluate(
    adapters: Sequence[Path],
    base: str,
    corpus: Path,
    sources: Sequence[str],
    *,
    window: int = 256,
    windows: int = 32,
) -> Report:
    """Loss and fired shares of every source, before and after all `adapters` are attached to `base`.

    `sources` are globs of files in `corpus`; up to `windows` windows of each source are read, in float32. An
    adapter's name is its file's. Raises BadAdapterFile for a file that does not fit the base, BadRequest if two
    have the same name, BadRecipe if a glob matches nothing.
    """
    names = [path.stem for path in adapters]
    if len(set(names)) < len(names):
        raise BadRequest(f"two adapters have the same name: {', '.join(names)}", param="adapters")
    frozen = load_base(base)
    loaded = [read_adapter(path, _identity(frozen)) for path in adapters]
    texts = read_heldout(corpus, sources, frozen.tokenizer, window, windows)
    return compare(frozen, dict(zip(names, loaded, strict=True)), texts)


def compare(base: FrozenBase, adapters: Mapping[str, Adapter], texts: Mapping[str, Windows]) -> Report:
    """Loss and fired shares of `texts`, by source, without and with the adapters. The base must be unhosted."""
    attached = Attached(base.model, [])
    before = measure(base.model, attached, texts)
    attached.adapters = [AdapterModule.from_file(adapter) for adapter in adapters.values()]
    after = measure(base.model, attached, texts)
    sources = {
        name: SourceReport(
            before=before[name].loss,
            after=after[name].loss,
            tokens=after[name].tokens,
            fired=dict(zip(adapters, after[name].fired, strict=True)),
        )
        for name in texts
    }
    return Report(
        base=base.name,
        base_fingerprint=base.fingerprint,
        adapters={name: adapter.version for name, adapter in adapters.items()},
        window=next(iter(texts.values())).ids_NT.shape[1],
        sources=sources,
    )


def _identity(base: FrozenBase) -> Base:
    return Base(base.name, base.fingerprint, base.layers, base.d)
