"""Builds the app from its collaborators; tests pass others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from nr_serve import __version__
from nr_serve.api import adapters, openai, system
from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.context import Context
from nr_serve.api.errors import add_error_handlers
from nr_serve.api.middleware import access_log
from nr_serve.api.middleware.access_log import AccessLog
from nr_serve.api.middleware.auth import KeyCheck
from nr_serve.api.middleware.deadlines import Deadlines
from nr_serve.api.middleware.hosts import HostCheck, checks_hosts
from nr_serve.api.middleware.limits import BodyLimit, KeyLimits
from nr_serve.api.openapi import EXAMPLES
from nr_serve.config import ServeConfig
from nr_serve.keys import Keys
from nr_serve.tokenizer import Tokenizer


def create_app(engine: AsyncEngine, tokenizer: Tokenizer, config: ServeConfig) -> FastAPI:
    """Return the app. Its lifespan starts and stops the engine. Raises BadRequest if the key file is wrong."""
    context = Context(engine, tokenizer, config)
    engine.metrics.ready.set_function(lambda: context.ready)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with engine.running():
                yield
        finally:
            context.stop_threads()

    # FastAPI's interactive pages load scripts from other sites, so only /openapi.json stays.
    app = _App(title="nr-serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False  # after a redirect a client would send its key again, perhaps unencrypted
    app.state.context = context
    # Only for the OpenAPI document, so that generated clients send a key; KeyCheck checks it before any route.
    key = Depends(HTTPBearer(auto_error=False, description="where the server has keys"))
    for router in (openai.router, adapters.router):
        app.include_router(router, dependencies=[key])
    app.include_router(system.router)
    add_error_handlers(app)
    _add_middleware(app, context)
    return app


def _add_middleware(app: FastAPI, context: Context) -> None:
    """Add the middleware that a request passes before its route; the last one added runs first."""
    config = context.config
    app.add_middleware(BodyLimit, max_bytes=int(config.max_body_mib * 2**20))
    app.add_middleware(Deadlines, underway=context.underway, timeout_s=config.request_timeout)
    app.add_middleware(KeyLimits, config=config)
    app.add_middleware(KeyCheck, keys=Keys(config))
    if context.engine.tracing is not None:
        from nr_serve.tracing import TraceCaller

        app.add_middleware(TraceCaller)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["*"],  # OpenAI's client sends a dozen; keys are headers, never cookies
            expose_headers=[access_log.HEADER, "Retry-After"],
        )
    if checks_hosts(config):
        app.add_middleware(HostCheck, config=config)
    app.add_middleware(AccessLog, config=config, tokenizer=context.tokenizer, metrics=context.engine.metrics)


class _App(FastAPI):
    """FastAPI with a correct OpenAPI document: this server answers an invalid body with 400, not 422."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # every route documents its 400
            for name in ("HTTPValidationError", "ValidationError"):
                document.get("components", {}).get("schemas", {}).pop(name, None)
            for name, example in EXAMPLES.items():  # FastAPI would drop their null values
                document["components"]["schemas"][name]["example"] = example
            self.openapi_schema = document
        return self.openapi_schema
