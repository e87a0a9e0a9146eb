"""The compiled operators, for tests."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nr_serve.engine.model.cpu_operators import CpuOperators, cpu_operators


def operators_or_skip() -> CpuOperators:
    """Skips where there is no C++ compiler; where there is one, that they cannot be had is a failure."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler here")
    made = cpu_operators()
    assert made is not None, "the operators do not compile: the log says why"
    return made


SHARING = {"one": (1, False), "two of torch": (2, False), "three of our own": (3, True)}
"""By how many threads operators are computed, and whether these are our own."""


@contextmanager
def computed_by(sharing: str) -> Iterator[None]:
    """What this thread calls meanwhile is computed as `SHARING` says."""
    count, own = SHARING[sharing]
    operators = operators_or_skip() if own else cpu_operators()
    before = torch.get_num_threads()
    if operators is not None:  # a model may have had its operators shared before
        operators.share_among(count if own else 0)
    if not own:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if operators is not None:
            operators.share_among(0)
        torch.set_num_threads(before)
