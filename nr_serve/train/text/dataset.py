"""A data set of the library `datasets` as a source of documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nr_serve.errors import DownloadFailed
from nr_serve.train.documents import document_lines, field_text, texts
from nr_serve.train.entries import DATASETS
from nr_serve.train.recipe import BadRecipe

_WRITTEN = re.compile(r"datasets:([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?")


@dataclass(frozen=True)
class Dataset:
    """A data set of the `datasets` library, streamed: `datasets:NAME[:CONFIG][@SPLIT]`."""

    written: str
    """The data set as the recipe names it."""
    path: str
    """The data set's name on the hub, or its folder."""
    config: str | None
    split: str
    field: str
    """The column that holds the documents."""

    @staticmethod
    def parse(written: str, folder: Path, field: str) -> Dataset:
        """The data set that a recipe names; if NAME is a folder in `folder`, it is read from there."""
        match = _WRITTEN.fullmatch(written)
        if match is None:
            raise BadRecipe(f"{written!r} is not datasets:NAME[:CONFIG][@SPLIT]")
        name, config, split = match.groups()
        local = folder / name
        path = str(local.resolve()) if local.is_dir() else name
        return Dataset(name, path, config, split or "train", field)

    @property
    def name(self) -> str:
        """The data set and its configuration, such as `wikimedia/wikipedia:20231101.hu`."""
        return self.written if self.config is None else f"{self.written}:{self.config}"

    @property
    def language(self) -> str:
        """The data set's name: its language is unknown, so each data set is a class of its own."""
        return self.name

    @property
    def identity(self) -> str:
        """The data set, configuration and split, for comparing sources."""
        return json.dumps([DATASETS, self.path, self.config, self.split])

    def __str__(self) -> str:
        return f"{DATASETS}{self.name}@{self.split}"

    @cached_property
    def _builder(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise BadRecipe(f"{self} needs the library datasets, of the extra `train`") from error
        try:
            return datasets.load_dataset_builder(self.path, self.config)
        except ConnectionError as error:
            raise DownloadFailed(f"cannot reach {self}: {error}") from error
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise BadRecipe(f"cannot read {self}: {error}") from error

    @property
    def held_out(self) -> bool:
        """False: a data set's name does not say whether its text is held out."""
        return False

    def entry(self, folder: Path) -> str:
        """How a recipe names the data set: name and split."""
        return str(self)

    def reads_alike(self, field: str) -> bool:
        """Whether `field` is the column that is read here."""
        return field == self.field

    def fingerprint(self) -> str:
        """Hash of the data set's files, by their revision (on the hub) or time of change (in a folder)."""
        builder = self._builder
        data_files = builder.config.data_files or {}
        files = {str(split): [*map(str, found), *found.origin_metadata] for split, found in data_files.items()}
        return json.dumps(["datasets", self.split, self.field, builder.hash, builder.config_id, files])

    def documents(self, end: str = "") -> Iterator[str]:
        """The documents, with `end` after each, as they arrive.

        Raises BadRecipe, naming the row; DownloadFailed if the hub fails.
        """
        import httpx
        from datasets.exceptions import DatasetsError

        builder = self._builder
        try:
            for number, row in enumerate(builder.as_streaming_dataset(split=self.split)):
                text = field_text(row, self.field, f"{self}, row {number}")
                yield from texts(document_lines(text), end)
        except (ConnectionError, httpx.HTTPError) as error:
            raise DownloadFailed(f"{self} broke off: {error}") from error
        except (OSError, ValueError, DatasetsError) as error:
            raise BadRecipe(f"cannot read {self}: {error}") from error
