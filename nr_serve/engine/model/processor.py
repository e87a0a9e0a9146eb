"""What Linux tells of the machine: its processor, and whether it has a GPU. Torch-free."""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
"""NVIDIA's, AMD's, and either's under Windows."""


def cpuinfo(*names: str) -> list[str]:
    """The lines on the first core that begin with one of the names, which differ by kind; none on other systems."""
    lines = _CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if _CPUINFO.exists() else []
    return [line for line in lines if line.startswith(names)]


def may_have_gpu() -> bool:
    """Whether there is a driver through which torch may see a GPU."""
    return any(driver.exists() for driver in _GPU_DRIVERS)
