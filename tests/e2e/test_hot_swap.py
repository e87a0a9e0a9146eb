"""Loads, replaces and unloads beside running streams change nothing in them, and lose nothing."""

import asyncio
import json
import random

import httpx

from tests.e2e.conftest import ADAPTER

TOKENS = 80
PROMPTS = [
    ("{base}", "The history of the city begins with"),
    ("{base}", "To make a good soup, first you need"),
    ("{base}", "A dokumentum mentéséhez kattintson a"),
    ("{base}", "Az új ablakban megjelenik"),
    ("{base}@none", "Scientists have found that"),
    ("{base}@none", "A fájl megnyitásához"),
    ("hu", "A táblázat celláit kijelölheti"),
    ("noise", "Once there was a king who"),
]


async def _stream(http: httpx.AsyncClient, model: str, prompt: str, first: asyncio.Event) -> tuple[list[int], str]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    ids, text = [], ""
    async with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                ids += choice["token_ids"]
                text += choice["text"]
                first.set()
    return ids, text


async def _streams(url: str, base: str, swap=None) -> list[tuple[list[int], str]]:
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        firsts = [asyncio.Event() for _ in PROMPTS]
        streams = [
            asyncio.create_task(_stream(http, model.format(base=base), prompt, first))
            for (model, prompt), first in zip(PROMPTS, firsts, strict=True)
        ]
        if swap is not None:
            await asyncio.gather(*(first.wait() for first in firsts))
            await swap(http)
            assert not any(stream.done() for stream in streams), "the streams ended before the last change"
        return await asyncio.gather(*streams)


def test_fifty_changes_beside_eight_streams(url, client, base, random_adapter):
    noise = random_adapter("noise", 1)
    others = [random_adapter(f"x{i}", 10 + i) for i in range(4)]

    def reset():
        for adapter in client.adapters():
            client.unload(adapter["name"])
        client.load(ADAPTER, "hu")
        client.load(noise, "noise")

    reset()
    undisturbed = asyncio.run(_streams(url, base["id"]))
    assert all(len(ids) == TOKENS for ids, _ in undisturbed)

    reset()
    rng = random.Random(0)
    done = {"load": 0, "replace": 0, "unload": 0}

    async def swap(http: httpx.AsyncClient) -> None:
        loaded = {"hu", "noise"}
        for _ in range(50):
            name = rng.choice(["hu", "noise", "x0", "x1", "x2"])
            if name in loaded and rng.random() < 0.5:
                answer = await http.delete(f"/v1/adapters/{name}")
                loaded.remove(name)
                done["unload"] += 1
            else:
                done["replace" if name in loaded else "load"] += 1
                answer = await http.put(
                    f"/v1/adapters/{name}", params={"replace": "true"}, content=rng.choice(others).read_bytes()
                )
                loaded.add(name)
            assert answer.status_code == 200, answer.text

    assert asyncio.run(_streams(url, base["id"], swap)) == undisturbed
    assert sum(done.values()) == 50
    assert min(done.values()) > 5, done

    for adapter in client.adapters():
        client.unload(adapter["name"])
    assert httpx.get(f"{url}/health").status_code == 200  # the idle engine found no page, row or slot lost
    samples = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")
    )
    assert float(samples["nr_slots_used"]) == 0
    assert float(samples["nr_pages_used"]) == 0
    assert float(samples["nr_requests_in_flight"]) == 0
