"""The processes that share a run, as `accelerate launch` and `torchrun` start them; one where neither did."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import accelerate
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from nr_serve import logs
from nr_serve.errors import BadRequest, NrError
from nr_serve.train.frozen_base import best_device

T = TypeVar("T")


def join() -> None:
    """Join the other processes; call it first.

    They wait for the first one as long as it fits gates and measures: longer than the usual half an hour. Raises
    BadRequest if the launcher splits the model among processes: a checkpoint would hold only a part of it.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise BadRequest(f"several processes each hold the whole model here: launch without {name}")
    on_cpu = best_device().type == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    accelerate.PartialState(cpu=on_cpu, timeout=timedelta(days=1))


def is_first() -> bool:
    """Whether this is the process that measures, writes files and prints."""
    return bool(accelerate.PartialState().is_main_process)


def say(command: str, message: str) -> None:
    """Call `logs.say` in the first process only."""
    if is_first():
        logs.say(command, message)


def count() -> int:
    """Number of processes."""
    return int(accelerate.PartialState().num_processes)


def several() -> bool:
    """Whether there is more than one process."""
    return count() > 1


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first process only; return its result in all processes, which wait for it.

    An NrError or OSError that it raises is raised in all processes.
    """
    if not several():
        return make()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome = [make(), None]
        except (NrError, OSError) as error:
            outcome = [None, error]
    value, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    made: T = value
    return made
