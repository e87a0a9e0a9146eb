"""The GPU's operators of a layer against transformers' own layers, on a CUDA device or by Triton's interpreter."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from nr_serve.engine.model import attention, gpu_attention, gpu_operators
from nr_serve.engine.model.attention import KVCache
from nr_serve.engine.model.batch import build_batch
from nr_serve.engine.model.fuse import GpuLayer, fuse
from nr_serve.engine.scheduler import Piece
from tests import tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE = 4


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("d", [48, 130])
def test_a_sum_and_its_norm_are_torchs(d):
    x, y, weight_d = rand(1, 3, d), rand(1, 3, d, seed=1), rand(d, seed=2)
    added, normed = gpu_operators.add_rms_norm(x, y, weight_d, 1e-5)
    assert torch.equal(added, x + y)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x + y, (d,), weight_d, 1e-5))
    torch.testing.assert_close(
        gpu_operators.rms_norm(x, weight_d, 1e-5), torch.nn.functional.rms_norm(x, (d,), weight_d, 1e-5)
    )


def test_silu_mul_is_torchs_beyond_a_block():
    gate, up = rand(1, 2, 1100), rand(1, 2, 1100, seed=1)
    got = gpu_operators.silu_mul(torch.cat([gate, up], -1))
    torch.testing.assert_close(got, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(
    ("kind", "head_dim"), [("llama", 16), ("mistral", 16), ("qwen2", 24), ("qwen3", 16), ("qwen3", 24)]
)
def test_a_model_of_fused_layers_gives_the_logits_of_the_plain_one(kind, head_dim):
    plain = tiny.model(kind, head_dim=head_dim).requires_grad_(False)
    for name, parameter in plain.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model = copy.deepcopy(plain).to(DEVICE)
    parameters = sum(p.numel() for p in model.parameters())
    attention.register()
    model.set_attn_implementation(attention.NAME)
    fuse(model, gpu_operators, GpuLayer)
    assert all(type(layer) is GpuLayer for layer in model.model.layers)
    assert sum(p.numel() for p in model.parameters()) == parameters
    shape = {"layers": tiny.LAYERS, "cells": 10 * PAGE, "heads": 2, "head_size": head_dim}
    cache = KVCache(**shape, device=DEVICE, dtype=torch.float32, attend=gpu_attention.attend)
    requests = [
        SimpleNamespace(
            tokens=[7 * i + j for j in range(9)], pages=[5 * i + j for j in (2, 0, 1)], row=i, selection=()
        )
        for i in range(2)
    ]
    with torch.inference_mode():
        for pieces in (
            [Piece(requests[0], 0, 5)],
            [Piece(requests[0], 5, 1), Piece(requests[1], 0, 7)],
            [Piece(requests[1], 7, 1), Piece(requests[0], 6, 3)],
        ):
            batch = build_batch(
                pieces,
                [0] * len(pieces),
                page_size=PAGE,
                spare_cell=cache.spare_cell,
                slots=1,
                paged=True,
                device=DEVICE,
            )
            ids, positions = batch.input_ids_T[None], batch.positions_T[None]
            got = model(input_ids=ids, position_ids=positions, use_cache=False, nr_batch=batch, nr_cache=cache)
            got, first = got.logits[0].cpu(), 0
            for piece in pieces:
                end = piece.start + piece.count
                want = plain(input_ids=torch.tensor([piece.request.tokens[:end]]), use_cache=False).logits[0]
                torch.testing.assert_close(
                    got[first : first + piece.count], want[piece.start :], atol=2e-4, rtol=1e-3
                )
                first += piece.count
