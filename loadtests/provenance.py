"""Where a measurement comes from: the command, the machine and the commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nr_serve import __version__

ROOT = Path(__file__).parents[1]


def provenance(script: str, argv: Sequence[str]) -> dict[str, Any]:
    """The command that runs `script` of this folder with those arguments, the machine, the commit, and versions."""
    return {
        "command": shlex.join(["python", f"loadtests/{Path(script).name}", *argv]),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "commit": _commit(),
        "nr_serve": __version__,
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name as Linux tells it, or its architecture."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The checkout's commit, marked `-dirty` if files differ from it; None outside a checkout or without git."""
    try:
        asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
