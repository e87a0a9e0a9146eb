"""OpenAI's batch files: a request a line in, an answer a line out, in any order, told apart by `custom_id`."""

from __future__ import annotations

import fcntl
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
"""Every line of answers begins so; a shorter line that was cut begins with a part of it."""


class BatchRequest(BaseModel):
    """A line of a file of requests."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    custom_id: str = Field(min_length=1)
    method: Literal["POST"]
    url: Literal["/v1/completions", "/v1/chat/completions"]
    body: dict[str, Any]


class WrongLine(Exception):
    """A line that is no request; `code` is OpenAI's for it, `custom_id` None if it has none."""

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
    """The line for a request that was answered, or refused, with this HTTP status and body."""
    return _line(custom_id, {"status_code": status, "request_id": f"req_{uuid4().hex}", "body": body}, None)


def error_line(wrong: WrongLine, number: int) -> bytes:
    """The line for line `number` of the requests, counted from 1, which is none."""
    return _line(wrong.custom_id, None, {"code": wrong.code, "message": wrong.message, "line": number})


def take_up(path: Path) -> tuple[BinaryIO, set[str]]:
    """A file for answers, open to go on writing, and the custom_ids that an earlier run answered in it.

    What failed, and a last line cut short, is dropped from the file: it is to be done again. The file is replaced
    whole or not at all, and locked until it is closed. Raises BadRequest for a file of something else or one that
    another run writes to, and OSError.
    """
    file = path.open("ab")
    if not path.is_file():  # nothing that could be taken up, such as a pipe
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
    """Keep other runs from the file. Raises BadRequest if one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _replaced(file, path):
            raise BlockingIOError
    except BlockingIOError as error:
        raise BadRequest(f"another run writes to {path}") from error


def _replaced(file: BinaryIO, path: Path) -> bool:
    """Whether another run has put a new file in the place of this one since it was opened."""
    return not os.path.samestat(os.fstat(file.fileno()), path.stat())


def _without_failures(path: Path) -> tuple[BinaryIO | None, set[str]]:
    """The custom_ids answered in a file, and the new file in its place, locked; None if it could stay."""
    kept: set[str] = set()
    part = path.with_name(f".{path.name}.part")
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
    """The custom_id of a line that holds an answer; None if the request failed or the line was cut short."""
    if not line.endswith(b"\n") and _OPENING.startswith(line[: len(_OPENING)]):
        return None
    try:
        data = from_json(line)
        custom_id, response = data["custom_id"], data["response"]
        return custom_id if response is not None and response["status_code"] == 200 else None
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{path} line {number} is no answer to a batch request; write to another file") from error


def _custom_id(data: Any) -> str | None:
    custom_id = data.get("custom_id") if isinstance(data, dict) else None
    return custom_id if isinstance(custom_id, str) else None


def _line(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    body = {"id": f"batch_req_{uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
