"""Every error as OpenAI's clients read it: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from nr_serve.api.responses import ErrorAnswer
from nr_serve.errors import BY_STATUS, BadRequest, NrError, TooManyRequests, Unauthorized, fault_text

_TYPES = {status: kind.type for status, kind in BY_STATUS.items()} | {405: "MethodNotAllowedError"}
GONE = 499
"""Status for the access log: the client went away, and nobody reads the answer."""
_LONGEST_MESSAGE, _LONGEST_PARAM = 2000, 200
"""In characters; both may contain text that the client sent."""
_TYPE_NAMES = {"str", "int", "float", "bool", "dict", "none", "nullable"}
"""Names of union branches in pydantic's error locations; no field of ours has such a name."""


def error_body(error: NrError) -> ErrorAnswer:
    """The error as a JSON body."""
    return _body(error.message, error.type, error.param, error.status)


def error_response(error: NrError) -> JSONResponse:
    """The error as an HTTP response."""
    headers = {}
    if isinstance(error, TooManyRequests):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


def error_type(status: int) -> str:
    """The `type` of every error with this HTTP status."""
    return _TYPES.get(status, "InvalidRequestError")


def add_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every error in this format, except bugs, which `AccessLog` answers."""
    app.add_exception_handler(NrError, _nr_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)


async def _nr_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, NrError)
    return error_response(error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid_request(error.errors()))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"Invalid URL ({request.method} {request.url.path})"
    elif error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path}"
    body = _body(message, error_type(error.status_code), None, error.status_code)
    return JSONResponse(body, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> BadRequest:
    """One message for the faults of a body, naming the field."""
    first = errors[0]
    param = _param(first["loc"])
    same_field = [each for each in errors if _param(each["loc"]) == param]
    if _is_branch(first["loc"][-1]):  # an unknown field in another branch of the union says more
        first = next((each for each in same_field if each["type"] == "extra_forbidden"), first)
    if first["type"] == "json_invalid":
        return BadRequest(f"the body is not JSON: {first.get('ctx', {}).get('error', 'cannot be read')}")
    if first["type"] in ("model_attributes_type", "model_type") and param is None:
        return BadRequest("a JSON object is required, sent as Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        *place, name = first["loc"]
        within = _param(place)
        param = f"{within}.{name}" if within else str(name)
        return BadRequest(f"Unrecognized request argument supplied: {param}", param=param)
    if first["type"] == "missing":
        return BadRequest(f"`{param}` is required" if param else "a JSON body is required", param=param)
    message = ", or: ".join(dict.fromkeys(fault_text(e) for e in same_field[:4]))
    named = _named(message)
    if named is not None:
        return BadRequest(message, param=f"{param}.{named}" if param else named)
    return BadRequest(f"{param}: {message}" if param else message, param=param)


def _named(message: str) -> str | None:
    """The field that a message of ours names first, in backquotes: rules over several fields have no location."""
    match = re.match(r"`(\w+)`", message)
    return match[1] if match else None


def _is_branch(part: str | int) -> bool:
    """Whether a part of a location is pydantic's name for a union's branch, which clients do not know."""
    return isinstance(part, str) and (part in _TYPE_NAMES or "-" in part or "[" in part)


def _param(place: Sequence[str | int]) -> str | None:
    """A location as a path: `("body", "messages", 0, "content", "str")` becomes `messages[0].content`."""
    name = ""
    for part in place[1:]:
        if isinstance(part, int):
            name += f"[{part}]" if name else ""
        elif _is_branch(part):
            break
        else:
            name += f".{part}" if name else part
    return name or None


def _body(message: str, kind: str, param: str | None, status: int) -> ErrorAnswer:
    return {
        "error": {
            "message": _sendable(message[:_LONGEST_MESSAGE]),
            "type": kind,
            "param": param and _sendable(param[:_LONGEST_PARAM]),
            "code": status,
        }
    }


def _sendable(text: str) -> str:
    """Replace what UTF-8 cannot encode: the name of an unknown field, or a path, may hold anything."""
    return text.encode(errors="replace").decode()
