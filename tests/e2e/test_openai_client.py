"""OpenAI's own client, sync and async, against a real server process."""

import asyncio

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from nr_serve.default_model import fetch_model
from nr_serve.tokenizer import Tokenizer
from tests.e2e.conftest import ADAPTER

PROMPT = "The capital of France is"


@pytest.fixture
def ai(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as ai:
        yield ai


@pytest.fixture(scope="module")
def reference():
    """transformers' own greedy answer and its log probabilities."""
    path = fetch_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, Tokenizer.load(path)


def test_a_greedy_completion_is_what_transformers_generates(ai, base, reference):
    model, tokenizer = reference
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    answer = ai.completions.create(model=base["id"], prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == tokenizer.decode(expected[0, ids.shape[1] :].tolist())
    assert answer.usage.prompt_tokens == ids.shape[1]


def test_echoed_log_probabilities_are_those_of_transformers(ai, base, reference):
    model, tokenizer = reference
    ids = tokenizer.encode(PROMPT)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
    answer = ai.completions.create(model=base["id"], prompt=ids, max_tokens=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)


def test_a_stream_says_what_the_whole_answer_says(ai, base):
    ask = {"model": base["id"], "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    whole = ai.completions.create(**ask)
    chunks = list(ai.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_the_same_seed_gives_the_same_answer_in_any_company(ai, base):
    ask = {"model": base["id"], "prompt": "My favourite animal is", "max_tokens": 12, "temperature": 1.0, "seed": 7}
    alone = ai.completions.create(**ask).choices[0].text

    async def crowd() -> list[str]:
        async with openai.AsyncOpenAI(base_url=ai.base_url, api_key="none") as many:
            asks = [many.completions.create(**ask | {"seed": seed}) for seed in (1, 7, 3, 7, 5)]
            return [answer.choices[0].text for answer in await asyncio.gather(*asks)]

    answers = asyncio.run(crowd())
    assert answers[1] == answers[3] == alone
    assert len(set(answers)) > 1


def test_chat_goes_through_the_template_and_streams(ai, base):
    ask = {
        "model": base["id"],
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = ai.chat.completions.create(**ask)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(ai.chat.completions.create(**ask, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


def test_models_come_and_go_with_their_adapters(ai, client, base):
    names = [model.id for model in ai.models.list()]
    assert names == [base["id"], f"{base['id']}@none"]
    with pytest.raises(openai.NotFoundError):
        ai.completions.create(model="hu", prompt=PROMPT)
    client.load(ADAPTER, "hu")
    assert ai.models.retrieve("hu").to_dict()["parent"] == base["id"]
    hungarian = {"prompt": "A fájl mentéséhez kattintson a", "max_tokens": 12, "temperature": 0}
    alone = ai.completions.create(model="hu", **hungarian).choices[0].text
    routed = ai.completions.create(model=base["id"], **hungarian).choices[0].text
    without = ai.completions.create(model=f"{base['id']}@none", **hungarian).choices[0].text
    assert alone == routed != without


def test_what_is_refused_reaches_the_client(ai, base):
    with pytest.raises(openai.BadRequestError) as refused:
        ai.completions.create(model=base["id"], prompt=PROMPT, max_tokens=100_000)
    assert refused.value.body["param"] == "max_tokens"
    with pytest.raises(openai.BadRequestError) as refused:
        ai.completions.create(model=base["id"], prompt=PROMPT, extra_body={"colour": "blue"})
    assert refused.value.body["param"] == "colour"
