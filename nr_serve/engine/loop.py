"""The engine's thread: one queue in, one hand-over per step out. Nothing else touches the engine's state.

Torch-free.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nr_serve.config import ServeConfig
from nr_serve.engine.messages import (
    Abort,
    AdapterView,
    Command,
    EngineInfo,
    LoadAdapter,
    Output,
    PatchAdapter,
    ReadStatistics,
    Status,
    StepEvents,
    Submit,
    UnloadAdapter,
)
from nr_serve.errors import BadAdapterFile, NrError, Unavailable
from nr_serve.names import adapter_entry
from nr_serve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nr_serve.engine.adapters.adapters import Adapters
    from nr_serve.engine.core import Core
    from nr_serve.neutral.format import Adapter

log = logging.getLogger(__name__)
_TAKE_SECONDS = 0.005  # for taking messages between two steps
_READ_SECONDS, _READ_PAUSE = 0.0005, 0.004  # computing, then pausing, while a file is read beside steps


@dataclass(frozen=True, slots=True)
class _Call:
    command: Command
    answer: Future[Any]


@dataclass(frozen=True, slots=True)
class _Checked:
    """A load whose file was read and checked."""

    message: LoadAdapter
    adapter: Adapter
    answer: Future[AdapterView]
    started: float


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class EngineLoop:
    """Runs the engine. `submit`, `abort`, `call` and `stop` may be called from any thread."""

    def __init__(
        self,
        config: ServeConfig,
        model_path: str | Path,
        tokenizer: Tokenizer,
        deliver: Callable[[StepEvents], None],
    ) -> None:
        """`deliver` is called on the engine's thread, once per step."""
        self.status: Status = "loading"
        self.failure: str | None = None
        self.info: EngineInfo | None = None
        self._config = config
        self._model_path = model_path
        self._tokenizer = tokenizer
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Submit | Abort | _Call | _Checked | _Stop] = queue.SimpleQueue()
        self._closing = threading.Lock()  # held to enqueue and to close, so that every message is answered
        self._closed = False
        self._running = False  # whether there are requests
        self._reading = False  # whether an adapter file is being read
        self._read_at = 0.0  # computing time of the reader's thread at its last pause
        self._readers = ThreadPoolExecutor(1, "nr-adapter-reader")
        self._thread = threading.Thread(target=self._main, name="nr-engine", daemon=True)

    def start(self) -> None:
        """Start the thread: it loads the base, attaches the configured adapters, then serves."""
        self._thread.start()

    def stop(self) -> None:
        """Stop when what was asked before is taken, and wait for it; open requests and commands get Unavailable."""
        with self._closing:
            if not self._closed:
                self._inbox.put(_Stop())
        if self._thread.ident is not None:
            self._thread.join()
        self._readers.shutdown()

    def submit(self, request: Submit) -> None:
        """Queue a request; its outputs come through `deliver`. Raises Unavailable."""
        self._put(request)

    def abort(self, request_id: str) -> None:
        """Drop a request whose client is gone. Harmless if the request has ended or the engine has stopped."""
        with self._closing:
            if not self._closed:
                self._inbox.put(Abort(request_id))

    def call(self, command: Command) -> Future[Any]:
        """Run a command between two steps; the future gets its answer or an NrError. Raises Unavailable."""
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()  # no longer cancellable, so that the engine can set it
        if isinstance(command, LoadAdapter):
            self._require_ready()
            try:
                self._readers.submit(self._read, command, answer, time.perf_counter())
            except RuntimeError as error:  # the engine stopped since the check above
                raise Unavailable("the server stopped") from error
        else:
            self._put(_Call(command, answer))
        return answer

    # On any thread

    def _put(self, message: Submit | _Call | _Checked) -> None:
        with self._closing:
            self._require_ready()
            self._inbox.put(message)

    def _require_ready(self) -> None:
        if self._closed or self.status != "ready":
            status = "stopped" if self._closed else self.status
            raise Unavailable(self.failure or f"the server is not ready: its engine is {status}")

    # On the reader's thread

    def _read(self, message: LoadAdapter, answer: Future[AdapterView], started: float) -> None:
        self._reading = True
        try:
            self._require_ready()  # files that still wait when the engine stops are not read
            self._put(_Checked(message, self._read_file(message.path, self._let_steps_run), answer, started))
        except NrError as error:
            # What it came from holds the file's bytes, and the answer holds it, until Python's collector comes by.
            error.__cause__ = error.__context__ = None
            answer.set_exception(error.with_traceback(None))
        except Exception as error:
            log.exception("reading %s failed", message.path)
            answer.set_exception(NrError(f"reading the adapter failed: {type(error).__name__}"))
        finally:
            self._reading = False

    def _let_steps_run(self) -> None:
        """Pause at times while requests run: reading takes the interpreter lock, and maybe a core, from steps."""
        if self._running and time.thread_time() - self._read_at > _READ_SECONDS:
            time.sleep(_READ_PAUSE)
            self._read_at = time.thread_time()

    def _read_file(self, path: Path, between: Callable[[], None] = lambda: None) -> Adapter:
        from nr_serve.neutral.format import Base, read_adapter

        assert self.info is not None
        base = Base(self.info.model, self.info.fingerprint, self.info.layers, self.info.d)
        return read_adapter(path, base, max_bytes=self._config.max_adapter_bytes, between=between)

    # On the engine's thread

    def _main(self) -> None:
        end: Status = "failed"
        error = NrError("the engine failed; the server's log says why")
        core: Core | None = None
        adapters: Adapters | None = None
        try:
            core, adapters = self._load()
            self.status = "ready"
            log.debug("ready: %s", self.info)
            self._serve(core, adapters)
            end, error = "stopped", Unavailable("the server stopped")
        except NrError as failure:
            self.failure = failure.message
        except Exception as failure:
            log.exception("the engine failed")
            self.failure = f"{type(failure).__name__}; the server's log has the details"
        finally:
            # Answer everybody with the reason before the status changes: then all further calls are refused.
            try:
                self._close(core, adapters, error)
            finally:
                self.status = end

    def _load(self) -> tuple[Core, Adapters]:
        from nr_serve.engine.adapters.adapters import Adapters
        from nr_serve.engine.adapters.canary import Canary
        from nr_serve.engine.adapters.probe_text import probe_requests, read_probe_texts
        from nr_serve.engine.core import Core
        from nr_serve.engine.model.runner import Runner

        config = self._config
        texts = read_probe_texts(config.probe_text, self._tokenizer)  # first: a wrong file is reported at once
        name = config.base_name(self._model_path)
        runner = Runner.load(self._model_path, self._tokenizer, config, name)
        self.info = runner.info
        requests = probe_requests(
            texts,
            longest=runner.info.max_model_len,
            row=runner.probe_row,
            pages=runner.probe_pages,
        )
        adapters = Adapters(runner.bank, Canary(requests, config.max_leak))
        core = Core(runner, adapters, self._tokenizer, config)
        for entry in config.adapter:
            self._attach_at_start(entry, core, adapters)
        return core, adapters

    def _attach_at_start(self, entry: str, core: Core, adapters: Adapters) -> None:
        from nr_serve.neutral.format import naming

        message = LoadAdapter(*adapter_entry(entry))
        answer: Future[AdapterView] = Future()
        with naming(message.path):
            adapters.load(message, self._read_file(message.path), answer, time.perf_counter())
            while adapters.busy:
                adapters.copy_some()
                core.step()  # measures the adapter
            view = answer.result()
        if all(each.version != view.version for each in adapters.views()):  # rejected after the answer
            raise BadAdapterFile(f"{message.path}: on the probe texts it was not finite; the log says more")
        log.info("adapter %s: version %s, %s", view.name, view.version, view.state)

    def _serve(self, core: Core, adapters: Adapters) -> None:
        while True:
            self._running = not core.idle
            idle = core.idle and not adapters.busy
            if idle:
                core.check()
            if not self._take_messages(core, adapters, wait=idle):
                return
            adapters.copy_some()
            if not core.idle or adapters.busy:
                step = core.launch(measures=not self._reading)  # a step should not be slowed by both
                self._hand_over(core.write())
                self._hand_over(core.finish(step))

    def _hand_over(self, events: StepEvents) -> None:
        if events.outputs or events.report is not None or events.adapters_changed:
            self._deliver(events)

    def _take_messages(self, core: Core, adapters: Adapters, *, wait: bool) -> bool:
        """Handle queued messages, with `wait` at least one; returns False once told to stop.

        No more than `_TAKE_SECONDS` of them: running answers wait meanwhile.
        """
        outputs: list[Output | None] = []
        try:
            message = self._inbox.get(block=wait)
            ends = time.perf_counter() + _TAKE_SECONDS
            while not isinstance(message, _Stop):
                if isinstance(message, Submit):
                    outputs.append(core.add(message))
                elif isinstance(message, Abort):
                    core.abort(message.request_id)
                else:
                    _carry_out(message, core, adapters)
                if time.perf_counter() > ends:
                    return True
                message = self._inbox.get(block=False)
        except queue.Empty:
            return True
        finally:
            given = tuple(output for output in outputs if output is not None)
            if given:
                self._deliver(StepEvents(given))
        return False

    def _close(self, core: Core | None, adapters: Adapters | None, error: NrError) -> None:
        """Close the queue, and answer everybody who still waits."""
        with self._closing:
            self._closed = True
        if core is not None and not core.idle:
            self._deliver(core.abort_all(error))
        if adapters is not None:
            adapters.abandon(error)
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Submit):
                self._deliver(StepEvents((Output(message.request_id, finish_reason="error", error=error),)))
            elif isinstance(message, _Call | _Checked):
                message.answer.set_exception(error)


def _carry_out(call: _Call | _Checked, core: Core, adapters: Adapters) -> None:
    answer: Future[Any] = call.answer
    try:
        match call:
            case _Checked():
                adapters.load(call.message, call.adapter, answer, call.started)
            case _Call(UnloadAdapter(name)):
                answer.set_result(adapters.unload(name))
            case _Call(PatchAdapter() as patch):
                adapters.patch(patch, answer)
            case _Call(ReadStatistics()):
                answer.set_result(core.statistics())
    except NrError as error:
        answer.set_exception(error)
    except Exception as error:
        if not answer.done():
            answer.set_exception(NrError(f"the command failed: {type(error).__name__}"))
        raise  # the command may be half done: the engine stops rather than continue from there
