"""A process that compiles every grammar first, so that one that takes too long or too much memory stops nobody.

A few bytes of grammar can take hours and all memory to compile. No limit of llguidance's prevents that, and a
thread cannot be ended. Run as a program, this module is that process: it reads the tokenizer, then grammars, one
JSON document a line, and answers each with `null` or the reason why it cannot be used. Torch-free.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path

from llguidance import LLTokenizer

import nr_serve
from nr_serve.engine.guide import Guide
from nr_serve.errors import BadRequest, NrError

CPU_SECONDS = 2
MEMORY_MIB = 512
WALL_SECONDS = 10
"""Limits of one grammar: time of the processor, memory beside the tokenizer's, and time on the clock."""


class GuideCheck:
    """Owns the process, which is started for the first grammar. Calls must not overlap."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def check(self, grammar: str, tokenizer: Callable[[], str], vocab_size: int, eos_ids: Sequence[int]) -> None:
        """Compile a grammar there. `tokenizer` gives the JSON of a fast tokenizer, the same in every call.

        It is called only when the process starts: the JSON has megabytes.

        Raises BadRequest if the grammar cannot be used, or takes too much; NrError if there can be no process.
        """
        if self._process is None:
            self._process = _start()
            if self._ask([tokenizer(), vocab_size, list(eos_ids)]) is None:
                raise NrError("the process that compiles grammars cannot be started")
        answer = self._ask(grammar)
        if answer is None:
            raise BadRequest(f"the grammar takes more than {CPU_SECONDS} s or {MEMORY_MIB} MiB to compile")
        reason = json.loads(answer)
        if reason is not None:
            raise BadRequest(reason)

    def stop(self) -> None:
        """End the process, even while it compiles. May be called from any thread."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _ask(self, question: object) -> str | None:
        """The process's answer, JSON; None if it has ended, by a limit or `stop`: the next call starts another."""
        process = self._process
        assert process is not None
        clock = threading.Timer(WALL_SECONDS, process.kill)
        clock.start()
        try:
            answer = _exchange(process, json.dumps(question))
        finally:
            clock.cancel()
        if answer is None:
            process.kill()
            with suppress(BrokenPipeError), process:  # closes its pipes, which may hold what it did not read
                self._process = None
        return answer


def _exchange(process: subprocess.Popen[str], question: str) -> str | None:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
        return process.stdout.readline() or None
    except BrokenPipeError:
        return None


def _start() -> subprocess.Popen[str]:
    found = [str(Path(nr_serve.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a process that is out of memory says so, and that is expected
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found))},
        start_new_session=True,  # Ctrl-C is for the server, which ends it
    )


def _main() -> None:
    tokenizer, vocab_size, eos_ids = json.loads(sys.stdin.readline())
    made = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos_ids)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory()
    print("null", flush=True)
    for line in sys.stdin:
        _limit_time()
        print(json.dumps(_fault(json.loads(line), made)), flush=True)


def _fault(grammar: str, tokenizer: LLTokenizer) -> str | None:
    try:
        Guide(grammar, tokenizer)
    except BadRequest as error:
        return error.message
    return None


def _limit_memory() -> None:
    """Allow this much more address space than is in use; where that is not told, as on macOS, there is no limit."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_MIB * 2**20, most))


def _limit_time() -> None:
    """Allow this much more processor time than was used: the limit is in whole seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (ceil(usage.ru_utime + usage.ru_stime) + CPU_SECONDS, most))


if __name__ == "__main__":
    _main()
