"""The bridge between asyncio and the engine's thread.

Requests go in through the engine's own thread-safe queue. The outputs of a step come back in one
`call_soon_threadsafe`, and are distributed here to one asyncio queue per HTTP request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from nr_serve.api.request_state import arrival, note_output, note_submits
from nr_serve.engine.messages import (
    AdapterView,
    Command,
    EngineInfo,
    EngineStatistics,
    LoadAdapter,
    Output,
    PatchAdapter,
    ReadStatistics,
    Status,
    StepEvents,
    Submit,
    UnloadAdapter,
)
from nr_serve.errors import NrError, Unavailable
from nr_serve.metrics import Metrics, RequestClock
from nr_serve.names import OTHER

if TYPE_CHECKING:
    from nr_serve.tracing import RequestTrace, Tracing

log = logging.getLogger(__name__)

Deliver = Callable[[StepEvents], None]
_POLL_SECONDS = 0.05
_READ_SECONDS = 2.0  # to wait for the engine's statistics; less than a scrape's own time limit


class Engine(Protocol):
    """What the API needs from an engine. All of it may be called from any thread."""

    @property
    def status(self) -> Status:
        """The engine's current state."""

    @property
    def failure(self) -> str | None:
        """Why the engine failed, if it did."""

    @property
    def info(self) -> EngineInfo | None:
        """What the engine serves; None until it is ready."""

    def start(self) -> None:
        """Start loading, on a thread of its own."""

    def stop(self) -> None:
        """Stop the engine and its thread."""

    def submit(self, request: Submit) -> None:
        """Queue a request; its outputs go to `deliver`."""

    def abort(self, request_id: str) -> None:
        """Drop a request; unknown ids are ignored."""

    def call(self, command: Command) -> Future[Any]:
        """Queue a command and return the future of its answer."""


@dataclass
class _Live:
    inbox: asyncio.Queue[Output]
    clock: RequestClock
    trace: RequestTrace | None

    def output(self, output: Output) -> None:
        """Hand on one step's output."""
        self.clock.output(output)
        if output.finish_reason is not None and self.trace is not None:
            self.trace.end(self.clock, output.finish_reason, output.error)
        self.inbox.put_nowait(output)

    def abort(self) -> None:
        """Record that the request was aborted."""
        self.clock.end("abort")
        if self.trace is not None:
            self.trace.end(self.clock, "abort")


class AsyncEngine:
    """Async interface to an engine. `build` gets the function that the engine must call once per step."""

    def __init__(
        self, build: Callable[[Deliver], Engine], metrics: Metrics, tracing: Tracing | None = None
    ) -> None:
        """Without `tracing`, no spans are made."""
        self._engine = build(self._deliver)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: dict[str, _Live] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reading: asyncio.Task[None] | None = None
        self._statistics: EngineStatistics | None = None
        self.metrics = metrics
        self.tracing = tracing
        self.status: Status = "loading"
        self.adapters: dict[str, AdapterView] = {}
        """Registered adapters as of their last change; the set of names is always current."""
        self.on_status: Callable[[Status], None] = lambda status: None
        """Called on the event loop when the status changes."""

    @property
    def failure(self) -> str | None:
        """Why the engine failed, if it did."""
        return self._engine.failure

    @property
    def info(self) -> EngineInfo:
        """What is served. Raises Unavailable until the engine is ready."""
        self._check_ready()
        assert self._engine.info is not None
        return self._engine.info

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the engine and watch its status; stop it at the end of the block."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.to_thread(self._engine.stop)
            self._end_all(Unavailable("the server stopped"))
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.close)

    async def generate(self, requests: Sequence[Submit]) -> AsyncGenerator[Output, None]:
        """Run requests together, yielding their outputs as they come.

        Raises the error of the first that fails. However the generator ends, requests still running are aborted.
        """
        self._check_ready()
        inbox: asyncio.Queue[Output] = asyncio.Queue()
        running: set[str] = set()
        note_submits(requests)
        try:
            for request in requests:
                running.add(request.request_id)
                self._live[request.request_id] = self._track(request, inbox)
                self._engine.submit(request)
            while running:
                output = await inbox.get()
                note_output(output)
                if output.finish_reason is not None:
                    running.discard(output.request_id)
                if output.finish_reason == "error":
                    raise output.error or NrError("the engine gave no reason")
                yield output
        finally:
            for request_id in running:
                self._abort(request_id)

    async def call(self, command: Command) -> Any:
        """Have the engine run a command between two steps, and return its answer."""
        self._check_ready()
        # A shielded task: if the client goes away, the engine still finishes the command, and its effect must be
        # recorded.
        return await asyncio.shield(self._keep(asyncio.create_task(self._carry_out(command))))

    async def scrape(self) -> bytes:
        """The metrics as text. While the engine is busy with a long step, its last known statistics are shown."""
        if self.status == "ready":
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read())
            await asyncio.wait([self._reading], timeout=_READ_SECONDS)
        statistics = self._statistics if self.status == "ready" else None
        return self.metrics.render(statistics, tuple(self.adapters.values()))

    def _check_ready(self) -> None:
        """Raise Unavailable unless requests are accepted."""
        if self.status == "failed":
            raise Unavailable("the engine failed; the server's log says why")
        if self.status != "ready":
            raise Unavailable(f"the server is not ready: {self.status}")

    def _keep(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """Keep a reference to a task until it ends, as asyncio itself does not."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _read(self) -> None:
        """Refresh what is known. By a command, so that the answer is newer than anything recorded before."""
        try:
            self._statistics = await self.call(ReadStatistics())
        except NrError as error:  # the engine has just failed: `nr_ready` shows it
            log.debug("the engine cannot be read: %s", error)

    async def _carry_out(self, command: Command) -> Any:
        try:
            answer = await asyncio.wrap_future(self._engine.call(command))
        except NrError:
            if isinstance(command, LoadAdapter):
                self.metrics.load_failures.inc()
            raise
        self._note(command, answer)
        return answer

    def _note(self, command: Command, answer: Any) -> None:
        if isinstance(command, LoadAdapter):
            self.metrics.loaded(answer)
        if isinstance(command, LoadAdapter | PatchAdapter):
            self.adapters[answer.name] = answer
        elif isinstance(command, UnloadAdapter):
            self.adapters.pop(command.name, None)
            self.metrics.unloaded(command.name)
        elif isinstance(command, ReadStatistics):
            before, self.adapters = self.adapters, dict(answer.adapters)
            for name in before.keys() - self.adapters.keys():  # unloaded by the engine itself
                self.metrics.unloaded(name)

    def _track(self, request: Submit, inbox: asyncio.Queue[Output]) -> _Live:
        if any(name not in self.adapters for name in request.adapters or ()):
            # An adapter was unloaded since the request came: its name must not come back as a time series.
            request = replace(request, selected=OTHER)
        trace = None if self.tracing is None else self.tracing.begin()
        return _Live(inbox, RequestClock(self.metrics, request, arrival()), trace)

    def _abort(self, request_id: str) -> None:
        live = self._live.pop(request_id, None)
        if live is None:
            return
        live.abort()
        self._engine.abort(request_id)

    def _deliver(self, events: StepEvents) -> None:
        """Hand one step's events to the event loop. Called on the engine's thread."""
        if self._loop is None or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._deal, events)

    def _deal(self, events: StepEvents) -> None:
        if events.report is not None:
            self.metrics.step(events.report)
        if events.adapters_changed:
            self._keep(asyncio.create_task(self._read()))
            self.metrics.load_failures.inc(events.loads_failed)
        for output in events.outputs:
            live = self._live.get(output.request_id)
            if live is None:  # aborted while the step ran
                continue
            if output.finish_reason is not None:
                del self._live[output.request_id]
            live.output(output)

    async def _watch(self) -> None:
        try:
            while self.status not in ("failed", "stopped"):
                status = self._engine.status
                if status != self.status:
                    await self._turn(status)
                await asyncio.sleep(_POLL_SECONDS)
        except Exception:  # an engine failure that nobody notices would leave its requests waiting
            log.exception("the engine cannot be watched any more")
            self.status = "failed"
            self._end_all(NrError("the engine cannot be watched any more; the server's log says why"))

    async def _turn(self, status: Status) -> None:
        if status == "ready":
            try:
                statistics = await asyncio.wrap_future(self._engine.call(ReadStatistics()))
            except NrError as error:  # the engine has just failed: the next poll shows it
                log.debug("no longer ready: %s", error)
                return
            self._statistics = statistics
            self._note(ReadStatistics(), statistics)
            for view in self.adapters.values():
                self.metrics.loaded(view)
            if self._engine.info is not None:
                self.metrics.serves(self._engine.info)
        self.status = status
        if status in ("failed", "stopped"):
            failed = NrError("the engine failed; the server's log says why")
            self._end_all(failed if status == "failed" else Unavailable("the server stopped"))
        self.on_status(status)

    def _end_all(self, error: NrError) -> None:
        outputs = tuple(Output(name, finish_reason="error", error=error) for name in self._live)
        self._deal(StepEvents(outputs))
