"""The commands by name: what each takes, and what it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic_settings import BaseSettings

from nr_serve.commands import comparison, evaluation, generate, inspect, keys, remote, training
from nr_serve.config import ServeConfig


def _serve(config: ServeConfig) -> int:
    from nr_serve.serve import serve

    return serve(config)


COMMANDS: Mapping[str, tuple[type[BaseSettings], Callable[[Any], int]]] = {
    "serve": (ServeConfig, _serve),
    "load-adapter": (remote.LoadAdapter, remote.load_adapter),
    "unload-adapter": (remote.UnloadAdapter, remote.unload_adapter),
    "list-adapters": (remote.ListAdapters, remote.list_adapters),
    "generate": (generate.Generate, generate.generate),
    "make-key": (keys.MakeKey, keys.make_key),
    "inspect": (inspect.Inspect, inspect.inspect),
    "train": (training.Train, training.train),
    "sweep": (training.Sweep, training.sweep),
    "calibrate": (training.Calibrate, training.calibrate),
    "export-adapter": (training.ExportAdapter, training.export_adapter),
    "evaluate": (evaluation.Evaluate, evaluation.evaluate),
    "compare": (comparison.Compare, comparison.compare),
    "fetch-model": (training.FetchModel, training.fetch_model),
    "fetch-corpus": (training.FetchCorpus, training.fetch_corpus),
}
"""Command -> (its flags, its action). The action returns the exit code."""
