"""Builds the engine and its app from the settings, for serving over HTTP and for answering in this process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI

from nr_serve.api.app import create_app
from nr_serve.api.bridge import AsyncEngine
from nr_serve.config import ServeConfig
from nr_serve.default_model import model_folder
from nr_serve.engine.loop import EngineLoop
from nr_serve.errors import BadRequest, loading
from nr_serve.metrics import Metrics, VllmCollector
from nr_serve.names import adapter_entry, check_adapter_name
from nr_serve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nr_serve.tracing import Tracing


log = logging.getLogger(__name__)


def assemble(config: ServeConfig) -> tuple[AsyncEngine, FastAPI]:
    """Return the engine, not yet started, and the app whose lifespan starts it.

    Fetches the default base if it is asked for. Raises NrError for a wrong adapter or folder.
    """
    _check_adapters(config)
    _begin_compiling(config)
    model = model_folder(config.model, say=log.info) if config.log_format == "json" else model_folder(config.model)
    for entry in config.adapter:
        check_adapter_name(adapter_entry(entry)[0], config.base_name(model))
    tokenizer = load_tokenizer(model)
    engine = AsyncEngine(
        lambda deliver: EngineLoop(config, model, tokenizer, deliver), _metrics(config, model), _tracing(config)
    )
    return engine, create_app(engine, tokenizer, config)


def _begin_compiling(config: ServeConfig) -> None:
    """Start to compile the CPU operators, first of all: at a first start this takes longer than anything else."""
    if not config.compile or config.device == "cuda":
        return
    from nr_serve.engine.model.cpu_operators import begin  # imports torch, which help must not wait for
    from nr_serve.engine.model.device import device_of

    if device_of(config) == "cpu":
        begin()


def _check_adapters(config: ServeConfig) -> None:
    """Refuse wrong folders and files before the base is loaded; whether an adapter fits it is checked later."""
    for folder in config.adapter_dir:
        if not folder.is_dir():
            raise BadRequest(f"--adapter-dir {folder}: there is no such folder", param="adapter_dir")
    if config.adapter:
        from nr_serve.neutral.format import naming, read_info  # imports torch, which help must not wait for

        for entry in config.adapter:
            _, path = adapter_entry(entry)
            with naming(path):
                read_info(path, max_bytes=config.max_adapter_bytes)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The base's tokenizer. Raises UnsupportedBase if there is none."""
    if not Path(model).is_dir():
        log.info("%s is not a folder here: looking for it on the hub and among earlier downloads from there", model)
    with loading(f"the tokenizer of {model}"):
        return Tokenizer.load(model)


def _metrics(config: ServeConfig, model: str | Path) -> Metrics:
    metrics = Metrics()
    if config.metrics_compat == "vllm":
        metrics.registry.register(VllmCollector(metrics, config.base_name(model), config.page_size))
    return metrics


def _tracing(config: ServeConfig) -> Tracing | None:
    if config.otlp_endpoint is None:
        return None
    from nr_serve.tracing import Tracing

    return Tracing.to_collector(config.otlp_endpoint)
