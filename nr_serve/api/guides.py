"""Compiles the guide (grammar) that a request body asks for, on a thread for grammars only.

Neither running streams nor other prompts wait for a grammar, and a request without one never does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

from nr_serve.api.context import Context
from nr_serve.api.schemas import GenerationBody
from nr_serve.api.structured import Form, form_of, has_form
from nr_serve.api.tools import NO_TOOLS, Toolbox
from nr_serve.api.worker import Worker
from nr_serve.engine.guide import Guide
from nr_serve.errors import BadRequest, QueueFull

COMPILE_SECONDS = 10
"""Time limit for compiling one grammar, and again for waiting for its turn."""
_PLACE = re.compile(r"\bat \d+\(\d+\): ")
"""Line and column in a grammar, which only its author can look up: ours is around a schema or an expression."""


async def guide_for(context: Context, body: GenerationBody, tools: Toolbox = NO_TOOLS) -> Guide | None:
    """The guide for the answer's format, or for tool calls; None if the body asks for neither.

    Raises BadRequest that names the field at fault, or QueueFull if other grammars take too long.
    """
    if not has_form(body) and not tools.guided:
        return None
    if body.ignore_eos:
        raise BadRequest("`ignore_eos` cannot be honoured: the answer ends as its grammar does", param="ignore_eos")
    return await _in_turn(context.grammars, partial(_compile, context, body, tools))


async def _in_turn(grammars: Worker, compile_: Callable[[], Guide | None]) -> Guide | None:
    """Compile when the caller's turn comes. Only the grammar's own compile time counts against it."""
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    def work() -> Guide | None:
        loop.call_soon_threadsafe(begun.set)
        return compile_()

    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                await stack.enter_async_context(grammars.turn("grammars wait to be compiled"))
                guide = grammars.run(work)
                stack.callback(guide.cancel)  # if this request gives up before the work began, it is not run
                await begun.wait()  # a grammar that was given up in an earlier turn may still be compiling
        except TimeoutError as error:
            raise QueueFull("other grammars take long to compile; try again later") from error
        try:
            return await asyncio.wait_for(guide, COMPILE_SECONDS)
        except TimeoutError as error:
            raise BadRequest(f"the grammar was not compiled within {COMPILE_SECONDS} s") from error


def _compile(context: Context, body: GenerationBody, tools: Toolbox) -> Guide | None:
    form = _form(body, tools)
    if form is None:
        return None
    try:
        return context.guides(form.grammar)
    except BadRequest as error:
        said = error.message if form.param.endswith("grammar") else _PLACE.sub("", error.message)
        raise BadRequest(f"{form.param}: {said}", param=form.param) from error


def _form(body: GenerationBody, tools: Toolbox) -> Form | None:
    """The format of the answer, or of the tool calls it may make instead."""
    form = form_of(body)
    if not tools.tools:
        return form
    if form is not None and form.rule is None and not tools.must_call:
        raise BadRequest(f"`{form.param}` and `tools` do not go together; JSON and `tools` do", param=form.param)
    try:
        grammar = tools.grammar(form.rule if form is not None else None)
    except ValueError as error:
        raise BadRequest(f"tools: {error}", param="tools") from error
    return Form(grammar, "tools") if grammar is not None else None
