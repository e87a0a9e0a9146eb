"""Loads, replaces and unloads beside running streams change nothing in them, and lose nothing."""

import asyncio
import json
import random

import httpx

from tests.e2e.conftest import ADAPTER

LONGEST = 2000  # tokens: more than any stream writes before the last change
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


class Stream:
    """One greedy stream: its token ids and text so far."""

    def __init__(self, model: str, prompt: str) -> None:
        self.model, self.prompt = model, prompt
        self.ids: list[int] = []
        self.begun = asyncio.Event()

    async def read(self, http: httpx.AsyncClient, max_tokens: int) -> None:
        body = {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    self.ids += json.loads(line[6:])["choices"][0]["token_ids"]
                    self.begun.set()


async def _beside(url: str, base: str, swap) -> list[Stream]:
    """Streams read while `swap` runs; they are left when it is done."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        streams = [Stream(model.format(base=base), prompt) for model, prompt in PROMPTS]
        readers = [asyncio.create_task(stream.read(http, LONGEST)) for stream in streams]
        await asyncio.gather(*(stream.begun.wait() for stream in streams))
        await swap(http)
        assert not any(reader.done() for reader in readers), "a stream ended before the last change"
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        return streams


async def _undisturbed(url: str, streams: list[Stream]) -> list[Stream]:
    """The same streams again, as long as each was, with nothing beside them."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        again = [Stream(stream.model, stream.prompt) for stream in streams]
        await asyncio.gather(*(a.read(http, len(s.ids)) for a, s in zip(again, streams, strict=True)))
        return again


def test_fifty_changes_beside_eight_streams(url, client, base, random_adapter):
    noise = random_adapter("noise", 1)
    others = [random_adapter(f"x{i}", 10 + i) for i in range(4)]

    def reset():
        for adapter in client.adapters():
            client.unload(adapter["name"])
        client.load(ADAPTER, "hu")
        client.load(noise, "noise")

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
            assert answer.is_success, answer.text

    disturbed = asyncio.run(_beside(url, base["id"], swap))
    assert sum(done.values()) == 50
    assert min(done.values()) > 5, done
    assert all(len(stream.ids) > 20 for stream in disturbed)
    reset()
    undisturbed = asyncio.run(_undisturbed(url, disturbed))
    assert [stream.ids for stream in disturbed] == [stream.ids for stream in undisturbed]

    for adapter in client.adapters():
        client.unload(adapter["name"])
    assert httpx.get(f"{url}/health").status_code == 200  # the idle engine found no page, row or slot lost
    samples = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")
    )
    assert float(samples["nr_slots_used"]) == 0
    assert float(samples["nr_pages_used"]) == 0
    assert float(samples["nr_requests_in_flight"]) == 0
