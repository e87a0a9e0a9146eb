"""train, export-adapter, evaluate, fetch-model, fetch-corpus: making adapters and measuring them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from nr_serve.commands.base import Command
from nr_serve.commands.remote import table
from nr_serve.errors import BadRequest

if TYPE_CHECKING:
    from nr_serve.evaluate.heldout import Report


class Train(Command):
    """Train an adapter as a recipe says."""

    recipe: CliPositionalArg[Path] = Field(description="the recipe, a TOML file")
    corpus: Path = Field(description="folder of text, as fetch-corpus leaves it")
    out: Path = Field(description="folder for the adapter, its checkpoints and its log")
    resume: bool = Field(False, description="go on from the last checkpoint in the folder")


class ExportAdapter(Command):
    """Write the adapter of a training run's newest checkpoint; the run may still be going."""

    run: CliPositionalArg[Path] = Field(description="the run's folder")
    file: CliPositionalArg[Path] = Field(description="the adapter file to write")
    percentile: float | None = Field(
        None, gt=0, lt=100, description="set the thresholds anew, at this percentile of the logits of --corpus"
    )
    corpus: Path | None = Field(None, description="folder of text, for --percentile")
    threshold: float = Field(0.0, description="a gate fires above this; more costs learning and lessens leak")


class Evaluate(Command):
    """Measure adapters' loss and fired shares on text, beside the base's own loss."""

    files: CliPositionalArg[list[Path]] = Field(description="adapter files, all attached at once")
    corpus: Path = Field(description="folder of text, as fetch-corpus leaves it")
    source: list[str] = Field(["*.heldout.txt"], description="which of its files to measure on; may be repeated")
    model: str = Field("default", description="base model: a local folder, a hub name, or `default`")
    window: int = Field(256, ge=8, description="tokens read at once")
    windows: int = Field(32, ge=1, description="most windows a source")
    json_: bool = Field(False, alias="json", description="print JSON")
    card: Path | None = Field(None, description="file for a page on the first adapter, in Markdown")


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


def export_adapter(command: ExportAdapter) -> int:
    """Export; print the adapter's file."""
    from nr_serve.train.export import export_run

    print(
        export_run(
            command.run,
            command.file,
            corpus=command.corpus,
            percentile=command.percentile,
            threshold=command.threshold,
        )
    )
    return 0


def evaluate(command: Evaluate) -> int:
    """Measure; print a row a source; write the card."""
    from nr_serve.evaluate.card import card
    from nr_serve.evaluate.heldout import evaluate as run
    from nr_serve.neutral.format import read_adapter

    report = run(
        command.files,
        command.model,
        command.corpus,
        command.source,
        window=command.window,
        windows=command.windows,
    )
    for line in [report.to_json()] if command.json_ else table(_rows(report)):
        print(line)
    if command.card is not None:
        first = command.files[0]
        _write(command.card, card(first.stem, read_adapter(first), report))
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


def _rows(report: Report) -> list[list[str]]:
    header = ["SOURCE", "TOKENS", "BASE LOSS", "LOSS", "CHANGE", *(f"FIRED {name}" for name in report.adapters)]
    rows = [
        [name, str(source.tokens), f"{source.before:.4f}", f"{source.after:.4f}", f"{source.change:+.2%}"]
        + [f"{source.fired[adapter]:.2%}" for adapter in report.adapters]
        for name, source in report.sources.items()
    ]
    return [header, *rows]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"cannot write {path}: {error.strerror}") from error
