"""The base model: loaded with transformers, and checked before it is served."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from nr_serve.config import ServeConfig
from nr_serve.engine.messages import SamplingDefaults
from nr_serve.engine.model.auto_dtype import fastest_dtype
from nr_serve.engine.model.device import device_of
from nr_serve.errors import UnsupportedBase, faults, loading
from nr_serve.neutral.host import load_model
from nr_serve.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def load_base(path: Path | str, config: ServeConfig) -> Any:
    """Load a model from a folder or the hub, on the configured device, in the configured dtype.

    Raises UnsupportedBase if there is no such model or device.
    """
    device = device_of(config)
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    else:
        dtype = fastest_dtype() if device == "cpu" else torch.bfloat16
    with loading(str(path)):
        model = load_model(path, dtype=dtype)
    return model.to(device)


def max_model_len(shape: Any, config: ServeConfig, cells: int) -> int:
    """Longest prompt plus answer: as configured; else the longest that both the base and the KV cache allow.

    Raises UnsupportedBase if more is configured than either allows.
    """
    longest = int(getattr(shape, "max_position_embeddings", None) or cells)
    if config.max_model_len is None:
        return min(longest, cells)
    if config.max_model_len > longest:
        raise UnsupportedBase(f"--max-model-len {config.max_model_len}: the base was made for {longest} tokens")
    if config.max_model_len > cells:
        raise UnsupportedBase(
            f"--max-model-len {config.max_model_len}: the KV cache holds {cells} tokens; raise --kv-cache-gib"
        )
    return config.max_model_len


def end_tokens(model: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens that end an answer."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    vocabulary = model.config.get_text_config().vocab_size
    return frozenset(i for i in [*listed, tokenizer.hf.eos_token_id] if i is not None and i < vocabulary)


def sampling_defaults(model: Any, config: ServeConfig) -> SamplingDefaults:
    """Defaults from the base's `generation_config.json`, as in vLLM; none of them with `--generation-config none`.

    Raises UnsupportedBase for a value that no request could ask for.
    """
    if config.generation_config == "none":
        return SamplingDefaults()
    values = {each.name: getattr(model.generation_config, each.name, None) for each in fields(SamplingDefaults)}
    named = {name: value for name, value in values.items() if value is not None}
    try:
        defaults = TypeAdapter(SamplingDefaults).validate_python(named)
    except ValidationError as error:
        raise UnsupportedBase(
            f"the base's generation_config.json: {faults(error)}; --generation-config none leaves it out"
        ) from error
    if named:
        log.info("sampling defaults for requests that set nothing: %s", asdict(defaults))
    return defaults
