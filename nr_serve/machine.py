"""The machine, as Linux describes it: its processor, its memory, and what control groups allow. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePath

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def cpuinfo(*names: str) -> list[str]:
    """The first core's lines in /proc/cpuinfo that start with one of `names`; an empty list on other systems."""
    lines = _CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if _CPUINFO.exists() else []
    return [line for line in lines if line.startswith(names)]


def cpu_limit() -> int | None:
    """CPUs that this process may use by its control groups, such as a container's; None: all.

    The least limit of its group and those above it, rounded up.
    """
    limits = (_cpus(group / "cpu.max") for group in _groups())
    return min((limit for limit in limits if limit is not None), default=None)


def memory_left() -> int | None:
    """Bytes of memory that this process may still take without swapping; None if the system does not tell.

    What the machine has, or less if its control group, or one above it, may have less. Files that were read stay in
    memory as long as nothing else needs it, so what they take counts as free.
    """
    lefts = [_group_left(group) for group in _groups()]
    if _MEMINFO.exists():
        lefts.append(_fields(_MEMINFO).get("MemAvailable:"))
    return min((left for left in lefts if left is not None), default=None)


def _groups() -> Iterator[Path]:
    """The folders of this process's control group (version 2) and of those above it."""
    lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines() if _OWN_GROUPS.exists() else []
    for own in (PurePath(line.removeprefix("0::/")) for line in lines if line.startswith("0::/")):
        yield from (_GROUPS / group for group in (own, *own.parents))


def _cpus(file: Path) -> int | None:
    if not file.exists():
        return None
    quota, period = file.read_text(encoding="utf-8").split()  # microseconds, or "max", of so many
    return None if quota == "max" else math.ceil(int(quota) / int(period))


def _group_left(group: Path) -> int | None:
    limit, taken, kinds = (group / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or (most := limit.read_text(encoding="utf-8").strip()) == "max":
        return None
    of_files = sum(_fields(kinds).get(name, 0) for name in ("active_file", "inactive_file"))
    return max(0, int(most) - int(taken.read_text(encoding="utf-8")) + of_files)


def _fields(file: Path) -> dict[str, int]:
    """Lines of a name, a number, and maybe kB for its unit; in bytes."""
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {name: int(number) * (1024 if unit else 1) for name, number, *unit in lines}
