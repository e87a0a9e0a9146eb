"""Wrong input by the thousand: adapter files, and requests to every route, beside a stream that must not change.

    python loadtests/fuzz.py --inputs 100000 --seed 0

Half of the inputs are files for the reader, half requests to the app (in this process, over a tiny random base).
All are mutations of good ones, chosen by the seed. A crash is an exception that is no refusal. Memory is read after
each tenth; over the second half it must stand still. oneDNN keeps a compiled product for each number of tokens that
it met, up to 1,024 in each of two caches, so memory grows for long before it does: here the caches are small. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ |= dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "64")  # read by torch

import psutil

from loadtests.fuzz_inputs import mutated_file, mutated_request, plain_request
from loadtests.provenance import provenance
from nr_serve.api.bridge import AsyncEngine
from nr_serve.assemble import assemble
from nr_serve.config import ServeConfig
from nr_serve.engine.messages import ReadStatistics
from nr_serve.errors import NrError
from nr_serve.neutral.format import Base, read_adapter, write_adapter
from tests import tiny

AT_ONCE = 16
PARTS = 10
"""Memory is read after each."""
MOST_GROWTH = 1.02
"""Of memory, over the second half of the inputs."""
STEADY = {"model": "tiny@none", "prompt": "Water boils", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
_SHOWN = 5


@dataclass
class Found:
    """What came of the inputs."""

    files: int = 0
    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    """Of the reader, and of the app."""
    server_errors: list[str] = field(default_factory=list)
    streams: int = 0
    """Well-behaved ones, answered meanwhile."""
    streams_changed: int = 0


async def ask(app: Any, asked: dict[str, Any]) -> tuple[int, bytes]:
    """Call the app; status and body. Raises what the app raises."""
    messages = [{"type": "http.request", "body": asked["body"], "more_body": False}]
    status, parts, gone = 0, [], asyncio.Event()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    given = {"host": "localhost", **asked["headers"]}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked["method"],
        "scheme": "http",
        "path": asked["path"],
        "raw_path": asked["path"].encode("latin-1", "replace"),
        "query_string": asked["query"],
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    await app(scope, receive, send)
    return status, b"".join(parts)


def read_files(chance: random.Random, inputs: int, folder: Path, good: bytes, base: Base, found: Found) -> None:
    """Have the reader read mutated files."""
    path = folder / "fuzzed.safetensors"
    for _ in range(inputs):
        data = mutated_file(chance, good)
        path.write_bytes(data)
        found.files += 1
        try:
            read_adapter(path, base)
        except NrError:
            found.statuses[400] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            found.crashes.append(f"reader: {type(error).__name__}: {str(error)[:200]}; header {data[:300]!r}")
        else:
            found.statuses[200] += 1


async def send_requests(
    chance: random.Random, app: Any, inputs: int, good_file: bytes, found: Found, at_once: int = AT_ONCE
) -> None:
    """Ask the app wrong things, some at once."""
    left = inputs

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            asked = mutated_request(chance, good_file)
            found.requests += 1
            try:
                status, body = await asyncio.wait_for(ask(app, asked), 120)
                _check(status, body)
            except Exception as error:  # noqa: BLE001 - as above
                found.crashes.append(f"app: {type(error).__name__}: {str(error)[:200]}; {str(asked)[:400]}")
                continue
            found.statuses[status] += 1
            if status >= 500:
                found.server_errors.append(f"{status} {body[:200]!r}; {str(asked)[:400]}")

    await asyncio.gather(*(client() for _ in range(at_once)))


def _check(status: int, body: bytes) -> None:
    """A refusal has the API's form, and shows nothing of the inside."""
    if status >= 400:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, body
    assert b"Traceback" not in body


def _completion(body: dict[str, Any]) -> dict[str, Any]:
    json_type = {"content-type": "application/json"}
    return plain_request("POST", "/v1/completions", b"", json_type, json.dumps(body).encode())


async def steady_stream(app: Any, found: Found, end: asyncio.Event) -> None:
    """Ask for the same stream again and again, until the end."""
    asked = _completion(STEADY | {"stream": True, "return_token_ids": True})
    first: list[int] | None = None
    while not end.is_set():
        status, body = await ask(app, asked)
        tokens = _tokens(body) if status == 200 else []
        first = first or tokens
        found.streams += 1
        found.streams_changed += len(tokens) != STEADY["max_tokens"] or tokens != first


def _tokens(body: bytes) -> list[int]:
    chunks = [json.loads(line) for line in re.findall(rb"^data: (\{.*)$", body, re.M)]
    return [i for chunk in chunks for choice in chunk.get("choices", ()) for i in choice["token_ids"]]


@asynccontextmanager
async def running(folder: Path) -> Any:
    """The app over the real engine with a tiny random base."""
    model = tiny.save(tiny.model(), folder / "tiny")
    settings: dict[str, Any] = {
        "model": str(model),
        "pages": 256,
        "slots": 2,
        "slot_width": 16,
        "max_running": 16,
        "max_waiting": 256,
        "adapter_dir": [folder],
        "device": "cpu",
        "dtype": "float32",  # in bfloat16, what shares a step changes the rounding
        "threads": 1,
    }
    engine, app = assemble(ServeConfig(**settings))
    settled = asyncio.Event()
    engine.on_status = lambda status: settled.set()
    async with app.router.lifespan_context(app):
        await settled.wait()
        yield app, engine


def rss_mib() -> float:
    """Memory of this process, MiB."""
    return float(psutil.Process().memory_info().rss) / 2**20


async def fuzz(inputs: int, seed: int) -> dict[str, Any]:
    """Run; what was found, with pages and memory before and after."""
    chance, found, end = random.Random(seed), Found(), asyncio.Event()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with running(folder) as (app, engine):
            made = tiny.adapter(tiny.model(), 1)
            write_adapter(folder / "x.safetensors", made.info, made.blocks)
            good = (folder / "x.safetensors").read_bytes()
            base = Base("tiny", engine.info.fingerprint, engine.info.layers, engine.info.d)
            first = {"model": "tiny", "prompt": "x", "guided_regex": "a"}
            await ask(app, _completion(first))  # starts the process that compiles grammars
            stream = asyncio.create_task(steady_stream(app, found, end))
            pages, descriptors, mib = await _pages(engine), _descriptors(), []
            for part in range(1, PARTS + 1):
                more = inputs * part // PARTS - found.files - found.requests
                reading = asyncio.to_thread(
                    read_files, random.Random(chance.random()), more // 2, folder, good, base, found
                )
                await asyncio.gather(reading, send_requests(chance, app, more - more // 2, good, found))
                mib.append(round(rss_mib()))
            end.set()
            await stream
            after = await _pages(engine)
            return asdict(found) | {
                "statuses": dict(sorted(found.statuses.items())),
                "pages": [pages, after],
                "mib": mib,
                "descriptors": [descriptors, _descriptors()],
                "status": engine.status,
            }


def _descriptors() -> int:
    """Open files and sockets."""
    return int(psutil.Process().num_fds())


def good(result: dict[str, Any]) -> bool:
    """Whether nothing was found, and nothing is held that was not held before."""
    mib = result["mib"]
    return (
        not result["crashes"]
        and not result["server_errors"]
        and not result["streams_changed"]
        and result["pages"][0] == result["pages"][1]
        and result["descriptors"][0] == result["descriptors"][1]
        and mib[-1] <= mib[len(mib) // 2 - 1] * MOST_GROWTH
        and result["status"] == "ready"
    )


async def _pages(engine: AsyncEngine) -> int:
    """Pages in use."""
    statistics = await engine.call(ReadStatistics())
    return int(statistics.pages_used)


def main(argv: list[str]) -> int:
    """Fuzz, print what was found, and return 1 if anything was."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    started = time.perf_counter()
    result = asyncio.run(fuzz(given.inputs, given.seed))
    for line in (*result["crashes"][:_SHOWN], *result["server_errors"][:_SHOWN]):
        print(line)
    counts = {name: len(result[name]) for name in ("crashes", "server_errors")}
    seconds = round(time.perf_counter() - started)
    print(json.dumps(provenance(__file__, argv) | result | counts | {"seconds": seconds}))
    return 0 if good(result) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
