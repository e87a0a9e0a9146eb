"""inspect: what is in an adapter file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic_settings import CliPositionalArg

from nr_serve.commands.command import Command

if TYPE_CHECKING:
    from nr_serve.neutral.format import Adapter


class Inspect(Command):
    """Check an adapter file and print what is in it."""

    file: CliPositionalArg[Path] = Field(description="the adapter's .safetensors file")
    json_: bool = Field(False, alias="json", description="print JSON")


def inspect(command: Inspect) -> int:
    """Read the whole file, as the server would; print its content."""
    from nr_serve.neutral.format import naming, read_adapter

    with naming(command.file):
        adapter = read_adapter(command.file)
    summary = _summary(adapter)
    if command.json_:
        print(json.dumps(summary, ensure_ascii=False, indent=2))
        return 0
    nested = {name: summary.pop(name) for name in ("recipe", "results")}
    for name, value in summary.items():
        print(f"{name + ':':<18}{value}")
    for name, value in nested.items():
        print(f"{name + ':':<18}" + ("none" if not value else ""))
        for line in _lines(value):
            print(f"  {line}")
    return 0


def _summary(adapter: Adapter) -> dict[str, Any]:
    info = adapter.info
    blocks = [block for block in adapter.blocks if block is not None]
    widths = sorted({block.h for block in blocks})
    return {
        "version": adapter.version,
        "domain": info.domain,
        "base": info.base,
        "base_fingerprint": info.base_fingerprint,
        "layers": info.layers,
        "blocks": len(blocks),
        "d": info.d,
        "h": widths[0] if len(widths) == 1 else widths,
        "gate": info.gate,
        "carry": info.carry,
        "threshold": info.threshold,
        "parameters": adapter.parameters,
        "bytes": adapter.nbytes,
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for b in blocks for t in (b.gate, b.w_in)}),
        "recipe": dict(info.recipe),
        "results": dict(info.results),
    }


def _lines(value: Any, path: str = "") -> list[str]:
    """A nested dict as lines of `path: value`."""
    if isinstance(value, dict):
        return [line for key, each in value.items() for line in _lines(each, f"{path}.{key}" if path else str(key))]
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return [f"{path}: {shown}"]
