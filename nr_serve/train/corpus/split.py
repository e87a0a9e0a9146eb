"""Deduplicating documents and holding some of them out."""

from __future__ import annotations

from collections.abc import Iterable, Set

from nr_serve.train.corpus.clean import words

Document = list[str]

GRAM = 8  # words in a gram
NEAR_DUPLICATE = 0.8  # a paragraph is dropped if this share of its 8-grams was seen before
LEAKED = 0.2  # a held-out paragraph is dropped if more of its 8-grams are in the training text
RUNS = 10  # number of contiguous runs of held-out documents, spread over the source
HELD_OUT = 0.08  # share of the characters


def grams(paragraph: str) -> set[int]:
    """Hashes of the paragraph's runs of 8 words; of the whole paragraph if it is shorter."""
    found = words(paragraph)
    return {hash(tuple(found[i : i + GRAM])) for i in range(max(1, len(found) - GRAM + 1))}


def deduplicate(documents: Iterable[Document]) -> list[Document]:
    """Drop every paragraph that repeats an earlier one, exactly or nearly, and documents left empty."""
    seen: set[int] = set()
    kept = []
    for document in documents:
        fresh = []
        for paragraph in document:
            own = grams(paragraph)
            if len(own & seen) < NEAR_DUPLICATE * len(own):
                fresh.append(paragraph)
            seen |= own
        if fresh:
            kept.append(fresh)
    return kept


def size(documents: Iterable[Document]) -> int:
    """Number of characters in the documents' paragraphs."""
    return sum(len(paragraph) for document in documents for paragraph in document)


def thin(documents: list[Document], limit: float, known: Set[str] = frozenset()) -> list[Document]:
    """About `limit` characters of documents, taken evenly from the whole list.

    Documents with a paragraph in `known` come before others; the order stays.
    """
    old = [document for document in documents if not known.isdisjoint(document)]
    new = [document for document in documents if known.isdisjoint(document)]
    kept = _evenly(old, limit)
    kept += _evenly(new, limit - size(kept))
    chosen = {id(document) for document in kept}
    return [document for document in documents if id(document) in chosen]


def _evenly(documents: list[Document], limit: float) -> list[Document]:
    share = min(1.0, max(0.0, limit) / max(1, size(documents)))
    return [document for i, document in enumerate(documents) if int((i + 1) * share) > int(i * share)]


def hold_out(
    documents: list[Document], trained: Set[str] = frozenset(), measured: Set[str] = frozenset()
) -> tuple[list[Document], list[Document]]:
    """Split documents into training and held-out ones.

    Paragraphs in `trained` are training text and others in `measured` held-out text, as they were before, and so
    are new ones between them: what an adapter has read must not come to measure it. Documents that are new as a
    whole are divided into `RUNS` stretches of equal length (fewer if there are few documents), and the last
    `HELD_OUT` of each stretch is held out. So held-out text is contiguous, because neighbouring documents resemble
    each other, and still covers the source. Held-out paragraphs that share 8-grams with the training text are
    dropped.
    """
    train: list[Document] = []
    held: list[Document] = []
    new: list[Document] = []
    for document in documents:
        if trained.isdisjoint(document) and measured.isdisjoint(document):
            new.append(document)
        else:
            was_trained, was_held = _as_before(document, trained, measured)
            train += [was_trained] if was_trained else []
            held += [was_held] if was_held else []
    runs = max(1, min(RUNS, int(HELD_OUT * len(new))))  # about one document or more held out of each
    stretch = max(1.0, size(new) / runs)
    position = 0
    for document in new:
        middle = position + size([document]) / 2
        (held if middle % stretch >= (1 - HELD_OUT) * stretch else train).append(document)
        position += size([document])
    return train, drop_leaked(held, shared_grams(held, train))


def _as_before(document: Document, trained: Set[str], measured: Set[str]) -> tuple[Document, Document]:
    """A document's paragraphs that were training text, and those that were held out.

    One of them at least is known. A new one goes with the one before it, at the beginning with the first known one.
    """
    was_trained = next(p in trained for p in document if p in trained or p in measured)
    parts: tuple[Document, Document] = ([], [])
    for paragraph in document:
        if paragraph in trained or paragraph in measured:
            was_trained = paragraph in trained
        parts[0 if was_trained else 1].append(paragraph)
    return parts


def shared_grams(held: Iterable[Document], train: Iterable[Document]) -> set[int]:
    """The 8-grams that held-out and training text have in common."""
    # Held-out text is smaller, so only its grams are kept in memory, however much training text there is.
    own = {gram for document in held for paragraph in document for gram in grams(paragraph)}
    return {gram for document in train for paragraph in document for gram in grams(paragraph) & own}


def drop_leaked(held: Iterable[Document], shared: set[int]) -> list[Document]:
    """Drop the held-out paragraphs with too many 8-grams in `shared`, and documents left empty."""
    clean = [[p for p in document if len((own := grams(p)) & shared) <= LEAKED * len(own)] for document in held]
    return [document for document in clean if document]
