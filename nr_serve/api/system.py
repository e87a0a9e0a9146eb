"""Routes for operators: health, readiness, metrics, versions; and the playground page."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from nr_serve import __version__
from nr_serve.api.context import Ctx
from nr_serve.engine.messages import ListAdapters, ReadGates
from nr_serve.errors import Unavailable

router = APIRouter()

_PAGE = (Path(__file__).parent / "playground.html").read_text(encoding="utf-8")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/health")
async def health(context: Ctx) -> JSONResponse:
    """200 while the process can do its work, or may soon; 503 once the engine failed."""
    engine = context.engine
    if engine.status in ("failed", "stopped"):
        raise Unavailable(f"the engine {engine.status}: {engine.failure or 'no reason given'}")
    return JSONResponse({"status": engine.status})


@router.get("/ready")
async def ready(context: Ctx) -> JSONResponse:
    """200 once requests are taken; 503 before."""
    return JSONResponse({"status": "ready", "model": context.engine.info.model})


@router.get("/metrics")
async def metrics(context: Ctx) -> Response:
    """Prometheus metrics."""
    engine = context.engine
    statistics, views = None, tuple(engine.adapters.values())
    if engine.status == "ready":
        statistics = await engine.call(ReadGates())
        views = await engine.call(ListAdapters())
    return Response(engine.metrics.render(statistics, views), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def versions(context: Ctx) -> JSONResponse:
    """Versions of the server and of what it runs on."""
    parts = {name: version(name) for name in ("torch", "transformers")}
    return JSONResponse({"version": __version__, **parts})


@router.get("/", response_class=HTMLResponse)
async def playground() -> HTMLResponse:
    """A page to try the server."""
    return HTMLResponse(_PAGE, headers=_PAGE_HEADERS)
