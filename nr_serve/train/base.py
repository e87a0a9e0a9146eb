"""The frozen base model of a run, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nr_serve.errors import UnsupportedBase
from nr_serve.neutral import host


@dataclass(frozen=True)
class FrozenBase:
    """A causal language model that takes no gradient, in evaluation mode."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(host.decoder_layers(self.model))

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())


def load_base(base: str, dtype: str = "float32") -> FrozenBase:
    """Load `default`, a folder or a model hub's name. Raises UnsupportedBase with the reason."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = base
    if base == "default":
        from nr_serve.default_model import fetch_model

        source = str(fetch_model())
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UnsupportedBase(f"cannot load the base {source}: {error}") from error
    model.requires_grad_(False)
    model.eval()
    name = Path(source).name
    return FrozenBase(name, model, tokenizer, host.fingerprint(model, tokenizer))
