"""train, evaluate, fetch-model, fetch-corpus: making adapters and measuring them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import CliPositionalArg

from nr_serve.commands.base import Command
from nr_serve.commands.remote import table


class Train(Command):
    """Train an adapter as a recipe says."""

    recipe: CliPositionalArg[Path] = Field(description="the recipe, a TOML file")
    corpus: Path = Field(description="folder of text, as fetch-corpus leaves it")
    out: Path = Field(description="folder for the adapter, its checkpoints and its log")
    resume: bool = Field(False, description="go on from the last checkpoint in the folder")


class Evaluate(Command):
    """Measure adapters' loss and fired shares on text, beside the base's own loss."""

    files: CliPositionalArg[list[Path]] = Field(description="adapter files, all attached at once")
    corpus: Path = Field(description="folder of text, as fetch-corpus leaves it")
    source: list[str] = Field(["*.heldout.txt"], description="which of its files to measure on; may be repeated")
    model: str = Field("default", description="base model: a local folder, a hub name, or `default`")
    window: int = Field(256, ge=8, description="tokens read at once")
    windows: int = Field(32, ge=1, description="most windows a source")
    json_: bool = Field(False, alias="json", description="print JSON")


class FetchModel(Command):
    """Fetch the default base model; the last line printed is its folder."""

    out: Path | None = Field(None, description="folder for the model (default: a cache folder)")


class FetchCorpus(Command):
    """Fetch text to train and measure with."""

    recipe: CliPositionalArg[Path] = Field(description="the corpus recipe, a TOML file")
    out: Path = Field(description="folder for the text")
    only: list[str] = Field([], description="sources to fetch, by name or pattern; may be repeated (default: all)")


def train(command: Train) -> int:
    """Train; print the adapter's file."""
    from nr_serve.train.trainer import train as run

    print(run(command.recipe, command.out, command.corpus, resume=command.resume))
    return 0


def evaluate(command: Evaluate) -> int:
    """Measure; print a row a source."""
    rows = _measure(command)
    if command.json_:
        print(json.dumps(rows, indent=2))
        return 0
    names = list(rows[0]["fired"])
    header = ["SOURCE", "TOKENS", "BASE LOSS", "LOSS", "CHANGE", *(f"FIRED {name}" for name in names)]
    lines = [
        [r["source"], str(r["tokens"]), f"{r['base_loss']:.4f}", f"{r['loss']:.4f}", f"{r['change']:+.4f}"]
        + [f"{r['fired'][name]:.2%}" for name in names]
        for r in rows
    ]
    for line in table([header, *lines]):
        print(line)
    return 0


def fetch_model(command: FetchModel) -> int:
    """Fetch and convert; print the folder."""
    from nr_serve.default_model import fetch_model as fetch

    print(fetch(command.out))
    return 0


def fetch_corpus(command: FetchCorpus) -> int:
    """Fetch; print what lies in the folder then."""
    from nr_serve.train.corpus.build import fetch_corpus as fetch

    fetched = fetch(command.recipe, command.out, command.only)
    rows = [(each.name, f"{each.train_chars:,}", f"{each.heldout_chars:,}") for each in fetched]
    for line in table([("SOURCE", "TRAIN CHARS", "HELD-OUT CHARS"), *rows]):
        print(line)
    return 0


def _measure(command: Evaluate) -> list[dict[str, Any]]:
    from nr_serve.evaluate.heldout import measure
    from nr_serve.neutral.format import Base, read_adapter
    from nr_serve.train.attach import AdapterModule, Attached
    from nr_serve.train.base import load_base
    from nr_serve.train.text import read_heldout

    base = load_base(command.model)
    shape = Base(base.name, base.fingerprint, base.layers, base.d)
    modules = [AdapterModule.from_file(read_adapter(file, shape)) for file in command.files]
    sources = read_heldout(command.corpus, command.source, base.tokenizer, command.window, command.windows)
    attached = Attached(base.model, [])
    before = measure(base.model, attached, sources)
    attached.adapters = modules
    after = measure(base.model, attached, sources)
    names = [file.stem for file in command.files]
    return [
        {
            "source": name,
            "tokens": after[name].tokens,
            "base_loss": before[name].loss,
            "loss": after[name].loss,
            "change": after[name].loss - before[name].loss,
            "fired": dict(zip(names, after[name].fired, strict=True)),
        }
        for name in sources
    ]
