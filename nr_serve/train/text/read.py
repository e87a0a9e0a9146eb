"""The text that training reads: a recipe's sources to classes of windows.

A run's text never depends on its budget, because a run may be continued with a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from nr_serve.logs import say
from nr_serve.train.documents import PIECE_CHARACTERS
from nr_serve.train.entries import DATASETS
from nr_serve.train.recipe import BadRecipe, Data, Run
from nr_serve.train.text.classes import CHAT, Classes
from nr_serve.train.text.frames import find_frames, render_exchange
from nr_serve.train.text.overlap import overlap
from nr_serve.train.text.pack import Packed, Windows, pack
from nr_serve.train.text.sources import Source, check_globs, find_sources, read_in_turn
from nr_serve.train.text.token_cache import TokenCache, tokenizer_key

CLASS_TOKENS = 65_536
"""Tokens read of each class that is not learned; the windows that are used are spread over them."""

POOL_CHARACTERS = 2**24
"""A class with a limit is drawn from this many first characters of its sources, not from the first documents."""

POOL_CHARACTERS_A_TOKEN = 8
"""For a large limit, the characters to draw from, per token: text has fewer characters per token than this."""

CHAT_DOCUMENTS = 100
"""Number of documents of each class of original text that are wrapped in the chat template."""

MOST_OVERLAP = 0.2
"""Two texts that share more of their 8-grams than this count as the same; our corpus's worst pair shares 0.03."""


def read_classes(
    folder: Path,
    data: Data,
    tokenizer: Any,
    run: Run,
    cache: TokenCache | None = None,
    *,
    background: Sequence[Source] = (),
) -> Classes:
    """The recipe's training text, packed; at most `CLASS_TOKENS` tokens of each class except the target.

    `background` is background text in addition to the recipe's.

    Raises BadRecipe if a source is missing, empty, damaged or has two roles, if a class has less than two windows
    of text, if the target's text is also another class's, or if the base's chat template takes no exchange;
    DownloadFailed if a data set cannot be reached.
    """
    roles = find_roles(folder, data)
    frames = find_frames(tokenizer, chat=data.chat)
    original = _by_class((source.name, source) for source in roles["original"])
    others = _by_class((source.language, source) for source in (*roles["background"], *background))
    _check_names([*original, *others])
    packer = _Packer(tokenizer, run.window, run.seed, cache or TokenCache(), end=_end(data, tokenizer))
    target = packer.pack("target", roles["target"], data.target_tokens)
    packed_original = {name: packer.pack(name, sources, CLASS_TOKENS) for name, sources in original.items()}
    packed_background = {name: packer.pack(name, sources, CLASS_TOKENS) for name, sources in others.items()}
    grams = {"target": target.grams}
    grams |= {f"original {name}": packed.grams for name, packed in packed_original.items()}
    grams |= {f"background {name}": packed.grams for name, packed in packed_background.items()}
    _check_target(grams)
    if frames.chat is not None:
        if not frames.chat.fits(run.window):
            say(
                "text",
                f"the chat template takes more than half of {run.window} tokens: only original text is put in it",
            )
        packed_original[CHAT] = packer.pack_chat(list(original.values()))
    return Classes(target.windows, _windows(packed_original), _windows(packed_background), grams, frames)


def read_heldout(
    folder: Path,
    written: Iterable[str],
    tokenizer: Any,
    window: int,
    windows: int,
    *,
    text_field: str = "text",
    apart_from: Classes | None = None,
    cache: TokenCache | None = None,
) -> dict[str, Windows]:
    """Up to `windows` windows of each class of the sources `written` as in a recipe, by class name.

    They are spread over the class's text, of which `CLASS_TOKENS` tokens are read, more if `windows` need more.
    Raises BadRecipe if a source is missing, empty or damaged, if a class fills no window or has only documents of
    one token, or if its text is also in the training text `apart_from`. The latter is an error, not a warning:
    measuring on learned text says nothing, and warnings in a long log are overlooked.
    """
    packer = _Packer(tokenizer, window, 0, cache or TokenCache(), fewest=1)
    classes = _by_class((source.name, source) for source in find_sources(folder, written, text_field))
    limit = max(CLASS_TOKENS, windows * window)
    packed = {name: packer.pack(name, sources, limit) for name, sources in classes.items()}
    for name, held in packed.items():
        for other, grams in {} if apart_from is None else apart_from.grams.items():
            _check_overlap(f"the held-out text of {name}", held.grams, _text_of(other), grams)
    return {name: each.windows.spread(windows) for name, each in packed.items()}


def find_roles(folder: Path, data: Data) -> dict[str, list[Source]]:
    """The sources by role. Raises BadRecipe for a glob without a match and for a source that is listed twice."""
    listed = {
        "target": data.target,
        "original": data.original,
        "background": data.background,
        "heldout": data.heldout,
    }
    written = [entry for entries in listed.values() for entry in entries]
    check_globs(folder, [entry for entry in written if not entry.startswith(DATASETS)])  # of all roles at once
    roles = {}
    role_of: dict[str, str] = {}
    for role, entries in listed.items():
        roles[role] = find_sources(folder, entries, data.text_field)
        for source in roles[role]:
            if source.identity in role_of:
                other = role_of[source.identity]
                raise BadRecipe(f"{source} is in both data.{other} and data.{role}; take it out of one of them")
            if role != "heldout" and source.held_out:
                raise BadRecipe(f"data.{role} names held-out text, {source}; nothing may train on it")
            role_of[source.identity] = role
    return roles


def chat_documents(tokenizer: Any, documents: Iterable[str]) -> list[str]:
    """Each document as one exchange in the base's chat template, which the tokenizer must have."""
    wrapped = []
    for document in documents:
        paragraphs = document.split("\n")
        answer = "\n".join(paragraphs[1:4]) or paragraphs[0]
        wrapped.append(render_exchange(tokenizer, paragraphs[0], answer))
    return wrapped


class _Packer:
    """Packs sources for one tokenizer, window size and seed, through the cache."""

    def __init__(
        self, tokenizer: Any, window: int, seed: int, cache: TokenCache, *, fewest: int = 2, end: str = ""
    ) -> None:
        self.tokenizer, self.window, self.seed, self.cache = tokenizer, window, seed, cache
        self.fewest, self.end = fewest, end
        self.key = [tokenizer_key(tokenizer), window, seed, PIECE_CHARACTERS]

    def pack(self, name: str, sources: Sequence[Source], limit: int | None) -> Packed:
        """Pack a class's text, at most `limit` tokens of it (None: all)."""
        pool = None if limit is None else max(POOL_CHARACTERS, POOL_CHARACTERS_A_TOKEN * limit)
        key = ["text", self.end, pool, [source.fingerprint() for source in sources]]

        def make() -> Packed:
            return pack(self.tokenizer, read_in_turn(sources, pool, self.end), self.window, limit, self.seed)

        return self._packed(name, key, limit, make)

    def pack_chat(self, classes: Sequence[Sequence[Source]]) -> Packed:
        """Pack the first documents of each class as exchanges in the chat template."""
        key = ["chat", CHAT_DOCUMENTS, [[source.fingerprint() for source in sources] for sources in classes]]

        def make() -> Packed:
            documents = chat_documents(self.tokenizer, _firsts(classes))
            return pack(self.tokenizer, documents, self.window, CLASS_TOKENS, self.seed, special_tokens=False)

        return self._packed(CHAT, key, CLASS_TOKENS, make)

    def _packed(self, name: str, key: list[Any], limit: int | None, make: Callable[[], Packed]) -> Packed:
        packed = self.cache.packed([*self.key, limit, *key], make)
        if len(packed.windows) < self.fewest:
            raise BadRecipe(
                f"the text of {name} fills {len(packed.windows)} windows of {self.window} tokens; "
                f"{self.fewest} must be filled"
            )
        if not packed.windows.labelled:
            raise BadRecipe(f"the text of {name} is of documents of one token each: none can be predicted")
        return packed


def _end(data: Data, tokenizer: Any) -> str:
    """What ends a document, as the tokenizer reads it. Raises BadRecipe if it has no such token."""
    if not data.end_of_text:
        return ""
    if tokenizer.eos_token is None:
        raise BadRecipe("data.end_of_text: the base's tokenizer has no end-of-text token")
    return str(tokenizer.eos_token)


def _firsts(classes: Iterable[Sequence[Source]]) -> Iterable[str]:
    for sources in classes:
        yield from islice(chain.from_iterable(source.documents() for source in sources), CHAT_DOCUMENTS)


def _by_class(named: Iterable[tuple[str, Source]]) -> dict[str, list[Source]]:
    classes: dict[str, list[Source]] = {}
    for name, source in named:
        classes.setdefault(name, []).append(source)
    return classes


def _windows(packed: Mapping[str, Packed]) -> dict[str, Windows]:
    return {name: each.windows for name, each in packed.items()}


def _check_names(names: Iterable[str]) -> None:
    seen = {"target", CHAT}  # the two classes that are not named after a source
    for name in names:
        if name in seen:
            raise BadRecipe(f"two classes of text are named {name!r}; rename a file or take another data set")
        seen.add(name)


def _check_target(grams: Mapping[str, Tensor]) -> None:
    for name, other in grams.items():
        if name != "target":
            _check_overlap("the target", grams["target"], _text_of(name), other)


def _text_of(name: str) -> str:
    return "the target" if name == "target" else f"the text of {name}"


def _check_overlap(a: str, grams_a: Tensor, b: str, grams_b: Tensor) -> None:
    share = overlap(grams_a, grams_b)
    if share > MOST_OVERLAP:
        raise BadRecipe(
            f"{a} and {b} share {share:.0%} of their runs of eight words; "
            f"more than {MOST_OVERLAP:.0%} means the same text in two places"
        )
