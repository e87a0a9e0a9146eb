"""Response bodies: one definition for building them, for the client and for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from nr_serve.engine.messages import AdapterState

FinishReason = Literal["stop", "length", "tool_calls"]


@with_config(ConfigDict(extra="forbid"))
class ResponseModel(TypedDict):
    """A JSON object with these keys and no others."""


class ErrorDetail(ResponseModel):
    """What went wrong."""

    message: str
    type: Annotated[str, Field(examples=["BadRequestError"])]
    param: Annotated[str | None, Field(description="the field to blame")]
    code: Annotated[int, Field(description="the HTTP status", examples=[400])]


class ErrorAnswer(ResponseModel):
    """Every refusal, in OpenAI's form."""

    error: ErrorDetail


class PromptTokensDetails(ResponseModel):
    """What became of the prompt's tokens."""

    cached_tokens: Annotated[int, Field(description="found in the prefix cache, and not computed again")]


class Usage(ResponseModel):
    """Tokens read and written; a prompt counts once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Gates(ResponseModel):
    """With `gates`: for every token the share of each adapter's blocks that fired, beside the text it completes."""

    prompt: NotRequired[list[dict[str, float]]]
    prompt_text: NotRequired[list[str]]
    tokens: list[dict[str, float]]
    token_text: list[str]


class PromptLogprob(ResponseModel):
    """With `prompt_logprobs`: a token that is, or might have been, in the prompt."""

    logprob: float
    rank: Annotated[int | None, Field(description="1 is the likeliest; null if it is not among them")]
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each prompt token, by token id; None for the first token, as nothing comes before it."""


class PromptReport(ResponseModel):
    """What is reported of the prompt, if it was asked for."""

    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


class TokenReport(ResponseModel):
    """What is reported of the answer's tokens, if it was asked for."""

    token_ids: NotRequired[list[int]]
    gates: NotRequired[Gates]


class Choice(TokenReport):
    """What a choice of either kind has."""

    index: int
    finish_reason: Annotated[FinishReason | None, Field(description="null in all but the last chunk of a stream")]
    stop_reason: Annotated[int | str | None, Field(description="the stop string or token id that ended it")]


class Envelope(ResponseModel):
    """What surrounds the choices."""

    id: str
    created: Annotated[int, Field(description="Unix time")]
    model: str
    system_fingerprint: str
    service_tier: NotRequired[Literal["default"]]
    usage: NotRequired[Usage | None]


class LegacyLogprobs(ResponseModel):
    """Log probabilities as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Choice, PromptReport):
    """One text."""

    text: str
    logprobs: LegacyLogprobs | None


class Completion(Envelope):
    """An answer of /v1/completions; chunks of a stream have the same form."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class FunctionCalled(ResponseModel):
    """A function and its arguments."""

    name: str
    arguments: Annotated[str, Field(description="a JSON object", examples=['{"city": "Budapest"}'])]


class ToolCalled(ResponseModel):
    """A call the model made."""

    id: str
    type: Literal["function"]
    function: FunctionCalled


class ToolCalledDelta(ToolCalled):
    """A call, and its place among those of its answer."""

    index: int


class ChatLogprob(ResponseModel):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[ChatLogprob]


class ChatLogprobs(ResponseModel):
    """Log probabilities, an entry per token."""

    content: list[ChatTokenLogprob]
    refusal: None


class ChatMessage(ResponseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: Annotated[str | None, Field(description="null beside tool calls without text")]
    refusal: None
    tool_calls: NotRequired[list[ToolCalled]]


class ChatDelta(ResponseModel):
    """What a chunk adds to the message; the role comes first."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCalledDelta]]


class ChatChoice(Choice):
    """One message."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(Choice):
    """A part of one message."""

    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatCompletion(Envelope, PromptReport):
    """An answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatChunk(Envelope, PromptReport):
    """A chunk of a stream of /v1/chat/completions."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class Model(ResponseModel):
    """A name that `model` may be: the base, the bare base, or an adapter, which has the last three fields."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    fingerprint: str
    version: NotRequired[str]
    language: NotRequired[str]
    state: NotRequired[AdapterState]


class ModelList(ResponseModel):
    """Every name that `model` may be."""

    object: Literal["list"]
    data: list[Model]


class Tokens(ResponseModel):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: Annotated[list[str] | None, Field(description="with `return_token_strs`")]


class Detokenized(ResponseModel):
    """Text of token ids."""

    prompt: str


class LayerGroupGates(ResponseModel):
    """Gate totals of some layers."""

    layers: Annotated[str, Field(examples=["0-9"])]
    fired: int
    seen: int
    fired_rate: Annotated[float | None, Field(description="null until a token was seen")]


class AdapterGates(ResponseModel):
    """An adapter's gate totals, over tokens that selected it."""

    fired: int
    seen: int
    fired_rate: Annotated[float | None, Field(description="null until a token was seen")]
    mass: float
    layer_groups: list[LayerGroupGates]


class ProbeLeak(ResponseModel):
    """The leak on one probe text."""

    leak: Annotated[float, Field(description="share of token-layers on which a gate fired")]
    tokens: int


class Adapter(ResponseModel):
    """A registered adapter."""

    name: str
    object: Literal["adapter"]
    version: str
    domain: str
    state: AdapterState
    slot: int | None
    bytes: int
    h: int
    carry: float
    threshold: float
    pinned: bool
    routed: Annotated[bool, Field(description="whether requests to the base's name may use it")]
    requests: int
    loaded_at: float
    load_seconds: float
    gates: AdapterGates
    neutrality: Annotated[dict[str, ProbeLeak] | None, Field(description="null until it was measured")]
    measuring: bool
    fired_by_selected: dict[str, int]
    deleted: NotRequired[bool]


class AdapterList(ResponseModel):
    """Every registered adapter."""

    object: Literal["list"]
    data: list[Adapter]


class Health(ResponseModel):
    """The server's state."""

    status: Annotated[str, Field(examples=["ready"])]


class Ready(Health):
    """The server takes requests."""

    model: str


class Versions(ResponseModel):
    """Versions of the server and of what it runs on."""

    version: str
    torch: str
    transformers: str
