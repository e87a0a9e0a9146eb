"""The runner: the one door to the device. Owns the model, the KV cache and the bank; turns pieces into results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nr_serve.config import ServeConfig
from nr_serve.engine import attention
from nr_serve.engine.attention import KVCache
from nr_serve.engine.batch import Batch, build_batch
from nr_serve.engine.messages import EngineInfo
from nr_serve.engine.probe import Probe
from nr_serve.engine.request import TopLogprobs
from nr_serve.engine.sampler import log_probabilities, sample
from nr_serve.engine.scheduler import Piece, Result
from nr_serve.errors import UnsupportedBase
from nr_serve.neutral.bank import Bank
from nr_serve.neutral.host import capacity_width, decoder_layers, fingerprint, host_blocks
from nr_serve.tokenizer import Tokenizer

DEFAULT_CAPACITY = 0.2  # the paper's extra capacity, as a share of the base's parameters


class Runner:
    """Runs steps of one base model with its bank of adapters."""

    def __init__(self, model: Any, tokenizer: Tokenizer, config: ServeConfig, name: str) -> None:
        """Take over a loaded model (it is changed in place). Raises UnsupportedBase with the reason."""
        self.model = model.eval().requires_grad_(False)
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.page_size = config.page_size
        shape = _check_model(model)
        mark = fingerprint(model, tokenizer.hf)
        probe = Probe(model, tokenizer)
        self.eos_ids = _eos_ids(model, tokenizer)

        layers, d = len(decoder_layers(model)), int(shape.hidden_size)
        width = config.slot_width or capacity_width(model, DEFAULT_CAPACITY)
        self.bank = Bank(
            layers=layers,
            d=d,
            slots=config.slots,
            width=width,
            rows=config.max_running,
            device=self.device,
            dtype=self.dtype,
        )
        heads = int(getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads)
        head_size = int(getattr(shape, "head_dim", None) or d // shape.num_attention_heads)
        bytes_per_page = self.page_size * KVCache.bytes_per_cell(
            layers=layers, heads=heads, head_size=head_size, dtype=self.dtype
        )
        self.pages = config.pages or max(1, int(config.kv_cache_gib * 2**30) // bytes_per_page)
        self.cache = KVCache(
            layers=layers,
            cells=self.pages * self.page_size,
            heads=heads,
            head_size=head_size,
            device=self.device,
            dtype=self.dtype,
        )
        attention.register()
        model.set_attn_implementation(attention.NAME)
        host_blocks(model, self.bank.add_residues)
        self.info = EngineInfo(
            model=name,
            fingerprint=mark,
            layers=layers,
            d=d,
            vocab_size=int(shape.vocab_size),
            max_model_len=_max_model_len(shape, config, self.pages * self.page_size),
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            slots=config.slots,
            slot_width=width,
        )
        probe.check(self)

    @classmethod
    def load(cls, path: Path | str, tokenizer: Tokenizer, config: ServeConfig, name: str) -> Runner:
        """Load a base model from a folder or the hub, on the configured device and in the configured dtype."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedBase("--device cuda was asked for, but torch sees no CUDA device")
        default = torch.float32 if device == "cpu" else torch.bfloat16
        dtype = default if config.dtype == "auto" else getattr(torch, config.dtype)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError) as error:
            raise UnsupportedBase(f"cannot load {path}: {error}") from error
        return cls(model.to(device), tokenizer, config, name)

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece], labels: Sequence[int]) -> list[Result]:
        """One step: a forward pass over all pieces, then a token for each piece that samples."""
        batch = build_batch(pieces, labels, page_size=self.page_size, slots=self.bank.slots, device=self.device)
        for piece in pieces:
            if piece.start == 0 and piece.request.row is not None:
                self.bank.forget_row(piece.request.row)
        wanted = [_logit_positions(piece) for piece in pieces]
        positions = [start + p for (start, _), own in zip(batch.bounds, wanted, strict=True) for p in own]
        logits_NV, fired_TS = self.forward(batch, positions)
        results, at = [], 0
        for piece, own, (start, end) in zip(pieces, wanted, batch.bounds, strict=True):
            fired_nS = fired_TS[start:end] if fired_TS is not None and piece.request.submit.gates else None
            results.append(_result(piece, logits_NV[at : at + len(own)], fired_nS))
            at += len(own)
        return results

    def forward(self, batch: Batch, positions: list[int]) -> tuple[Tensor, Tensor | None]:
        """Logits at the given tokens of the step, float32 [N, V], and layers fired by token and slot."""
        self.bank.begin(batch.tokens)
        try:
            output = self.model(
                input_ids=batch.input_ids_T[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                logits_to_keep=torch.tensor(positions, dtype=torch.long, device=self.device),
                nr_batch=batch,
                nr_cache=self.cache,
            )
        finally:
            fired_TS = self.bank.end()
        return output.logits[0].float(), fired_TS


def _check_model(model: Any) -> Any:
    """The model's text configuration, if it can be served. Raises UnsupportedBase."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedBase(f"{name} has an encoder; only decoder-only models are served")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedBase(f"{name} has layers of kind {', '.join(sorted(kinds))}, which are not supported")
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedBase(f"{name} caps its attention logits, which is not supported")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedBase(f"{name} does not take transformers' attention interface")
    decoder_layers(model)
    return config


def _max_model_len(shape: Any, config: ServeConfig, cells: int) -> int:
    longest = int(getattr(shape, "max_position_embeddings", None) or cells)
    if config.max_model_len is not None and config.max_model_len > longest:
        raise UnsupportedBase(f"--max-model-len {config.max_model_len}: the base was made for {longest} tokens")
    return min(config.max_model_len or longest, cells)


def _eos_ids(model: Any, tokenizer: Tokenizer) -> frozenset[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in [*listed, tokenizer.hf.eos_token_id] if i is not None)


def _logit_positions(piece: Piece) -> list[int]:
    """Places in the piece whose logits are needed: the last if it samples, and the prompt's if asked for."""
    sampling = piece.request.sampling
    if sampling.prompt_logprobs is None:
        return [piece.count - 1] if piece.samples and sampling.max_tokens > 0 else []
    last_of_prompt = piece.request.prompt_length - 1
    scored = [p for p in range(piece.count) if piece.start + p < last_of_prompt]
    return [*scored, piece.count - 1] if piece.samples and sampling.max_tokens > 0 else scored


def _result(piece: Piece, logits_NV: Tensor, fired_nS: Tensor | None) -> Result:
    request, sampling = piece.request, piece.request.sampling
    samples = piece.samples and sampling.max_tokens > 0
    token = sample(logits_NV[-1], request) if samples else None
    logprob = None
    if token is not None and sampling.logprobs is not None:
        logprob = log_probabilities(logits_NV[-1:], [token], sampling.logprobs)[0]
    scored: list[TopLogprobs] = []
    if sampling.prompt_logprobs is not None:
        prompt_NV = logits_NV[:-1] if samples else logits_NV
        following = request.tokens[piece.start + 1 : piece.start + 1 + len(prompt_NV)]
        scored = log_probabilities(prompt_NV, following, sampling.prompt_logprobs) if following else []
    fired = tuple(map(tuple, fired_nS.tolist())) if fired_nS is not None else ()
    return Result(token, logprob, tuple(scored), fired)
