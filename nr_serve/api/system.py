"""Routes for operators: health, readiness, metrics, versions; and the playground page."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from nr_serve import __version__
from nr_serve.api.context import Ctx
from nr_serve.api.encode import Json
from nr_serve.api.openapi import AnswerRoute
from nr_serve.api.responses import Health, Ready, Versions
from nr_serve.errors import Unavailable

router = APIRouter(route_class=AnswerRoute)

_PAGE = (Path(__file__).parent / "playground.html").read_text(encoding="utf-8")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(context: Ctx) -> Json[Health]:
    """200 while the process can do its work, or may soon; 503 once the engine failed."""
    engine = context.engine
    if engine.status in ("failed", "stopped"):
        raise Unavailable(f"the engine {engine.status}; the server's log says why")
    return Json({"status": "draining" if context.underway.draining else engine.status})


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(context: Ctx) -> Json[Ready]:
    """200 while requests are taken; 503 before, and once the server was told to end."""
    if context.underway.draining:
        raise Unavailable("the server is shutting down")
    return Json({"status": "ready", "model": context.engine.info.model})


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(context: Ctx) -> Response:
    """Prometheus metrics."""
    return Response(await context.engine.scrape(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def versions(context: Ctx) -> Json[Versions]:
    """Versions of the server and of what it runs on."""
    return Json({"version": __version__, "torch": version("torch"), "transformers": version("transformers")})


@router.get("/", response_class=HTMLResponse)
async def playground() -> HTMLResponse:
    """A page to try the server."""
    return HTMLResponse(_PAGE, headers=_PAGE_HEADERS)
