"""The library of operators for a CPU: the sources in `cpu/`, compiled once for the processor at hand.

Torch-free, so that a start can begin with it: torch itself takes seconds to import.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cache
from importlib.metadata import distribution, version
from pathlib import Path

from nr_serve.disk import cache_folder
from nr_serve.engine.model.processor import cpuinfo

log = logging.getLogger(__name__)
_SOURCES = Path(__file__).with_name("cpu")
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-strict-aliasing")


@cache
def begin() -> Future[Path]:
    """Begin to compile the library, if need be, beside what is done until its file is waited for.

    The future raises CalledProcessError, FileNotFoundError where there is no compiler, or another OSError.
    """
    library: Future[Path] = Future()

    def make() -> None:
        try:
            library.set_result(_library())
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            library.set_exception(error)

    # A daemon: nobody who mistyped a folder waits for the compiler.
    threading.Thread(target=make, name="nr-compiler", daemon=True).start()
    return library


def _library() -> Path:
    """The compiled file, in the cache folder."""
    compiler = os.environ.get("CXX", "c++")
    sources = (path.read_bytes() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".h", ".cpp"))
    # A cache folder may be shared by several machines.
    machine = (compiler, *_FLAGS, version("torch"), " ".join([platform.machine(), *cpuinfo("flags", "Features")]))
    key = hashlib.sha256(b"\0".join([*sources, *map(str.encode, machine)])).hexdigest()[:16]
    library = cache_folder() / "operators" / f"{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        log.info("compiling operators for this processor, which is done once")
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            # Whole or not at all, whoever else does the same.
            os.replace(_compiled(compiler, Path(folder)), library)
        log.info("operators compiled in %.0f s", time.perf_counter() - started)
    return library


def _compiled(compiler: str, folder: Path) -> Path:
    """Compile and link apart: linking with -fopenmp would bring a second pool of threads beside torch's."""
    torch_folder, library = Path(str(distribution("torch").locate_file("torch"))), folder / "operators.so"
    compiling = (compiler, *_FLAGS, "-isystem", torch_folder / "include", "-c")
    parts = {source: folder / f"{source.stem}.o" for source in sorted(_SOURCES.glob("*.cpp"))}
    _run(*((*compiling, source, "-o", part) for source, part in parts.items()))
    libraries = ("-L", torch_folder / "lib", "-ltorch_cpu", "-lc10")
    _run((compiler, "-shared", *parts.values(), *libraries, "-o", library))
    return library


def _run(*commands: Sequence[str | Path]) -> None:
    """Run commands at once and wait for all. Raises CalledProcessError for one that failed."""
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    said = [process.communicate()[1] for process in running]
    for process, errors in zip(running, said, strict=True):
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
