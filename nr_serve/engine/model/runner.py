"""The runner: the one door to the device, where the pieces of a step become results.

Owns the model, the KV cache and the bank of adapter slots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nr_serve.config import PROBE_TOKENS, ServeConfig
from nr_serve.engine.adapters.gate_counts import label_count
from nr_serve.engine.cache.neutrality import Opened
from nr_serve.engine.messages import EngineInfo
from nr_serve.engine.model import attention
from nr_serve.engine.model.attention import KVCache
from nr_serve.engine.model.base import end_tokens, load_base, max_model_len, sampling_defaults
from nr_serve.engine.model.batch import Batch, build_batch
from nr_serve.engine.model.cpu_operators import cpu_operators
from nr_serve.engine.model.device import placed
from nr_serve.engine.model.forward import run_model
from nr_serve.engine.model.fuse import prepare_layers
from nr_serve.engine.model.graphs import SIZES, Graphs, Padding, model_step
from nr_serve.engine.model.opened import opened_by_page
from nr_serve.engine.model.results import Outcome, draws, guarded_result, logit_positions
from nr_serve.engine.model.sampler import likeliest
from nr_serve.engine.model.startup_check import LENGTH, StartupCheck
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Piece, Result, spans
from nr_serve.errors import BadAdapterFile, BadRequest, UnsupportedBase, raised_as
from nr_serve.machine import cpu_limit
from nr_serve.neutral import block_width
from nr_serve.neutral.bank import Bank
from nr_serve.neutral.cpu_bank import CpuBank
from nr_serve.neutral.host import check_base, decoder_layers, fingerprint
from nr_serve.neutral.torch_bank import TorchBank
from nr_serve.tokenizer import Tokenizer

log = logging.getLogger(__name__)
DEFAULT_CAPACITY = 0.2  # the paper's extra capacity, as a share of the base's parameters
_APART = 64 * 64  # tokens times context up to which torch's attention is slower than our own for single tokens


class Runner:
    """Runs steps of one base model with its bank of adapters."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, config: ServeConfig, name: str, *, kernels: bool | None = None
    ) -> None:
        """Take over a loaded model, changing it in place. Raises UnsupportedBase with the reason.

        `kernels`: whether steps run on the GPU kernels; None: if the model is on a GPU.
        """
        shape = check_base(model)
        model.eval().requires_grad_(False)
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.kernels = self.device.type == "cuda" if kernels is None else kernels
        mark, check = fingerprint(model, tokenizer.hf), StartupCheck(model)
        self.page_size = config.page_size
        compiles = config.compile and self.device.type == "cpu" and not self.kernels
        self.operators = cpu_operators() if compiles else None
        # A base of an unforeseen kind can fail in any way.
        refused = partial(raised_as, UnsupportedBase, f"{type(model).__name__} cannot be served")
        with refused():
            self.pages, self.cache = self._kv_cache(model, config, shape)
        self.probe_row = config.max_running
        self.probe_pages = range(self.pages, self.pages + _probe_pages(self.page_size))
        self.recalls_pages = config.prefix_cache
        self.tries_apart = self.kernels  # the GPU kernels know only one threshold per slot
        self.overlaps = self.kernels
        with raised_as(UnsupportedBase, f"{config.slots} slots cannot be had (--slots, --slot-width)"):
            self.bank = self._bank(model, config, int(shape.hidden_size))
        self.info = EngineInfo(
            model=name,
            fingerprint=mark,
            layers=self.bank.layers,
            d=self.bank.d,
            vocab_size=int(shape.vocab_size),
            max_model_len=max_model_len(shape, config, self.pages * self.page_size),
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            eos_ids=tuple(sorted(end_tokens(model, tokenizer))),
            sampling=sampling_defaults(model, config),
        )
        attention.register()
        model.set_attn_implementation(attention.NAME)
        self.model = prepare_layers(
            model,
            self.bank,
            self.operators,
            positions=max(self.info.max_model_len, LENGTH),
            kernels=self.kernels and config.compile,
        )
        self.graphs: Graphs | None = None
        with refused():
            check.run(self._all_logits, page_size=self.page_size, pages=self.pages)
        if self.kernels:
            self.graphs = self._graphs()
        if self.graphs is not None:
            check.run(self._all_logits, page_size=self.page_size, pages=self.pages)  # its last piece by a graph
        if self.device.type == "cuda":
            from nr_serve.engine.model.warm_up import warm_up  # needs triton

            warm_up(self, max(config.max_batch_tokens, config.max_running))

    @classmethod
    def load(cls, path: Path | str, tokenizer: Tokenizer, config: ServeConfig, name: str) -> Runner:
        """Load a base and take it over. Raises UnsupportedBase with the reason."""
        torch.set_num_threads(config.threads or default_threads())
        runner = cls(load_base(path, config), tokenizer, config, name)
        try:
            # Prepare grammars now: doing it later would hold up running streams.
            tokenizer.for_grammars(runner.info.vocab_size, runner.info.eos_ids)
        except BadRequest as error:
            log.warning("guided requests will be refused: %s", error)
        return runner

    def run(self, pieces: Sequence[Piece], labels: Sequence[int]) -> list[Result]:
        """Run one step: a forward pass over all pieces, then a token for each piece that samples.

        A piece on trial comes last or, if `tries_apart`, alone. Its result holds the layers fired. If its tokens
        became NaN, its result's error is BadAdapterFile.
        """
        return self.launch(pieces, labels)()

    @torch.inference_mode()
    def launch(self, pieces: Sequence[Piece], labels: Sequence[int]) -> Callable[[], list[Result]]:
        """As `run`, but returns what waits for a GPU and gives the results; the next step must come after it."""
        self._set_rows(pieces)
        wanted = [logit_positions(piece) for piece in pieces]
        positions = [start + p for (start, _), own in zip(spans(pieces), wanted, strict=True) for p in own]
        logits_NV, open_TS, selected_TS = self._step(pieces, labels, positions)
        ends = accumulate(map(len, wanted))
        rows = [slice(end - len(own), end) for own, end in zip(wanted, ends, strict=True)]
        asking = {own.stop - 1: piece.request for piece, own in zip(pieces, rows, strict=True) if draws(piece)}
        outcome = self._outcome(logits_NV, asking, open_TS, selected_TS)
        return partial(self._results, pieces, rows, logits_NV, outcome)

    @torch.inference_mode()
    def _results(
        self, pieces: Sequence[Piece], rows: Sequence[slice], logits_NV: Tensor, outcome: Callable[[], Outcome]
    ) -> list[Result]:
        """Each piece's result, from its `rows` of the logits and the step's outcome."""
        step = outcome()
        opened = self._opened(pieces, step.open_TS, step.selected_TS)
        results = []
        for piece, own, (start, end), opened_here in zip(pieces, rows, spans(pieces), opened, strict=True):
            fired_nS = None
            if piece.request.submit.gates:
                fired_nS = step.selected_TS[start:end].int() * (
                    0 if step.open_TS is None else step.open_TS[start:end]
                )
            drawn = step.drawn.get(own.stop - 1)
            result = guarded_result(piece, logits_NV, own, step.likeliest_N, fired_nS, drawn)
            results.append(replace(result, opened=opened_here) if opened_here else result)
        if pieces[-1].trial is not None and self._diverged(pieces[-1], logits_NV[-pieces[-1].count :]):
            error = BadAdapterFile("its residues drive the base to values that are not finite")
            results[-1] = replace(results[-1], error=error)
        return results

    def _outcome(
        self, logits_NV: Tensor, asking: Mapping[int, Request], open_TS: Tensor | None, selected_TS: Tensor
    ) -> Callable[[], Outcome]:
        """What waits for the device and gives the step's outcome.

        The rows of `asking` are drawn from on a GPU only: on a CPU each request is sampled by itself.
        """
        if self.kernels:
            from nr_serve.engine.model.gpu_sampler import outcome  # needs triton

            return outcome(logits_NV, asking, open_TS, selected_TS)
        by = likeliest if self.operators is None else self.operators.likeliest
        return partial(Outcome, by(logits_NV).tolist(), {}, open_TS, selected_TS)

    def _diverged(self, trial: Piece, logits_NV: Tensor) -> bool:
        """Whether the adapter on trial drove the stream to NaN or infinity, given its tokens' logits [N, V].

        After a residue that diverged every gate is NaN, and a NaN does not fire: it must not pass for neutral. No
        gate follows the last layer's residue, but the logits do. A stream whose squares are infinite is normalised
        to 0: then no gate opens either, and all logits are equal.
        """
        slots = [version.slot for version in trial.request.selection or ()]
        nan = self.bank.state_LRS[:, trial.request.row][:, slots].isnan().any()
        return bool(nan) or not bool((logits_NV.amax(-1) > logits_NV.amin(-1)).all())

    def _step(
        self, pieces: Sequence[Piece], labels: Sequence[int], positions: list[int]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `forward`, by a CUDA graph if one fits the step; also returns each token's selected slots."""
        decoded = None
        if self.graphs is not None and all(piece.count == 1 and piece.trial is None for piece in pieces):
            decoded = self.graphs.run(pieces, labels, attached=bool(self.bank.attached))
        if decoded is None:
            batch = self.batch(pieces, labels, positions)
            self.bank.begin(batch.tokens)
            return *self.forward(batch), batch.tokens.selected_TS
        logits_NV = decoded.logits_BV
        if len(positions) < len(pieces):
            (wanted_N,) = placed([np.array(positions, np.int64)], self.device)
            logits_NV = logits_NV.index_select(0, wanted_N)
        return logits_NV, decoded.open_BS, decoded.selected_BS

    def batch(self, pieces: Sequence[Piece], labels: Sequence[int], positions: list[int]) -> Batch:
        """The step's tensors; `positions`: the tokens whose logits are wanted, by index in the step."""
        return build_batch(
            pieces,
            labels,
            page_size=self.page_size,
            spare_cell=self.cache.spare_cell,
            slots=self.bank.slots,
            recalls_pages=self.recalls_pages,
            apart=self._apart(),
            paged=self.kernels,
            positions=positions,
            device=self.device,
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits wanted of the step, float32 [N, V], and open layers by token and slot (None: none was open).

        `bank.begin` must have been called for the step.
        """
        wanted = 0 if batch.logits_N is None else batch.logits_N
        return run_model(self.model, self.bank, self.cache, batch, logits_to_keep=wanted)

    def _set_rows(self, pieces: Sequence[Piece]) -> None:
        """Set the carried state before each request's first piece: empty, or as at the last reused page's end."""
        for piece in pieces:
            request = piece.request
            if piece.start != request.reused or request.row is None:
                continue
            if request.reused:
                self.bank.recall_row(request.row, request.pages[request.reused // self.page_size - 1])
            else:
                self.bank.forget_row(request.row)

    def _opened(
        self, pieces: Sequence[Piece], open_TS: Tensor | None, selected_TS: Tensor
    ) -> Sequence[tuple[Opened, ...]]:
        if open_TS is None or not self.recalls_pages:
            return [()] * len(pieces)
        return opened_by_page(pieces, open_TS, selected_TS, self.page_size)

    def _apart(self) -> int | None:
        """Up to how many tokens times context a piece attends as single tokens; see docs/performance.md."""
        if self.operators is None:
            return None
        own = self.operators.prompts_by(self.dtype, self.cache.keys_LCKD.shape[-1])
        return _APART if own is None else 0

    @torch.inference_mode()
    def _all_logits(self, piece: Piece) -> Tensor:
        return self._step([piece], [0], list(range(piece.count)))[0]

    def _attend(self) -> attention.Attend:
        if not self.kernels:
            return partial(attention.attend_on_cpu, operators=self.operators)
        from nr_serve.engine.model.gpu_attention import attend  # needs triton, which torch for CPUs lacks

        # torch's SDPA would prefer cuDNN's attention on Hopper, which plans for some 30 ms for every new length.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return attend

    @torch.inference_mode()
    def _graphs(self) -> Graphs | None:
        """CUDA graphs of steps of single tokens; None if the device refuses to capture them."""
        from nr_serve.neutral.gpu_bank import GpuBank

        assert isinstance(self.bank, GpuBank)
        graphs = Graphs(
            model_step(self.model, self.bank, self.cache),
            slots=self.bank.slots,
            page_size=self.page_size,
            longest=self.info.max_model_len,
            padding=Padding(row=self.probe_row + 1, page=self.probe_pages.stop, label=self.bank.labels),
            device=self.device,
            sizes=[size for size in SIZES if size < 2 * self.probe_row],  # the largest holds all that run
        )
        try:
            graphs.warm_up()
        except RuntimeError:  # out of memory, or not capturable: steps are slower, not wrong
            log.exception("steps cannot be captured as CUDA graphs; they are launched kernel by kernel")
            return None
        return graphs

    def _bank(self, model: nn.Module, config: ServeConfig, d: int) -> Bank:
        layers = len(decoder_layers(model))
        parameters = sum(p.numel() for p in model.parameters())
        kind: Callable[..., Bank] = TorchBank
        if self.kernels:
            from nr_serve.neutral.gpu_bank import GpuBank

            kind = GpuBank
        elif self.operators is not None:
            kind = partial(CpuBank, self.operators.residues, multiplies=self.operators.multiply is not None)
        return kind(
            layers=layers,
            d=d,
            slots=config.slots,
            width=config.slot_width or block_width(DEFAULT_CAPACITY, parameters=parameters, d=d, layers=layers),
            rows=config.max_running + 2,  # one for probe texts, one for a graph's padding
            labels=label_count(config.slots),
            pages=self.probe_pages.stop,
            device=self.device,
            dtype=self.dtype,
        )

    def _kv_cache(self, model: nn.Module, config: ServeConfig, shape: Any) -> tuple[int, KVCache]:
        """The KV cache, and the number of its pages that requests may use.

        The cache has further pages: those for one probe text, and one for the padding of CUDA graphs.
        """
        layers = len(decoder_layers(model))
        heads = int(getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads)
        head_size = int(getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)
        per_page = config.page_size * 2 * layers * heads * head_size * self.dtype.itemsize
        pages = config.pages or max(1, int(config.kv_cache_gib * 2**30) // per_page)
        attend = self._attend()
        with raised_as(UnsupportedBase, f"a KV cache of {pages:,} pages cannot be had (--kv-cache-gib, --pages)"):
            cache = KVCache(
                layers=layers,
                cells=(pages + _probe_pages(config.page_size) + 1) * config.page_size,
                heads=heads,
                head_size=head_size,
                device=self.device,
                dtype=self.dtype,
                attend=attend,
            )
        return pages, cache


def _probe_pages(page_size: int) -> int:
    return -(-PROBE_TOKENS // page_size)


def default_threads() -> int:
    """Torch's choice, which counts cores, or fewer in a container that may not use all of them."""
    own = torch.get_num_threads()
    return min(own, cpu_limit() or own)
