"""Paged attention against a plain loop in float64: every piece over its own pages, scattered in the cache."""

from functools import partial

import pytest
import torch
from torch import nn

from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.model import attention
from nr_serve.engine.model.attention import KVCache, attend_on_cpu, paged_attention
from nr_serve.engine.model.batch import build_batch
from nr_serve.engine.request import AnswerText, Request
from nr_serve.engine.scheduler import Piece, spans
from nr_serve.tokenizer import Detokenizer
from tests import tiny
from tests.compiled import operators_or_skip

PAGE, CELLS, SIZE = 4, 240, 16
PIECES = [(0, 1), (9, 1), (30, 1), (0, 5), (7, 6), (0, 9), (2, 11)]
"""(start, count), ordered by count as a step's are."""
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def pieces() -> list[Piece]:
    order = torch.randperm(CELLS // PAGE, generator=torch.Generator().manual_seed(0)).tolist()
    made = []
    for row, (start, count) in enumerate(PIECES):
        request = Request(
            submit=Submit(str(row), tuple(range(start + count)), Sampling()),
            eos_ids=frozenset(),
            seed=0,
            text=AnswerText(Detokenizer(tiny.tokenizer(), ()), ()),
            arrival=row,
        )
        request.row = row
        request.pages = [order.pop() for _ in range(-(-(start + count) // PAGE))]
        made.append(Piece(request, start, count))
    return made


def wanted(query_THD, cache, piece, first, heads_a_key, window):
    """One piece's outputs, token by token and head by head."""
    outputs = []
    for i in range(piece.count):
        at = piece.start + i
        seen = range(max(0, at + 1 - (window or at + 1)), at + 1)
        cells = [piece.request.pages[p // PAGE] * PAGE + p % PAGE for p in seen]
        for head in range(query_THD.shape[1]):
            keys_ND = cache.keys_LCKD[1, cells, head // heads_a_key].double()
            weights_N = (keys_ND @ query_THD[first + i, head].double() / SIZE**0.5).softmax(0)
            outputs.append(weights_N @ cache.values_LCKD[1, cells, head // heads_a_key].double())
    return torch.stack(outputs).view(piece.count, query_THD.shape[1], SIZE)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("apart", [None, 0, 100])  # of 100 nine tokens are short, eleven are not
@pytest.mark.parametrize(
    ("dtype", "products"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (6, 2)])
def test_every_token_attends_to_its_own_context_and_nothing_else(
    monkeypatch, dtype, products, window, heads, key_heads, compiled, apart
):
    monkeypatch.setattr(attention, "_WORTH_PRODUCTS", 0 if products else 10**9)
    monkeypatch.setattr(attention, "_TOKENS_AT_ONCE", 4)
    torch.manual_seed(1)
    cache = KVCache(
        layers=2,
        cells=CELLS,
        heads=key_heads,
        head_size=SIZE,
        device=torch.device("cpu"),
        dtype=dtype,
        attend=partial(attend_on_cpu, operators=operators_or_skip() if compiled else None),
    )
    step = pieces()
    # What nobody's context holds may be anything, NaN above all.
    cache.keys_LCKD[:, :-1], cache.values_LCKD[:, :-1] = torch.nan, torch.nan
    for piece in step:
        for p in range(piece.start):
            cell = piece.request.pages[p // PAGE] * PAGE + p % PAGE
            for store in (cache.keys_LCKD, cache.values_LCKD):
                store[1, cell] = torch.randn(key_heads, SIZE)
    batch = build_batch(
        step,
        [0] * len(step),
        page_size=PAGE,
        spare_cell=cache.spare_cell,
        slots=1,
        apart=apart,
        device=torch.device("cpu"),
    )
    tokens = sum(piece.count for piece in step)
    query = torch.randn(1, heads, tokens, SIZE).to(dtype)
    key, value = (torch.randn(1, key_heads, tokens, SIZE).to(dtype) for _ in range(2))
    layer = nn.Module()
    layer.layer_idx = 1
    with torch.inference_mode():
        got, _ = paged_attention(
            layer, query, key, value, None, sliding_window=window, nr_batch=batch, nr_cache=cache
        )
    for piece, (first, end) in zip(step, spans(step), strict=True):
        want = wanted(query[0].transpose(0, 1), cache, piece, first, heads // key_heads, window)
        torch.testing.assert_close(got[0, first:end].double(), want, rtol=0, atol=ROUNDING[dtype])
