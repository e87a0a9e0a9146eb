"""The engine on a CUDA device gives what the naive loop gives on the CPU. Skipped where there is no device.

python -m pytest tests/gpu -rs
"""

import random

import pytest
import torch

from nr_serve.engine.messages import Sampling, Submit
from tests import tiny
from tests.unit.stepped import engine, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_mixed_traffic_on_the_device_equals_the_naive_loop_on_the_cpu():
    rng = random.Random(0)
    base = tiny.model()
    naive = tiny.Naive(base)
    made = {f"a{i}": tiny.adapter(base, seed=i, carry=0.5 * (i % 2)) for i in range(3)}
    core, adapters = engine(base.to("cuda"), pages=64, budget=16, running=8)
    for name, adapter in made.items():
        load(adapters, name, adapter)
    requests, answers = {}, {}
    for i in range(60):
        prompt = tuple(rng.randrange(290) for _ in range(rng.randint(1, 40)))
        sampling = Sampling(max_tokens=12, temperature=0, logprobs=3, ignore_eos=True)
        selection = rng.choice([(), ("a0",), ("a0", "a1"), None])
        requests[str(i)] = Submit(str(i), prompt, sampling, selection)
        assert core.add(requests[str(i)]) is None
    while not core.idle:
        for output in core.step().outputs:
            assert output.error is None
            answers.setdefault(output.request_id, []).extend(output.tokens)
    core.check()
    for key, request in requests.items():
        selected = list(made.values()) if request.adapters is None else [made[n] for n in request.adapters]
        got = [token.id for token in answers[key]]
        logprobs_TV = naive.logits([*request.prompt_ids, *got], selected).log_softmax(-1)[
            len(request.prompt_ids) - 1 :
        ]
        for token, logprobs_V in zip(answers[key], logprobs_TV, strict=False):
            # Sums are taken in another order on the device, so a near tie may fall the other way.
            assert float(logprobs_V.max() - logprobs_V[token.id]) < 1e-3
            assert token.logprob == pytest.approx(float(logprobs_V[token.id]), abs=1e-3)
