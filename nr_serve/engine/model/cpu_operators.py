"""Operators of a model's steps on a CPU: those of `cpu/`, compiled once for the processor at hand.

Knows how they are built and loaded, not where they are used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nr_serve.disk import cache_folder, whole
from nr_serve.machine import cpuinfo
from nr_serve.neutral.cpu_bank import Residues

log = logging.getLogger(__name__)
_SOURCES = Path(__file__).with_name("cpu")
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-strict-aliasing")


@dataclass(frozen=True, slots=True)
class CpuOperators:
    """The compiled operators; their shapes and formulas are documented in the C++ sources."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]
    residues: Callable[..., Residues]
    multiply: Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor] | None
    """Matrix product with packed weights; None on processors without AVX512-BF16."""
    attend_prompts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor] | None
    """Prompt attention by `multiply`'s products; None if `multiply` is None."""
    decoder: Callable[..., Any] | None
    """A model up to its output head in one call, by `multiply`'s products; None if `multiply` is None."""
    likeliest: Callable[[Tensor], Tensor]
    share_among: Callable[[int], None]
    """Set how many threads of our own share the calling thread's work from now on; 0: torch's threads share it.

    While it is not 0, torch's own operators run on one thread when called from there."""

    def prompts_by(
        self, dtype: torch.dtype, head_size: int
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor] | None:
        """The attention operator for prompts with heads of this type and size; None: use torch's own."""
        return self.attend_prompts if dtype is torch.bfloat16 and head_size % 16 == 0 else None


@cache
def begin() -> Future[Path]:
    """Start to compile the operators, if need be, in the background; `cpu_operators` waits for the result."""
    library: Future[Path] = Future()

    def make() -> None:
        try:
            library.set_result(_library())
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            library.set_exception(error)

    # A daemon thread, so that a command that fails early does not wait for the compiler.
    threading.Thread(target=make, name="nr-compiler", daemon=True).start()
    return library


@cache
def cpu_operators() -> CpuOperators | None:
    """The operators. Waits until they are compiled, if this machine has not compiled them before.

    Returns None, and logs the reason, where they cannot be had; torch's own operators are then used, more slowly.
    """
    try:
        torch.ops.load_library(begin().result())  # type: ignore[no-untyped-call]
    except FileNotFoundError as error:
        log.warning("no C++ compiler (%s): steps take up to twice as long; install g++, say", error.filename)
        return None
    except subprocess.CalledProcessError as error:
        log.warning("the operators for this processor cannot be compiled; torch's own are used: %s", error.stderr)
        return None
    except ValueError as error:
        log.warning("the compiler in CXX cannot be read, torch's own operators are used: %s", error)
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
        torch.classes.nr_serve.Decoder if hasattr(ops, "multiply") else None,
        ops.likeliest.default,
        ops.share_among.default,
    )


def _library() -> Path:
    """Path of the compiled library in the cache folder. Raises CalledProcessError, OSError, ValueError for CXX."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    sources = (path.read_bytes() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".h", ".cpp"))
    flags = _flags()
    # The key names the machine too: several machines may share a cache folder.
    machine = (*compiler, *flags, torch.__version__, " ".join([platform.machine(), *cpuinfo("flags", "Features")]))
    key = hashlib.sha256(b"\0".join([*sources, *map(str.encode, machine)])).hexdigest()[:16]
    library = cache_folder() / "operators" / f"{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        log.info("compiling operators for this processor (only at the first start)")
        started = time.perf_counter()
        # Other processes must never load half a file.
        with tempfile.TemporaryDirectory() as folder, whole(library) as part:
            _compile((*compiler, *flags), Path(folder), part)
        log.info("operators compiled in %.0f s", time.perf_counter() - started)
    return library


def _flags() -> tuple[str, ...]:
    """Flags of the compiler. Asks the system for the registers of AMX, which a process has only if it asked."""
    if torch.cpu._init_amx() or platform.machine() not in ("x86_64", "AMD64"):
        return _FLAGS
    return (*_FLAGS, "-mno-amx-tile", "-mno-amx-bf16")


def _compile(compiler: Sequence[str], folder: Path, library: Path) -> None:
    """Compile and link in separate steps: linking with -fopenmp would add a second thread pool beside torch's."""
    torch_folder = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    compiling: tuple[str | Path, ...] = (*compiler, abi, "-isystem", torch_folder / "include", "-c")
    parts = {source: folder / f"{source.stem}.o" for source in sorted(_SOURCES.glob("*.cpp"))}
    _run(*((*compiling, source, "-o", part) for source, part in parts.items()))
    libraries = ("-L", torch_folder / "lib", "-ltorch_cpu", "-lc10")
    _run((*compiler, "-shared", *parts.values(), *libraries, "-o", library))


def _run(*commands: Sequence[str | Path]) -> None:
    """Run commands in parallel and wait for all. Raises CalledProcessError if one failed."""
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    said = [process.communicate()[1] for process in running]
    for process, errors in zip(running, said, strict=True):
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
