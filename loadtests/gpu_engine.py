"""A base of random weights on one GPU with the bank, attention and graphs that the server has there."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from random_blocks import random_blocks
from transformers import AutoConfig, AutoModelForCausalLM

from nr_serve.engine.adapters.registry import Version
from nr_serve.neutral import block_width
from nr_serve.neutral.format import Adapter, AdapterInfo

PAGE = 16
CAPACITY = 0.05
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "rope_theta": 500000.0,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True, "rope_theta": 500000.0,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "rope_theta": 100000.0,
    },
    "tiny": {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 200, "tie_word_embeddings": True,
    },
}  # fmt: skip


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of that shape, made on the device."""
    config = AutoConfig.for_model("llama", max_position_embeddings=16384, **SHAPES[shape])
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Engine:
    """A base with the GPU's bank, attention and graphs, as the server has them."""

    def __init__(self, shape: str, args: argparse.Namespace, batches: Sequence[int], context: int) -> None:
        # Here, for they need triton, and --help does not.
        from nr_serve.engine.model import attention, gpu_attention, graphs
        from nr_serve.engine.model.fuse import prepare_layers
        from nr_serve.neutral.gpu_bank import GpuBank

        self.device, dtype = args.device, torch.float32 if args.tiny else torch.bfloat16
        self.model = random_model(shape, self.device, dtype).requires_grad_(False)
        config = self.model.config
        self.parameters = sum(p.numel() for p in self.model.parameters())
        layers, d = config.num_hidden_layers, config.hidden_size
        self.width = block_width(CAPACITY, parameters=self.parameters, d=d, layers=layers)
        self.pages_each = -(-context // PAGE)
        self.pages = self.pages_each * max(batches) + 1
        rows = max(batches) + 1
        self.bank = GpuBank(
            layers=layers,
            d=d,
            slots=8,
            width=self.width,
            rows=rows,
            device=self.device,
            dtype=dtype,
            labels=1,
            pages=self.pages,
        )
        heads, head_size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.cache = attention.KVCache(
            layers=layers,
            cells=self.pages * PAGE,
            heads=heads,
            head_size=head_size,
            device=self.device,
            dtype=dtype,
            attend=gpu_attention.attend,
        )
        torch.backends.cuda.enable_cudnn_sdp(False)  # as the server has it
        self.kv_bytes_a_token = 2 * layers * heads * head_size * dtype.itemsize
        attention.register()
        self.model.set_attn_implementation(attention.NAME)
        prepare_layers(self.model, self.bank, None, positions=config.max_position_embeddings, kernels=True)
        self.graphs = graphs.Graphs(
            graphs.model_step(self.model, self.bank, self.cache), slots=8, page_size=PAGE, longest=context,
            padding=graphs.Padding(rows - 1, self.pages - 1, self.bank.labels), device=self.device,
            sizes=batches,
        )  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads of the base: all but an input embedding of its own."""
        embedding = 0 if self.model.config.tie_word_embeddings else self.model.get_input_embeddings().weight.nbytes
        return sum(p.nbytes for p in self.model.parameters()) - embedding

    @property
    def adapter_bytes(self) -> int:
        return 3 * self.width * self.bank.d * self.bank.layers * self.bank.dtype.itemsize

    def attach(self, slot: int, *, fires: bool, seed: int = 0) -> None:
        """A random adapter whose every gate is 1, or far below 0."""
        for _ in self.attaching(slot, fires=fires, seed=seed, memory=self.device):
            pass

    def attaching(self, slot: int, *, fires: bool, seed: int, memory: torch.device) -> Iterator[None]:
        """So, from weights in that memory, a little at a time."""
        bank, bias = self.bank, 1.0 if fires else -1e4
        generator = torch.Generator(memory).manual_seed(seed)
        block = random_blocks(1, bank.d, self.width, bias, generator, bank.dtype)
        info = AdapterInfo("random", "", bank.layers, bank.d, carry=0.5)
        return bank.attach(slot, Adapter(info, block * bank.layers, f"v{seed}", nbytes=0), 0.0)

    def detach_all(self) -> None:
        for slot in list(self.bank.attached):
            self.bank.detach(slot)

    def pieces(self, count: int, start: int, length: int) -> list[Any]:
        """`length` tokens at `start` of so many requests, every attached slot selected; a request's own pages."""
        from nr_serve.engine.scheduler import Piece

        selection = tuple(Version(str(slot), "", None, 0.0, slot=slot) for slot in sorted(self.bank.attached))
        made = []
        for i in range(count):
            tokens = [(7 * j + i) % self.model.config.vocab_size for j in range(start + length)]
            pages = list(range(i * self.pages_each, (i + 1) * self.pages_each))
            request: Any = SimpleNamespace(tokens=tokens, pages=pages, row=i, selection=selection)
            made.append(Piece(request, start, length))
        return made

    @torch.inference_mode()
    def decode(self, pieces: list[Any]) -> torch.Tensor:
        decoded = self.graphs.run(pieces, [0] * len(pieces), attached=bool(self.bank.attached))
        assert decoded is not None
        return decoded.logits_BV

    @torch.inference_mode()
    def prefill(self, pieces: list[Any]) -> None:
        from nr_serve.engine.model.batch import build_batch

        batch = build_batch(
            pieces, [0], page_size=PAGE, spare_cell=self.cache.spare_cell, slots=8, paged=True, device=self.device
        )
        self.bank.begin(batch.tokens)
        try:
            self.model(
                input_ids=batch.input_ids_T[None], position_ids=batch.positions_T[None], use_cache=False,
                logits_to_keep=1, nr_batch=batch, nr_cache=self.cache,
            )  # fmt: skip
        finally:
            self.bank.end()
