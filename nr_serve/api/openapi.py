"""The answers' forms, for the OpenAPI document alone: routes write plain dictionaries, tests hold them to this."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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


class Answer(BaseModel):
    """A JSON object of an answer."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _example(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"example": example})


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str = Field(examples=["BadRequestError"])
    param: str | None = Field(description="the field to blame")
    code: int = Field(description="the HTTP status", examples=[400])


class ErrorAnswer(Answer):
    """Every refusal, in OpenAI's form."""

    error: ErrorDetail


class PromptTokensDetails(Answer):
    """What became of the prompt's tokens."""

    cached_tokens: int = Field(description="found in the prefix cache, and not computed again")


class Usage(Answer):
    """Tokens read and written; a prompt counts once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Gates(Answer):
    """With `gates`: for every token the share of each adapter's blocks that fired, beside the text it completes."""

    prompt: list[dict[str, float]] | None = None
    prompt_text: list[str] | None = None
    tokens: list[dict[str, float]]
    token_text: list[str]


class PromptLogprob(Answer):
    """With `prompt_logprobs`: a token that is, or might have been, in the prompt."""

    logprob: float
    rank: int | None = Field(description="1 is the likeliest; null if it is not among them")
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class LegacyLogprobs(Answer):
    """Log probabilities as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(Answer):
    """What a choice of either kind has."""

    index: int
    finish_reason: FinishReason | None = Field(description="null in all but the last chunk of a stream")
    stop_reason: int | str | None = Field(None, description="the stop string or token id that ended it")
    token_ids: list[int] | None = None
    gates: Gates | None = None


class CompletionChoice(Choice):
    """One text."""

    text: str
    logprobs: LegacyLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class Envelope(Answer):
    """What surrounds the choices."""

    id: str
    created: int = Field(description="Unix time")
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] | None = None
    usage: Usage | None = None


class Completion(Envelope):
    """An answer of /v1/completions; chunks of a stream have the same form."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]

    model_config = _example(
        {
            "id": "cmpl-6f0c",
            "object": "text_completion",
            "created": 1790000000,
            "model": "smollm2-135m-instruct",
            "system_fingerprint": "f00d",
            "choices": [{"index": 0, "text": " Paris.", "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": 5,
                "completion_tokens": 3,
                "total_tokens": 8,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }
    )


class FunctionCalled(Answer):
    """A function and its arguments."""

    name: str
    arguments: str = Field(description="a JSON object", examples=['{"city": "Budapest"}'])


class ToolCalled(Answer):
    """A call the model made."""

    id: str
    type: Literal["function"]
    function: FunctionCalled


class ChatLogprob(Answer):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[ChatLogprob]


class ChatLogprobs(Answer):
    """Log probabilities, an entry per token."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(Answer):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None = Field(description="null beside tool calls without text")
    refusal: None = None
    tool_calls: list[ToolCalled] | None = None


class ChatChoice(Choice):
    """One message."""

    message: ChatMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Envelope):
    """An answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None

    model_config = _example(
        {
            "id": "chatcmpl-6f0c",
            "object": "chat.completion",
            "created": 1790000000,
            "model": "smollm2-135m-instruct",
            "system_fingerprint": "f00d",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Paris."},
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": 31,
                "completion_tokens": 3,
                "total_tokens": 34,
                "prompt_tokens_details": {"cached_tokens": 16},
            },
        }
    )


class Model(Answer):
    """A name that `model` may be: the base, the bare base, or an adapter, which has the last three fields."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    fingerprint: str
    version: str | None = None
    language: str | None = None
    state: Literal["loading", "attached", "registered"] | None = None


class ModelList(Answer):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Tokens(Answer):
    """Token ids of a text."""

    model_config = _example(
        {"count": 2, "max_model_len": 8192, "tokens": [19556, 17], "token_strs": ["Hello", "!"]}
    )

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(None, description="with `return_token_strs`")


class Detokenized(Answer):
    """Text of token ids."""

    model_config = _example({"prompt": "Hello!"})

    prompt: str


class LayerGroupGates(Answer):
    """Gate totals of some layers."""

    layers: str = Field(examples=["0-9"])
    fired: int
    seen: int
    fired_rate: float | None


class AdapterGates(Answer):
    """An adapter's gate totals, over tokens that selected it."""

    fired: int
    seen: int
    fired_rate: float | None
    mass: float
    layer_groups: list[LayerGroupGates]


class ProbeLeak(Answer):
    """The leak on one probe text."""

    leak: float = Field(description="share of token-layers on which a gate fired")
    tokens: int


class Adapter(Answer):
    """A registered adapter."""

    name: str
    object: Literal["adapter"]
    version: str
    domain: str
    state: Literal["loading", "attached", "registered"]
    slot: int | None
    bytes: int
    h: int
    carry: float
    threshold: float
    pinned: bool
    requests: int
    loaded_at: float
    load_seconds: float
    gates: AdapterGates
    neutrality: dict[str, ProbeLeak] | None
    measuring: bool
    fired_by_selected: dict[str, int]
    deleted: bool | None = None


class AdapterList(Answer):
    """All of them."""

    object: Literal["list"]
    data: list[Adapter]


class Health(Answer):
    """The server's state."""

    status: str = Field(examples=["ready"])


class Ready(Health):
    """The server takes requests."""

    model: str


class Versions(Answer):
    """Versions of the server and of what it runs on."""

    version: str
    torch: str
    transformers: str


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


def answers(model: type[Answer], *refused: type[NrError], events: str | None = None) -> dict[int | str, Any]:
    """A route's `responses`: `model`, with `events` as an example if it can be streamed, and its `refusals`."""
    whole: dict[str, Any] = {"model": model, "description": (model.__doc__ or "").strip()}
    if events is not None:
        stream = {
            "schema": {"type": "string", "description": "events; the data of each is a chunk, of the last [DONE]"},
            "example": events,
        }
        whole["content"] = {"text/event-stream": stream}
    return {200: whole, **refusals(*refused)}


def refusals(*kinds: type[NrError]) -> dict[int | str, Any]:
    """The errors that any route may answer with, and those of `kinds`, by their status."""
    return {kind.status: _refusal(kind) for kind in (*_ANYWHERE, *kinds)}


def _refusal(kind: type[NrError]) -> dict[str, Any]:
    example = {"error": {"message": "what is wrong", "type": kind.type, "param": "prompt", "code": kind.status}}
    return {
        "model": ErrorAnswer,
        "description": (kind.__doc__ or "").strip().split("\n")[0],
        "content": {"application/json": {"example": example}},
    }


COMPLETION_EVENTS = (
    'data: {"id": "cmpl-6f0c", "object": "text_completion", "created": 1790000000, '
    '"model": "smollm2-135m-instruct", "system_fingerprint": "f00d", "choices": [{"index": 0, '
    '"text": " Paris.", "logprobs": null, "finish_reason": "stop", "stop_reason": null}]}\n\ndata: [DONE]\n\n'
)
CHAT_EVENTS = (
    'data: {"id": "chatcmpl-6f0c", "object": "chat.completion.chunk", "created": 1790000000, '
    '"model": "smollm2-135m-instruct", "system_fingerprint": "f00d", "choices": [{"index": 0, '
    '"delta": {"content": "Paris."}, "logprobs": null, "finish_reason": "stop", "stop_reason": null}]}'
    "\n\ndata: [DONE]\n\n"
)
