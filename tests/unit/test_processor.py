"""What Linux says of the processor, and how much of it a container may use."""

import pytest
import torch

from nr_serve.engine.model import processor, runner


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Writes the limits of this process's control group."""
    own = tmp_path / "own"
    own.write_text("1:cpu:/old\n0::/system.slice/nr-serve.service\n")
    monkeypatch.setattr(processor, "_OWN_GROUPS", own)
    monkeypatch.setattr(processor, "_GROUPS", tmp_path)
    limits = tmp_path / "system.slice" / "nr-serve.service" / "cpu.max"
    limits.parent.mkdir(parents=True)
    return limits


@pytest.mark.parametrize(
    ("limits", "cpus"),
    [("200000 100000\n", 2), ("150000 100000\n", 2), ("10000 100000\n", 1), ("max 100000\n", None), (None, None)],
)
def test_a_control_group_may_limit_the_cpus(group, limits, cpus):
    if limits is not None:
        group.write_text(limits)
    assert processor.cpu_limit() == cpus


def test_the_least_limit_of_the_groups_above_counts(group, tmp_path):
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    assert processor.cpu_limit() == 3
    group.write_text("max 100000\n")
    assert processor.cpu_limit() == 3
    group.write_text("200000 100000\n")
    assert processor.cpu_limit() == 2


def test_without_control_groups_there_is_no_limit(group, tmp_path, monkeypatch):
    group.write_text("200000 100000\n")
    monkeypatch.setattr(processor, "_OWN_GROUPS", tmp_path / "none")
    assert processor.cpu_limit() is None


@pytest.mark.parametrize(("limit", "threads"), [(1, 1), (64, 3), (None, 3)])
def test_a_server_starts_no_more_threads_than_it_may_use(limit, threads, monkeypatch):
    monkeypatch.setattr(runner, "cpu_limit", lambda: limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert runner.default_threads() == threads
