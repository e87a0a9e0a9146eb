"""Routes that take JSON: large bodies are read on the tokenizer's thread, so that running streams do not wait."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, cast

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from nr_serve.api.body import MOST_BRACKETS
from nr_serve.api.context import Context
from nr_serve.api.errors import GONE, error_response, invalid_request
from nr_serve.api.openapi import AnswerRoute
from nr_serve.api.request_state import note_arrival
from nr_serve.errors import BadRequest, NrError

LARGE_BYTES = 2**18
MANY_BRACKETS = 2**14
"""From either on a body is read on another thread; smaller ones take less than about 10 ms."""


class BodyRoute(AnswerRoute):
    """A route whose body, if it is large, is read on another thread."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler."""
        handle = super().get_route_handler()
        model = None if self.body_field is None else self.body_field.field_info.annotation

        async def handler(request: Request) -> Response:
            try:
                return await handle(
                    request if model is None else _BodyRequest(request, cast(type[BaseModel], model))
                )
            except _Refused as refused:
                return error_response(refused.error)
            except _Gone as gone:
                raise ClientDisconnect from gone

        return handler


class _Refused(HTTPException):
    """Carries a refusal: the only kind of error that FastAPI passes on while it reads a body."""

    def __init__(self, error: NrError) -> None:
        super().__init__(error.status)
        self.error = error


class _Gone(HTTPException):
    """The client went away before its body was whole. FastAPI would take ClientDisconnect for a wrong body."""

    def __init__(self) -> None:
        super().__init__(GONE, "the client went away")


class _BodyRequest(Request):
    """A request whose body must be a `model`."""

    def __init__(self, request: Request, model: type[BaseModel]) -> None:
        super().__init__(request.scope, request.receive)
        self._model = model

    async def body(self) -> bytes:
        """The whole body."""
        try:
            return await super().body()
        except ClientDisconnect as gone:
            raise _Gone from gone

    async def json(self) -> Any:
        """The body as parsed JSON, or as a `model` if it is large."""
        data = await self.body()
        note_arrival()
        context: Context = self.app.state.context
        try:
            brackets = data.count(b"[") + data.count(b"{")
            if brackets > MOST_BRACKETS:
                raise BadRequest(f"the body holds more than {MOST_BRACKETS:,} opening brackets")
            if len(data) < LARGE_BYTES and brackets < MANY_BRACKETS:
                return parse_json(data)
            return await context.text(partial(_read, data, self._model))
        except NrError as error:
            raise _Refused(error) from error


def parse_json(data: bytes) -> Any:
    """Parse a body. Raises JSONDecodeError if it is not JSON, and BadRequest if it cannot be read at all."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise BadRequest("the body is not JSON: it is not UTF-8") from error
    except json.JSONDecodeError:
        raise  # FastAPI reports the position
    except ValueError as error:
        raise BadRequest("the body holds a number of too many digits") from error


def _read(data: bytes, model: type[BaseModel]) -> BaseModel:
    try:
        return model.model_validate(parse_json(data))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        raise invalid_request([{**fault, "loc": ("body", *fault["loc"])} for fault in faults]) from error
