"""Reading a safetensors file without making other threads wait.

The safetensors library holds the GIL while it copies tensors; here tensors are views of the bytes read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
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
    """Type, shape and place of a tensor in the file; offsets in bytes from the end of the header."""

    dtype: str
    shape: Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(max_length=8, fail_fast=True)]
    data_offsets: tuple[Annotated[int, Field(strict=True)], Annotated[int, Field(strict=True)]]


@dataclass(frozen=True)
class Header:
    """A file's header: its metadata and its tensors, whose bytes fill the rest of the file."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Stored]
    nbytes: int
    """Size of the tensors in bytes."""


_STORED = TypeAdapter(Stored)


def read_header(file: BufferedReader, size: int) -> Header:
    """Read the header of a file of `size` bytes, whose tensors must fill the rest of it exactly.

    `file` is read from its beginning to the end of the header. Raises ValueError.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > LONGEST_HEADER:
        raise ValueError("it does not begin as one")
    if length > size - 8:
        raise ValueError(f"its header has {length:,} bytes; it holds {size - 8:,}")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
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
    if 8 + length + end != size:
        raise ValueError(f"its tensors have {end:,} bytes; it holds {size - 8 - length:,}")
    return Header(metadata, tensors, end)


def tensor(stored: Stored, data_B: NDArray[np.uint8]) -> Tensor:
    """A tensor of the file, from the bytes after its header: a view of them, or a copy if they are not aligned.

    Its type must be in DTYPES. Raises ValueError if its shape does not fit its bytes.
    """
    dtype = DTYPES[stored.dtype]
    first, end = stored.data_offsets
    own_B = torch.from_numpy(data_B[first:end])
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
