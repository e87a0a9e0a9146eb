"""Probe texts: short texts of the base's original domain, on which every adapter must be neutral. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nr_serve.config import PROBE_TOKENS
from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.request import Request
from nr_serve.errors import BadRequest
from nr_serve.tokenizer import Tokenizer

_FOLDER = Path(__file__).parent / "probe_texts"
_CHAT = _FOLDER / "chat.txt"
# Files by name: a missing folder must be an error, not an empty list of texts.
BUILT_IN = (_CHAT, *(_FOLDER / f"{kind}.txt" for kind in ("code", "documentation", "prose", "questions")))
"""English texts of several kinds; used unless the operator names other files."""

_MOST_CHARACTERS = 128 * PROBE_TOKENS  # how much of a file is read: more than PROBE_TOKENS tokens of any text


def read_probe_texts(files: Sequence[Path], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Each file's token ids, by file name without suffix; uses `BUILT_IN` if no file is given.

    Raises BadRequest for a file that cannot be read, holds no text, or has the same name as another.
    """
    texts: dict[str, list[int]] = {}
    for path in files or BUILT_IN:
        if path.stem in texts:
            raise BadRequest(f"two probe texts are called {path.stem!r}; rename one of the files")
        text = _read(path)
        texts[path.stem] = _chat_ids(text, tokenizer) if path == _CHAT else tokenizer.encode(text)
    return texts


def probe_requests(
    texts: Mapping[str, Sequence[int]], *, longest: int, row: int, pages: Sequence[int]
) -> dict[str, Request]:
    """The first PROBE_TOKENS tokens of each text, `longest` at most, as requests outside the scheduler."""
    requests = {}
    for name, ids in texts.items():
        submit = Submit("probe", tuple(ids[: min(longest, PROBE_TOKENS)]), Sampling(max_tokens=0), gates=True)
        requests[name] = Request.outside(submit, row=row, pages=pages)
    return requests


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS)
    except OSError as error:
        raise BadRequest(f"cannot read the probe text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"the probe text {path} is not UTF-8") from error
    if not text.strip():
        raise BadRequest(f"the probe text {path} is empty")
    return text


def _chat_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The text as a user's turn if the base has a chat template, else as it is."""
    try:
        prompt = tokenizer.chat_prompt([{"role": "user", "content": text}])
    except BadRequest:  # no template, or one that takes no plain turn: use the text alone
        return tokenizer.encode(text)
    return tokenizer.encode(prompt, special_tokens=False)  # the template adds its own
