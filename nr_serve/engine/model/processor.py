"""The processor, as Linux describes it. Torch-free."""

from __future__ import annotations

import math
from pathlib import Path, PurePath

_CPUINFO = Path("/proc/cpuinfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def cpuinfo(*names: str) -> list[str]:
    """The first core's lines in /proc/cpuinfo that start with one of `names`; an empty list on other systems."""
    lines = _CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if _CPUINFO.exists() else []
    return [line for line in lines if line.startswith(names)]


def cpu_limit() -> int | None:
    """CPUs that this process may use by its control groups (version 2), such as a container's; None: all.

    The least limit of its group and those above it, rounded up.
    """
    groups = _OWN_GROUPS.read_text(encoding="utf-8").splitlines() if _OWN_GROUPS.exists() else []
    own = next((line.removeprefix("0::/") for line in groups if line.startswith("0::/")), None)
    if own is None:
        return None
    files = (_GROUPS / group / "cpu.max" for group in (PurePath(own), *PurePath(own).parents))
    limits = [_limit(file) for file in files if file.exists()]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(file: Path) -> int | None:
    quota, period = file.read_text(encoding="utf-8").split()  # microseconds, or "max", of so many
    return None if quota == "max" else math.ceil(int(quota) / int(period))
