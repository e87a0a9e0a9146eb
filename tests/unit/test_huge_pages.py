"""Memory in huge pages, by the kernel's own account of it."""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from nr_serve.neutral import huge_pages

CPU = torch.device("cpu")
SIZE = 2**26
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's account is Linux's")


def mapping_of(tensor: torch.Tensor) -> str:
    """What the kernel tells of the mapping that holds a tensor's middle."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(x, 16) for x in mapping.split(maxsplit=1)[0].split("-"))
        if begin <= middle < end:
            return mapping
    raise AssertionError("an address that is mapped nowhere")


def taken(tensor: torch.Tensor) -> int:
    """Bytes of memory that the mapping takes."""
    return 1024 * int(re.search(r"Rss: +(\d+) kB", mapping_of(tensor))[1])


@on_linux
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
def test_large_tensors_ask_for_huge_pages():
    asked, plain = (f((SIZE,), dtype=torch.uint8, device=CPU) for f in (huge_pages.zeros, torch.zeros))
    assert "hg" in mapping_of(asked).split("VmFlags:")[1].split()
    assert "hg" not in mapping_of(plain).split("VmFlags:")[1].split()


@on_linux
def test_memory_is_taken_as_it_is_written_and_given_back():
    tensor = huge_pages.zeros((SIZE,), dtype=torch.uint8, device=CPU)
    before = taken(tensor)
    tensor[: SIZE // 2] = 1
    assert SIZE // 2 <= taken(tensor) - before <= SIZE // 2 + 2**22
    address = tensor.data_ptr()
    del tensor
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    assert not any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 0, 7), (2**21, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_are_as_torch_makes_them(shape, dtype, monkeypatch):
    for platform in (sys.platform, "darwin"):
        monkeypatch.setattr(sys, "platform", platform)
        made = huge_pages.zeros(shape, dtype=dtype, device=CPU)
        assert made.dtype is dtype
        assert torch.equal(made, torch.zeros(shape, dtype=dtype))
        made += 1
    assert huge_pages.zeros(shape, dtype=dtype, device=torch.device("meta")).is_meta


@on_linux
def test_a_kernel_without_huge_pages_does_as_well(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # as unknown as it is there
    made = huge_pages.zeros((SIZE,), dtype=torch.uint8, device=CPU)
    assert not made.any()
