"""OpenAI's batch files: a request a line in, an answer a line out, in any order, told apart by `custom_id`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal
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


def take_up(path: Path) -> set[str]:
    """The custom_ids that an earlier run answered, as its file of answers `path` says; none if there is no file.

    What failed, and a last line cut short, is dropped from the file: it is to be done again. The file is replaced
    whole or not at all. Raises BadRequest for a file of something else, and OSError.
    """
    if not path.is_file():  # or nothing that could be taken up, such as a pipe
        return set()
    path = path.resolve()
    kept: set[str] = set()
    part = path.with_name(f".{path.name}.part")
    try:
        with path.open("rb") as old, part.open("wb") as new:
            for number, line in enumerate(old, 1):
                custom_id = _answered(line, path, number)
                if custom_id is not None:
                    kept.add(custom_id)
                    new.write(line)
        if part.stat().st_size < path.stat().st_size:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return kept


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
