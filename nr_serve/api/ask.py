"""From a request's body to what the engine is asked: prompts as ids, sampling, one `Submit` per answer."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nr_serve.api.context import Context
from nr_serve.api.guides import guide_for
from nr_serve.api.schemas import ChatBody, CompletionBody, GenerationBody, TokenizeBody
from nr_serve.api.selection import select, selection_name
from nr_serve.api.tools import Toolbox, toolbox
from nr_serve.engine.guide import Allowance, Guide
from nr_serve.engine.messages import Sampling, Submit
from nr_serve.errors import BadRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions
ENTRY_BYTES = 300
"""What one entry of a report, such as a log probability, takes until it is sent."""
GATES_IN_ENTRY = 6
"""The gates of so many adapters at one token take as much as one entry."""
ID_BYTES = 16
"""What one token id takes."""
MAX_REPORTED = 2**18
"""Most entries in one response."""
LARGE_REPORT = 2**10
"""Of them; writing fewer takes a few ms."""
_REPORTS = ("logprobs", "prompt_logprobs", "gates", "echo", "return_token_ids")
"""Fields that ask for a report; `best_of` does too, for answers are ranked by log probabilities."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine reads it. `text`: the text sent; None if ids were sent or the prompt was truncated."""

    ids: tuple[int, ...]
    text: str | None
    echo: str = ""
    """What an answer that echoes its prompt begins with."""


@dataclass(frozen=True)
class Ask:
    """What one HTTP request asks for: answer i belongs to prompt i // tries."""

    id: str
    model: str
    n: int
    """Number of answers per prompt that the client gets."""
    tries: int
    """Number of answers per prompt that are generated."""
    prompts: tuple[Prompt, ...]
    submits: tuple[Submit, ...]
    is_large: bool
    """Whether its response may take long to write."""
    begins_large: bool
    """Whether an answer's first chunk may, because of what it reports of the prompt."""
    calls_tools: bool = False
    """Whether an answer may call tools."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    def prompt(self, choice: int) -> Prompt:
        """The prompt of the choice with this index."""
        return self.prompts[choice // self.n]


async def completion_ask(context: Context, body: CompletionBody) -> Ask:
    """Check a completion request and tokenise it. Raises BadRequest or NotFound."""
    adapters = select(context, body.model, body.adapters)
    tries = _tries(body)
    given = _several(body)
    _check_count(context, len(given), tries, "n" if tries == body.n else "best_of")
    for i, each in enumerate(given):
        if isinstance(each, str) and body.truncate_prompt_tokens is None:
            check_size(context, each, _place(given, i))
    prompts = await context.text(lambda: _prompts(context, body, given))
    sampling = replace(_sampling(context, body), logprobs=body.logprobs)
    if tries > body.n:
        sampling = replace(sampling, logprobs=body.logprobs or 0)  # needed for ranking the answers
    if body.echo and body.logprobs is not None:
        sampling = replace(sampling, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = min(DEFAULT_MAX_TOKENS, _room(context, prompts))
    _check_length(context, prompts, max_tokens, "prompt", "max_tokens")
    guide = await guide_for(context, body)
    return _ask(
        context, "cmpl", body, adapters, prompts, _with_length(sampling, max_tokens), tries=tries, guide=guide
    )


async def chat_ask(context: Context, body: ChatBody) -> Ask:
    """Check a chat request and apply the chat template to its messages. Raises BadRequest or NotFound."""
    adapters = select(context, body.model, body.adapters)
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("`logprobs` must be true when `top_logprobs` is given", param="top_logprobs")
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise BadRequest("`max_tokens` and `max_completion_tokens` differ; give one", param="max_tokens")
    _check_count(context, 1, body.n, "n")
    tools = toolbox(body.tools or (), body.tool_choice, body.parallel_tool_calls)
    prompts = (await context.text(lambda: _chat_prompt(context, body, tools)),)
    sampling = replace(_sampling(context, body), logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    max_tokens = body.answer_tokens
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    if max_tokens is None:
        max_tokens = _room(context, prompts)
        of_prompts, of_token = _report_sizes(context, body, adapters, prompts, sampling)
        if of_token:
            max_tokens = min(max_tokens, _most_reported(body.n * sum(of_prompts), body.n * of_token))
    _check_length(context, prompts, max_tokens, "messages", param)
    guide = await guide_for(context, body, tools)
    ask = _ask(
        context, "chatcmpl", body, adapters, prompts, _with_length(sampling, max_tokens), tries=body.n, guide=guide
    )
    return replace(ask, calls_tools=bool(tools.tools))


def _ask(
    context: Context,
    kind: str,
    body: GenerationBody,
    adapters: tuple[str, ...] | None,
    prompts: tuple[Prompt, ...],
    sampling: Sampling,
    *,
    tries: int,
    guide: Guide | None,
) -> Ask:
    of_prompts, of_token = _report_sizes(context, body, adapters, prompts, sampling)
    entries = tries * (sum(of_prompts) + len(prompts) * of_token * sampling.max_tokens)
    _check_report(body, entries)
    name = f"{kind}-{uuid.uuid4().hex}"
    allowance = Allowance(min(len(prompts) * tries, context.config.max_running))
    selected = selection_name(context, adapters)
    submits = tuple(
        Submit(
            request_id=f"{name}-{i}",
            prompt_ids=prompts[i // tries].ids,
            # Each of the n answers gets its own seed; repeating the request with the same seed gives the same
            # answers.
            sampling=sampling if body.seed is None else replace(sampling, seed=body.seed + i % tries),
            adapters=adapters,
            selected=selected,
            priority=body.priority,
            cache_salt=body.cache_salt,
            gates=body.gates,
            guide=guide,
            allowance=allowance,
        )
        for i in range(len(prompts) * tries)
    )
    large, begins = entries > LARGE_REPORT, max(of_prompts) > LARGE_REPORT
    return Ask(name, body.model, body.n, tries, prompts, submits, large, begins)


def _tries(body: CompletionBody) -> int:
    if body.best_of is None or body.best_of == body.n:
        return body.n
    if body.best_of < body.n:
        raise BadRequest(f"`best_of` must not be below `n`, which is {body.n}", param="best_of")
    if body.stream:
        raise BadRequest("`best_of` above `n` cannot be streamed: the best is known at the end", param="best_of")
    return body.best_of


def _several(body: CompletionBody) -> list[str | list[int]]:
    """The prompts of a body, each as text or as ids."""
    given: Any = body.prompt
    if not given:
        raise BadRequest("`prompt` must not be empty", param="prompt")
    return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


def _place(given: list[str | list[int]], i: int) -> str:
    """Path of prompt i in the body."""
    return "prompt" if len(given) == 1 else f"prompt[{i}]"


def _prompts(context: Context, body: CompletionBody, given: list[str | list[int]]) -> tuple[Prompt, ...]:
    vocab_size = context.engine.info.vocab_size
    prompts = []
    for i, each in enumerate(given):
        param = _place(given, i)
        text = None
        if isinstance(each, str):
            text = _read_part(context, body, each)
            ids = context.tokenizer.encode(text, special_tokens=body.add_special_tokens)
        else:
            ids = check_ids(each, vocab_size, param)
        if not ids:
            raise BadRequest("`prompt` must not be empty", param=param)
        prompt = _truncated(context, body, Prompt(tuple(ids), text), body.max_tokens)
        if body.echo:
            text = prompt.text
            echo = context.tokenizer.decode(prompt.ids, special_tokens=True) if text is None else text
            prompt = replace(prompt, echo=echo)
        prompts.append(prompt)
    return tuple(prompts)


def chat_text(context: Context, body: ChatBody | TokenizeBody, tools: Toolbox) -> str:
    """The chat template's text for a body's messages and tools. Raises BadRequest."""
    if body.add_generation_prompt and body.continue_final_message:
        raise BadRequest(
            "`add_generation_prompt` must be false when `continue_final_message` is true",
            param="continue_final_message",
        )
    text = context.tokenizer.chat_prompt(
        [message.plain() for message in body.messages or ()],
        tools=tools.plain(),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs or {},
    )
    if tools.tools and context.tool_fault is not None:
        raise BadRequest(context.tool_fault, param="tools")
    return text


def _chat_prompt(context: Context, body: ChatBody, tools: Toolbox) -> Prompt:
    text = _read_part(context, body, chat_text(context, body, tools))
    if body.truncate_prompt_tokens is None:
        check_size(context, text, "messages")
    ids = context.tokenizer.encode(text, special_tokens=False)  # the template adds its own
    if not ids:
        raise BadRequest("`messages` give an empty prompt", param="messages")
    return _truncated(context, body, Prompt(tuple(ids), text), body.answer_tokens)


def _read_part(context: Context, body: GenerationBody, text: str) -> str:
    """The part of a text that may be read: all of it or, if the prompt is truncated, as much as could be its end.

    To tokenise more would take long for nothing.
    """
    if body.truncate_prompt_tokens is None:
        return text
    data, most = text.encode(), _most_bytes(context)
    return text if len(data) <= most else data[-most:].decode(errors="ignore")


def _most_bytes(context: Context) -> int:
    """Bytes of the longest text that the model could read."""
    return context.engine.info.max_model_len * context.most_token_bytes


def _truncated(context: Context, body: GenerationBody, prompt: Prompt, max_tokens: int | None) -> Prompt:
    most = body.truncate_prompt_tokens
    if most == -1:
        answer = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        most = max(1, context.engine.info.max_model_len - answer)
    if most is None or len(prompt.ids) <= most:
        return prompt
    return Prompt(prompt.ids[-most:], None)  # the text sent no longer matches


def _check_count(context: Context, prompts: int, n: int, param: str) -> None:
    """Refuse more answers than could ever be queued, before any of them is built."""
    most = min(context.config.max_answers or context.config.max_waiting, context.config.max_waiting)
    if prompts * n > most:
        raise BadRequest(
            f"{prompts} prompts with `{param}` = {n} ask for {prompts * n} answers; at most {most} are allowed",
            param=param if n > 1 else "prompt",
        )


def _check_logprobs(context: Context, body: GenerationBody) -> None:
    most = context.config.max_logprobs
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        asked = getattr(body, name, None)
        if asked is not None and asked is not True and asked > most:  # in a chat body, `logprobs` is a boolean
            raise BadRequest(f"{name}: at most {most} are allowed", param=name)


def _check_report(body: GenerationBody, entries: int) -> None:
    """Raise BadRequest if memory would not hold so many entries of a report."""
    if entries > MAX_REPORTED:
        raise BadRequest(
            f"this asks for a report of up to {entries:,} entries, such as log probabilities; at most "
            f"{MAX_REPORTED:,} are sent: ask for fewer answers, tokens or logprobs",
            param=next((name for name in _REPORTS if _asks(getattr(body, name, None))), "best_of"),
        )


def _asks(value: int | bool | None) -> bool:
    """Whether a field's value asks for a report; 0 log probabilities beside the token's own do."""
    return value is not None and value is not False


def _most_reported(of_prompts: int, of_token: int) -> int:
    """Tokens an answer may have if all are to be reported; at least 1, so that the report is the error."""
    return max(1, (MAX_REPORTED - of_prompts) // of_token)


def _report_sizes(
    context: Context,
    body: GenerationBody,
    adapters: tuple[str, ...] | None,
    prompts: tuple[Prompt, ...],
    sampling: Sampling,
) -> tuple[list[int], int]:
    """Entries that one answer reports: of each prompt, and of each token."""
    prompt_k, answer_k = (0 if k is None else k + 1 for k in (sampling.prompt_logprobs, sampling.logprobs))
    acting = len(context.engine.adapters) if adapters is None else len(adapters)
    gates = 1 + min(acting, context.config.slots) // GATES_IN_ENTRY if body.gates else 0
    of_prompts = []
    for prompt in prompts:
        repeated = len(prompt.echo.encode()) + (ID_BYTES * len(prompt.ids) if body.return_token_ids else 0)
        of_prompts.append((prompt_k + gates) * len(prompt.ids) + math.ceil(repeated / ENTRY_BYTES))
    return of_prompts, answer_k + gates


def check_size(context: Context, text: str, what: str) -> None:
    """Refuse text that is too long for the model however it is tokenised, before tokenising it."""
    limit = context.engine.info.max_model_len
    size, most = len(text.encode()), _most_bytes(context)
    if size > most:
        raise BadRequest(
            f"This model's maximum context length is {limit} tokens, at most {most} bytes of text. "
            f"However, you sent {size} bytes. Please reduce the length of the {what}.",
            param=what,
        )


def check_ids(ids: list[int], vocab_size: int, param: str) -> list[int]:
    """Return `ids`; raise BadRequest if one is outside the vocabulary."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise BadRequest(f"{param}: token id {token_id} is not in 0..{vocab_size - 1}", param=param)
    return ids


def _sampling(context: Context, body: GenerationBody) -> Sampling:
    _check_logprobs(context, body)
    vocab_size = context.engine.info.vocab_size
    default = context.engine.info.sampling
    return Sampling(
        min_tokens=body.min_tokens or 0,
        temperature=default.temperature if body.temperature is None else body.temperature,
        top_k=max(default.top_k if body.top_k is None else body.top_k, 0),
        top_p=default.top_p if body.top_p is None else body.top_p,
        min_p=default.min_p if body.min_p is None else body.min_p,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=(
            default.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty
        ),
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        stop=body.stops,
        stop_token_ids=tuple(check_ids(body.stop_token_ids or [], vocab_size, "stop_token_ids")),
        ignore_eos=body.ignore_eos,
        include_stop=body.include_stop_str_in_output,
        special_tokens=not body.skip_special_tokens,
        prompt_logprobs=body.prompt_logprobs,
    )


def _logit_bias(given: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise BadRequest(f"logit_bias: {key[:20]!r} is not a token id", param="logit_bias")
        if int(key) >= vocab_size:
            raise BadRequest(f"logit_bias: token id {key} is not in 0..{vocab_size - 1}", param="logit_bias")
        bias[int(key)] = value
    return bias


def _with_length(sampling: Sampling, max_tokens: int) -> Sampling:
    if sampling.min_tokens > max_tokens:
        raise BadRequest(
            f"min_tokens ({sampling.min_tokens}) is above max_tokens ({max_tokens})", param="min_tokens"
        )
    return replace(sampling, max_tokens=max_tokens)


def _room(context: Context, prompts: tuple[Prompt, ...]) -> int:
    """Tokens left for the answer to the longest prompt; at least 1, so that the prompt's length is the error."""
    return max(1, context.engine.info.max_model_len - max(len(prompt.ids) for prompt in prompts))


def _check_length(
    context: Context, prompts: tuple[Prompt, ...], max_tokens: int, what: str, length_param: str
) -> None:
    longest = max(len(prompt.ids) for prompt in prompts)
    limit = context.engine.info.max_model_len
    if longest + max_tokens <= limit:
        return
    raise BadRequest(
        f"This model's maximum context length is {limit} tokens. However, you requested {longest + max_tokens} "
        f"tokens ({longest} in the {what}, {max_tokens} in the completion). "
        f"Please reduce the length of the {what} or completion.",
        param=length_param if longest < limit else what,
    )
