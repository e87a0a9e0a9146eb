"""The host model: where an adapter's blocks go in a `transformers` decoder, for serving and training alike.

Knows the model's module tree, and nothing about what a block computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nr_serve.errors import UnsupportedBase

AddResidues = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, x, y) -> y plus the residues; x is the FFN's input and y its output, both [..., d]."""


# These scale their frequencies by the longest sequence in the batch, so requests would affect each other.
_ROPE_BY_LENGTH = {"dynamic", "longrope"}


class HostFFN(nn.Module):
    """A layer's FFN with residues added to its output; without residues it computes the same as the FFN."""

    def __init__(self, ffn: nn.Module, layer: int, add_residues: AddResidues) -> None:
        super().__init__()
        self.ffn = ffn
        self.layer = layer
        self.add_residues = add_residues

    def forward(self, x: Tensor) -> Tensor:
        """FFN(x) + residues, same shape as x."""
        out: Tensor = self._added(x, self.ffn(x))
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]  # one compiled FFN serves all layers
    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        return self.add_residues(self.layer, x, y)


def load_model(source: Path | str, **options: Any) -> Any:
    """A causal language model of transformers, from a folder or the hub; `options` are of its `from_pretrained`.

    Raises UnsupportedBase if its files lack weights: transformers would make them up.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    model, told = loaded
    lacking = sorted(told["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UnsupportedBase(f"{source}: its files lack the weights {lacking[0]}{more}")
    return model


def check_base(model: Any) -> Any:
    """The model's text configuration, if the model can be served and adapters can be trained for it.

    Raises UnsupportedBase with the reason.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedBase(f"{name} has an encoder; only decoder-only models are served")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedBase(f"{name} has layers of kind {', '.join(sorted(kinds))}, which are not supported")
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedBase(f"{name} caps its attention logits, which is not supported")
    ropes = _rope_types(getattr(config, "rope_parameters", None)) & _ROPE_BY_LENGTH
    if ropes:
        raise UnsupportedBase(f"{name} has {', '.join(sorted(ropes))} rotary embeddings, which are not supported")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedBase(f"{name} does not take transformers' attention interface")
    decoder_layers(model)
    return config


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a causal language model, first to last.

    Raises UnsupportedBase, with the reason, for a model whose layers cannot host blocks.
    """
    decoder = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    name = type(model).__name__
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UnsupportedBase(f"{name} has no list of decoder layers at model.layers")
    for i, layer in enumerate(layers):
        ffn = getattr(layer, "mlp", None)
        if not isinstance(ffn, nn.Module):
            raise UnsupportedBase(f"{name} has no FFN module at model.layers.{i}.mlp")
        if getattr(ffn, "experts", None) is not None:
            raise UnsupportedBase(f"{name} has a mixture-of-experts FFN in layer {i}; only dense FFNs are hosted")
    return list(layers)


def host_blocks(model: nn.Module, add_residues: AddResidues) -> None:
    """Wrap every layer's FFN, in place, so that `add_residues` is called with its input and output.

    In models with a norm after the FFN (Gemma 3) the residue is added before that norm.
    Raises UnsupportedBase as `decoder_layers` does, and if the blocks are hosted already.
    """
    layers = decoder_layers(model)
    if isinstance(layers[0].mlp, HostFFN):
        raise UnsupportedBase("this model already hosts blocks")
    for i, layer in enumerate(layers):
        ffn = layer.get_submodule("mlp")
        layer.mlp = HostFFN(ffn, i, add_residues)


def unhost_blocks(model: nn.Module) -> None:
    """Put every layer's own FFN back, in place; layers without hosted blocks stay as they are."""
    for layer in decoder_layers(model):
        if isinstance(layer.mlp, HostFFN):
            layer.mlp = layer.mlp.ffn


def fingerprint(model: nn.Module, tokenizer: Any) -> str:
    """Identity of a base: 16 hex digits over its shape, its tokenizer's vocabulary and a sample of its weights.

    Weights are compared in bfloat16, so the same checkpoint loaded in another dtype has the same fingerprint.
    Call it before `host_blocks`.
    """
    config: Any = model.config
    shape = {k: getattr(config, k, None) for k in _SHAPE_FIELDS}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    digest.update(json.dumps(sorted(vocabulary.items(), key=lambda item: item[1])).encode())
    layers = decoder_layers(model)
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        for name, weight in sorted(layer.named_parameters()):
            digest.update(name.encode())
            digest.update(_sample(weight))
    return digest.hexdigest()[:16]


_SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def _sample(weight: Tensor) -> bytes:
    flat = weight.detach().flatten()
    picked = flat[:: max(1, flat.numel() // 256)][:256].to(torch.bfloat16).cpu().contiguous()
    return picked.view(torch.uint8).numpy().tobytes()


def _rope_types(parameters: Any) -> set[str]:
    """The kinds of rotary embedding in a configuration, which may nest a set of parameters per kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    own = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return own.union(*nested)
