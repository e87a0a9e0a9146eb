"""OpenAI's routes: completions, chat, models; and vLLM's tokenize and detokenize."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from fastapi import APIRouter, Request

from nr_serve.api.answers import Chunk, Tally, Writer, best, collect, envelope
from nr_serve.api.ask import Ask, chat_ask, chat_text, check_ids, check_size, completion_ask
from nr_serve.api.body_route import BodyRoute
from nr_serve.api.chat import ChatWriter, chat_completion
from nr_serve.api.completions import CompletionWriter, completion
from nr_serve.api.context import Context, Ctx
from nr_serve.api.encode import Json, LargeJson
from nr_serve.api.openapi import CHAT_EVENTS, COMPLETION_EVENTS, refusals, streamed
from nr_serve.api.responses import ChatCompletion, Completion, Detokenized, Envelope, Model, ModelList, Tokens
from nr_serve.api.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    StreamOptions,
    TokenizeBody,
)
from nr_serve.api.selection import check_model, model_card, model_cards
from nr_serve.api.sse import EventStream, large_event, while_connected
from nr_serve.api.tools import toolbox
from nr_serve.engine.messages import Output
from nr_serve.errors import BadRequest, Forbidden

W = TypeVar("W", bound=Writer)
A = TypeVar("A", Completion, ChatCompletion)
router = APIRouter(route_class=BodyRoute)

MANY_IDS = 2**14
"""Writing fewer, with their texts, takes a few ms."""
FOR_MESSAGES = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
"""Fields of a /tokenize body that apply to `messages` only."""


@router.post("/v1/completions", responses=streamed(COMPLETION_EVENTS) | refusals(Forbidden))
async def create_completion(context: Ctx, request: Request, body: CompletionBody) -> Json[Completion] | EventStream:
    """Continue a text, or several."""
    _check_priority(request, body)
    ask = await while_connected(request, completion_ask(context, body))
    choices = range(len(ask.prompts) * ask.n)
    writers = [CompletionWriter(context.tokenizer, body, ask.prompt(i), i) for i in choices]
    return await _respond(context, request, body, ask, writers, completion)


@router.post("/v1/chat/completions", responses=streamed(CHAT_EVENTS) | refusals(Forbidden))
async def create_chat_completion(
    context: Ctx, request: Request, body: ChatBody
) -> Json[ChatCompletion] | EventStream:
    """Answer a conversation."""
    _check_priority(request, body)
    ask = await while_connected(request, chat_ask(context, body))
    writers = [
        ChatWriter(context.tokenizer, body, ask.prompt(i), i, calls_tools=ask.calls_tools) for i in range(ask.n)
    ]
    return await _respond(context, request, body, ask, writers, chat_completion)


@router.get("/v1/models")
async def list_models(context: Ctx) -> Json[ModelList]:
    """Everything that `model` may be."""
    return Json({"object": "list", "data": model_cards(context)})


@router.get("/v1/models/{model:path}")
async def get_model(context: Ctx, model: str) -> Json[Model]:
    """One model."""
    return Json(model_card(context, model))


@router.post("/tokenize")
async def tokenize(context: Ctx, body: TokenizeBody) -> Json[Tokens]:
    """Token ids of a prompt or of messages."""
    check_model(context, body.model)
    limit = context.engine.info.max_model_len
    ids, strings = await context.text(lambda: _tokens(context, body))
    answer: Tokens = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings}
    return await context.report(lambda: LargeJson(answer)) if len(ids) > MANY_IDS else Json(answer)


@router.post("/detokenize")
async def detokenize(context: Ctx, body: DetokenizeBody) -> Json[Detokenized]:
    """Text of token ids."""
    check_model(context, body.model)
    limit = context.engine.info.max_model_len
    if len(body.tokens) > limit:
        raise BadRequest(f"{len(body.tokens):,} token ids were sent; at most {limit:,} are taken", param="tokens")
    ids = check_ids(body.tokens, context.engine.info.vocab_size, "tokens")
    text = await context.text(lambda: context.tokenizer.decode(ids, special_tokens=True))
    return Json({"prompt": text})


def _check_priority(request: Request, body: GenerationBody) -> None:
    if body.priority < 0 and not request.state.admin:
        raise Forbidden(
            "`priority` below 0, ahead of others, needs an admin key; 0 and above is free", param="priority"
        )


async def _respond(
    context: Context,
    request: Request,
    body: GenerationBody,
    ask: Ask,
    writers: Sequence[W],
    whole: Callable[[Envelope, Sequence[W], Sequence[Output]], A],
) -> Json[A] | EventStream:
    request.state.take_answers(len(ask.submits))
    around = envelope(ask, body, context.engine.info.fingerprint)
    outputs = context.engine.generate(ask.submits)
    if body.stream:
        chunks = _chunks(context, ask, writers, around, body.stream_options or StreamOptions(), outputs)
        try:
            # Wait for the first one before the response begins, so that a refusal still becomes an HTTP status.
            return EventStream(await while_connected(request, anext(chunks)), chunks)
        except BaseException:  # cancelled just as it came
            await chunks.aclose()
            raise
    async with aclosing(outputs):
        ended = await while_connected(request, collect(ask, outputs))
    tally = Tally(ask)
    for output in ended:
        tally.count(output)
    kept = [writer.parts(output)[0] for writer, output in zip(writers, best(ask, ended), strict=True)]

    def write() -> A:
        return whole({**around, "usage": tally.usage()}, writers, kept)

    return await context.report(lambda: LargeJson(write())) if ask.is_large else Json(write())


async def _chunks(
    context: Context,
    ask: Ask,
    writers: Sequence[Writer],
    envelope: Envelope,
    options: StreamOptions,
    outputs: AsyncGenerator[Output, None],
) -> AsyncGenerator[Chunk | bytes, None]:
    tally = Tally(ask)
    place = {submit.request_id: i for i, submit in enumerate(ask.submits)}
    opened = False
    written: set[int] = set()
    """The answers that have begun: what is reported of a prompt is in an answer's first chunk."""

    def around(*, last: bool = False) -> Envelope:
        if not options.include_usage:
            return envelope
        return {**envelope, "usage": tally.usage() if last or options.continuous_usage_stats else None}

    async with aclosing(outputs):
        async for output in outputs:
            if not opened:  # now that it is not refused
                opened = True
                for opening in [writer.opening(around()) for writer in writers]:
                    if opening is not None:
                        yield opening
            tally.count(output)
            i = place[output.request_id]
            for part in filter(writers[i].shows, writers[i].parts(output)):
                write = partial(writers[i].chunk, around(), part)
                if ask.begins_large and i not in written:
                    yield await context.report(partial(_large_event, write))
                else:
                    yield write()
                written.add(i)
    if options.include_usage:
        yield writers[0].closing(around(last=True))


def _large_event(write: Callable[[], Chunk]) -> bytes:
    return large_event(write())


def _tokens(context: Context, body: TokenizeBody) -> tuple[list[int], list[str] | None]:
    ids = _token_ids(context, body)
    return ids, [context.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None


def _token_ids(context: Context, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give one of `prompt` and `messages`", param="prompt")
    if body.prompt is not None:
        for name in FOR_MESSAGES:
            if name in body.model_fields_set and getattr(body, name) not in (None, [], {}):
                raise BadRequest(f"`{name}` is for `messages`", param=name)
        check_size(context, body.prompt, "prompt")
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return context.tokenizer.encode(body.prompt, special_tokens=special)
    text = chat_text(context, body, toolbox(body.tools or (), None, None))
    check_size(context, text, "messages")
    return context.tokenizer.encode(text, special_tokens=bool(body.add_special_tokens))
