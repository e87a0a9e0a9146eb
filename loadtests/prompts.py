"""The prompts that load is made of: stretches of real text, none twice, so that no prefix cache can answer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nr_serve.tokenizer import Tokenizer

CHARACTERS = 12
"""Most characters of text that are read for one token."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the language that it is in."""

    language: str
    text: str


class Texts:
    """Text by language, and the prompts drawn from it."""

    def __init__(self, by_language: Mapping[str, str], tokenizer: Tokenizer, seed: int) -> None:
        self._texts = by_language
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)

    def take(self, count: int, tokens: int) -> list[Prompt]:
        """Prompts of about `tokens` tokens from random places, the languages in turn."""
        languages = list(self._texts)
        return [self._one(languages[i % len(languages)], tokens) for i in range(count)]

    def _one(self, language: str, tokens: int) -> Prompt:
        text, span = self._texts[language], CHARACTERS * tokens
        start = self._rng.randrange(max(1, len(text) - span))
        stretch = text[start : start + span]
        whole_words = stretch.partition(" ")[2] or stretch  # a table's rule has no space
        ids = self._tokenizer.encode(whole_words, special_tokens=False)[:tokens]
        # The last token may be half a character.
        return Prompt(language, self._tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}"))


def read_texts(corpus: Path, languages: Sequence[str]) -> dict[str, str]:
    """All held-out text of a corpus by language. Raises SystemExit if there is none of one."""
    found = {}
    for language in languages:
        files = sorted(corpus.glob(f"{language}.*.heldout.txt"))
        if not files:
            raise SystemExit(f"{corpus} holds no {language}.*.heldout.txt")
        found[language] = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    return found


def own_english() -> dict[str, str]:
    """This project's documentation: English that is at hand without a corpus."""
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return {"en": "\n\n".join(page.read_text(encoding="utf-8") for page in pages)}
