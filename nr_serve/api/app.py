"""The app, built from its collaborators: tests pass others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from nr_serve import __version__
from nr_serve.api import adapters, openai, system
from nr_serve.api.auth import KeyCheck
from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.context import Context
from nr_serve.api.errors import add_error_handlers
from nr_serve.api.limits import BodyLimit
from nr_serve.config import ServeConfig
from nr_serve.tokenizer import Tokenizer


def create_app(engine: AsyncEngine, tokenizer: Tokenizer, config: ServeConfig) -> FastAPI:
    """Return the app. Its lifespan starts the engine and stops it."""
    context = Context(engine, tokenizer, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with engine.running():
            yield
        context.text_thread.shutdown(wait=False, cancel_futures=True)

    # The interactive pages load scripts from elsewhere; /openapi.json alone stays.
    app = _App(title="nr-serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.context = context
    for router in (openai.router, adapters.router, system.router):
        app.include_router(router)
    add_error_handlers(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(KeyCheck, api_key=config.api_key, admin_key=config.admin_key)
    return app


class _App(FastAPI):
    """FastAPI, but its document says what is true here: a wrong body is answered with 400, not 422."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            for operations in document["paths"].values():
                for operation in operations.values():
                    answers = operation["responses"]
                    if answers.pop("422", None):
                        answers["400"] = {"description": "Bad request: `error` names the field"}
            for name in ("HTTPValidationError", "ValidationError"):
                document.get("components", {}).get("schemas", {}).pop(name, None)
            self.openapi_schema = document
        return self.openapi_schema
