"""What Linux says of the machine, and how much of it a container may use."""

import pytest
import torch

from nr_serve import machine
from nr_serve.engine.model import runner
from nr_serve.neutral import huge_pages


@pytest.fixture
def group(tmp_path, monkeypatch):
    """The folder of this process's control group."""
    own = tmp_path / "own"
    own.write_text("1:cpu:/old\n0::/system.slice/nr-serve.service\n")
    monkeypatch.setattr(machine, "_OWN_GROUPS", own)
    monkeypatch.setattr(machine, "_GROUPS", tmp_path)
    folder = tmp_path / "system.slice" / "nr-serve.service"
    folder.mkdir(parents=True)
    return folder


def limits_memory(group, limit, current, files=(0, 0)):
    group.joinpath("memory.max").write_text(f"{limit}\n")
    group.joinpath("memory.current").write_text(f"{current}\n")
    group.joinpath("memory.stat").write_text(f"anon 7\nactive_file {files[0]}\ninactive_file {files[1]}\n")


@pytest.mark.parametrize(
    ("limits", "cpus"),
    [("200000 100000\n", 2), ("150000 100000\n", 2), ("10000 100000\n", 1), ("max 100000\n", None), (None, None)],
)
def test_a_control_group_may_limit_the_cpus(group, limits, cpus):
    if limits is not None:
        (group / "cpu.max").write_text(limits)
    assert machine.cpu_limit() == cpus


def test_the_least_limit_of_the_groups_above_counts(group, tmp_path):
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    assert machine.cpu_limit() == 3
    (group / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_limit() == 3
    (group / "cpu.max").write_text("200000 100000\n")
    assert machine.cpu_limit() == 2


def test_without_control_groups_there_is_no_limit(group, tmp_path, monkeypatch):
    (group / "cpu.max").write_text("200000 100000\n")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "none")
    assert machine.cpu_limit() is None


@pytest.mark.parametrize(("limit", "threads"), [(1, 1), (64, 3), (None, 3)])
def test_a_server_starts_no_more_threads_than_it_may_use(limit, threads, monkeypatch):
    monkeypatch.setattr(runner, "cpu_limit", lambda: limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert runner.default_threads() == threads


# Memory


@pytest.fixture
def meminfo(tmp_path, monkeypatch):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       4000 kB\nMemAvailable:   3000 kB\nHugePages_Total:       0\n")
    monkeypatch.setattr(machine, "_MEMINFO", file)
    return file


def test_what_is_left_is_what_the_machine_has_or_its_group_may_have(group, meminfo):
    assert machine.memory_left() == 3000 * 1024
    limits_memory(group, "max", 10**9)
    assert machine.memory_left() == 3000 * 1024
    limits_memory(group, 10**9, 1000)
    assert machine.memory_left() == 3000 * 1024, "more than the machine has"
    limits_memory(group, 10_000, 7_000, files=(300, 40))
    assert machine.memory_left() == 3_340, "files in memory give way"
    limits_memory(group.parent, 10_000, 9_000)
    assert machine.memory_left() == 1_000
    limits_memory(group.parent, 8_000, 9_000)
    assert machine.memory_left() == 0


def test_a_system_that_does_not_tell_limits_nothing(group, meminfo):
    meminfo.unlink()
    assert machine.memory_left() is None


def test_no_more_memory_is_taken_than_is_left(group, meminfo):
    size, cpu = 2**21, torch.device("cpu")
    limits_memory(group, 10**9, 10**9 - size + 1)
    meminfo.unlink()
    with pytest.raises(MemoryError, match="2,097,152 bytes of memory cannot be had; 2,097,151 are left"):
        huge_pages.zeros((size,), dtype=torch.uint8, device=cpu)
    limits_memory(group, 10**9, 10**9 - size)
    assert huge_pages.zeros((size,), dtype=torch.uint8, device=cpu).shape == (size,)
