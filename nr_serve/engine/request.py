"""A request inside the engine: its tokens, its pages, its text, and when it ends. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nr_serve.engine.adapters.registry import Selection
from nr_serve.engine.cache.prefix_tree import Chain
from nr_serve.engine.guide import Progress
from nr_serve.engine.messages import FinishReason, Sampling, Submit, Token
from nr_serve.tokenizer import Detokenizer

Gates = dict[str, float]
"""Share of each adapter's blocks that fired at one token, by adapter name."""

TopLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log probability, and (id, log probability) of the likeliest tokens at its position."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer ends."""

    reason: FinishReason
    stop: int | str | None = None
    """The stop token or the stop string that ended it, if one did."""
    at_token: bool = False
    """Whether its last token ended it, and so is no part of its text, unless stops are shown."""


@dataclass(eq=False, slots=True)
class Request:
    """A request's state. Tokens [0, computed) have keys and values in `pages`; the rest are still to be fed."""

    submit: Submit
    eos_ids: frozenset[int]
    seed: int
    """The seed the client asked for, or one drawn at random."""
    text: AnswerText
    arrival: int
    tokens: list[int] = field(default_factory=list)
    """The prompt's tokens, then the answer's so far."""
    computed: int = 0
    reused: int = 0
    """Prompt tokens found in the prefix cache when it was last admitted: computing starts after them."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it was first admitted."""
    pages: list[int] = field(default_factory=list)
    chain: Chain | None = None
    """Where its pages are in the prefix cache while it runs; None if its pages are not added there."""
    row: int | None = None
    """Its row of carried gate states in the bank, while it runs."""
    started: float | None = None
    """`time.monotonic()` when it was first admitted; None while it waits."""
    overtaken: int = 0
    """Requests admitted before it that hold a slot for which it waits."""
    selection: Selection | None = None
    """Fixed once all its adapters are attached, even if it must then wait for pages; kept over preemptions."""
    prompt_logprobs: list[TopLogprobs] = field(default_factory=list)
    """Log probabilities of the prompt's tokens, from the second on, as far as computed."""
    prompt_gates: list[Gates] = field(default_factory=list)
    """Of the prompt's tokens, as far as computed."""
    prompt_tokens: list[Token] = field(default_factory=list)
    """The prompt's tokens with both, as far as computed, if they are part of the answer."""
    progress: Progress | None = None
    """Position of the answer in its guide's grammar; None without a guide."""

    @classmethod
    def outside(cls, submit: Submit, *, row: int, pages: Iterable[int]) -> Request:
        """A request of the engine's own, which the scheduler never sees: it ends at nothing and writes no text."""
        text: Any = None
        return cls(submit, eos_ids=frozenset(), seed=0, text=text, arrival=0, row=row, pages=list(pages))

    def __post_init__(self) -> None:
        self.tokens = list(self.submit.prompt_ids)
        self.progress = self.submit.guide.begin(self.submit.allowance) if self.submit.guide is not None else None

    @property
    def id(self) -> str:
        """The request id of its `Submit`."""
        return self.submit.request_id

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen and when it ends."""
        return self.submit.sampling

    @property
    def prompt_length(self) -> int:
        """Number of tokens in the prompt."""
        return len(self.submit.prompt_ids)

    @property
    def generated(self) -> int:
        """Number of tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Known tokens still to be fed; 1 while it decodes, more while it reads its prompt."""
        return len(self.tokens) - self.computed

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: the lowest is admitted first and preempted last."""
        return (self.submit.priority, self.arrival)

    @property
    def reports_prompt(self) -> bool:
        """Whether the answer reports something about each prompt token."""
        return self.sampling.prompt_logprobs is not None or self.submit.gates

    def append(self, token_id: int) -> Ending | None:
        """Add a new token. Returns why the answer ends with it, if that takes no text; `write` must follow.

        Raises BadRequest if the guide's grammar has no continuation.
        """
        self.tokens.append(token_id)
        if self.progress is not None:
            self.progress.take(token_id)
        sampling = self.sampling
        if self._may_stop:
            if token_id in sampling.stop_token_ids:
                return Ending("stop", token_id, at_token=True)
            if token_id in self.eos_ids and not sampling.ignore_eos:
                return Ending("stop", at_token=True)
        if self.progress is not None and self.progress.complete:
            return Ending("stop")
        return Ending("length") if self.generated >= sampling.max_tokens else None

    def write(self, token_id: int, ending: Ending | None) -> tuple[str, Ending | None]:
        """The text that the token appended last releases, and why the answer ends with it (None: it goes on).

        `ending` is what `append` returned; a stop string in the text may end the answer earlier.
        """
        if ending is not None and ending.at_token:
            shown = self.text.push(token_id, may_stop=False)[0] if self.sampling.include_stop else ""
            return shown + self.text.finish(), ending
        shown, stop = self.text.push(token_id, may_stop=self._may_stop)
        if stop is None and ending is not None and ending.reason == "length":
            last, stop = self.text.finish_at_length(may_stop=self._may_stop)
            shown += last
        elif stop is None and ending is not None:
            shown += self.text.finish()
        return shown, ending if stop is None else Ending("stop", stop)

    @property
    def _may_stop(self) -> bool:
        return self.generated >= self.sampling.min_tokens


class AnswerText:
    """The answer as text. Holds back a tail that could still become a stop string."""

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...], *, include_stop: bool = False) -> None:
        self._detokenizer = detokenizer
        self._matches = [_Match(stop) for stop in stops]
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_id: int, *, may_stop: bool) -> tuple[str, str | None]:
        """Text released by a token, and the stop string it completed, if one."""
        return self._release(self._detokenizer.push(token_id), may_stop)

    def finish(self) -> str:
        """The rest of the text."""
        text, self._held = self._held + self._detokenizer.flush(), ""
        return text

    def finish_at_length(self, *, may_stop: bool) -> tuple[str, str | None]:
        """The rest of the text when the length ends it; the last characters may complete a stop string."""
        shown, stop = self._release(self._detokenizer.flush(), may_stop)
        return (shown, stop) if stop is not None else (shown + self.finish(), None)

    def _release(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        found = []
        for match in self._matches:
            for end, char in enumerate(text, len(self._held) + 1):
                if match.push(char):
                    found.append((end - len(match.stop), match.stop))
        self._held += text
        if found and may_stop:
            at, stop = min(found)
            return self._held[: at + len(stop) * self._include_stop], stop
        cut = len(self._held) - max((match.begun for match in self._matches), default=0)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None


class _Match:
    """How far a growing text is in a stop string: constant time a character, as Knuth, Morris and Pratt have it."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.begun = 0
        """Length of the longest end of the text that begins the stop string and is not all of it."""
        self._borders = [0]  # the same for `stop[: i + 1]` as a text; as many as were needed so far

    def push(self, char: str) -> bool:
        """Whether the text's next character completes the stop string."""
        matched = self._go_on(self.begun, char)
        if matched > len(self._borders):
            self._borders.append(self._go_on(self._borders[-1], char))
        whole = matched == len(self.stop)
        self.begun = self._borders[-1] if whole else matched
        return whole

    def _go_on(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._borders[matched - 1]
        return matched + (self.stop[matched] == char)
