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


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads compute meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
