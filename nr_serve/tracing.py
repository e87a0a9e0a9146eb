"""OpenTelemetry traces: a span for each request, a child of the caller's. Needs the extra `otel`.

Imported only when tracing is on. Attributes follow OpenTelemetry's semantic conventions for generative AI; they
never include the text of a prompt or an answer.
"""

from __future__ import annotations

import os
import time
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nr_serve import __version__
from nr_serve.engine.messages import Outcome, Sampling
from nr_serve.errors import NrError
from nr_serve.metrics import RequestClock

try:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    from opentelemetry.util.types import AttributeValue
except ModuleNotFoundError as error:
    raise NrError(f"tracing needs {error.name}, of the extra `otel`") from error

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


@dataclass(frozen=True, slots=True)
class _Caller:
    """The caller's trace context, and the operation asked for, from the current HTTP request."""

    context: Context
    operation: str


_NOBODY = _Caller(Context(), "text_completion")
_caller: ContextVar[_Caller] = ContextVar("caller", default=_NOBODY)


class TraceCaller:
    """ASGI middleware that reads the caller's trace context from the W3C headers `traceparent` and `tracestate`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Record the caller's context, then pass the request on."""
        operation = _OPERATIONS.get(scope.get("path", ""))
        if scope["type"] == "http" and operation is not None:
            context = self._propagator.extract(dict(Headers(scope=scope)), Context())
            _caller.set(_Caller(context, operation))
        await self._app(scope, receive, send)


class Tracing:
    """Makes spans and exports them, in batches and on a thread of its own."""

    def __init__(self, exporter: SpanExporter) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", "nr-serve")
        resource = Resource.create({SERVICE_NAME: name, SERVICE_VERSION: __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nr_serve", __version__)

    @classmethod
    def to_collector(cls, endpoint: str) -> Tracing:
        """Send traces to the OTLP collector at `endpoint`, such as http://127.0.0.1:4318."""
        return cls(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"))

    def begin(self) -> RequestTrace:
        """Start the trace of a request that is about to be submitted, with the current caller as its parent."""
        return RequestTrace(self, _caller.get())

    def close(self) -> None:
        """Send the remaining spans, and stop."""
        self._provider.shutdown()

    def span(
        self, name: str, parent: Context, kind: SpanKind, start: int, attributes: dict[str, AttributeValue]
    ) -> Span:
        """Begin a span; `start` is Unix time in nanoseconds."""
        return self._tracer.start_span(name, parent, kind, attributes, start_time=start)


class RequestTrace:
    """One request's spans: its own, and in it `queue`, `prefill` and `decode`.

    All are made once it is over, from the times on its clock.
    """

    def __init__(self, tracing: Tracing, caller: _Caller) -> None:
        self._tracing = tracing
        self._caller = caller

    def end(self, clock: RequestClock, reason: Outcome, error: NrError | None = None) -> None:
        """The request is over: `reason` is why."""
        zero, now = time.time_ns() - time.monotonic_ns(), time.monotonic()

        def unix_ns(monotonic: float) -> int:
            return zero + int(monotonic * 1e9)

        span = self._tracing.span(
            f"{self._caller.operation} {clock.request.selected}",
            self._caller.context,
            SpanKind.SERVER,
            unix_ns(clock.arrived),
            {"gen_ai.operation.name": self._caller.operation} | _attributes(clock, reason),
        )
        if error is not None:
            span.set_attribute("error.type", error.type)
            span.set_status(Status(StatusCode.ERROR))  # without the message: it may repeat what the client sent
        phases = [("queue", clock.arrived), ("prefill", clock.started), ("decode", clock.first_token)]
        begun = [(name, unix_ns(start)) for name, start in phases if start is not None]
        self._children(set_span_in_context(span), begun, unix_ns(now))
        span.end(unix_ns(now))

    def _children(self, parent: Context, phases: list[tuple[str, int]], end: int) -> None:
        """A span for each phase; it ends where the next begins."""
        ends = [start for _, start in phases[1:]] + [end]
        for (name, start), stop in zip(phases, ends, strict=True):
            self._tracing.span(name, parent, SpanKind.INTERNAL, start, {}).end(stop)


def _attributes(clock: RequestClock, reason: Outcome) -> dict[str, AttributeValue]:
    request = clock.request
    attributes: dict[str, AttributeValue] = {
        "gen_ai.provider.name": "nr-serve",
        "gen_ai.request.model": request.selected,
        "gen_ai.response.finish_reasons": (reason,),
        "gen_ai.usage.input_tokens": len(request.prompt_ids),
        "gen_ai.usage.output_tokens": clock.generated,
        "nr.request_id": request.request_id,
    }
    if request.adapters is not None:  # without, every attached adapter may act
        attributes["nr.adapters"] = request.adapters
    if clock.first_token is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = clock.first_token - clock.arrived
    return attributes | _asked(request.sampling)


def _asked(sampling: Sampling) -> dict[str, AttributeValue]:
    """How the answer was to be made. Stop strings are left out: they are a client's text."""
    asked: dict[str, AttributeValue] = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    if sampling.top_k:
        asked["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None:
        asked["gen_ai.request.seed"] = sampling.seed
    return asked
