"""The start-up check: this engine's forward pass against the model's own, on a short prompt.

What a model needs and this engine does not compute shows here, before anybody is served wrong answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nr_serve.engine.batch import build_batch
from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.request import AnswerText, Request
from nr_serve.engine.scheduler import Piece
from nr_serve.errors import UnsupportedBase
from nr_serve.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from nr_serve.engine.runner import Runner

_LENGTH = 24
_CHUNKS = (10, 13, 1)


class Probe:
    """A prompt and the model's own logits for it, taken before the model is changed."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (_LENGTH,), generator=torch.Generator().manual_seed(0))
        device = next(model.parameters()).device
        with torch.inference_mode():
            self._reference_TV = model(input_ids=ids[None].to(device), use_cache=False).logits[0].float()
        self._ids = tuple(ids.tolist())
        self._text = AnswerText(Detokenizer(tokenizer, ()), ())

    def check(self, runner: Runner) -> None:
        """Run the prompt in chunks through `runner`. Raises UnsupportedBase if the logits differ."""
        request = Request(
            submit=Submit("probe", self._ids, Sampling()), eos_ids=frozenset(), seed=0, text=self._text, arrival=0
        )
        request.row = 0
        request.pages = list(range(-(-_LENGTH // runner.page_size)))
        if len(request.pages) > runner.pages:
            raise UnsupportedBase(f"{runner.pages} pages of KV cache cannot hold {_LENGTH} tokens; give it more")
        logits, start = [], 0
        for count in _CHUNKS:
            batch = build_batch(
                [Piece(request, start, count)],
                [0],
                page_size=runner.page_size,
                slots=runner.bank.slots,
                device=runner.device,
            )
            with torch.inference_mode():
                logits.append(runner.forward(batch, list(range(count)))[0])
            start += count
        self._compare(torch.cat(logits), runner)

    def _compare(self, logits_TV: torch.Tensor, runner: Runner) -> None:
        scale = float(self._reference_TV.abs().max())
        error = float((logits_TV - self._reference_TV).abs().max())
        tolerance = 1e-3 if runner.dtype == torch.float32 else 5e-2
        if not error <= tolerance * scale:
            raise UnsupportedBase(
                f"{type(runner.model).__name__} needs something this engine does not compute: "
                f"its logits differ by {error:.2g} (of {scale:.2g}) from the model's own"
            )
