"""Memory in huge pages, by the kernel's own account of it."""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nr_serve.engine.model.attention import KVCache
from nr_serve.engine.model.packed_linear import PairedLinear, pack_linears
from nr_serve.neutral import huge_pages
from nr_serve.neutral.torch_bank import TorchBank
from tests.compiled import operators_or_skip

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


def asks(tensor: torch.Tensor) -> bool:
    """Whether huge pages were asked for."""
    return "hg" in mapping_of(tensor).split("VmFlags:")[1].split()


needs_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"
)


@on_linux
@needs_huge_pages
def test_large_tensors_ask_for_huge_pages():
    assert asks(huge_pages.zeros((SIZE,), dtype=torch.uint8, device=CPU))
    assert not asks(torch.zeros(SIZE, dtype=torch.uint8))


@on_linux
@needs_huge_pages
def test_the_cache_and_the_slots_are_in_huge_pages_and_take_their_memory_at_once():
    cache = KVCache(
        layers=2, cells=20_000, heads=4, head_size=32, device=CPU, dtype=torch.float32, attend=lambda *_: None
    )
    bank = TorchBank(layers=8, d=512, slots=128, width=16, rows=2, labels=3, device=CPU, dtype=torch.bfloat16)
    for tensor in (cache.keys_LCKD, cache.values_LCKD, bank.gate_LSd, bank.w_up_SLud, bank.w_out_SLhd):
        assert asks(tensor)
        assert taken(tensor) >= tensor.nbytes


@on_linux
@needs_huge_pages
def test_weights_of_our_own_products_are_in_huge_pages_end_to_end():
    operators = operators_or_skip()
    if operators.multiply is None:
        pytest.skip("no products of our own here")
    model = nn.Sequential(*(nn.Linear(1024, 512, bias=False) for _ in range(4))).bfloat16().requires_grad_(False)
    pack_linears(model, operators.multiply)
    packed = [module.packed for module in model if isinstance(module, PairedLinear)]
    assert len(packed) == 4
    assert all(map(asks, packed))
    starts = [tensor.data_ptr() for tensor in packed]
    assert starts == [starts[0] + i * packed[0].nbytes for i in range(4)]


@on_linux
def test_memory_that_is_not_taken_is_as_it_is_written_and_given_back():
    tensor = huge_pages.zeros((SIZE,), dtype=torch.uint8, device=CPU, taken=False)
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
@pytest.mark.parametrize(
    ("size", "named"), [(2**60, "1,152,921,504,606,846,976"), (2**64, "18,446,744,073,709,551,616")]
)
def test_memory_that_cannot_be_had_is_named(size, named):
    with pytest.raises(MemoryError, match=f"{named} bytes"):
        huge_pages.zeros((size,), dtype=torch.uint8, device=CPU)


@on_linux
def test_a_kernel_without_huge_pages_does_as_well(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # as unknown as it is there
    made = huge_pages.zeros((SIZE,), dtype=torch.uint8, device=CPU)
    assert not made.any()
