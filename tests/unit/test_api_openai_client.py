"""The app as the openai package sees it: its types parse what the server says."""

import asyncio

import openai
import pytest

from nr_serve.errors import BadRequest
from tests.fakes import serving


@pytest.fixture(scope="module")
def server():
    with serving(api_key="k") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
        yield client


def test_completions(client):
    answer = client.completions.create(model="base", prompt=["x", "y"], max_tokens=3, seed=0, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["abc", "abc"]
    assert answer.choices[0].logprobs.tokens == ["a", "b", "c"]
    assert answer.usage.total_tokens == 10


def test_streamed_completions(client):
    stream = client.completions.create(
        model="base", prompt="x", max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "abc"
    assert chunks[-1].usage.completion_tokens == 3


def test_chat(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(
        model="hu",
        messages=messages,
        max_completion_tokens=2,
        logprobs=True,
        top_logprobs=1,
        extra_body={"top_k": 3},
    )
    assert answer.choices[0].message.content == "ab"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "a"


def test_streamed_chat(client):
    messages = [{"role": "user", "content": "hi"}]
    with client.chat.completions.stream(model="base", messages=messages, stop="d") as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "abc"
    assert final.choices[0].finish_reason == "stop"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["base", "base@none", "hu"]
    assert client.models.retrieve("base@none").owned_by == "nr-serve"


def test_many_at_once_asynchronously(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k") as client:

            async def one(seed):
                stream = await client.completions.create(
                    model="base", prompt="x", max_tokens=4, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(10)))

    assert asyncio.run(ask()) == ["abcdefghijklmn"[i : i + 4] for i in range(10)]


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (openai.BadRequestError, {"model": "base", "suffix": "x"}),
        (openai.NotFoundError, {"model": "nope"}),
    ],
)
def test_refusals_become_the_packages_exceptions(client, error, asked):
    with pytest.raises(error) as caught:
        client.completions.create(prompt="x", **asked)
    assert caught.value.param in ("suffix", "model")


def test_a_wrong_key_is_an_authentication_error(server):
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_an_error_in_mid_stream_is_raised(server, client):
    server.engine.error[1] = BadRequest("no page is free")
    with pytest.raises(openai.APIError):
        list(client.completions.create(model="base", prompt="x", stream=True))
