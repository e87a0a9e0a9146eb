"""From what a body asks for to a guide. Grammars are compiled on a thread of their own.

Neither running streams nor other prompts wait for them, and a request without a grammar never does.
"""

from __future__ import annotations

import asyncio

from nr_serve.api.context import Context
from nr_serve.api.schemas import GenerationBody
from nr_serve.api.structured import Form, form_of, has_form
from nr_serve.api.tools import NO_TOOLS, Toolbox
from nr_serve.engine.guide import Guide
from nr_serve.errors import BadRequest

COMPILE_SECONDS = 10
"""Longest wait for a grammar, its turn included."""


async def guide_for(context: Context, body: GenerationBody, tools: Toolbox = NO_TOOLS) -> Guide | None:
    """The guide for the form asked for, or for calls of tools. Raises BadRequest that names the field to blame."""
    if not has_form(body) and not tools.guided:
        return None
    if body.ignore_eos:
        raise BadRequest("`ignore_eos` cannot be honoured: the answer ends as its grammar does", param="ignore_eos")
    work = asyncio.get_running_loop().run_in_executor(context.guide_thread, _compile, context, body, tools)
    try:
        return await asyncio.wait_for(work, COMPILE_SECONDS)
    except TimeoutError as error:
        raise BadRequest(f"the grammar was not compiled within {COMPILE_SECONDS} s") from error


def _compile(context: Context, body: GenerationBody, tools: Toolbox) -> Guide | None:
    form = _form(body, tools)
    if form is None:
        return None
    info = context.engine.info
    try:
        return Guide(form.grammar, context.tokenizer.for_grammars(info.vocab_size, info.eos_ids))
    except BadRequest as error:
        raise BadRequest(f"{form.param}: {error.message}", param=form.param) from error


def _form(body: GenerationBody, tools: Toolbox) -> Form | None:
    """The form of the answer, or of the calls it may make instead."""
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
