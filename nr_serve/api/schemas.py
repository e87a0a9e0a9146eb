"""Request bodies. What is not supported is refused by name.

Every accepted field is honoured, or its description says what happens with it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator

from nr_serve.api.body import Body, JsonObject, NotSupported, Text, TokenIds, at_most
from nr_serve.api.structured import FormFields
from nr_serve.api.tools import MAX_TOOLS, Tool, ToolCall, ToolChoice
from nr_serve.config import MAX_LOGPROBS
from nr_serve.neutral import MAX_THRESHOLD

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_MESSAGES = 4096
MAX_PARTS = 64
MAX_CALLS = 128
MAX_PROMPTS = 2048

_Texts = Annotated[list[Text], Field(fail_fast=True, max_length=MAX_PROMPTS)]
_Key = Annotated[Text, Field(max_length=64)]
_Value = Annotated[Text, Field(max_length=512)]
_Stop = Annotated[Text, Field(min_length=1, max_length=1024)]


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False

    not_supported: ClassVar[NotSupported] = {"include_obfuscation": [False]}


def _not_0(value: int) -> int:
    if value == 0:
        raise ValueError("a prompt must keep a token")
    return value


class GenerationBody(FormFields):
    """What completions and chat share: which model, how tokens are chosen, what is reported."""

    model: Text = Field(description="base name: gates route; base@none: no adapter; an adapter's name: that one")
    adapters: list[Text] | None = Field(None, max_length=64, description="exactly these adapters, whatever `model`")
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63 - MAX_CHOICES)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 or 0: off")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, at_most(1024)] = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[StrictInt], Field(max_length=256)] | None = None
    include_stop_str_in_output: bool = Field(False, description="show what ended the answer, text or token")
    skip_special_tokens: bool = Field(True, description="leave special tokens out of the answer's text")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1), AfterValidator(_not_0)] | None = Field(
        None,
        description="keep only this many last tokens of a prompt; -1: as many as leave room for `max_tokens`, or "
        "for 16 tokens",
    )
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool | None = False
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="lower runs first")
    gates: bool = Field(False, description="report the share of its blocks that fired, per token and adapter")
    service_tier: Literal["auto", "default"] | None = Field(None, description="there is one tier")
    cache_salt: Annotated[Text, Field(min_length=1, max_length=256)] | None = Field(
        None, description="share no cache with requests of another salt"
    )
    user: Text | None = Field(None, description="the caller's own name for its user; not used")
    safety_identifier: Text | None = Field(None, description="newer name of `user`; not used")
    prompt_cache_key: Text | None = Field(None, description="not used: equal beginnings are found without a key")
    metadata: Annotated[dict[_Key, _Value] | None, at_most(16)] = Field(None, description="accepted and ignored")

    # Fields of OpenAI's and vLLM's APIs.
    not_supported: ClassVar[NotSupported] = {
        **FormFields.not_supported,
        "allowed_token_ids": [],
        "bad_words": [[]],
        "detokenize": [True],
        "ec_transfer_params": [{}],
        "kv_transfer_params": [{}],
        "length_penalty": [1],
        "logits_processors": [[]],
        "logprob_token_ids": [],
        "repetition_detection": [],
        "request_id": [],
        "return_token_offsets": [False],
        "return_tokens_as_token_ids": [False],
        "routed_experts_prompt_start": [0],
        "session_id": [],
        "spaces_between_special_tokens": [True],
        "stream_interval": [1],
        "thinking_token_budget": [],
        "truncation_side": ["left"],
        "use_beam_search": [False],
        "vllm_xargs": [{}],
        "watermarking": [],
    }

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is only allowed with `stream`: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"model": "smollm2-135m-instruct", "prompt": "The capital of France is", "max_tokens": 8}
        }
    )

    prompt: Text | _Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)]
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="default 16")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="answers made, the `n` likeliest given")
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = Field(True, description="put the tokenizer's special tokens before text prompts")

    not_supported: ClassVar[NotSupported] = {**GenerationBody.not_supported, "prompt_embeds": [], "suffix": [""]}


class TextPart(Body):
    """A part of a message: only text can be served."""

    type: Literal["text"]
    text: Text
    cache_control: JsonObject | None = Field(None, description="not used: equal beginnings are found without it")


_Calls = Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_CALLS)]
_Parts = Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)]


class Message(Body):
    """A chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | _Parts | None = Field(None, description="required, but not beside `tool_calls`")
    name: Text | None = Field(None, description="who speaks, for chat templates that have a place for it")
    tool_calls: _Calls | None = Field(None, description="what the assistant called")
    tool_call_id: Text | None = Field(
        None, description="the call that a tool answers; templates may go by the order instead"
    )
    reasoning: Text | None = Field(None, description="what the assistant thought before it spoke; not used")
    reasoning_content: Text | None = Field(None, description="older name of `reasoning`; not used")

    not_supported: ClassVar[NotSupported] = {"refusal": [], "audio": [], "function_call": [], "annotations": [[]]}

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError("only parts of type `text` are supported by this server")
        return content

    @model_validator(mode="after")
    def _fields_belong_to_the_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("`tool_calls` are only allowed in assistant messages")
        for name in ("reasoning", "reasoning_content"):
            if getattr(self, name) and self.role != "assistant":
                raise ValueError(f"`{name}` is only allowed in assistant messages")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("`tool_call_id` is required of a tool, and only allowed there")
        if self.content is None and not self.tool_calls:
            raise ValueError("`content` is required")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it: one string of text, `system` for OpenAI's `developer`."""
        text = self.content if not isinstance(self.content, list) else "\n".join(part.text for part in self.content)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text or "",
        }
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        given = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in given.items() if value is not None}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "smollm2-135m-instruct",
                "messages": [{"role": "user", "content": "Hello!"}],
                "max_tokens": 8,
            }
        }
    )

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="default: what the context leaves")
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="older name of max_completion_tokens")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = Field(None, description="default: auto")
    parallel_tool_calls: bool | None = Field(None, description="whether one answer may call several tools")
    add_generation_prompt: bool = Field(True, description="open the assistant's turn after the messages")
    continue_final_message: bool = Field(False, description="go on writing the last message")
    chat_template_kwargs: JsonObject | None = Field(
        None, description="variables for the base's chat template, such as Qwen3's `enable_thinking`"
    )

    not_supported: ClassVar[NotSupported] = {
        **GenerationBody.not_supported,
        "add_special_tokens": [False],
        "audio": [],
        "chat_template": [],
        "documents": [[]],
        "echo": [False],
        "function_call": ["none"],
        "functions": [[]],
        "include_reasoning": [True],
        "media_io_kwargs": [{}],
        "mm_processor_kwargs": [{}],
        "modalities": [["text"]],
        "moderation": [],
        "prediction": [],
        "prompt_cache_options": [],
        "prompt_cache_retention": [],
        "reasoning_effort": [],
        "return_mm_kwargs": [False],
        "store": [False],
        "verbosity": [],
        "web_search_options": [],
    }

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer, by whichever name it was given."""
        return self.max_completion_tokens or self.max_tokens


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages put through the chat template."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "Hello!"}})

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="as for a chat with these messages")
    add_special_tokens: bool | None = Field(None, description="default: true for a prompt, false for messages")
    add_generation_prompt: bool = Field(True, description="as for a chat")
    continue_final_message: bool = Field(False, description="as for a chat")
    chat_template_kwargs: JsonObject | None = Field(None, description="as for a chat")
    return_token_strs: bool | None = False

    not_supported: ClassVar[NotSupported] = {
        "chat_template": [],
        "media_io_kwargs": [{}],
        "mm_processor_kwargs": [{}],
    }


class DetokenizeBody(Body):
    """POST /detokenize."""

    model_config = ConfigDict(json_schema_extra={"example": {"tokens": [19556, 17]}})

    model: Text | None = None
    tokens: TokenIds


class Loading(BaseModel):
    """How an adapter is loaded."""

    replace: bool = False
    pinned: bool | None = Field(None, description="keep its slot; default: as the version it replaces, else no")
    threshold: float | None = Field(None, ge=0, le=MAX_THRESHOLD, description="default: the file's")
    routed: bool | None = Field(
        None, description="let it act for the base's name too; default: as the version it replaces, else yes"
    )


class LoadBody(Loading, Body):
    """POST /v1/adapters: a file already on the server, inside an allowed folder."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "hu", "path": "hu.safetensors"}})

    name: Text
    path: Text = Field(min_length=1, description="absolute, or relative to an allowed folder")


class PutQuery(Loading):
    """The query of PUT /v1/adapters/{name}."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PatchBody(Body):
    """PATCH /v1/adapters/{name}: fields left out stay as they are."""

    model_config = ConfigDict(json_schema_extra={"example": {"pinned": True, "threshold": 0.5}})

    pinned: bool | None = None
    threshold: float | None = Field(None, ge=0, le=MAX_THRESHOLD)
    routed: bool | None = None


class LoadLoraBody(Body):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    model_config = ConfigDict(json_schema_extra={"example": {"lora_name": "hu", "lora_path": "hu.safetensors"}})

    lora_name: Text = ""
    lora_path: Text = ""
    load_inplace: bool = False
    base_model_name: Text | None = None

    not_supported: ClassVar[NotSupported] = {"is_3d_lora_weight": [False]}


class UnloadLoraBody(Body):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    model_config = ConfigDict(json_schema_extra={"example": {"lora_name": "hu"}})

    lora_name: Text = ""
    lora_int_id: int | None = Field(None, description="not used: adapters go by their names")
