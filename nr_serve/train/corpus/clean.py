"""What counts as text: normalising a paragraph, and telling prose from leftovers."""

from __future__ import annotations

import re
import unicodedata

UNSPACED = "\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Characters of scripts written without spaces: each counts as a word."""
MARKS = "".join(c for c in map(chr, range(2**16)) if unicodedata.category(c)[0] == "M")
"""Combining marks, such as the vowel signs of Hindi: parts of a word, though `\\w` does not match them."""
# A word is a run of letters.
WORD = re.compile(rf"[{UNSPACED}]|(?:[^\W\d_{UNSPACED}]|[{MARKS}])+")
INVISIBLE = re.compile(
    r"[\u0000-\u0008\u000e-\u001b\u007f-\u0084\u0086-\u009f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ufffd]"
)
"""Invisible characters; not the zero-width joiners, which Persian and Indian languages need for spelling."""
MIN_WORDS = 4
MIN_LETTERS = 0.7  # share of the characters that are not white space
# English function words that no other language here has, and some that a few languages share. Not "a", "is" and
# "be", which are common Hungarian words, nor "as", which is a Portuguese one.
ENGLISH = frozenset(
    ("the", "and", "you", "this", "with", "that", "which", "your", "from", "when", "used", "using", "these")
)
SHARED = ENGLISH.union(
    ("an", "of", "to", "for", "are", "or", "can", "if", "in", "on", "by", "it", "not", "will", "has", "have", "use")
)
ENGLISH_SHARE, SHARED_SHARE = 0.1, 0.2


def normalise(text: str) -> str:
    """Return `text` as one line: NFC, no invisible characters, single spaces."""
    return " ".join(INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def words(text: str) -> list[str]:
    """Return the words of `text` in lower case, without digits and punctuation."""
    return WORD.findall(text.lower())


def is_prose(paragraph: str) -> bool:
    """Whether a normalised paragraph has a few words and is mostly letters."""
    solid = paragraph.replace(" ", "")
    if not solid or len(words(paragraph)) < MIN_WORDS:
        return False
    return sum(map(_is_letter, solid)) >= MIN_LETTERS * len(solid)


def looks_english(paragraph: str) -> bool:
    """Whether a paragraph of a translation was left in English, judged by its function words."""
    found = words(paragraph)
    english = sum(word in ENGLISH for word in found)
    shared = sum(word in SHARED for word in found)
    return english > ENGLISH_SHARE * len(found) or shared > SHARED_SHARE * len(found)


def clean_document(paragraphs: list[str], *, translated: bool, originals: frozenset[str]) -> list[str]:
    """The prose of a document, normalised.

    With `translated`, text that is still English is dropped: what looks English, and what is in `originals`.
    """
    normal = (normalise(paragraph) for paragraph in paragraphs)
    kept = (paragraph for paragraph in normal if is_prose(paragraph) and paragraph not in originals)
    return [paragraph for paragraph in kept if not (translated and looks_english(paragraph))]


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"
