"""The start-up check: this engine's forward pass against the model's own, on a short prompt.

If a model needs something that this engine does not compute, it shows here, before wrong answers are served. Not
found is what only a longer text needs, such as a sliding window shorter than the text.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Piece
from nr_serve.errors import UnsupportedBase

LENGTH = 24
"""Positions that it reads."""
_CHUNKS = (10, 13, 1)


class StartupCheck:
    """A prompt and the model's own logits for it, taken before the model is changed."""

    def __init__(self, model: Any) -> None:
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (LENGTH,), generator=torch.Generator().manual_seed(0))
        weight = next(model.parameters())
        self._name = type(model).__name__
        self._tolerance = 1e-3 if weight.dtype == torch.float32 else 5e-2
        with torch.inference_mode():
            self._reference_TV = model(input_ids=ids[None].to(weight.device), use_cache=False).logits[0].float()
        self._ids = tuple(ids.tolist())

    def run(self, logits: Callable[[Piece], Tensor], *, page_size: int, pages: int) -> None:
        """Compare with the logits [n, V] of each piece, from an engine with `pages` pages of `page_size` tokens.

        Raises UnsupportedBase if they differ.
        """
        needed = -(-LENGTH // page_size)
        if needed > pages:
            raise UnsupportedBase(f"{pages} pages of KV cache cannot hold {LENGTH} tokens; give it more")
        request = Request.outside(Submit("probe", self._ids, Sampling()), row=0, pages=range(needed))
        starts = accumulate(_CHUNKS, initial=0)
        pieces = [Piece(request, start, count) for start, count in zip(starts, _CHUNKS, strict=False)]
        self._compare(torch.cat([logits(piece) for piece in pieces]))

    def _compare(self, logits_TV: Tensor) -> None:
        scale = float(self._reference_TV.abs().max())
        error = float((logits_TV - self._reference_TV).abs().max())
        if not error <= self._tolerance * scale:
            raise UnsupportedBase(
                f"{self._name} needs something this engine does not compute: "
                f"its logits differ by {error:.2g} (of {scale:.2g}) from the model's own"
            )
