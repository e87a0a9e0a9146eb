"""Reading a safetensors file without making other threads wait.

The safetensors library holds the GIL while it copies tensors; here tensors are views of the bytes read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from torch import Tensor

LONGEST_HEADER = 2**20
"""In bytes; our headers have about twenty thousand. The GIL is held while a header is read."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types read here, by their names in the file."""


@dataclass(frozen=True)
class Stored:
    """Type, shape and place of a tensor in the file; offsets in bytes after the header."""

    dtype: str
    shape: Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(max_length=8, fail_fast=True)]
    data_offsets: tuple[Annotated[int, Field(strict=True)], Annotated[int, Field(strict=True)]]


@dataclass(frozen=True)
class Header:
    """A file's header: its metadata, its tensors, and where their bytes begin."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Stored]
    start: int


_STORED = TypeAdapter(Stored)


def read_header(data_B: NDArray[np.uint8]) -> Header:
    """Parse the header of a whole file; its tensors must fill the rest of the file exactly. Raises ValueError."""
    size = int.from_bytes(data_B[:8].tobytes(), "little")
    if len(data_B) < 8 or size > LONGEST_HEADER:
        raise ValueError("it does not begin as one")
    if size > len(data_B) - 8:
        raise ValueError(f"its header has {size:,} bytes; it holds {len(data_B) - 8:,}")
    try:
        header = json.loads(data_B[8 : 8 + size].tobytes().decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its header is nested too deep") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are not strings")
    tensors = {name: _STORED.validate_python(each) for name, each in header.items()}  # the first fault is reported
    end = 0
    for each in sorted(tensors.values(), key=lambda each: each.data_offsets):
        if each.data_offsets[0] != end or each.data_offsets[1] < end:
            raise ValueError("its tensors do not lie end to end")
        end = each.data_offsets[1]
    if 8 + size + end != len(data_B):
        raise ValueError(f"its tensors have {end:,} bytes; it holds {len(data_B) - 8 - size:,}")
    return Header(metadata, tensors, 8 + size)


def tensor(stored: Stored, header: Header, data_B: NDArray[np.uint8]) -> Tensor:
    """A tensor of the file: a view of `data_B`, or a copy if its bytes are not aligned.

    Its type must be in DTYPES. Raises ValueError if its shape does not fit its bytes.
    """
    dtype = DTYPES[stored.dtype]
    first, end = stored.data_offsets
    own_B = torch.from_numpy(data_B[header.start + first : header.start + end])
    if own_B.data_ptr() % dtype.itemsize:
        own_B = own_B.clone()
    try:
        return own_B.view(dtype).view(stored.shape)
    except (RuntimeError, TypeError) as error:  # TypeError: a size of more than 64 bits
        raise ValueError(f"its {end - first:,} bytes do not fit its type and shape: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return named
