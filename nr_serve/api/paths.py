"""Classifies requests by path: guarded by keys, changing adapters, or asking the model."""

from __future__ import annotations

from starlette.types import Scope

_GUARDED = ("/v1", "/tokenize", "/detokenize")
_CHANGES = ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_READS = ("GET", "HEAD", "OPTIONS")


def is_guarded(scope: Scope) -> bool:
    """Whether a request concerns the model or the adapters; the rest is for operators and the playground page."""
    return _under(scope["path"], _GUARDED)


def changes_adapters(scope: Scope) -> bool:
    """Whether a request may change the set of adapters that is served."""
    return scope["method"] not in _READS and _under(scope["path"], _CHANGES)


def asks_model(scope: Scope) -> bool:
    """Whether a request makes work for the model or its tokenizer."""
    return scope["method"] not in _READS and is_guarded(scope) and not changes_adapters(scope)


def _under(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots)
