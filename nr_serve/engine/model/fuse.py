"""Fuses a decoder layer into eleven operators, on some CPUs nearly the whole model into one: what is between costs.

Only layers of transformers that are known to compute exactly this are replaced. The start-up check
(`startup_check.py`) compares the result to the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nr_serve.engine.model.attention import NO_WINDOW, KVCache, refuse_unknown
from nr_serve.engine.model.batch import Batch
from nr_serve.engine.model.cpu_operators import CpuOperators
from nr_serve.engine.model.packed_linear import PairedLinear, can_pack, pack_linears
from nr_serve.neutral.bank import Bank
from nr_serve.neutral.cpu_bank import CpuBank
from nr_serve.neutral.host import HostFFN, decoder_layers, host_blocks

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
_MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
_SILUS = {"SiLU", "SiLUActivation"}


def prepare_layers(
    model: nn.Module, bank: Bank, operators: CpuOperators | None, *, positions: int, kernels: bool = False
) -> nn.Module:
    """Make a frozen model's layers add the bank's residues, and compute as fast as they can, in place.

    Returns what runs the steps: the model, or a `CompiledModel` of its parts, for texts of up to `positions`
    tokens. Uses `operators` on a CPU, or `gpu_operators` with `kernels`. The order matters: layers are fused before
    they host blocks, packed after they are fused, compiled after they are packed. Raises UnsupportedBase as
    `host_blocks` does.
    """
    if kernels:
        from nr_serve.engine.model import gpu_operators  # needs triton

        fuse(model, gpu_operators, GpuLayer)
    elif operators is not None and can_pack(next(model.parameters()).dtype):
        fuse(model, operators)
    host_blocks(model, bank.add_residues)
    pack_linears(model, None if operators is None else operators.multiply)
    if operators is not None and isinstance(bank, CpuBank):
        return compile_model(model, operators, bank, positions)
    return model


class FusedNorm(nn.Module):
    """The RMSNorm after the last layer, as one operator."""

    def __init__(self, norm: Any, rms_norm: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        """Take the norm over."""
        super().__init__()
        self.weight, self.eps = norm.weight, float(norm.variance_epsilon)
        self._rms_norm = rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        return self._rms_norm(x.contiguous(), self.weight, self.eps)


class FusedFFN(nn.Module):
    """SwiGLU FFN (Shazeer, 2020) with the gate and up projections as one product."""

    def __init__(self, ffn: Any, silu_mul: Callable[[Tensor], Tensor]) -> None:
        """Take the FFN over. `silu_mul` takes gate and up side by side."""
        super().__init__()
        self.gate_up, self.down = _joined(ffn.gate_proj, ffn.up_proj), ffn.down_proj
        self._silu_mul = silu_mul

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        y: Tensor = self.down(self._silu_mul(self.gate_up(x)))
        return y


class FusedLayer(nn.Module):
    """A layer of attention and FFN, each after an RMSNorm (Zhang and Sennrich, 2019) and added to the stream.

    Queries, keys and values are one product. Qwen 3 also normalises queries and keys.
    """

    def __init__(self, layer: Any, operators: Any) -> None:
        """Take the layer over. `operators`: `CpuOperators`, or the module `gpu_operators` for a `GpuLayer`."""
        super().__init__()
        attention = layer.self_attn
        self.mlp = FusedFFN(layer.mlp, operators.silu_mul)
        self.qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj
        self.attention_norm, self.ffn_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.eps = float(layer.input_layernorm.variance_epsilon)
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.q_norm, self.k_norm = getattr(q_norm, "weight", None), getattr(k_norm, "weight", None)
        self.layer_idx: int = attention.layer_idx
        self.head_size: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.window = _window(attention)
        self._operators = operators

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        nr_batch: Batch,
        nr_cache: KVCache,
        **unknown: Any,
    ) -> Tensor:
        """[1, T, d] to [1, T, d], called as the model calls its own layers."""
        refuse_unknown(attention_mask, 0.0, unknown)
        ops = self._operators
        keys_CKD, values_CKD = nr_cache.keys_LCKD[self.layer_idx], nr_cache.values_LCKD[self.layer_idx]
        qkv = self.qkv(ops.rms_norm(hidden_states, self.attention_norm, self.eps))
        query_THD = ops.rotate(
            qkv,
            *position_embeddings,
            keys_CKD,
            values_CKD,
            nr_batch.cells_T,
            self.q_norm,
            self.k_norm,
            self.eps,
        )
        out_THD = nr_cache.attend(query_THD, keys_CKD, values_CKD, nr_batch, self.scaling, self.window)
        return self._add_ffn(hidden_states, self.out(out_THD.flatten(1)[None]))

    def _add_ffn(self, stream: Tensor, out: Tensor) -> Tensor:
        """The stream after the layer: `out` of the attention is added to it, then the FFN's output."""
        residual = stream + out
        y: Tensor = self.mlp(self._operators.rms_norm(residual, self.ffn_norm, self.eps))
        return residual + y


class GpuLayer(FusedLayer):
    """A fused layer on `gpu_operators`, where the residual sum and the norm after it are one operator."""

    def _add_ffn(self, stream: Tensor, out: Tensor) -> Tensor:
        residual, x = self._operators.add_rms_norm(stream, out, self.ffn_norm, self.eps)
        y: Tensor = self.mlp(x)
        return y.add_(residual)


def fuse(model: nn.Module, operators: Any, kind: type[FusedLayer] = FusedLayer) -> None:
    """Replace, in place, known layers of a frozen model that host no blocks yet; if all are, the last norm too."""
    decoder: Any = model.get_submodule("model")
    for i in range(len(decoder.layers)):  # no list of layers: each is given back once it is replaced
        if _is_known(decoder.layers[i]):
            decoder.layers[i] = kind(decoder.layers[i], operators)
    if all(isinstance(layer, kind) for layer in decoder.layers) and _is_of(getattr(decoder, "norm", None), _NORMS):
        decoder.norm = FusedNorm(decoder.norm, operators.rms_norm)


class Logits(NamedTuple):
    """The part of a model's output that a step needs."""

    logits: Tensor
    """[1, N, V]"""


class CompiledModel(nn.Module):
    """A model in two calls of C++ operators: `decoder`, with its FFNs' residues, and the output head.

    It is called as the model is. What transformers prepares for other uses, masks and caches above all, it leaves
    out: that takes more than half a millisecond a step. And at every call into torch another thread of Python, such
    as the API's, may take the interpreter's lock.
    """

    def __init__(self, model: Any, make: Callable[..., Any], bank: CpuBank, positions: int) -> None:
        """Take the model over, for that many positions. `make`: `CpuOperators.decoder`; `bank` has the residues."""
        super().__init__()
        decoder, self.lm_head, self._bank = model.model, model.lm_head, bank
        layers: list[FusedLayer] = list(decoder.layers)
        # A position's rotation is the same in every step: `check_base` refuses other kinds.
        positions_P = torch.arange(positions)
        cos_PD, sin_PD = (x[0] for x in decoder.rotary_emb(decoder.norm.weight, positions_P[None]))
        self._decoder = make(
            {
                "embedding": decoder.embed_tokens.weight,
                "norm": decoder.norm.weight,
                "cos": cos_PD.contiguous(),
                "sin": sin_PD.contiguous(),
            },
            [_weights(layer) for layer in layers],
            [*(layer.eps for layer in layers), decoder.norm.eps],
            [layer.scaling for layer in layers],
            [layer.window or NO_WINDOW for layer in layers],
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        nr_batch: Batch,
        nr_cache: KVCache,
        logits_to_keep: Tensor | Literal[0] = 0,
        use_cache: Literal[False] = False,
    ) -> Logits:
        """Logits of tokens [1, T]: of all of them, or of those at the indices `logits_to_keep` [N]."""
        x = self._decoder.forward(
            input_ids,
            position_ids,
            nr_cache.keys_LCKD,
            nr_cache.values_LCKD,
            nr_batch.cells_T,
            [group.cells_BN for group in nr_batch.groups],
            [group.positions_Bn for group in nr_batch.groups],
            logits_to_keep if isinstance(logits_to_keep, Tensor) else None,
            self._bank.under_way,
        )
        return Logits(self.lm_head(x))


def compile_model(model: nn.Module, operators: CpuOperators, bank: CpuBank, positions: int) -> nn.Module:
    """A model as a `CompiledModel`, if its parts are known and its layers' products `PairedLinear`; else itself.

    If the output head is a `PairedLinear` too, the calling thread, which must be the one that runs the model,
    shares its work with our own threads instead of torch's.
    """
    if operators.decoder is None or not _is_of(model, _MODELS):
        return model
    decoder: Any = model.get_submodule("model")
    if type(decoder.embed_tokens) is not nn.Embedding or not isinstance(decoder.norm, FusedNorm):
        return model
    if not all(_is_ours(layer, operators) for layer in decoder_layers(model)):
        return model
    if isinstance(model.lm_head, PairedLinear):
        operators.share_among(torch.get_num_threads())
    return CompiledModel(model, operators.decoder, bank, positions)


def _is_ours(layer: nn.Module, operators: CpuOperators) -> bool:
    """Whether a layer computes what `operators.decoder` does."""
    return (
        isinstance(layer, FusedLayer)
        and operators.prompts_by(layer.attention_norm.dtype, layer.head_size) is not None
        and all(isinstance(product, PairedLinear) for product in _products(layer).values())
    )


def _weights(layer: FusedLayer) -> dict[str, Tensor | None]:
    """A layer's tensors, by their names in `CpuOperators.decoder`."""
    weights = {name: getattr(layer, name) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")}
    for name, product in _products(layer).items():
        weights |= {name: product.packed, f"{name}_bias": product.bias}
    return weights


def _products(layer: FusedLayer) -> dict[str, Any]:
    """A layer's linear layers, by their names in `CpuOperators.decoder`."""
    ffn: Any = layer.mlp.ffn if isinstance(layer.mlp, HostFFN) else layer.mlp
    return {"qkv": layer.qkv, "out": layer.out, "gate_up": ffn.gate_up, "down": ffn.down}


def _is_known(layer: Any) -> bool:
    if not _is_of(layer, _LAYERS):
        return False
    # A quantised or otherwise changed linear layer is of another class.
    children = (*layer.self_attn.named_children(), *layer.mlp.named_children())
    linears = [child for name, child in children if "proj" in name]
    return type(layer.mlp.act_fn).__name__ in _SILUS and all(type(linear) is nn.Linear for linear in linears)


def _is_of(module: Any, names: set[str]) -> bool:
    """Whether a module is of one of these classes of transformers."""
    return type(module).__name__ in names and type(module).__module__.startswith("transformers.models.")


def _window(attention: Any) -> int | None:
    """How many positions a layer's attention looks back, its own included; None: all."""
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)


@torch.no_grad()
def _joined(*linears: nn.Linear) -> nn.Linear:
    """One linear layer whose outputs are those of several, concatenated."""
    weight = torch.cat([linear.weight for linear in linears])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if linears[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joined
