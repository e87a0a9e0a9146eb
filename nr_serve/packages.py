"""Downloads files from package registries, through the registries' own clients.

Knows pip; knows nothing about the contents of packages.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nr_serve.errors import DownloadFailed

REPORTED_LINES = 6  # of a client's error output: enough to see why, short enough to read


def pip_download(requirement: str, folder: Path, *, wheel_only: bool = True) -> Path:
    """Download one distribution, without its dependencies, and return its file.

    `requirement` is what pip takes ("name==1.2.3"); `folder` must exist and be empty. With `wheel_only`, source
    distributions are not used, because pip would run their build code. Raises `DownloadFailed`, with the end of
    pip's output, if pip is missing or fails.
    """
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--quiet"]
    if wheel_only:
        options.append("--only-binary=:all:")
    run_client([sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement])
    files = sorted(folder.iterdir())
    if len(files) != 1:
        raise DownloadFailed(f"pip download {requirement} left {len(files)} files, expected one")
    return files[0]


def run_client(command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a registry's client and return its output; if it fails, raise `DownloadFailed` with the output's end."""
    shown = " ".join(command[:4])
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)
    except OSError as error:
        raise DownloadFailed(f"cannot run {command[0]}: {error.strerror or error}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-REPORTED_LINES:]
        raise DownloadFailed(f"'{shown} ...' failed with exit status {done.returncode}:\n" + "\n".join(said))
    return done.stdout
