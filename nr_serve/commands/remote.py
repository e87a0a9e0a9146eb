"""load-adapter, unload-adapter, list-adapters: changes to a running server."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from nr_serve.api.responses import Adapter
from nr_serve.commands.command import Remote
from nr_serve.commands.table import table
from nr_serve.errors import Conflict


class LoadAdapter(Remote):
    """Upload an adapter file to a running server and attach it."""

    file: CliPositionalArg[Path] = Field(description="the adapter's .safetensors file")
    name: str | None = Field(None, description="name to serve it under (default: the file's)")
    replace: bool = Field(False, description="replace the adapter of this name, if there is one")
    pin: bool | None = Field(None, description="never give up its slot (default: as the adapter it replaces)")
    threshold: float | None = Field(None, description="a gate fires above this (default: the file's own)")
    route: bool | None = Field(
        None, description="let it act for the base's name too (default: as the adapter it replaces, or yes)"
    )


class UnloadAdapter(Remote):
    """Unload an adapter from a running server."""

    name: CliPositionalArg[str] = Field(description="the adapter's name")


class ListAdapters(Remote):
    """List a running server's adapters."""


def load_adapter(command: LoadAdapter) -> int:
    """Load; print name, version, slot, seconds and leak, and on stderr what may not have been meant."""
    with command.client() as client:
        before = client.adapters()
        try:
            adapter = client.load(
                command.file,
                command.name,
                replace=command.replace,
                pinned=command.pin,
                threshold=command.threshold,
                routed=command.route,
            )
        except Conflict as error:  # the server does not know the command's flags
            raise Conflict(f"{error.message} (--replace, --name)", param=error.param) from error
    print(
        f"{adapter['name']}: version {adapter['version']}, {_place(adapter)}, "
        f"loaded in {adapter['load_seconds']:.2f} s, leak {_leak(adapter)}"
    )
    for warning in _warnings(adapter, before):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def unload_adapter(command: UnloadAdapter) -> int:
    """Unload; print the name."""
    with command.client() as client:
        adapter = client.unload(command.name)
    print(f"{adapter['name']}: unloaded")
    return 0


def list_adapters(command: ListAdapters) -> int:
    """Print a table of the adapters."""
    with command.client() as client:
        adapters = client.adapters()
    if not adapters:
        print("no adapter is loaded")
        return 0
    header = ("NAME", "VERSION", "DOMAIN", "STATE", "SLOT", "MB", "THRESHOLD", "RUNNING", "LEAK", "FIRED")
    for line in table([header, *map(_row, adapters)]):
        print(line)
    return 0


def _warnings(adapter: Adapter, before: Sequence[Adapter]) -> Iterator[str]:
    """What loading this adapter, beside or in place of those before, did that may not have been meant."""
    name, domain = adapter["name"], adapter["domain"]
    for other in before:
        if other["name"] == name:
            if other["domain"] != domain:
                yield f"{name} was for {other['domain'] or 'no domain'} before, and is for {domain or 'none'} now"
        elif domain and other["domain"] == domain and other["routed"] and adapter["routed"]:
            yield (
                f"requests to the base's name get the sum of {other['name']} and {name} on {domain}, which is "
                "worse than either; unload one, or load one again with --replace --no-route"
            )


def _row(adapter: Adapter) -> tuple[str, ...]:
    rate = adapter["gates"]["fired_rate"]
    return (
        adapter["name"] + _marks(adapter),
        adapter["version"],
        adapter["domain"] or "-",
        adapter["state"],
        "-" if adapter["slot"] is None else str(adapter["slot"]),
        f"{adapter['bytes'] / 1e6:.1f}",
        f"{adapter['threshold']:g}",
        str(adapter["requests"]),
        _leak(adapter),
        "-" if rate is None else f"{rate:.2%}",
    )


def _marks(adapter: Adapter) -> str:
    marks = {"pinned": adapter["pinned"], "not routed": not adapter["routed"]}
    shown = [mark for mark, is_so in marks.items() if is_so]
    return f" ({', '.join(shown)})" if shown else ""


def _leak(adapter: Adapter) -> str:
    """The highest leak on any probe text, with the text's name if it is visibly above 0."""
    if adapter["neutrality"] is None:
        return "measuring" if adapter["measuring"] else "-"
    name, worst = max(adapter["neutrality"].items(), key=lambda item: item[1]["leak"])
    shown = f"{worst['leak']:.2%}"
    return shown if shown == "0.00%" else f"{shown} ({name})"


def _place(adapter: Adapter) -> str:
    return adapter["state"] if adapter["slot"] is None else f"slot {adapter['slot']}"
