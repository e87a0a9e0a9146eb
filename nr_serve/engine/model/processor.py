"""The processor, as Linux describes it. Torch-free."""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpuinfo(*names: str) -> list[str]:
    """The first core's lines in /proc/cpuinfo that start with one of `names`; an empty list on other systems."""
    lines = _CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if _CPUINFO.exists() else []
    return [line for line in lines if line.startswith(names)]
