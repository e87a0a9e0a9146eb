"""Files on the server that clients may name: inside the allowed folders, once links are followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nr_serve.errors import BadRequest, Forbidden, NotFound, TooLarge


@contextmanager
def allowed_file(folders: Sequence[Path], given: str, param: str, max_bytes: int) -> Iterator[Path]:
    """A path to exactly the file that was checked; valid until the block ends, even if files are moved meanwhile.

    A folder stands for the only .safetensors file in it. Raises Forbidden outside the allowed folders, without
    saying what exists there; or NotFound, BadRequest or TooLarge.
    """
    if not folders:
        raise Forbidden("this server loads from no folder; start it with --adapter-dir, or upload", param=param)
    try:
        root, path = _find([folder.resolve() for folder in folders], given, param)
        handle = _open_beneath(root, path)
    # The path is too long, was changed meanwhile, has a zero byte, or a cycle of links.
    except (OSError, ValueError, RuntimeError) as error:
        raise BadRequest("this is not a usable path", param=param) from error
    try:
        size = os.fstat(handle).st_size
        if size > max_bytes:
            raise TooLarge(f"the file has {size:,} bytes; the limit is {max_bytes:,} (--max-adapter-gib)")
        yield Path(f"/dev/fd/{handle}")
    finally:
        os.close(handle)


def _find(roots: Sequence[Path], given: str, param: str) -> tuple[Path, Path]:
    """The allowed folder, and the file in it with links resolved."""
    inside = [(root, path) for root in roots if (path := (root / given).resolve()).is_relative_to(root)]
    if not inside:
        raise Forbidden("the path is outside the folders this server may load from", param=param)
    for root, path in inside:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if len(files) == 1 and files[0].is_file() and files[0].resolve().is_relative_to(root):
            return root, files[0].resolve()
    raise NotFound("no adapter found at this path; paths are relative to --adapter-dir", param=param)


def _open_beneath(root: Path, path: Path) -> int:
    """Open `path` one folder at a time from `root`, following no link created since the check. Raises OSError."""
    passing = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW  # folders need not be readable
    reading = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a file may have become a pipe since
    parts = path.relative_to(root).parts
    handle = os.open(root, passing)
    for i, part in enumerate(parts, start=1):
        folder = handle
        try:
            handle = os.open(part, reading if i == len(parts) else passing, dir_fd=folder)
        finally:
            os.close(folder)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("not a file any more")
    return handle
