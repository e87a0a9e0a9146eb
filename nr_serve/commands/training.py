"""train, sweep, calibrate, export-adapter, fetch-model, fetch-corpus: making adapters."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from nr_serve.commands.command import Command, check_flags, check_package
from nr_serve.commands.table import table
from nr_serve.errors import BadAdapterFile, BadRequest


class Train(Command):
    """Train an adapter, or a baseline, as a recipe says."""

    recipe: CliPositionalArg[Path] = Field(description="the recipe, a TOML file")
    corpus: Path = Field(description="folder of text, as fetch-corpus leaves it")
    out: Path = Field(description="folder for the adapter, its checkpoints and its log")
    set: list[str] = Field(
        [], description="KEY=VALUE, such as run.tokens=100000: change the recipe; may be repeated"
    )
    resume: bool = Field(False, description="go on from the last checkpoint in the folder")
    tensorboard: bool = Field(False, description="also log for TensorBoard, in the folder's `runs`")


class Sweep(Command):
    """Train a recipe several times with keys changed; compare runs of one domain; goes on where it was stopped."""

    sweep: CliPositionalArg[Path] = Field(description="the sweep, a TOML file")
    corpus: Path = Field(description="folder of text, as fetch-corpus leaves it")
    out: Path = Field(description="folder for the runs, a folder each, and the comparison")
    set: list[str] = Field([], description="KEY=VALUE: change the recipe in every run; may be repeated")
    source: list[str] = Field(
        [], description="held-out files to compare on; may be repeated (default: what the recipe holds out)"
    )
    windows: int = Field(32, ge=1, description="most windows per source")


class Calibrate(Command):
    """Fit the gates of a trained adapter anew, so that it can live beside others; its blocks stay."""

    file: CliPositionalArg[Path] = Field(description="the adapter file; it must carry its recipe")
    beside: list[Path] = Field([], description="an adapter it shall live beside; may be repeated")
    corpus: Path = Field(description="folder of text, with that of all these adapters' recipes")
    out: Path = Field(description="the adapter file to write")
    model: str = Field("default", description="base model: a local folder, a hub name, or `default`")
    carry: float | None = Field(None, ge=0, le=0.999, description="carry of the new gates (default: as it was)")
    set: list[str] = Field(
        [], description="KEY=VALUE in the recipe's [gate], such as percentile=99.9; may be repeated"
    )


class ExportAdapter(Command):
    """Write the adapter of a training run's newest checkpoint, or of its best one if it has patience.

    The run may still be going.
    """

    run: CliPositionalArg[Path] = Field(description="the run's folder")
    file: CliPositionalArg[Path] = Field(description="the adapter file to write")
    threshold: float | None = Field(
        None,
        ge=0,
        description="a gate fires above this; a higher one leaks less and learns less (default: the recipe's)",
    )


class FetchModel(Command):
    """Fetch the default base model; the last line printed is its folder."""

    out: Path | None = Field(None, description="folder for the model (default: a cache folder)")


class FetchCorpus(Command):
    """Fetch text to train and measure with."""

    recipe: CliPositionalArg[Path] = Field(description="the corpus recipe, a TOML file")
    out: Path = Field(description="folder for the text")
    only: list[str] = Field([], description="sources to fetch, by name or pattern; may be repeated (default: all)")


def train(command: Train) -> int:
    """Train; print the adapter's file, or the baseline's folder."""
    from nr_serve.train import processes
    from nr_serve.train.recipe_file import parse_changes, read_recipe
    from nr_serve.train.run import train as run

    check_flags(command, {}, {"tensorboard": "tensorboard"})
    recipe = read_recipe(command.recipe, parse_changes(command.set))
    with _told_if_stopped("train", lambda: _left(command.out)), _ended_in_order():
        made = run(recipe, command.out, command.corpus, resume=command.resume, tensorboard=command.tensorboard)
    if processes.is_first():
        print(made)
    return 0


def sweep(command: Sweep) -> int:
    """Train every run; compare those that ended, if all are of one domain; 1 if one failed."""
    from nr_serve.evaluate.compare import check_sources
    from nr_serve.train.recipe_file import parse_changes
    from nr_serve.train.sweep import read_sweep, run_sweep

    recipes = read_sweep(command.sweep, parse_changes(command.set))
    compares = len({(recipe.domain, recipe.base) for recipe in recipes.values()}) == 1
    if compares:
        check_package("matplotlib", "the plot of a comparison")
        check_sources(list(recipes.values()), command.corpus, command.source)
    else:
        for flag in ("source", "windows"):
            if flag in command.model_fields_set:
                fault = f"runs of several domains or bases are not compared: --{flag} does nothing"
                raise BadRequest(fault, param=flag)
    with _told_if_stopped("sweep", lambda: "the same command goes on where this one was"), _ended_in_order():
        results = run_sweep(recipes, command.out, command.corpus)
        made = {name: result for name, result in results.items() if isinstance(result, Path)}
        for path in _written(command, made, compares=compares):
            print(path)
    return 0 if len(made) == len(results) else 1


def _written(command: Sweep, made: Mapping[str, Path], *, compares: bool) -> list[Path]:
    """What a sweep leaves: its comparison, written now, or each run's result. Empty but in the first process."""
    from nr_serve.evaluate.compare import compare_runs, write_comparison
    from nr_serve.train import processes

    if not made or not processes.is_first():
        return []
    if not compares:
        return list(made.values())
    folders = {name: command.out / name for name in made}
    comparison = compare_runs(folders, command.corpus, command.source, windows=command.windows)
    return write_comparison(comparison, folders, command.out)


def calibrate(command: Calibrate) -> int:
    """Calibrate; print the file."""
    from nr_serve.train.calibrate import calibrate as run
    from nr_serve.train.recipe_file import parse_changes

    changes = parse_changes(command.set)
    _check_adapter_output(command.out, command.beside)
    print(
        run(
            command.file,
            command.beside,
            command.corpus,
            command.out,
            base=command.model,
            carry=command.carry,
            changes=changes,
        )
    )
    return 0


def export_adapter(command: ExportAdapter) -> int:
    """Export; print the adapter's file."""
    from nr_serve.train.checkpoint import LOG, PREFIX
    from nr_serve.train.export import export_run

    _check_adapter_output(command.file, [command.run / LOG, *command.run.glob(f"{PREFIX}*/*")])
    print(export_run(command.run, command.file, threshold=command.threshold))
    return 0


def _check_adapter_output(path: Path, used: Iterable[Path]) -> None:
    """`check_output`; raise BadRequest, too, for a file that is there and is no adapter: a base's weights, say."""
    from nr_serve.disk import check_output
    from nr_serve.neutral.format import read_info

    check_output(path, used)
    if path.is_file() and path.stat().st_size:
        try:
            read_info(path)
        except BadAdapterFile as error:
            raise BadRequest(f"cannot write {path}: it is there already, and is no adapter file") from error


def fetch_model(command: FetchModel) -> int:
    """Fetch and convert; print the folder."""
    from nr_serve.default_model import fetch_model as fetch

    print(fetch(command.out))
    return 0


def fetch_corpus(command: FetchCorpus) -> int:
    """Fetch; print the sources now in the folder."""
    from nr_serve.train.corpus.build import fetch_corpus as fetch

    with _ended_in_order():  # so that unpacked files are removed
        fetched = fetch(command.recipe, command.out, command.only)
    rows = [(each.name, f"{each.train_chars:,}", f"{each.heldout_chars:,}") for each in fetched]
    for line in table([("SOURCE", "TRAIN CHARS", "HELD-OUT CHARS"), *rows]):
        print(line)
    return 0


def _left(out: Path) -> str:
    """From where the run in `out` can be resumed."""
    from nr_serve.train import checkpoint

    newest = checkpoint.latest(out)
    return f"--resume goes on from {newest}" if newest else "there is no checkpoint yet to go on from"


@contextmanager
def _told_if_stopped(command: str, left: Callable[[], str]) -> Iterator[None]:
    """Say how the command can be continued, if a signal ends the program inside the block."""
    from nr_serve.train import processes

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        processes.say(command, f"stopped; {left()}")
        raise


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """In the block, SIGTERM and SIGHUP end the program by an exception, so that temporary files are removed.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    caught = [each for each, handler in before.items() if handler is not signal.SIG_IGN]
    for each in caught:
        signal.signal(each, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for each in caught:
            signal.signal(each, before[each])
