"""The processor, as Linux describes it. Torch-free."""

from __future__ import annotations

import math
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def cpuinfo(*names: str) -> list[str]:
    """The first core's lines in /proc/cpuinfo that start with one of `names`; an empty list on other systems."""
    lines = _CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if _CPUINFO.exists() else []
    return [line for line in lines if line.startswith(names)]


def cpu_limit() -> int | None:
    """CPUs that this process's control group (version 2), such as a container, may use, rounded up; None: all."""
    groups = _OWN_GROUPS.read_text(encoding="utf-8").splitlines() if _OWN_GROUPS.exists() else []
    own = next((line.removeprefix("0::/") for line in groups if line.startswith("0::/")), None)
    limits = None if own is None else _GROUPS / own / "cpu.max"  # microseconds, or "max", and of how many
    if limits is None or not limits.exists():
        return None
    quota, period = limits.read_text(encoding="utf-8").split()
    return None if quota == "max" else math.ceil(int(quota) / int(period))
