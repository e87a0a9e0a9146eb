"""Prefill tokens that one English system prompt costs when requests in several languages and selections follow it.

    python loadtests/prefix.py adapters/*/??.safetensors adapters/bio/bio.safetensors

Three runs of the same requests, one after the other: every request computes its whole prompt; a prefix is reused
under the very selection that computed it; the neutrality rule. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from provenance import ROOT, provenance

from nr_serve.assemble import load_tokenizer
from nr_serve.config import ServeConfig
from nr_serve.default_model import model_folder
from nr_serve.engine.adapters.adapters import Adapters
from nr_serve.engine.core import Core
from nr_serve.engine.messages import AdapterView, LoadAdapter, Sampling, Submit
from nr_serve.engine.model.runner import Runner
from nr_serve.neutral.format import Base, read_adapter
from nr_serve.tokenizer import Tokenizer

QUESTIONS = (
    "How do I save the file that I am working on?",
    "Hogyan menthetem el a fájlt, amelyen éppen dolgozom?",
    "Hvordan gemmer jeg den fil, som jeg arbejder på?",
    "Ako uložím súbor, na ktorom práve pracujem?",
    "Which enzymes are inhibited by the compound in human hepatocytes?",
)
SALTS = {
    "without a cache": lambda name, selected: name,
    "by selection": lambda name, selected: selected,
    "neutrality rule": lambda name, selected: None,
}
"""Requests share pages only with those of their salt."""


def system_prompt(path: Path, tokenizer: Tokenizer, tokens: int) -> list[int]:
    """The first tokens of a text, its lines joined. Raises SystemExit if it has fewer."""
    ids = tokenizer.encode(" ".join(path.read_text(encoding="utf-8").split()))
    if len(ids) < tokens:
        raise SystemExit(f"{path} has {len(ids)} tokens")
    return ids[:tokens]


def load(adapters: Adapters, runner: Runner, files: Sequence[Path]) -> list[str]:
    """Attach the files; their names."""
    info = runner.info
    for path in files:
        answer: Future[AdapterView] = Future()
        adapter = read_adapter(path, Base(info.model, info.fingerprint, info.layers, info.d), max_bytes=2**31)
        adapters.load(LoadAdapter(path.stem, path), adapter, answer, time.perf_counter())
        adapters.copy_some(seconds=600)
        answer.result(timeout=0)
    return [path.stem for path in files]


def requests(system: list[int], tokenizer: Tokenizer, names: Sequence[str], rounds: int) -> list[Submit]:
    """The selections in turn, each time with another question."""
    selections: list[tuple[str, tuple[str, ...] | None]] = [("base", None), ("base@none", ())]
    selections += [(name, (name,)) for name in names]
    asked = []
    for i in range(rounds * len(selections)):
        selected, adapters = selections[i % len(selections)]
        question = QUESTIONS[(i + i // len(selections)) % len(QUESTIONS)]
        prompt = (*system, *tokenizer.encode(f"\n\n{question}\n", special_tokens=False))
        asked.append(Submit(str(i), prompt, Sampling(max_tokens=4, temperature=0), adapters, selected))
    return asked


def run(core: Core, asked: Sequence[Submit], salt: Any) -> dict[str, Any]:
    """Answer one request after the other; what was computed and found, and the answers."""
    computed = found = neutral = 0
    answers: list[list[int]] = []
    started = time.perf_counter()
    for submit in asked:
        core.add(replace(submit, cache_salt=salt(submit.request_id, submit.selected)))
        answers.append([])
        while not core.idle:
            events = core.step()
            assert events.report is not None
            computed += events.report.prefill_tokens
            found += events.report.prefix.found
            neutral += events.report.prefix.neutral
            answers[-1] += [token.id for output in events.outputs for token in output.tokens]
    core.check()
    seconds = time.perf_counter() - started
    return {"computed": computed, "found": found, "neutral": neutral, "seconds": seconds, "answers": answers}


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--model", default="default")
    parser.add_argument("--text", type=Path, default=ROOT / "LICENSE", help="English for the system prompt")
    parser.add_argument("--system-tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)

    config = ServeConfig(model=args.model, threads=args.threads, max_running=4)
    folder = model_folder(config.model)
    tokenizer = load_tokenizer(folder)
    runner = Runner.load(folder, tokenizer, config, config.base_name(folder))
    adapters = Adapters(runner.bank)
    names = load(adapters, runner, args.adapters)
    asked = requests(system_prompt(args.text, tokenizer, args.system_tokens), tokenizer, names, args.rounds)
    results = {}
    for kind, salt in SALTS.items():
        results[kind] = run(Core(runner, adapters, tokenizer, config), asked, salt)
        print(f"{kind:16} {results[kind]['computed']:7} prefill tokens computed, {results[kind]['seconds']:.1f} s")
    answers = [result.pop("answers") for result in results.values()]
    document = {
        "requests": len(asked),
        "prompt_tokens": sum(len(submit.prompt_ids) for submit in asked),
        "system_tokens": args.system_tokens,
        "text": args.text.name,
        "adapters": names,
        "runs": results,
        "answers_equal": all(each == answers[0] for each in answers),
        **provenance(__file__, argv),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main(sys.argv[1:])
