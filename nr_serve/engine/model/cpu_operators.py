"""Operators of a decoder layer on a CPU: those of the compiled library. Knows not where they are used."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nr_serve.engine.model import cpu_library
from nr_serve.neutral.cpu_bank import Residues

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CpuOperators:
    """The compiled operators; shapes and formulas stand in their source."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]
    residues: Callable[..., Residues]
    multiply: Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor] | None
    """None where oneDNN's products are the faster ones."""
    attend_prompts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor] | None
    """By such products; None where there are none."""
    layer: Callable[..., Any] | None
    """A decoder layer by such products, in one call; None where there are none."""

    def prompts_by(
        self, dtype: torch.dtype, head_size: int
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor] | None:
        """The operator by which prompts attend with heads of that type and size; None: torch's own."""
        return self.attend_prompts if dtype is torch.bfloat16 and head_size % 16 == 0 else None


@cache
def cpu_operators() -> CpuOperators | None:
    """The operators. Waits until they are compiled, if this machine has not done so before.

    None, and the reason in the log, where they cannot be had: torch's own do the work then, more slowly.
    """
    try:
        torch.ops.load_library(cpu_library.begin().result())  # type: ignore[no-untyped-call]
    except FileNotFoundError as error:
        log.warning("no C++ compiler (%s): steps take up to twice as long; g++ would do", error.filename)
        return None
    except subprocess.CalledProcessError as error:
        log.warning("the operators for this processor cannot be compiled; torch's own are used: %s", error.stderr)
        return None
    except OSError as error:
        log.warning("the operators for this processor cannot be loaded; torch's own are used: %s", error)
        return None
    ops = torch.ops.nr_serve
    return CpuOperators(
        ops.rms_norm.default,
        ops.silu_mul.default,
        ops.rotate.default,
        ops.attend.default,
        torch.classes.nr_serve.Residues,
        ops.multiply.default if hasattr(ops, "multiply") else None,
        ops.attend_prompts.default if hasattr(ops, "attend_prompts") else None,
        torch.classes.nr_serve.Layer if hasattr(ops, "multiply") else None,
    )
