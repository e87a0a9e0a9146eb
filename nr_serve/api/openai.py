"""OpenAI's routes: completions, chat, models; and vLLM's tokenize and detokenize."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nr_serve.api import chat, completions
from nr_serve.api.answers import Envelope, Usage, Writer, best, collect
from nr_serve.api.ask import Ask, chat_ask, chat_text, check_ids, check_size, completion_ask
from nr_serve.api.body_route import BodyRoute
from nr_serve.api.chat import ChatWriter
from nr_serve.api.completions import CompletionWriter
from nr_serve.api.context import Context, Ctx
from nr_serve.api.openapi import (
    CHAT_EVENTS,
    COMPLETION_EVENTS,
    ChatCompletion,
    Completion,
    Detokenized,
    Model,
    ModelList,
    Tokens,
    answers,
)
from nr_serve.api.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    StreamOptions,
    TokenizeBody,
)
from nr_serve.api.selection import check_model, model_card, model_cards
from nr_serve.api.sse import EventStream, while_connected
from nr_serve.api.tools import toolbox
from nr_serve.engine.messages import Output
from nr_serve.errors import BadRequest

router = APIRouter(route_class=BodyRoute)

FOR_MESSAGES = ("tools", "add_generation_prompt", "continue_final_message")
"""Fields of a body for /tokenize that say nothing of a `prompt`."""


@router.post("/v1/completions", responses=answers(Completion, events=COMPLETION_EVENTS))
async def create_completion(context: Ctx, request: Request, body: CompletionBody) -> Response:
    """Continue a text, or several."""
    ask = await while_connected(request, completion_ask(context, body))
    choices = range(len(ask.prompts) * ask.n)
    writers = [CompletionWriter(context.tokenizer, body, ask.prompt(i), i) for i in choices]
    kinds = (completions.OBJECT, completions.CHUNK)
    return await _respond(context, request, body, ask, writers, kinds)


@router.post("/v1/chat/completions", responses=answers(ChatCompletion, events=CHAT_EVENTS))
async def create_chat_completion(context: Ctx, request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    ask = await while_connected(request, chat_ask(context, body))
    writers = [
        ChatWriter(context.tokenizer, body, ask.prompt(i), i, calls_tools=ask.calls_tools) for i in range(ask.n)
    ]
    return await _respond(context, request, body, ask, writers, (chat.OBJECT, chat.CHUNK))


@router.get("/v1/models", responses=answers(ModelList))
async def list_models(context: Ctx) -> JSONResponse:
    """Everything that `model` may be."""
    return JSONResponse({"object": "list", "data": model_cards(context)})


@router.get("/v1/models/{model:path}", responses=answers(Model))
async def get_model(context: Ctx, model: str) -> JSONResponse:
    """One model."""
    return JSONResponse(model_card(context, model))


@router.post("/tokenize", responses=answers(Tokens))
async def tokenize(context: Ctx, body: TokenizeBody) -> JSONResponse:
    """Token ids of a prompt or of messages."""
    check_model(context, body.model)
    limit = context.engine.info.max_model_len
    ids, strings = await context.text(lambda: _tokens(context, body))
    return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings})


@router.post("/detokenize", responses=answers(Detokenized))
async def detokenize(context: Ctx, body: DetokenizeBody) -> JSONResponse:
    """Text of token ids."""
    check_model(context, body.model)
    ids = check_ids(body.tokens, context.engine.info.vocab_size, "tokens")
    text = await context.text(lambda: context.tokenizer.decode(ids, special_tokens=True))
    return JSONResponse({"prompt": text})


async def _respond(
    context: Context,
    request: Request,
    body: GenerationBody,
    ask: Ask,
    writers: Sequence[Writer],
    kinds: tuple[str, str],
) -> Response:
    tier = None if body.service_tier is None else "default"
    envelope = Envelope(ask.id, ask.model, context.engine.info.fingerprint, tier)
    outputs = context.engine.generate(ask.submits)
    if body.stream:
        # The first output is awaited before the answer begins: a refusal still becomes an HTTP status.
        first = await while_connected(request, _first(outputs))
        options = body.stream_options or StreamOptions()
        chunks = _chunks(ask, writers, envelope, kinds[1], options, _chain(first, outputs))
        return EventStream(chunks, outputs)
    async with aclosing(outputs):
        whole = await while_connected(request, collect(ask, outputs))
    usage = Usage(ask)
    for output in whole:
        usage.count(output)
    kept = [writer.parts(output)[0] for writer, output in zip(writers, best(ask, whole), strict=True)]
    extras = writers[0].extras(kept[0])
    choices = [writer.choice(output) for writer, output in zip(writers, kept, strict=True)]
    return JSONResponse(envelope.body(kinds[0], choices, usage=usage.body(), **extras))


async def _first(outputs: AsyncGenerator[Output, None]) -> Output:
    return await anext(outputs)


async def _chain(first: Output, rest: AsyncGenerator[Output, None]) -> AsyncGenerator[Output, None]:
    async with aclosing(rest):
        yield first
        async for output in rest:
            yield output


async def _chunks(
    ask: Ask,
    writers: Sequence[Writer],
    envelope: Envelope,
    kind: str,
    options: StreamOptions,
    outputs: AsyncGenerator[Output, None],
) -> AsyncGenerator[dict[str, Any], None]:
    usage = Usage(ask)
    place = {submit.request_id: i for i, submit in enumerate(ask.submits)}

    def chunk(choices: list[dict[str, Any]], *, last: bool = False, **extras: Any) -> dict[str, Any]:
        if not options.include_usage:
            return envelope.body(kind, choices, **extras)
        shown = usage.body() if last or options.continuous_usage_stats else None
        return envelope.body(kind, choices, usage=shown, **extras)

    async with aclosing(outputs):
        for writer in writers:
            opening = writer.opening()
            if opening is not None:
                yield chunk([opening])
        async for output in outputs:
            usage.count(output)
            writer = writers[place[output.request_id]]
            for part in filter(writer.shows, writer.parts(output)):
                extras = writer.extras(part)
                yield chunk([writer.choice(part)], **extras)
    if options.include_usage:
        yield chunk([], last=True)


def _tokens(context: Context, body: TokenizeBody) -> tuple[list[int], list[str] | None]:
    ids = _token_ids(context, body)
    return ids, [context.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None


def _token_ids(context: Context, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give one of `prompt` and `messages`", param="prompt")
    if body.prompt is not None:
        for name in FOR_MESSAGES:
            if name in body.model_fields_set and getattr(body, name) not in (None, []):
                raise BadRequest(f"`{name}` is for `messages`", param=name)
        check_size(context, body.prompt, "prompt")
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return context.tokenizer.encode(body.prompt, special_tokens=special)
    text = chat_text(context, body, toolbox(body.tools or (), None, None))
    return context.tokenizer.encode(text, special_tokens=bool(body.add_special_tokens))
