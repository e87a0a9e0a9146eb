"""Answers in the OpenAPI document: taken from the routes' return annotations, with examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from fastapi.routing import APIRoute

from nr_serve.api.encode import Json
from nr_serve.api.responses import ChatChunk, ChatCompletion, Completion, Detokenized, ErrorAnswer, Tokens
from nr_serve.api.sse import DONE, event
from nr_serve.errors import (
    BadRequest,
    NotFound,
    NrError,
    TimedOut,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)

Responses = dict[int | str, dict[str, Any]]
_ANYWHERE: tuple[type[NrError], ...] = (
    BadRequest,
    Unauthorized,
    NotFound,
    TooLarge,
    TooManyRequests,
    NrError,
    Unavailable,
    TimedOut,
)


class AnswerRoute(APIRoute):
    """A route documented with the body type of the `Json` that its endpoint returns, and with possible errors."""

    def __init__(
        self, path: str, endpoint: Callable[..., Any], *, responses: Responses | None = None, **settings: Any
    ) -> None:
        documented = refusals() | (responses or {})
        form = _form(endpoint)
        if form is not None:
            documented[200] = answer(form) | documented.get(200, {})
        settings["response_model"] = None  # else FastAPI would validate each response
        super().__init__(path, endpoint, responses=documented, **settings)


def _form(endpoint: Callable[..., Any]) -> type | None:
    """The body type of the `Json` in an endpoint's return annotation (maybe in a union); None without one."""
    returned = get_type_hints(endpoint)["return"]
    for kind in (returned, *get_args(returned)):
        if get_origin(kind) is Json:
            form: type = get_args(kind)[0]
            return form
    return None


def answer(form: type) -> dict[str, Any]:
    """OpenAPI response with this body type, described by the type's docstring."""
    return {"model": form, "description": form.__doc__}


def streamed(events: str) -> Responses:
    """OpenAPI response that may also be a stream; `events` is an example."""
    schema = {"type": "string", "description": "events; the data of each is a chunk, of the last [DONE]"}
    return {200: {"content": {"text/event-stream": {"schema": schema, "example": events}}}}


def refusals(*kinds: type[NrError]) -> Responses:
    """OpenAPI responses, by status, for the errors of any route and those of `kinds`."""
    return {kind.status: _refusal(kind) for kind in (*_ANYWHERE, *kinds)}


def _refusal(kind: type[NrError]) -> dict[str, Any]:
    example: ErrorAnswer = {
        "error": {"message": "what is wrong", "type": kind.type, "param": "prompt", "code": kind.status}
    }
    return {
        "model": ErrorAnswer,
        "description": (kind.__doc__ or "").strip().split("\n")[0],
        "content": {"application/json": {"example": example}},
    }


_COMPLETION: Completion = {
    "id": "cmpl-6f0c",
    "object": "text_completion",
    "created": 1790000000,
    "model": "smollm2-135m-instruct",
    "system_fingerprint": "f00d",
    "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
}
_WHOLE_COMPLETION: Completion = {
    **_COMPLETION,
    "usage": {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    },
}
_CHAT: ChatCompletion = {
    "id": "chatcmpl-6f0c",
    "object": "chat.completion",
    "created": 1790000000,
    "model": "smollm2-135m-instruct",
    "system_fingerprint": "f00d",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Paris.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ],
    "usage": {
        "prompt_tokens": 31,
        "completion_tokens": 3,
        "total_tokens": 34,
        "prompt_tokens_details": {"cached_tokens": 16},
    },
}
_CHAT_CHUNK: ChatChunk = {
    "id": "chatcmpl-6f0c",
    "object": "chat.completion.chunk",
    "created": 1790000000,
    "model": "smollm2-135m-instruct",
    "system_fingerprint": "f00d",
    "choices": [
        {"index": 0, "delta": {"content": "Paris."}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ],
}
_TOKENS: Tokens = {"count": 2, "max_model_len": 8192, "tokens": [19556, 17], "token_strs": ["Hello", "!"]}
_DETOKENIZED: Detokenized = {"prompt": "Hello!"}

EXAMPLES: dict[str, Mapping[str, object]] = {
    "Completion": _WHOLE_COMPLETION,
    "ChatCompletion": _CHAT,
    "Tokens": _TOKENS,
    "Detokenized": _DETOKENIZED,
}
"""Examples, by schema name."""
COMPLETION_EVENTS = (event(_COMPLETION) + DONE).decode()
CHAT_EVENTS = (event(_CHAT_CHUNK) + DONE).decode()
