"""OpenAI's batch files: one request per line in, one answer per line out, in any order, matched by `custom_id`."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from nr_serve.errors import BadRequest, faults

_OPENING = b'{"id":"batch_req_'
"""Beginning of every line of answers; a line cut shorter than this is a prefix of it."""


class BatchRequest(BaseModel):
    """A line of a file of requests."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    custom_id: str = Field(min_length=1)
    method: Literal["POST"]
    url: Literal["/v1/completions", "/v1/chat/completions"]
    body: dict[str, Any]


class WrongLine(Exception):
    """A line that is not a request. `code`: OpenAI's error code; `custom_id`: None if the line has none."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.custom_id = custom_id


def read_request(line: bytes) -> BatchRequest:
    """Check one line. Raises WrongLine."""
    try:
        data = from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise WrongLine("invalid_json_line", f"the line is not JSON: {error}") from error
    try:
        return BatchRequest.model_validate(data)
    except ValidationError as error:
        raise WrongLine("invalid_request", faults(error), _custom_id(data)) from error


def answer_line(custom_id: str, status: int, body: Any) -> bytes:
    """The output line for a request that was answered, or refused, with this HTTP status and body."""
    return _line(custom_id, {"status_code": status, "request_id": f"req_{uuid4().hex}", "body": body}, None)


def error_line(wrong: WrongLine, number: int) -> bytes:
    """The output line for an invalid input line; `number` is its line number, counted from 1."""
    return _line(wrong.custom_id, None, {"code": wrong.code, "message": wrong.message, "line": number})


def take_up(path: Path) -> tuple[BinaryIO, set[str]]:
    """Open a file of answers for appending; also returns the custom_ids that an earlier run answered in it.

    Failed requests, and a last line that was cut short, are dropped from the file, to be done again. The file is
    replaced completely or not at all, and locked until it is closed. Raises BadRequest for a file that holds
    something else or that another run writes to, and OSError.
    """
    file = path.open("ab")
    if not path.is_file():  # has no earlier answers, such as a pipe
        return file, set()
    try:
        _lock(file, path)
        new, kept = _without_failures(path.resolve())
    except BaseException:
        file.close()
        raise
    if new is None:
        return file, kept
    file.close()
    return new, kept


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock the file against other runs. Raises BadRequest if another run has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _replaced(file, path):
            raise BlockingIOError
    except BlockingIOError as error:
        raise BadRequest(f"another run writes to {path}") from error


def _replaced(file: BinaryIO, path: Path) -> bool:
    """Whether another run has replaced this file since it was opened."""
    return not os.path.samestat(os.fstat(file.fileno()), path.stat())


def _without_failures(path: Path) -> tuple[BinaryIO | None, set[str]]:
    """The locked file without failures that replaced this one (None: unchanged), and the answered custom_ids."""
    kept: set[str] = set()
    # The name may be as long as allowed; the same one each time, so that killed runs do not leave many.
    part = path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:16]}.part")
    new = part.open("wb")
    try:
        fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with path.open("rb") as old:
            for number, line in enumerate(old, 1):
                custom_id = _answered(line, path, number)
                if custom_id is not None:
                    kept.add(custom_id)
                    new.write(line)
        new.flush()
        if part.stat().st_size < path.stat().st_size:
            shutil.copymode(path, part)
            os.replace(part, path)
            return new, kept
    except BaseException:
        new.close()
        raise
    finally:
        part.unlink(missing_ok=True)
    new.close()
    return None, kept


def _answered(line: bytes, path: Path, number: int) -> str | None:
    """The custom_id of a successful answer's line; None if the request failed or the line was cut short."""
    if not line.endswith(b"\n") and _OPENING.startswith(line[: len(_OPENING)]):
        return None
    try:
        data = from_json(line)
        custom_id, response = data["custom_id"], data["response"]
        if response is None or response["status_code"] != 200:
            return None
        if not isinstance(custom_id, str):
            raise TypeError("custom_id is not text")
        return custom_id
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{path} line {number} is no answer to a batch request; write to another file") from error


def _custom_id(data: Any) -> str | None:
    custom_id = data.get("custom_id") if isinstance(data, dict) else None
    return custom_id if isinstance(custom_id, str) else None


def _line(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    body = {"id": f"batch_req_{uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
