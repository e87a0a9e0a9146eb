"""The canary: how far an adapter leaks on the probe texts, measured on the base as served. Torch-free.

The texts are read through the adapter alone, in its slot, before it may act there (or before its threshold is
changed): the gates see the stream that earlier residues of the same adapter moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

from nr_serve.engine.messages import Leak, Neutrality
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Piece
from nr_serve.errors import BadRequest, NrError
from nr_serve.neutral.registry import Version

log = logging.getLogger(__name__)
MOST_REPORTS = 1024
PIECE_TOKENS = 64  # run between two steps: less than what a prompt adds to one step

Fired = Callable[[Piece, int, float], int]
"""(piece, slot, threshold) -> token-layers of the piece on which a gate of the adapter in the slot fired."""


class Canary:
    """Owns the probe texts and what was measured on them. Without texts nothing is measured."""

    def __init__(self, texts: Mapping[str, Request], fired: Fired, max_leak: float | None = None) -> None:
        """`texts` by name, outside the scheduler, with a row and pages that nobody else gets.

        `max_leak`: the largest leak that is taken, as a share; None takes any.
        """
        self.max_leak = max_leak
        self._texts = texts
        self._fired = fired
        self._reports: dict[tuple[str, float], Neutrality] = {}  # by content and threshold: a reload is known

    def report(self, version: Version) -> Neutrality | None:
        """The leak on each probe text; None until it was measured at the version's threshold."""
        return self._reports.get((version.digest, version.threshold))

    def needs(self, version: Version, threshold: float) -> bool:
        """Whether the version is still to be measured at this threshold."""
        return bool(self._texts) and (version.digest, threshold) not in self._reports

    def measure(self, version: Version, threshold: float) -> Iterator[None]:
        """Measure a version in its slot, if it needs it, with at most PIECE_TOKENS between yields.

        Raises BadRequest if it leaks more than is allowed, NrError if it cannot be run; then nothing is noted.
        """
        if not self.needs(version, threshold):
            return
        neutrality = {}
        for name, request in self._texts.items():
            request.selection = (version,)
            tokens, fired = request.prompt_length, 0
            for start in range(0, tokens, PIECE_TOKENS):
                piece = Piece(request, start, min(PIECE_TOKENS, tokens - start))
                fired += self._run(name, piece, version, threshold)
                yield
            neutrality[name] = Leak(fired, tokens * version.payload.depth, tokens)
        self._check(version, neutrality)
        self._reports[version.digest, threshold] = neutrality
        if len(self._reports) > MOST_REPORTS:
            del self._reports[next(iter(self._reports))]

    def _run(self, name: str, piece: Piece, version: Version, threshold: float) -> int:
        assert version.slot is not None
        try:
            return self._fired(piece, version.slot, threshold)
        except NrError:
            raise
        except Exception as error:  # as with a step that fails: it must not stop the server
            log.exception("adapter %s could not be run on the probe text %s", version.name, name)
            raise NrError(f"adapter {version.name!r} could not be run on the probe text {name!r}") from error

    def _check(self, version: Version, neutrality: Neutrality) -> None:
        name, worst = max(neutrality.items(), key=lambda item: item[1].rate)
        if self.max_leak is not None and worst.rate > self.max_leak:
            raise BadRequest(
                f"adapter {version.name!r} leaks: on the probe text {name!r} its gates fired on {worst.rate:.3%} "
                f"of the token-layers, and --max-leak is {self.max_leak:.3%}; a higher threshold leaks less",
                param="threshold",
            )
