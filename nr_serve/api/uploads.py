"""A body streamed to a file, so that no upload is ever whole in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import Request

from nr_serve.errors import BadRequest, TooLarge, Unavailable

_WRITE_BYTES = 2**20


async def receive_file(request: Request, path: Path, max_bytes: int) -> None:
    """Write the request's body to `path`.

    Raises TooLarge, BadRequest if it is empty, Unavailable if it cannot be stored.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        taken = await _write(request, path, max_bytes)
    except OSError as error:
        raise Unavailable(f"the upload could not be stored: {error.strerror}") from error
    if taken == 0:
        raise BadRequest("the body is empty; send the adapter's file")


async def _write(request: Request, path: Path, max_bytes: int) -> int:
    """Write the body; return the number of bytes written."""
    taken, held = 0, bytearray()
    with path.open("wb") as file:
        async for chunk in request.stream():
            taken += len(chunk)
            if taken > max_bytes:
                raise _too_large(max_bytes)
            held += chunk
            if len(held) >= _WRITE_BYTES:
                await asyncio.to_thread(file.write, bytes(held))
                held.clear()
        await asyncio.to_thread(file.write, bytes(held))
    return taken


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the file is larger than {max_bytes:,} bytes (--max-adapter-gib)")
