"""One request's times and tokens."""

from __future__ import annotations

import time

from nr_serve.engine.messages import Outcome, Output, Submit
from nr_serve.errors import NrError
from nr_serve.metrics.instruments import Metrics


class RequestClock:
    """Times one request and counts its tokens. All times are `time.monotonic()`, in seconds."""

    def __init__(self, metrics: Metrics, request: Submit, arrived: float | None = None) -> None:
        """Start the clock, at `arrived` if that is given, when the request is about to be submitted."""
        self.request = request
        self.arrived = time.monotonic() if arrived is None else arrived
        self.started: float | None = None
        """When its first step began; None while it waits."""
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.generated = 0
        """Number of tokens generated so far."""
        self._read = False
        self._metrics = metrics
        self._selected = metrics.selected(request.selected)
        metrics.began(request)

    def output(self, output: Output) -> None:
        """Record one step's output for the request."""
        if not self._read and output.finish_reason != "error":
            self._prompt_read(output)
        if output.tokens:
            self._tokens(len(output.tokens))
        if output.finish_reason is not None:
            self.end(output.finish_reason, output.error)

    def end(self, reason: Outcome, error: NrError | None = None) -> None:
        """Record that the request ended, and why."""
        metrics = self._metrics
        metrics.ended(self.request, self._selected, reason)
        if reason == "error":
            metrics.errors.labels(error.type if error is not None else NrError.type).inc()
        if reason in ("stop", "length"):
            metrics.request_prompt_tokens.observe(len(self.request.prompt_ids))
            metrics.request_generated_tokens.observe(self.generated)
            metrics.request_seconds.observe(time.monotonic() - self.arrived)
            if self.first_token is not None and self.last_token is not None:
                metrics.decode_seconds.observe(self.last_token - self.first_token)

    def _prompt_read(self, output: Output) -> None:
        self._read = True
        self._metrics.prompt_tokens.inc(len(self.request.prompt_ids))
        if output.started is not None:
            self.started = output.started
            self._metrics.queue_seconds.observe(self.started - self.arrived)
            self._metrics.prefill_seconds.observe(time.monotonic() - self.started)

    def _tokens(self, count: int) -> None:
        metrics, now = self._metrics, time.monotonic()
        self.generated += count
        metrics.generated_tokens.inc(count)
        if self.last_token is None:
            self.first_token = now
            metrics.first_token_seconds.observe(now - self.arrived)
        else:
            for _ in range(count):
                metrics.inter_token_seconds.observe((now - self.last_token) / count)
        self.last_token = now
