"""Memory in huge pages, by the kernel's own account of it."""

import re
import sys
from pathlib import Path

import pytest
import torch

from nr_serve.neutral import huge_pages

CPU = torch.device("cpu")
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> list[str]:
    """Flags of the mapping that holds an address, as the kernel abbreviates them."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(x, 16) for x in mapping.split(maxsplit=1)[0].split("-"))
        if begin <= address < end:
            return mapping.split("VmFlags:")[1].split()
    raise AssertionError("an address that is mapped nowhere")


@pytest.mark.skipif(not TRANSPARENT.exists(), reason="no huge pages on this machine")
def test_large_tensors_ask_for_huge_pages():
    asked, plain = (f((2**25,), dtype=torch.bfloat16, device=CPU) for f in (huge_pages.zeros, torch.empty))
    middle = asked.nbytes // 2
    assert "hg" in flags_at(asked.data_ptr() + middle)
    assert "hg" not in flags_at(plain.data_ptr() + middle)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 0, 7), (2**21, 3)])
def test_tensors_are_as_torch_makes_them(shape, monkeypatch):
    for platform in (sys.platform, "darwin"):
        monkeypatch.setattr(sys, "platform", platform)
        for dtype in (torch.bfloat16, torch.float32):
            made, empty = (f(shape, dtype=dtype, device=CPU) for f in (huge_pages.zeros, huge_pages.empty))
            assert torch.equal(made, torch.zeros(shape, dtype=dtype))
            assert (empty.shape, empty.dtype) == (shape, dtype)
    on_meta = huge_pages.empty(shape, dtype=torch.float32, device=torch.device("meta"))
    assert on_meta.shape == shape
    assert on_meta.is_meta
