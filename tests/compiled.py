"""The compiled operators, for tests."""

import os
import shutil

import pytest

from nr_serve.engine.cpu_operators import CpuOperators, cpu_operators


def operators_or_skip() -> CpuOperators:
    """Skips where there is no C++ compiler; where there is one, that they cannot be had is a failure."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler here")
    made = cpu_operators()
    assert made is not None, "the operators do not compile: the log says why"
    return made
