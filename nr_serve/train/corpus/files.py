"""The corpus on disk: text files, one paragraph per line, an empty line between documents; and their manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nr_serve.disk import whole
from nr_serve.errors import BadRequest, faults
from nr_serve.train.corpus.split import Document

MANIFEST = "manifest.json"
Manifest = dict[str, dict[str, Any]]  # entries by the source's name
_MANIFEST = TypeAdapter(Manifest)


def text_file(out: Path, name: str, part: str) -> Path:
    """The path of a source's text; `part` is "train" or "heldout"."""
    return out / f"{name}.{part}.txt"


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a text file."""
    for document in path.read_text(encoding="utf-8").split("\n\n"):
        if document.strip():
            yield document.strip("\n").split("\n")


def write_documents(path: Path, documents: list[Document]) -> None:
    """Write a text file completely or not at all."""
    _replace(path, "\n\n".join("\n".join(document) for document in documents) + "\n")


def read_manifest(out: Path) -> Manifest:
    """The manifest of the folder, empty if there is none; raises `BadRequest` if it is damaged."""
    path = out / MANIFEST
    if not path.exists():
        return {}
    try:
        return _MANIFEST.validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadRequest(f"{path} is damaged ({faults(error)}); delete it to fetch everything again") from error


def write_manifest(out: Path, manifest: Manifest) -> None:
    """Write the manifest completely or not at all."""
    _replace(out / MANIFEST, json.dumps(dict(sorted(manifest.items())), indent=1, ensure_ascii=False) + "\n")


def _replace(path: Path, content: str) -> None:
    with whole(path) as part:
        part.write_text(content, encoding="utf-8")
