"""Guided decoding: which tokens a grammar allows next. Owns the matchers; torch-free, and knows nothing of HTTP.

A grammar is text in llguidance's format. It is compiled once per request, off the engine's thread, into a `Guide`.
Each answer then has its own `Progress` in the grammar, which survives preemption as the answer's tokens do.
"""

from __future__ import annotations

import time

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from nr_serve.errors import BadRequest

MAX_GRAMMAR_BYTES = 32 * 2**10
"""Longest grammar."""
TOKEN_SECONDS = 0.002
BURST_SECONDS = 0.1
"""Processor time that a grammar may take for each token in the mean, and at once beyond that, for all answers of a
request together: every stream waits."""

# A short grammar can be the most expensive. With llguidance's default of 50,000 items, the 150th token of an
# ambiguous grammar takes 0.4 s, and no other answer advances meanwhile.
_LIMITS = LLParserLimits(step_max_items=6_000, max_lexer_states=50_000, verbose_errors=False)


class Allowance:
    """Processor time that the answers of one request may still take for their grammar."""

    def __init__(self, answers: int) -> None:
        """`answers`: how many of them may run at once."""
        self._most = self._left = BURST_SECONDS + TOKEN_SECONDS * answers

    def take(self, seconds: float) -> None:
        """Use time up. Raises BadRequest if there is none left."""
        self._left -= seconds
        if self._left < 0:
            raise BadRequest(
                f"the grammar cannot be followed further: it takes more than {TOKEN_SECONDS * 1000:g} ms a token"
            )

    def token(self) -> None:
        """One of the answers has one token more."""
        self._left = min(self._left + TOKEN_SECONDS, self._most)


class Guide:
    """A grammar compiled for one tokenizer. It never changes, so several answers can start from it."""

    def __init__(self, grammar: str, tokenizer: LLTokenizer) -> None:
        """Compile. Raises BadRequest if the grammar is wrong, too long or too complex, or matches nothing."""
        size = len(grammar.encode())
        if size > MAX_GRAMMAR_BYTES:
            raise BadRequest(f"the grammar has {size} bytes; at most {MAX_GRAMMAR_BYTES} are taken")
        self._start = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
        if not self._start.is_error():
            self._start.compute_bitmask()  # the first mask is the most expensive, and some errors show only here
        if self._start.is_error():
            raise BadRequest(f"the grammar cannot be used: {_reason(self._start)}")

    def begin(self, allowance: Allowance | None = None) -> Progress:
        """The progress of a new answer; without an `allowance` it has one of its own."""
        return Progress(self._start.deep_copy(), Allowance(1) if allowance is None else allowance)


class Progress:
    """Position of one answer in its grammar."""

    def __init__(self, matcher: LLMatcher, allowance: Allowance) -> None:
        self._matcher = matcher
        self._allowance = allowance
        self._bits: bytes | None = None
        """Which tokens may come next, once that was asked."""

    @property
    def complete(self) -> bool:
        """Whether nothing can follow: the grammar is complete."""
        return self._matcher.is_stopped()

    def allowed_bits(self) -> bytes:
        """Which tokens may come next, one bit each, lowest id first; end of sequence only if the answer may end.

        Raises BadRequest if the grammar has become too complex.
        """
        if self._bits is None:
            started = time.thread_time()
            bits = self._matcher.compute_bitmask()
            self._check(started)
            self._bits = bits
        return self._bits

    def take(self, token_id: int) -> None:
        """Advance by a token. Raises BadRequest if it is not allowed, or if the grammar has become too complex."""
        started, self._bits = time.thread_time(), None
        self._matcher.consume_token(token_id)
        self._check(started)
        self._allowance.token()

    def _check(self, started: float) -> None:
        if self._matcher.is_error():
            raise BadRequest(f"the grammar cannot be followed further: {_reason(self._matcher)}")
        self._allowance.take(time.thread_time() - started)


def _reason(matcher: LLMatcher) -> str:
    """The first line of llguidance's message and, for a regular expression, its reason; the rest shows the text."""
    first, *more = matcher.get_error().split("\n")
    reasons = [line.removeprefix("error: ") for line in more if line.startswith("error: ")]
    if first == "NoExtensionBias":  # as of a schema that only refers to itself
        return "no text can follow it"
    return " ".join([first[:500], *reasons[:1]])
