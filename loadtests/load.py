"""Load on one OpenAI-style server, and what it answered when: knows HTTP and time, nothing of who is asked."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text[:500]}")
        self.status = status


@dataclass(frozen=True)
class Answer:
    """One streamed answer; times in seconds of one clock."""

    started: float
    arrivals: tuple[float, ...]
    """When each piece of text came."""
    ended: float
    tokens: int
    prompt_tokens: int


async def ask(http: httpx.AsyncClient, body: Mapping[str, Any]) -> Answer:
    """POST /v1/completions, streamed. Raises Refused, and httpx's errors."""
    arrivals, usage, started = [], None, time.perf_counter()
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            raise Refused(response.status_code, (await response.aread()).decode(errors="replace"))
        async for line in response.aiter_lines():
            now = time.perf_counter()
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise Refused(200, line)
            if any(choice.get("text") for choice in chunk.get("choices", ())):
                arrivals.append(now)
            usage = chunk.get("usage") or usage
    if usage is None or not arrivals:
        raise Refused(200, "the stream held no text or no usage")
    return Answer(started, tuple(arrivals), time.perf_counter(), usage["completion_tokens"], usage["prompt_tokens"])


async def at_concurrency(
    http: httpx.AsyncClient, bodies: Sequence[Mapping[str, Any]], concurrency: int
) -> list[Answer]:
    """Ask all, `concurrency` at a time: the next one starts when one has ended."""
    answers: list[Answer] = []
    left = iter(bodies)

    async def work() -> None:
        for body in left:
            answers.append(await ask(http, body))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return answers


async def at_rate(
    http: httpx.AsyncClient, bodies: Sequence[Mapping[str, Any]], rate: float, seed: int
) -> list[Answer]:
    """Ask all, `rate` a second on average at random times (a Poisson process), whether or not others have ended."""
    rng = random.Random(seed)

    async def later(body: Mapping[str, Any], seconds: float) -> Answer:
        await asyncio.sleep(seconds)
        return await ask(http, body)

    starts = itertools.accumulate(rng.expovariate(rate) for _ in bodies)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(later(body, start)) for body, start in zip(bodies, starts, strict=True)]
    return [task.result() for task in tasks]


def summarise(answers: Sequence[Answer]) -> dict[str, float]:
    """Throughput in tokens a second, time to first token and inter-token latency in milliseconds, of one run.

    Inter-token latency is over all gaps between two pieces of text; `itl_mean` is by tokens, as others define it:
    the time from an answer's first to its last piece, over its tokens less one.
    """
    seconds = max(a.ended for a in answers) - min(a.started for a in answers)
    first = [1e3 * (a.arrivals[0] - a.started) for a in answers]
    gaps = [1e3 * (after - before) for a in answers for before, after in itertools.pairwise(a.arrivals)]
    means = [1e3 * (a.arrivals[-1] - a.arrivals[0]) / (a.tokens - 1) for a in answers if a.tokens > 1]
    return {
        "requests": len(answers),
        "seconds": seconds,
        "tokens": sum(a.tokens for a in answers),
        "prompt_tokens": sum(a.prompt_tokens for a in answers),
        "throughput": sum(a.tokens for a in answers) / seconds,
        "ttft_p50": percentile(first, 50),
        "ttft_p99": percentile(first, 99),
        "itl_p50": percentile(gaps, 50),
        "itl_p99": percentile(gaps, 99),
        "itl_mean": statistics.fmean(means) if means else 0.0,
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` of them do not exceed (nearest rank); 0 if there are none."""
    ordered = sorted(values)
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)] if ordered else 0.0
