"""The main job, end to end: serve the base, load an adapter beside a running stream, ask in two languages.

Run it with `make demo`. It starts its own server on a free port and stops it at the end.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from nr_serve.client import Client
from nr_serve.default_model import fetch_model
from nr_serve.server_process import local_server

ADAPTER = Path(__file__).parent.parent / "adapters" / "hu" / "hu.safetensors"
ENGLISH = [
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colors are",
    "A good friend is someone who",
]
HUNGARIAN = [
    "A fájl mentéséhez kattintson a",
    "A dokumentum megnyitásához válassza a",
    "Az új ablakban megjelenik a",
    "Ha törölni szeretné a kijelölt szöveget, nyomja meg a",
]
# Written for this demo, so in nobody's training text.
HUNGARIAN_TEXT = [
    "A program első indításakor egy rövid varázsló segít beállítani a nyelvet, a betűméretet és a mentések helyét. "
    "Ezeket később bármikor megváltoztathatja a Beállítások menüben.",
    "Tegnap délután a barátommal elmentünk a könyvtárba, mert szerettünk volna néhány új könyvet kölcsönözni. "
    "Útközben megálltunk egy kis kávézóban, ahol finom süteményt ettünk.",
    "A táblázat celláiba számokat és szöveget is írhat. Jelölje ki a kívánt tartományt, majd a jobb egérgombbal "
    "kattintva válassza a megfelelő műveletet a helyi menüből.",
]
ENGLISH_TEXT = [
    "Yesterday afternoon my friend and I walked to the library, because we wanted to borrow a few new books. "
    "On the way we stopped at a small cafe and ate some very good cake.",
    "The river rises in the mountains and runs south for two hundred miles before it reaches the sea. In spring, "
    "when the snow melts, it often floods the fields along its banks.",
    "When the program starts for the first time, a short wizard helps you to set the language, the size of the "
    "letters and the folder for your files. You can change all of this later.",
]


def run(url: str, *args: str) -> None:
    """Run a command of `nr-serve` against the demo's server."""
    subprocess.run([sys.executable, "-m", "nr_serve.cli", *args], check=True, env=os.environ | {"NR_URL": url})


def stream(url: str, model: str, events: list[float], loaded: threading.Event) -> None:
    """Stream an English answer, noting when each piece arrived, until the adapter is loaded and a little longer."""
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 400, "stream": True, "temperature": 0}
    after = 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120, trust_env=False) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(time.monotonic())
                after += loaded.is_set()
                if after == 20:
                    return


def load_beside_a_stream(url: str, model: str) -> None:
    """`nr-serve load-adapter` while an English answer is being streamed."""
    events: list[float] = []
    loaded = threading.Event()
    reader = threading.Thread(target=stream, args=(url, model, events, loaded))
    reader.start()
    while len(events) < 10 and reader.is_alive():
        time.sleep(0.02)
    if len(events) < 10:
        raise SystemExit("the stream ended before the adapter could be loaded beside it")
    before = len(events)
    print(f"$ nr-serve load-adapter adapters/hu/{ADAPTER.name}", flush=True)
    run(url, "load-adapter", str(ADAPTER))
    during = len(events) - before
    loaded.set()
    reader.join()
    gaps = sorted(b - a for a, b in itertools.pairwise(events))
    print(
        f"meanwhile an English stream wrote {during} tokens; between two tokens: "
        f"median {1e3 * gaps[len(gaps) // 2]:.0f} ms, longest {1e3 * gaps[-1]:.0f} ms"
    )


def ask_in_two_languages(url: str, client: Client, model: str) -> None:
    """One batch of English and Hungarian prompts to the base's name; the gates route."""
    prompts = [prompt for pair in zip(ENGLISH, HUNGARIAN, strict=True) for prompt in pair]
    before = metrics(url)
    answer = client.complete(model=model, prompt=prompts, max_tokens=24, temperature=0, gates=True)
    after = metrics(url)
    base = client.complete(model=f"{model}@none", prompt=ENGLISH, max_tokens=24, temperature=0)
    unchanged = {p: c["text"] for p, c in zip(ENGLISH, base["choices"], strict=True)}
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        note = ""
        if prompt in unchanged:
            note = "  = the base's answer" if choice["text"] == unchanged[prompt] else "  ≠ the base's answer"
        print(f"[hu gates fired {rate(choice):6.1%}]{note}\n    {prompt} | {choice['text'].strip()!r}")
    steps = after["nr_step_seconds_count"] - before["nr_step_seconds_count"]
    passes = after["nr_step_requests_sum"] - before["nr_step_requests_sum"]
    print(
        f"{len(prompts)} requests took {steps:.0f} forward passes in place of {passes:.0f}: "
        f"{passes / steps:.1f} requests a pass"
    )


def rate(choice: dict[str, Any]) -> float:
    """Share of token-layers at which the adapter's gate fired, prompt and answer together."""
    shares = [share for part in ("prompt", "tokens") for token in choice["gates"][part] for share in token.values()]
    return sum(shares) / len(shares)


def loss(client: Client, model: str, texts: list[str]) -> float:
    """Mean negative log likelihood, nats per token, from echoed prompts."""
    answer = client.complete(model=model, prompt=texts, max_tokens=0, echo=True, logprobs=0)
    scored = [p for choice in answer["choices"] for p in choice["logprobs"]["token_logprobs"] if p is not None]
    return -sum(scored) / len(scored)


def metrics(url: str) -> dict[str, float]:
    """Every sample of /metrics without labels, by name."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name: sample.value for sample in samples if not sample.labels}


def main() -> None:
    """Run the demo."""
    print("fetching the base model (kept in a cache after the first time) ...", flush=True)
    fetch_model()
    print("starting the server (its first start on a machine compiles operators) ...", flush=True)
    started = time.monotonic()
    # In bfloat16 a near tie may fall either way with what shares a step, gates or no gates.
    with local_server("--log-level", "warning", "--dtype", "float32") as client:
        url, model = client.url, client.models()[0]["id"]
        print(f"serving {model} after {time.monotonic() - started:.1f} s\n")
        load_beside_a_stream(url, model)
        print("\none batch, two languages, one model name:")
        ask_in_two_languages(url, client, model)
        print("\nloss in nats per token    frozen base   base + hu, gates route")
        for language, texts in (("Hungarian", HUNGARIAN_TEXT), ("English", ENGLISH_TEXT)):
            alone, routed = loss(client, f"{model}@none", texts), loss(client, model, texts)
            print(f"  {language:22}  {alone:11.3f}   {routed:11.3f}")
        print(flush=True)
        run(url, "list-adapters")
    print(f"\ndone in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
