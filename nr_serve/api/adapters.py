"""Routes that list, load, change and unload adapters: ours, and vLLM's two."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from nr_serve.api.context import Context, Ctx
from nr_serve.api.schemas import LoadBody, LoadLoraBody, PatchBody, UnloadLoraBody
from nr_serve.api.selection import check_name
from nr_serve.api.uploads import receive_file
from nr_serve.api.views import adapter_body
from nr_serve.engine.messages import (
    AdapterView,
    ListAdapters,
    LoadAdapter,
    PatchAdapter,
    ReadGates,
    UnloadAdapter,
)
from nr_serve.errors import BadRequest, Conflict, Forbidden, NotFound
from nr_serve.neutral import MAX_THRESHOLD

router = APIRouter()


@router.get("/v1/adapters")
async def list_adapters(context: Ctx) -> JSONResponse:
    """Every registered adapter."""
    views: tuple[AdapterView, ...] = await context.engine.call(ListAdapters())
    statistics = await context.engine.call(ReadGates())
    return JSONResponse({"object": "list", "data": [adapter_body(view, statistics) for view in views]})


@router.get("/v1/adapters/{name}")
async def get_adapter(context: Ctx, name: str) -> JSONResponse:
    """One adapter."""
    views: tuple[AdapterView, ...] = await context.engine.call(ListAdapters())
    for view in views:
        if view.name == name:
            return JSONResponse(adapter_body(view, await context.engine.call(ReadGates())))
    raise _unknown(name)


@router.put("/v1/adapters/{name}")
async def put_adapter(
    context: Ctx,
    request: Request,
    name: str,
    replace: Annotated[bool, Query()] = False,
    pinned: Annotated[bool | None, Query()] = None,
    threshold: Annotated[float | None, Query(ge=-MAX_THRESHOLD, le=MAX_THRESHOLD, allow_inf_nan=False)] = None,
) -> JSONResponse:
    """Load the adapter in the body: the bytes of its file."""
    check_name(context, name)
    _check_free(context, name, replace)  # before the upload: it may be long
    with tempfile.TemporaryDirectory(prefix="nr-serve-") as folder:
        path = Path(folder) / f"{name}.safetensors"
        await receive_file(request, path, int(context.config.max_adapter_gib * 2**30))
        return await _load(context, LoadAdapter(name, path, replace, pinned, threshold))


@router.post("/v1/adapters")
async def post_adapter(context: Ctx, body: LoadBody) -> JSONResponse:
    """Load an adapter from a file on the server, inside an allowed folder."""
    check_name(context, body.name)
    path = allowed_file(context, body.path, "path")
    _check_free(context, body.name, body.replace)
    return await _load(context, LoadAdapter(body.name, path, body.replace, body.pinned, body.threshold))


@router.patch("/v1/adapters/{name}")
async def patch_adapter(context: Ctx, name: str, body: PatchBody) -> JSONResponse:
    """Change an adapter's dials."""
    view = await _change(context, PatchAdapter(name, body.pinned, body.threshold))
    return JSONResponse(adapter_body(view))


@router.delete("/v1/adapters/{name}")
async def delete_adapter(context: Ctx, name: str) -> JSONResponse:
    """Unload an adapter; requests in flight keep it until they end."""
    view = await _change(context, UnloadAdapter(name))
    return JSONResponse(adapter_body(view) | {"deleted": True})


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(context: Ctx, body: LoadLoraBody) -> PlainTextResponse:
    """vLLM's way to load an adapter from a file on the server."""
    name = body.lora_name
    if not name or not body.lora_path:
        raise BadRequest("Both 'lora_name' and 'lora_path' must be provided.", param="lora_name")
    if body.base_model_name and body.base_model_name != context.engine.info.model:
        raise BadRequest(f"the base here is `{context.engine.info.model}`", param="base_model_name")
    check_name(context, name, "lora_name")
    path = allowed_file(context, body.lora_path, "lora_path")
    if name in context.engine.adapters and not body.load_inplace:
        raise BadRequest(
            f"The lora adapter '{name}' has already been loaded. "
            "If you want to load the adapter in place, set 'load_inplace' to True.",
            param="lora_name",
        )
    await context.engine.call(LoadAdapter(name, path, replace=body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(context: Ctx, body: UnloadLoraBody) -> PlainTextResponse:
    """vLLM's way to unload an adapter."""
    name = body.lora_name
    if not name:
        raise BadRequest("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
    if name not in context.engine.adapters:
        raise NotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name")
    await context.engine.call(UnloadAdapter(name))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def allowed_file(context: Context, given: str, param: str) -> Path:
    """The file `given` names, once links are followed. Raises Forbidden outside the allowed folders.

    A folder stands for the one .safetensors file in it. Nothing is said about paths outside.
    """
    if not context.config.adapter_dir:
        raise Forbidden("this server loads from no folder; start it with --adapter-dir, or upload", param=param)
    try:
        inside = [
            (root, path)
            for root in (folder.resolve() for folder in context.config.adapter_dir)
            if (path := (root / given).resolve()).is_relative_to(root)
        ]
        if not inside:
            raise Forbidden("the path is outside the folders this server may load from", param=param)
        for root, path in inside:
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            if len(files) == 1 and files[0].is_file() and files[0].resolve().is_relative_to(root):
                return files[0].resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, links in a circle
        raise BadRequest("this is not a usable path", param=param) from error
    raise NotFound("no adapter found at this path", param=param)


async def _load(context: Context, command: LoadAdapter) -> JSONResponse:
    status = 200 if command.name in context.engine.adapters else 201
    view = await context.engine.call(command)
    return JSONResponse(adapter_body(view), status)


async def _change(context: Context, command: PatchAdapter | UnloadAdapter) -> AdapterView:
    try:
        view: AdapterView = await context.engine.call(command)
    except NotFound as error:  # the engine does not know where in the request the name stood
        raise _unknown(command.name) from error
    return view


def _check_free(context: Context, name: str, replace: bool) -> None:
    if name in context.engine.adapters and not replace:
        raise Conflict(f"an adapter named `{name}` is loaded; replace it, or choose another name", param="name")


def _unknown(name: str) -> NotFound:
    return NotFound(f"The adapter `{name}` does not exist", param="name")
