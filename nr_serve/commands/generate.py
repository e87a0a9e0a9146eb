"""generate: a file of requests answered without a server."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from io import UnsupportedOperation
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, TextIO

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal
from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from nr_serve.batch_file import BatchRequest, WrongLine, answer_line, error_line, read_request, take_up
from nr_serve.errors import BadRequest, NrError, Unavailable
from nr_serve.in_process import local_http, post
from nr_serve.logs import bar_interval, configure_logging
from nr_serve.offline import OfflineConfig

STANDARD = "-"
"""In place of a file: standard input or output."""


class Generate(OfflineConfig):
    """Answer a file of requests in OpenAI's batch format; stopped and started again, it goes on where it was.

    The flags are those of `serve` without HTTP's, and so are the environment variables (--max-running is
    NR_MAX_RUNNING). The exit code is 1 if a request failed.
    """

    model_config = SettingsConfigDict(cli_enforce_required=True)

    requests: CliPositionalArg[str] = Field(description="file of requests, JSONL; `-` is standard input")
    answers: CliPositionalArg[str] = Field(
        description="file for the answers, JSONL; what it answers already is not done again; `-` is standard output"
    )


def generate(command: Generate) -> int:
    """Answer the requests that are not answered yet; return 1 if a request failed."""
    from tqdm import tqdm

    configure_logging("warning", "text")
    config = command.serve_config()
    with ExitStack() as stack:
        lines = stack.enter_context(_requests(command.requests))
        answers, answered = stack.enter_context(_answers(command))
        bar = stack.enter_context(tqdm(total=_count(command.requests), unit="request", mininterval=bar_interval()))
        run = _Run(answers, bar)
        unanswered = run.unanswered(lines, answered)
        first = next(unanswered, None)
        if first is not None:  # without a request, no base is loaded
            portal = stack.enter_context(start_blocking_portal(name="nr-generate"))
            http = stack.enter_context(portal.wrap_async_context_manager(local_http(config)))
            # Twice what the engine runs at once, so that it finds the next requests tokenised.
            run.answer(chain([first], unanswered), portal, http, at_once=2 * config.max_running)
    where = "the output" if command.answers == STANDARD else command.answers
    failed = f"{run.failed} failed (error in their lines of {where})" if run.failed else "0 failed"
    print(f"generate: {run.ok} answered, {failed}, {run.skipped} answered before", file=sys.stderr)
    return 1 if run.failed else 0


class _Run:
    """Answers requests concurrently. Owns the file of answers, and counts the outcomes."""

    def __init__(self, answers: BinaryIO, bar: Any) -> None:
        self.ok = self.failed = self.skipped = 0
        self._answers = answers
        self._bar = bar
        self._writing = threading.Lock()

    def unanswered(self, lines: Iterable[bytes], answered: set[str]) -> Iterator[BatchRequest]:
        """The requests whose custom_id is not in `answered`. Raises NrError if an error cannot be written."""
        for request in self._requests(lines):
            if request.custom_id in answered:
                self.skipped += 1
                self._bar.update()
            else:
                yield request

    def answer(
        self, requests: Iterable[BatchRequest], portal: BlockingPortal, http: httpx.AsyncClient, *, at_once: int
    ) -> None:
        """Answer all `requests`, `at_once` of them concurrently.

        Raises Unavailable if the engine fails, and NrError if an answer cannot be written.
        """
        free = threading.BoundedSemaphore(at_once)
        running: list[Future[None]] = []
        for request in requests:
            free.acquire()
            running = [future for future in running if not _over(future)]
            running.append(portal.start_task_soon(self._answer, http, request))
            running[-1].add_done_callback(lambda _: free.release())
        for future in running:
            future.result()

    def _requests(self, lines: Iterable[bytes]) -> Iterator[BatchRequest]:
        """The requests in `lines`; for a line that is not a request, an error is written."""
        seen: set[str] = set()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                self._bar.update()
                continue
            try:
                request = read_request(line)
                if request.custom_id in seen:
                    raise WrongLine("duplicate_custom_id", "an earlier line has this custom_id", request.custom_id)
            except WrongLine as wrong:
                self._write(error_line(wrong, number), ok=False)
            else:
                seen.add(request.custom_id)
                yield request

    async def _answer(self, http: httpx.AsyncClient, request: BatchRequest) -> None:
        status, body = await self._ask(http, request)
        if status == Unavailable.status:  # all later requests would fail too: leave them for the next run
            raise Unavailable(body["error"]["message"])
        self._write(answer_line(request.custom_id, status, body), ok=status == 200)

    async def _ask(self, http: httpx.AsyncClient, request: BatchRequest) -> tuple[int, Any]:
        from nr_serve.api.errors import error_body

        try:
            if request.body.get("stream") is True:
                raise BadRequest("`stream` is not supported in a file of requests", param="stream")
            response = await post(http, request.url, request.body)
        except BadRequest as error:
            return error.status, error_body(error)
        return response.status_code, response.json()

    def _write(self, line: bytes, *, ok: bool) -> None:
        """Write one whole line at once, so that a killed process loses no finished answer."""
        with self._writing:  # errors of invalid lines are written by the reading thread
            try:
                self._answers.write(line)
                self._answers.flush()
            except BrokenPipeError:  # the reader closed the pipe
                raise
            except OSError as error:
                raise NrError(f"cannot write the answers: {error.strerror}") from error
            self.ok += ok
            self.failed += not ok
            self._bar.update()


def _over(future: Future[None]) -> bool:
    """Whether a request is done. Raises the request's exception."""
    if not future.done():
        return False
    future.result()
    return True


@contextmanager
def _requests(name: str) -> Iterator[BinaryIO]:
    """The file of requests, or standard input. Raises BadRequest."""
    if name == STANDARD:
        yield sys.stdin.buffer
        return
    try:
        file = open(name, "rb")  # noqa: SIM115
    except OSError as error:
        raise BadRequest(f"cannot open {name}: {error.strerror}") from error
    with file:
        yield file


def _close(file: BinaryIO, name: str) -> None:
    try:
        file.close()
    except OSError as error:  # buffered data that could not be written before
        raise NrError(f"cannot write {name}: {error.strerror}") from error


@contextmanager
def _answers(command: Generate) -> Iterator[tuple[BinaryIO, set[str]]]:
    """The file for the answers, and the custom_ids that an earlier run answered. Raises BadRequest."""
    path = Path(command.answers)
    try:
        if _same_file(command):
            raise BadRequest("the answers need a file of their own", param="answers")
        taken = None if command.answers == STANDARD else take_up(path)
    except OSError as error:
        raise BadRequest(f"cannot open {path}: {error.strerror}") from error
    if taken is None:
        yield sys.stdout.buffer, set()
        return
    file, answered = taken
    try:
        yield file, answered
    finally:
        _close(file, command.answers)


def _same_file(command: Generate) -> bool:
    """Whether the answers would go into the file of requests: they would be read as requests, without end."""
    requests, answers = _stat(command.requests, sys.stdin), _stat(command.answers, sys.stdout)
    return bool(requests and answers and S_ISREG(requests.st_mode) and os.path.samestat(requests, answers))


def _stat(name: str, standard: TextIO) -> os.stat_result | None:
    """What a name, or the standard stream that it stands for, is; None if there is no such file."""
    try:
        return os.stat(name) if name != STANDARD else os.fstat(standard.buffer.fileno())
    except (FileNotFoundError, UnsupportedOperation):  # a stream in memory has no number
        return None


def _count(name: str) -> int | None:
    """Number of lines in a file; None for something that can be read only once."""
    path = Path(name)
    if name == STANDARD or not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(1 for _ in file)
