"""LangChain's OpenAI classes against a real server: its answers are those of plain requests, whole and streamed."""

import asyncio

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI

from tests.e2e.conftest import ADAPTER

PROMPT = "The capital of France is"
QUESTION = [("system", "Answer in one word."), ("human", "What is the capital of France?")]


@pytest.fixture
def completions(url, base):
    return OpenAI(base_url=f"{url}/v1", api_key="none", model=base["id"], temperature=0, max_tokens=12)


@pytest.fixture
def chat(url, base):
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=base["id"], temperature=0, max_tokens=12)


def plain(client, **body):
    return client.complete(max_tokens=12, temperature=0, **body)["choices"][0]["text"]


def plain_chat(url, base):
    messages = [{"role": {"human": "user"}.get(role, role), "content": text} for role, text in QUESTION]
    body = {"model": base["id"], "messages": messages, "max_tokens": 12, "temperature": 0}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()["choices"][0]["message"][
        "content"
    ]


def test_completions(completions, client, base):
    expected = plain(client, model=base["id"], prompt=PROMPT)
    assert expected
    assert completions.invoke(PROMPT) == expected
    assert "".join(completions.stream(PROMPT)) == expected
    assert asyncio.run(completions.ainvoke(PROMPT)) == expected


def test_several_prompts_are_answered_in_their_order(completions, client, base):
    prompts = [PROMPT, "Water boils at"]
    answers = completions.generate(prompts)
    assert [each[0].text for each in answers.generations] == [
        plain(client, model=base["id"], prompt=prompt) for prompt in prompts
    ]
    assert answers.llm_output["token_usage"]["completion_tokens"] == 24


def test_a_stop_word_ends_the_answer(completions, client, base):
    whole = plain(client, model=base["id"], prompt=PROMPT)
    word = whole.split()[-1]
    assert completions.invoke(PROMPT, stop=[word]) == whole[: whole.index(word)]


def test_chat(chat, url, base):
    expected = plain_chat(url, base)
    whole = chat.invoke(QUESTION)
    assert whole.content == expected
    assert "Paris" in expected
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == expected
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [each["total_tokens"] for each in usage] == [whole.usage_metadata["total_tokens"]]


def test_an_adapter_is_chosen_by_its_name(url, client, base):
    client.load(ADAPTER, "hu")
    prompt = "A fájl mentéséhez kattintson a"
    hungarian = OpenAI(base_url=f"{url}/v1", api_key="none", model="hu", temperature=0, max_tokens=12)
    answer = hungarian.invoke(prompt)
    assert answer == plain(client, model="hu", prompt=prompt)
    assert answer != plain(client, model=f"{base['id']}@none", prompt=prompt)
    client.unload("hu")
    with pytest.raises(openai.NotFoundError):
        hungarian.invoke(prompt)
