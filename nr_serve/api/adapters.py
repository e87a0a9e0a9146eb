"""Routes that list, load, change and unload adapters: ours, and vLLM's two."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse

from nr_serve.api.body_route import BodyRoute
from nr_serve.api.context import Context, Ctx
from nr_serve.api.encode import Json
from nr_serve.api.files import allowed_file
from nr_serve.api.openapi import answer, refusals
from nr_serve.api.responses import Adapter, AdapterList
from nr_serve.api.schemas import LoadBody, LoadLoraBody, PatchBody, PutQuery, UnloadLoraBody
from nr_serve.api.selection import check_name
from nr_serve.api.uploads import receive_file
from nr_serve.api.views import adapter_body
from nr_serve.engine.messages import (
    AdapterView,
    EngineStatistics,
    LoadAdapter,
    PatchAdapter,
    ReadStatistics,
    UnloadAdapter,
)
from nr_serve.errors import BadRequest, Conflict, Forbidden, NotFound

log = logging.getLogger(__name__)
router = APIRouter(route_class=BodyRoute)

_LOADED = refusals(Forbidden, Conflict)
_LOADED[201] = answer(Adapter) | {"description": "A registered adapter, new under its name"}

_FILE = {
    "required": True,
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}


@router.get("/v1/adapters")
async def list_adapters(context: Ctx) -> Json[AdapterList]:
    """Every registered adapter."""
    statistics: EngineStatistics = await context.engine.call(ReadStatistics())
    return Json({"object": "list", "data": [adapter_body(view) for view in statistics.adapters.values()]})


@router.get("/v1/adapters/{name}")
async def get_adapter(context: Ctx, name: str) -> Json[Adapter]:
    """One adapter."""
    statistics: EngineStatistics = await context.engine.call(ReadStatistics())
    if name not in statistics.adapters:
        raise _unknown(name)
    return Json(adapter_body(statistics.adapters[name]))


@router.put("/v1/adapters/{name}", responses=_LOADED, openapi_extra={"requestBody": _FILE})
async def put_adapter(
    context: Ctx, request: Request, name: str, query: Annotated[PutQuery, Query()]
) -> Json[Adapter]:
    """Load the adapter in the body: the bytes of its file."""
    check_name(context, name)
    _check_free(context, name, query.replace)  # checked before the upload, which may take long
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nr-serve-")))
        path = folder / f"{name}.safetensors"
        await receive_file(request, path, context.config.max_adapter_bytes)
        status = _load_status(context, name)
        received = stack.pop_all()
    command = LoadAdapter(name, path, query.replace, query.pinned, query.threshold, query.routed)
    return Json(adapter_body(await _load(context, command, received)), status)


@router.post("/v1/adapters", responses=_LOADED)
async def post_adapter(context: Ctx, body: LoadBody) -> Json[Adapter]:
    """Load an adapter from a file on the server, inside an allowed folder."""
    check_name(context, body.name)
    _check_free(context, body.name, body.replace)
    status = _load_status(context, body.name)
    view = await _load_allowed(
        context,
        body.path,
        "path",
        lambda path: LoadAdapter(body.name, path, body.replace, body.pinned, body.threshold, body.routed),
    )
    return Json(adapter_body(view), status)


@router.patch("/v1/adapters/{name}", responses=refusals(Forbidden))
async def patch_adapter(context: Ctx, name: str, body: PatchBody) -> Json[Adapter]:
    """Change an adapter's dials."""
    command = PatchAdapter(name, body.pinned, body.threshold, body.routed)
    return Json(adapter_body(await _change(context, command)))


@router.delete("/v1/adapters/{name}", responses=refusals(Forbidden))
async def delete_adapter(context: Ctx, name: str) -> Json[Adapter]:
    """Unload an adapter; requests in flight keep it until they end."""
    return Json({**adapter_body(await _change(context, UnloadAdapter(name))), "deleted": True})


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=refusals(Forbidden, Conflict))
async def load_lora_adapter(context: Ctx, body: LoadLoraBody) -> PlainTextResponse:
    """vLLM's way to load an adapter from a file on the server."""
    name = body.lora_name
    if not name or not body.lora_path:
        raise BadRequest("Both 'lora_name' and 'lora_path' must be provided.", param="lora_name")
    if body.base_model_name and body.base_model_name != context.engine.info.model:
        raise BadRequest(f"the base here is `{context.engine.info.model}`", param="base_model_name")
    check_name(context, name, "lora_name")
    if name in context.engine.adapters and not body.load_inplace:
        raise BadRequest(
            f"The lora adapter '{name}' has already been loaded. "
            "If you want to load the adapter in place, set 'load_inplace' to True.",
            param="lora_name",
        )
    await _load_allowed(
        context, body.lora_path, "lora_path", lambda path: LoadAdapter(name, path, replace=body.load_inplace)
    )
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=refusals(Forbidden))
async def unload_lora_adapter(context: Ctx, body: UnloadLoraBody) -> PlainTextResponse:
    """vLLM's way to unload an adapter."""
    name = body.lora_name
    if not name:
        raise BadRequest("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
    try:
        await _change(context, UnloadAdapter(name))
    except NotFound as error:
        raise NotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name") from error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _load_allowed(
    context: Context, given: str, param: str, command: Callable[[Path], LoadAdapter]
) -> AdapterView:
    """Have the engine load the file that `given` names on the server."""
    with ExitStack() as stack:
        file = allowed_file(context.config.adapter_dir, given, param, context.config.max_adapter_bytes)
        path = stack.enter_context(file)
        return await _load(context, command(path), stack.pop_all())


async def _load(context: Context, command: LoadAdapter, file: AbstractContextManager[object]) -> AdapterView:
    """Have the engine load an adapter from a file that exists until `file` is exited."""

    async def load() -> AdapterView:
        with file:
            view: AdapterView = await context.engine.call(command)
        _log_change("loaded", view)
        _warn_of_sum(context, view)
        return view

    # The file must exist until the engine has read it, even if this request is cancelled.
    return await asyncio.shield(asyncio.ensure_future(load()))


def _log_change(what: str, view: AdapterView) -> None:
    log.info(
        "%s adapter %s: version %s, domain %s, threshold %g, %s",
        what, view.name, view.version, view.domain or "none", view.threshold, view.state,
    )  # fmt: skip


def _warn_of_sum(context: Context, view: AdapterView) -> None:
    """Log if other adapters act on the new one's domain too: the sum of what they add is worse than either."""
    others = [each.name for each in context.engine.adapters.values() if each.domain == view.domain and each.routed]
    if view.domain and view.routed and len(others) > 1:
        log.warning("adapters %s all act on %s for the base's name", ", ".join(sorted(others)), view.domain)


def _load_status(context: Context, name: str) -> int:
    return 200 if name in context.engine.adapters else 201


async def _change(context: Context, command: PatchAdapter | UnloadAdapter) -> AdapterView:
    try:
        view: AdapterView = await context.engine.call(command)
    except NotFound as error:  # the engine does not know which field of the request held the name
        raise _unknown(command.name) from error
    _log_change("unloaded" if isinstance(command, UnloadAdapter) else "changed", view)
    return view


def _check_free(context: Context, name: str, replace: bool) -> None:
    if name in context.engine.adapters and not replace:
        raise Conflict(f"an adapter named `{name}` is loaded; replace it, or choose another name", param="name")


def _unknown(name: str) -> NotFound:
    return NotFound(f"The adapter `{name}` does not exist", param="name")
