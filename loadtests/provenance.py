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
from nr_serve.machine import cpuinfo

ROOT = Path(__file__).parents[1]
MATRIX_EXTENSIONS = frozenset(
    ["avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "bf16", "i8mm"]
)
"""As Linux calls them, on x86 and Arm."""


def provenance(script: str, argv: Sequence[str]) -> dict[str, Any]:
    """The command that runs `script` of this folder with those arguments, the machine, the commit, and versions."""
    return {
        "command": shlex.join(["python", f"loadtests/{Path(script).name}", *argv]),
        "machine": _machine(),
        "commit": _commit(),
        "nr_serve": __version__,
        "torch": torch.__version__,
    }


def _machine() -> dict[str, Any]:
    """The processor and, of the extensions that decide how fast bfloat16 and int8 products are, those it has."""
    extensions = sorted(MATRIX_EXTENSIONS & set(" ".join(cpuinfo("flags", "Features")).split()))
    model = "".join(cpuinfo("model name")).partition(":")[2].strip()
    return {
        "processor": model or platform.machine(),
        "extensions": extensions,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The checkout's commit, marked `-dirty` if files differ from it; None outside a checkout or without git."""
    try:
        asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
