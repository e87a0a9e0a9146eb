"""Text files to windows of tokens: reading, tokenising, packing, and the order in which windows are taken.

Nothing here depends on how far a run has come: a batch is a function of the recipe, the text and the step.
Shape suffixes: N windows, T tokens a window.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nr_serve.train.recipe import BadRecipe, Data, Run

PIECE_CHARACTERS = 8000
"""Longer documents are cut at paragraphs, so that one long book does not crowd out the other documents."""

CLASS_TOKENS = 65_536
"""A class that only keeps the gates shut is read this far: the text of a run must not depend on its budget."""


@dataclass(frozen=True)
class Windows:
    """Token ids and each token's place in its document's piece (0 starts one), both int64 [N, T]."""

    ids_NT: Tensor
    offset_NT: Tensor

    def __len__(self) -> int:
        return self.ids_NT.shape[0]

    def take(self, rows: slice | Sequence[int]) -> Windows:
        """Those windows."""
        return Windows(self.ids_NT[rows], self.offset_NT[rows])


def join(parts: Iterable[Windows]) -> Windows:
    """All windows of `parts`, in order."""
    listed = list(parts)
    return Windows(torch.cat([part.ids_NT for part in listed]), torch.cat([part.offset_NT for part in listed]))


def find_files(folder: Path, globs: Iterable[str]) -> list[Path]:
    """Files of `folder` that match, sorted, each once. Raises BadRecipe for a glob that matches none."""
    found: set[Path] = set()
    for pattern in globs:
        matches = [path for path in folder.glob(pattern) if path.is_file()]
        if not matches:
            raise BadRecipe(f"no text in {folder} matches {pattern!r}")
        found.update(matches)
    return sorted(found)


def source_name(path: Path) -> str:
    """`hu.lohelp` of `hu.lohelp.train.txt`."""
    return ".".join(path.name.split(".")[:2])


def language(path: Path) -> str:
    """`hu` of `hu.lohelp.train.txt`."""
    return path.name.split(".")[0]


def read_documents(path: Path) -> list[str]:
    """The documents of a file of one paragraph a line and an empty line between documents, the longest cut."""
    documents: list[str] = []
    for document in path.read_text(encoding="utf-8").split("\n\n"):
        documents.extend(_pieces([line for line in document.split("\n") if line.strip()]))
    return documents


def _pieces(paragraphs: list[str]) -> Iterator[str]:
    piece: list[str] = []
    length = 0
    for paragraph in paragraphs:
        if piece and length + len(paragraph) > PIECE_CHARACTERS:
            yield "\n".join(piece)
            piece, length = [], 0
        piece.append(paragraph)
        length += len(paragraph)
    if piece:
        yield "\n".join(piece)


def chat_documents(tokenizer: Any, documents: Iterable[str]) -> list[str]:
    """Each document as one exchange in the base's chat template; none if it has no template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    wrapped = []
    for document in documents:
        paragraphs = document.split("\n")
        turns = [
            {"role": "user", "content": paragraphs[0]},
            {"role": "assistant", "content": "\n".join(paragraphs[1:4]) or paragraphs[0]},
        ]
        wrapped.append(tokenizer.apply_chat_template(turns, tokenize=False))
    return wrapped


def pack(tokenizer: Any, documents: Sequence[str], window: int, limit: int | None, seed: int) -> Windows:
    """Documents in a shuffled order, laid end to end and cut into windows; at most about `limit` tokens.

    A document cut by a window's end goes on in the next window as a piece of its own, from offset 0.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    ids: list[int] = []
    starts: list[bool] = []
    for at in range(0, len(order), 256):
        for tokens in tokenizer(order[at : at + 256])["input_ids"]:
            ids += tokens
            starts += [i == 0 for i in range(len(tokens))]
        if limit is not None and len(ids) >= limit:
            break
    count = (len(ids) if limit is None else min(limit, len(ids))) // window
    ids_NT = torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)
    starts_NT = torch.tensor(starts[: count * window], dtype=torch.bool).view(count, window)
    return Windows(ids_NT, _offsets(starts_NT))


def _offsets(starts_NT: Tensor) -> Tensor:
    place_T = torch.arange(starts_NT.shape[1])
    last_start_NT = torch.where(starts_NT, place_T, 0).cummax(dim=1).values
    return place_T - last_start_NT


@dataclass(frozen=True)
class Classes:
    """Windows by the part they play and by class; a class's name is a source (`en.fortunes`) or a language."""

    target: Windows
    original: Mapping[str, Windows]
    background: Mapping[str, Windows]

    def digest(self) -> str:
        """16 hex digits that tell this text from any other."""
        digest = hashlib.sha256()
        for windows in (self.target, *self.original.values(), *self.background.values()):
            digest.update(windows.ids_NT.numpy().tobytes())
        return digest.hexdigest()[:16]


class Rotation:
    """An endless, seeded order over classes of windows: the classes in turn, each reshuffled every epoch."""

    def __init__(self, classes: Iterable[Windows], seed: int) -> None:
        self.classes = list(classes)
        self.seed = seed
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def at(self, i: int) -> Windows:
        """The i-th window of the order, [1, T]."""
        turn, which = divmod(i, len(self.classes))
        windows = self.classes[which]
        epoch, row = divmod(turn, len(windows))
        if self._orders.get(which, (-1, []))[0] != epoch:
            order = list(range(len(windows)))
            random.Random(f"{self.seed}.{which}.{epoch}").shuffle(order)
            self._orders[which] = (epoch, order)
        return windows.take([self._orders[which][1][row]])


class Mix:
    """What each step reads: so many target, original and background windows that the shares hold over a run."""

    def __init__(self, classes: Classes, run: Run) -> None:
        self.run = run
        self.target = Rotation([classes.target], run.seed)
        self.original = Rotation(classes.original.values(), run.seed)
        self.background = Rotation(classes.background.values(), run.seed)

    def batch(self, step: int) -> tuple[Windows, Windows | None, Windows | None]:
        """Target, original and background windows of step 0, 1, ...; None where a step has none."""
        before, after = self._taken(step), self._taken(step + 1)
        target, original, background = (
            [rotation.at(i) for i in range(first, last)]
            for rotation, first, last in zip(
                (self.target, self.original, self.background), before, after, strict=True
            )
        )
        return join(target), join(original) if original else None, join(background) if background else None

    def _taken(self, steps: int) -> tuple[int, int, int]:
        """Target, original and background windows taken before step `steps`."""
        windows = steps * self.run.windows_a_step
        original = int(windows * self.run.original_share + 1e-9)
        background = int(windows * self.run.background_share + 1e-9)
        return windows - original - background, original, background


def read_classes(folder: Path, data: Data, tokenizer: Any, run: Run) -> Classes:
    """The recipe's training text, packed; at most `CLASS_TOKENS` tokens of each class that is not the target.

    Raises BadRecipe if a glob matches no file or a class has less than two windows of text.
    """
    target_files = find_files(folder, data.target)
    target = [document for path in target_files for document in read_documents(path)]
    original = {source_name(path): read_documents(path) for path in find_files(folder, data.original)}
    if data.chat:
        chats = chat_documents(tokenizer, [d for documents in original.values() for d in documents[:100]])
        if chats:
            original["chat"] = chats
    background: dict[str, list[str]] = {}
    for path in find_files(folder, data.background):
        background.setdefault(language(path), []).extend(read_documents(path))

    def packed(named: Mapping[str, list[str]]) -> dict[str, Windows]:
        return {n: _packed(n, d, tokenizer, run, CLASS_TOKENS) for n, d in named.items()}

    return Classes(_packed("target", target, tokenizer, run, None), packed(original), packed(background))


def read_heldout(
    folder: Path, globs: Iterable[str], tokenizer: Any, window: int, windows: int
) -> dict[str, Windows]:
    """Up to `windows` windows of each source that matches, by source name.

    Raises BadRecipe if a glob matches no file or a source fills no window.
    """
    sources = {}
    for path in find_files(folder, globs):
        name = source_name(path)
        sources[name] = pack(tokenizer, read_documents(path), window, windows * window, seed=0)
        if len(sources[name]) == 0:
            raise BadRecipe(f"the held-out text of {name} fills 0 windows of {window} tokens")
    return sources


def _packed(name: str, documents: list[str], tokenizer: Any, run: Run, tokens: int | None) -> Windows:
    windows = pack(tokenizer, documents, run.window, tokens, run.seed)
    if len(windows) < 2:
        raise BadRecipe(f"the text of {name} fills {len(windows)} windows of {run.window} tokens; 2 are needed")
    return windows
