"""The engine without its thread: takes requests, and steps. A step is three verbs: schedule, run, apply.

Torch-free: everything with tensors is behind `RunnerLike`.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from typing import Protocol

from nr_serve.config import ServeConfig
from nr_serve.engine.adapters.adapters import Adapters
from nr_serve.engine.cache.pages import PagePool
from nr_serve.engine.cache.prefix_cache import PrefixCache
from nr_serve.engine.messages import (
    EngineInfo,
    EngineStatistics,
    Output,
    StepEvents,
    StepReport,
    Submit,
    Token,
)
from nr_serve.engine.request import AnswerText, Gates, Request, TopLogprobs
from nr_serve.engine.scheduler import Piece, Result, Schedule, Scheduler
from nr_serve.errors import BadRequest, NrError, QueueFull
from nr_serve.tokenizer import Detokenizer, Tokenizer

log = logging.getLogger(__name__)
MAX_FAILED_STEPS = 5  # in a row, before the engine gives up
TRIAL_TOKENS = 64  # of a piece on trial in its own forward pass: new requests should not wait long
TRIAL_TOKENS_BESIDE = 2  # of a piece on trial in a step with requests: too few to slow their streams


class RunnerLike(Protocol):
    """What the core needs from a runner."""

    info: EngineInfo
    pages: int
    recalls_pages: bool
    """Whether it keeps the gate states that a request needs to reuse pages that another request computed."""
    tries_apart: bool
    """Whether a piece on trial needs a forward pass of its own."""

    def run(self, pieces: Sequence[Piece], labels: Sequence[int]) -> list[Result]:
        """Run one forward pass, with a piece on trial last or alone. Returns one result per piece.

        `labels`: for each piece, the row of the bank's cross statistics that its gates count in.
        """
        ...


class Core:
    """Owns the requests. Not thread-safe: `EngineLoop` calls it from one thread."""

    def __init__(self, runner: RunnerLike, adapters: Adapters, tokenizer: Tokenizer, config: ServeConfig) -> None:
        pool = PagePool(runner.pages, config.page_size)
        self.scheduler = Scheduler(
            pool,
            max_running=config.max_running,
            max_batch_tokens=config.max_batch_tokens,
            admit=adapters.admit,
            delays=adapters.delays,
            prefix_cache=PrefixCache(pool, adapters.registry.attachments) if runner.recalls_pages else None,
        )
        self._runner = runner
        self._adapters = adapters
        self._tokenizer = tokenizer
        self._max_model_len = runner.info.max_model_len
        self._vocab_size = runner.info.vocab_size
        self._eos_ids = frozenset(runner.info.eos_ids)
        self._max_waiting = config.max_waiting
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self._failed_steps = 0

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._requests

    def add(self, submit: Submit) -> Output | None:
        """Queue a request. Returns an output only if the request is refused at once."""
        try:
            self._check_submit(submit)
        except NrError as error:
            return Output(submit.request_id, finish_reason="error", error=error)
        self._arrivals += 1
        sampling = submit.sampling
        detokenizer = Detokenizer(self._tokenizer, submit.prompt_ids, special_tokens=sampling.special_tokens)
        request = Request(
            submit=submit,
            eos_ids=self._eos_ids,
            seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
            text=AnswerText(detokenizer, sampling.stop, include_stop=sampling.include_stop),
            arrival=self._arrivals,
        )
        self._requests[request.id] = request
        self.scheduler.add(request)
        return None

    def abort(self, request_id: str) -> None:
        """Drop a request, if it is known (any more), and take back what it holds. There is no output of it."""
        request = self._requests.get(request_id)
        if request is not None:
            self._drop(request)

    def abort_all(self, error: NrError) -> StepEvents:
        """Fail every request with `error`. Frees nothing, as that could fail too: the engine is ending."""
        outputs = tuple(Output(name, finish_reason="error", error=error) for name in self._requests)
        self._requests.clear()
        return StepEvents(outputs)

    def step(self, *, measures: bool = True) -> StepEvents:
        """Run one forward pass over a mixed batch. Returns the outputs of all requests that it advanced.

        Without `measures`, no adapter's leak is measured in the same step as requests.
        """
        started, preempted = time.perf_counter(), self.scheduler.preemptions
        schedule = self.scheduler.schedule()
        # Single tokens first, then chunks by length: the batch groups pieces of the same length.
        pieces = sorted(schedule.pieces, key=lambda piece: piece.count)
        probe = None
        if measures or not pieces:
            apart = self._runner.tries_apart or not pieces
            probe = self._adapters.next_probe(TRIAL_TOKENS if apart else TRIAL_TOKENS_BESIDE)
        results, tried = self._run(pieces, None if probe is None else probe.piece)
        outputs = self._apply(schedule, pieces, results)
        if probe is not None and tried is not None:
            self._adapters.take_result(probe, tried)
        report = self._report(pieces, started, preempted) if pieces else None
        changed, loads_failed = self._adapters.take_rejected()
        return StepEvents(tuple(outputs), report, changed, loads_failed)

    def statistics(self) -> EngineStatistics:
        """The adapters' counts and the gauges, as they are between two steps."""
        scheduler, registry = self.scheduler, self._adapters.registry
        return EngineStatistics(
            adapters={view.name: view for view in self._adapters.views()},
            slots_used=registry.slots_used,
            slots_total=registry.slots,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=scheduler.pool.used,
            pages_total=scheduler.pool.total,
        )

    def check(self) -> None:
        """Check, while idle, that no page, row or slot is lost. Raises RuntimeError."""
        self.scheduler.check()
        self._adapters.registry.check()

    def _check_submit(self, submit: Submit) -> None:
        longest = len(submit.prompt_ids) + submit.sampling.max_tokens
        if not submit.prompt_ids:
            raise BadRequest("the prompt is empty", param="prompt")
        if longest > self._max_model_len:
            raise BadRequest(
                f"the prompt's {len(submit.prompt_ids)} tokens and max_tokens {submit.sampling.max_tokens} "
                f"exceed the {self._max_model_len} tokens this server takes",
                param="max_tokens",
            )
        if max(submit.prompt_ids) >= self._vocab_size:  # a tokenizer may have more tokens than the base
            raise BadRequest(
                f"the prompt has the token {max(submit.prompt_ids)}; the base knows those below {self._vocab_size}",
                param="prompt",
            )
        if submit.request_id in self._requests:
            raise BadRequest(f"request id {submit.request_id!r} is in use")
        if len(self.scheduler.waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self.scheduler.waiting)} requests wait already; try again later")
        self._adapters.check_selection(submit.adapters)

    def _run(self, pieces: list[Piece], trial: Piece | None) -> tuple[list[Result] | NrError, Result | None]:
        """Run the pieces, and the piece on trial. Returns the pieces' results and the trial's."""
        labels = self._adapters.labels([piece.request for piece in pieces])
        if trial is None or not pieces or self._runner.tries_apart:
            results = self._run_requests(pieces, labels) if pieces else []
            return results, None if trial is None else self._try(trial)
        try:
            *together, tried = self._runner.run([*pieces, trial], [*labels, 0])
        except Exception:  # the trial must not fail other requests: they run again without it
            log.exception("a step with an adapter on trial failed")
            again = self._run_requests(pieces, labels)
            # If they fail without the trial too, the trial is not to blame: it is repeated later.
            return again, None if isinstance(again, NrError) else _not_run()
        self._failed_steps = 0
        return together, tried

    def _try(self, trial: Piece) -> Result:
        try:
            (tried,) = self._runner.run([trial], [0])
        except Exception:
            log.exception("an adapter could not be run on a probe text")
            return _not_run()
        return tried

    def _run_requests(self, pieces: list[Piece], labels: list[int]) -> list[Result] | NrError:
        try:
            results = self._runner.run(pieces, labels)
        except Exception:
            # A failure of this batch must not stop the server: the batch's requests fail, others go on. If every
            # step fails, the device is lost, and only a new process will help.
            self._failed_steps += 1
            if self._failed_steps == MAX_FAILED_STEPS:
                raise
            log.exception("a step over %d requests failed", len(pieces))
            return NrError("the step that computed this request failed; the server's log says why")
        self._failed_steps = 0
        return results

    def _apply(self, schedule: Schedule, pieces: list[Piece], results: list[Result] | NrError) -> list[Output]:
        outputs = []
        for request, error in schedule.refused:
            del self._requests[request.id]
            self._adapters.release(request)
            outputs.append(Output(request.id, finish_reason="error", error=error))
        if isinstance(results, NrError):
            return outputs + [self._fail(piece.request, results) for piece in pieces]
        # Advance all pieces first: a request that ends may free a slot, which then no longer names what opened in
        # it.
        for piece, result in zip(pieces, results, strict=True):
            if result.error is None:
                self.scheduler.advance(piece, result.opened)
        for piece, result in zip(pieces, results, strict=True):
            try:
                output = self._apply_piece(piece, result)
            except BadRequest as error:
                output = self._fail(piece.request, error)
            except Exception:  # in a tokenizer, say: one answer must not stop the others
                log.exception("an answer could not be written")
                unwritten = NrError("this answer could not be written; the server's log says why")
                output = self._fail(piece.request, unwritten)
            if output is not None:
                outputs.append(output)
        return outputs

    def _apply_piece(self, piece: Piece, result: Result) -> Output | None:
        """Apply one request's result; returns its output, if any. Raises BadRequest if its grammar is stuck."""
        request = piece.request
        if result.error is not None:
            return self._fail(request, result.error)
        gates = self._adapters.shares(result.fired, request.selection or ())
        _add_prompt_report(piece, result, gates)
        if request.reports_prompt:
            self._write_prompt_tokens(piece)
        if not piece.samples:
            return None
        prompt = tuple(request.prompt_tokens) if request.reports_prompt and not request.generated else None
        tokens: tuple[Token, ...] = ()
        if result.token is not None:
            tokens = (self._token(result.token, result.logprob, gates[-1] if gates else None),)
            text, finish_reason, stop_reason = request.append(result.token)
        else:  # a request that asked for no token ends at once, by length
            text, finish_reason, stop_reason = "", "length", None
        if finish_reason is not None:
            self._drop(request)
        return Output(
            request.id,
            tokens,
            text,
            prompt,
            finish_reason,
            stop_reason,
            started=request.started,
            cached_tokens=request.cached_tokens,
        )

    def _write_prompt_tokens(self, piece: Piece) -> None:
        """Those that are known by now: all of a long prompt in one step would hold up the others."""
        request = piece.request
        ids, logprobs, gates = request.submit.prompt_ids, request.prompt_logprobs, request.prompt_gates
        for i in range(len(request.prompt_tokens), min(piece.start + piece.count, len(ids))):
            # The first token has no log probability: nothing came before it.
            logprob = logprobs[i - 1] if 0 < i <= len(logprobs) else None
            request.prompt_tokens.append(self._token(ids[i], logprob, gates[i] if i < len(gates) else None))

    def _token(self, token_id: int, logprob: TopLogprobs | None, gates: Gates | None) -> Token:
        text = self._tokenizer.token_text
        own, likeliest = logprob or (None, ())
        return Token(token_id, text(token_id), own, tuple((i, text(i), p) for i, p in likeliest), gates)

    def _fail(self, request: Request, error: NrError) -> Output:
        self._drop(request)
        return Output(request.id, finish_reason="error", error=error)

    def _drop(self, request: Request) -> None:
        del self._requests[request.id]
        self.scheduler.drop(request)
        self._adapters.release(request)

    def _report(self, pieces: list[Piece], started: float, preempted: int) -> StepReport:
        # A preempted request computes its answer's tokens again, many at once: that is prefill.
        decode = sum(piece.count == 1 and piece.start >= piece.request.prompt_length for piece in pieces)
        return StepReport(
            seconds=time.perf_counter() - started,
            prefill_tokens=sum(piece.count for piece in pieces) - decode,
            decode_tokens=decode,
            requests=len(pieces),
            preemptions=self.scheduler.preemptions - preempted,
            prefix=self.scheduler.take_prefix_counts(),
        )


def _add_prompt_report(piece: Piece, result: Result, gates: Sequence[Gates]) -> None:
    """Keep the prompt's log probabilities and gates; a preempted request computes some of them twice."""
    request = piece.request
    for position, logprob in enumerate(result.prompt_logprobs, start=piece.start):
        if position == len(request.prompt_logprobs):
            request.prompt_logprobs.append(logprob)
    for position, share in enumerate(gates, start=piece.start):
        if position == len(request.prompt_gates) and position < request.prompt_length:
            request.prompt_gates.append(share)


def _not_run() -> Result:
    return Result(None, error=NrError("it could not be run on the probe texts; the log says why"))
