"""How neutral an attached adapter is: greedy English answers with the gates routing, against the frozen base's.

    nr-serve serve --adapter adapters/hu/hu.safetensors
    python loadtests/neutrality.py --corpus corpus --source en.boolq --source en.biomed

Prompts are the first words of held-out paragraphs. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from provenance import provenance

from nr_serve.client import DEFAULT_URL, Client


def prompts(corpus: Path, sources: list[str], count: int, words: int, seed: int) -> list[str]:
    """The first `words` words of `count` paragraphs, evenly from the sources' held-out text."""
    rng = random.Random(seed)
    chosen = []
    for i, source in enumerate(sources):
        lines = (corpus / f"{source}.heldout.txt").read_text(encoding="utf-8").splitlines()
        long = [line for line in lines if len(line.split()) > words]
        share = count // len(sources) + (i < count % len(sources))
        chosen += rng.sample(long, share)
    return [" ".join(line.split()[:words]) for line in chosen]


def main(argv: list[str] | None = None) -> None:
    """Ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--source", action="append", required=True, help="a source of the corpus; may be repeated")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--words", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)

    asked = prompts(args.corpus, args.source, args.prompts, args.words, args.seed)
    with Client(args.url) as client:
        base = client.models()[0]["id"]
        body = {"prompt": asked, "max_tokens": args.tokens, "temperature": 0}
        routed = client.complete(model=base, **body, gates=True)["choices"]
        alone = client.complete(model=f"{base}@none", **body)["choices"]
        adapters = {a["name"]: a["version"] for a in client.adapters()}
    differing = [
        {"prompt": prompt, "base": b["text"], "routed": r["text"]}
        for prompt, b, r in zip(asked, alone, routed, strict=True)
        if b["text"] != r["text"]
    ]
    for each in differing:
        print(json.dumps(each, ensure_ascii=False))
    shares = [share for r in routed for part in ("prompt", "tokens") for share in r["gates"][part]]
    fired = {name: sum(share.get(name, 0.0) for share in shares) / len(shares) for name in adapters}
    result = {
        "prompts": len(asked),
        "equal": len(asked) - len(differing),
        "fired": fired,
        "adapters": adapters,
        "base": base,
        "sources": args.source,
        "tokens": args.tokens,
        "seed": args.seed,
    }
    print(json.dumps(result | provenance(__file__, argv)))


if __name__ == "__main__":
    main()
