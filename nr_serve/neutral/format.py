"""The adapter file: read, check, write. One safetensors file, never pickle.

Tensors, for each layer i that has a block (a layer without one lacks all of them):

    layers.{i}.block_gate [d]   .block_gate_bias [] (absent: 0)   .w_in [h, d]   .w_gate [h, d]   .w_out [d, h]

h may differ between layers. The metadata are strings: see `AdapterInfo`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor

from nr_serve.disk import check_ends, whole
from nr_serve.errors import BadAdapterFile, TooLarge, fault_text, faults
from nr_serve.neutral import MAX_THRESHOLD, safetensors_file
from nr_serve.neutral.safetensors_file import DTYPES, LONGEST_HEADER

FORMAT = "neutral-residues"
FORMAT_VERSION = 1
ServedGate = Literal["relu", "relu1"]
"""The kinds of gate that can be served."""
CEILINGS: Mapping[ServedGate, float] = {"relu": math.inf, "relu1": 1.0}
"""The ceiling of each kind of gate."""
_LONGEST_TEXT = 200
_DEEPEST = 32
"""Deepest nesting of lists and tables in a recipe or in results; ours have five levels."""
_MAX_LAYERS = 9999
"""Largest number of layers accepted, far above any base's."""
_TENSOR = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.(block_gate|block_gate_bias|w_in|w_gate|w_out)")


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("not a line of printable characters")
    return text


def _flat(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse nesting so deep that code which reads or shows the table would exceed the recursion limit."""
    level: list[Any] = [table]
    for _ in range(_DEEPEST):
        nested = [each for each in level if isinstance(each, dict | list)]
        level = [part for each in nested for part in (each.values() if isinstance(each, dict) else each)]
    if any(isinstance(each, dict | list) for each in level):
        raise ValueError(f"nested more than {_DEEPEST} levels deep")
    return table


_Line = Annotated[str, Field(max_length=_LONGEST_TEXT), AfterValidator(_printable)]
_Table = Annotated[Mapping[str, Any], Field(strict=True), AfterValidator(_flat)]


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter file's metadata: what it says about itself besides its tensors.

    In the file, strings are stored as they are, everything else as JSON. The fields' constraints are checked on
    reading.
    """

    base: _Line
    """Name of the base model it was trained beside."""
    base_fingerprint: _Line
    """`host.fingerprint` of that base."""
    layers: Annotated[int, Field(strict=True, gt=0, le=_MAX_LAYERS)]
    """Decoder layers of the base."""
    d: Annotated[int, Field(strict=True, gt=0)]
    """Width of the base's residual stream."""
    carry: Annotated[FiniteFloat, Field(strict=True, ge=0, lt=1)] = 0.0
    """a in m_t = a m_(t-1) + (1 - a) z_t; 0 is the paper's gate."""
    threshold: Annotated[FiniteFloat, Field(strict=True, ge=0, le=MAX_THRESHOLD)] = 0.0
    """The gate is min(relu(m - threshold), ceiling)."""
    gate: ServedGate = "relu"
    """The kind of gate: relu, or relu1, which is at most 1."""
    domain: _Line = ""
    """What it was trained for: a language tag such as `hu`, or a domain's name."""
    recipe: _Table = field(default_factory=dict)
    """The training recipe."""
    results: _Table = field(default_factory=dict)
    """Measured results."""

    @property
    def ceiling(self) -> float:
        """The largest value of a gate."""
        return CEILINGS[self.gate]


_CHECKED = TypeAdapter(AdapterInfo)
_TEXTS = ("base", "base_fingerprint", "gate", "domain")


@dataclass(frozen=True)
class Block:
    """One layer's block: gate [d], bias [], w_in [h, d], w_gate [h, d], w_out [d, h]."""

    gate: Tensor
    bias: Tensor
    w_in: Tensor
    w_gate: Tensor
    w_out: Tensor

    @property
    def h(self) -> int:
        """Width of the block."""
        return self.w_in.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A checked adapter in host memory."""

    info: AdapterInfo
    blocks: tuple[Block | None, ...]
    """One entry per layer of the base; None where the layer has no block."""
    version: str
    """First 12 hex digits of a SHA-256 over the metadata and the tensors, whatever their order in the file."""
    nbytes: int
    """Size of the tensors in bytes."""

    @property
    def depth(self) -> int:
        """Number of layers with a block."""
        return sum(block is not None for block in self.blocks)

    @property
    def parameters(self) -> int:
        """Number of parameters in all its tensors."""
        present = [b for b in self.blocks if b is not None]
        return sum(t.numel() for b in present for t in (b.gate, b.bias, b.w_in, b.w_gate, b.w_out))

    @property
    def h(self) -> int:
        """Width of the widest block."""
        return max(block.h for block in self.blocks if block is not None)


@dataclass(frozen=True)
class Base:
    """What an adapter must fit: the base's name, fingerprint and shape."""

    name: str
    fingerprint: str
    layers: int
    d: int


def read_adapter(
    path: Path,
    base: Base | None = None,
    *,
    max_bytes: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Adapter:
    """Read and check an adapter file; with `base`, also check that it was made for that base.

    `between` is called after every MiB read, every tensor and every layer. Other threads can run meanwhile: the
    file is read once, its tensors are views of the bytes read, and long work on the bytes releases the GIL.

    Raises BadAdapterFile (TooLarge above `max_bytes`), saying which check failed.
    """
    with _opened(path, max_bytes) as file:
        header = _header(file)
        info = _info(header.metadata)
        if base is not None:
            _check_base(info, base)
        data_B = _data(file, header.nbytes, between)
    tensors = _tensors(header, data_B)
    blocks = _blocks(tensors, info, between)
    return Adapter(
        info=info,
        blocks=blocks,
        version=_version(tensors, header.metadata, between),
        nbytes=sum(t.nbytes for t in tensors.values()),
    )


def read_info(path: Path, *, max_bytes: int | None = None) -> AdapterInfo:
    """An adapter file's metadata. The header is read and checked, the tensors are not.

    Raises BadAdapterFile (TooLarge above `max_bytes`), saying which check failed.
    """
    with _opened(path, max_bytes) as file:
        return _info(_header(file).metadata)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's path in front of the messages of BadAdapterFile and TooLarge raised inside."""
    try:
        yield
    except (BadAdapterFile, TooLarge) as error:
        raise type(error)(f"{path}: {error.message}", param=error.param) from error


def write_adapter(path: Path, info: AdapterInfo, blocks: tuple[Block | None, ...]) -> None:
    """Write an adapter file completely or not at all. Raises BadAdapterFile if it could not be read back."""
    tensors: dict[str, Tensor] = {}
    for i, block in enumerate(blocks):
        if block is None:
            continue
        named = {"block_gate": block.gate, "block_gate_bias": block.bias}
        named |= {"w_in": block.w_in, "w_gate": block.w_gate, "w_out": block.w_out}
        tensors |= {f"layers.{i}.{name}": t.detach().cpu().contiguous() for name, t in named.items()}
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    for name, value in asdict(info).items():
        metadata[name] = value if isinstance(value, str) else json.dumps(value)
    _blocks(tensors, _info(metadata), lambda: None)
    with whole(path) as part:
        safetensors.torch.save_file(tensors, part, metadata)
        with part.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > LONGEST_HEADER:
            raise BadAdapterFile(
                f"its recipe and results make a header of {size:,} bytes; {LONGEST_HEADER:,} are read"
            )
        part.chmod(0o644)  # the library makes it readable by its owner only


@contextmanager
def _opened(path: Path, max_bytes: int | None) -> Iterator[BufferedReader]:
    """Open the file; refuse what is not a file, is too large, cannot be read or is written to meanwhile."""
    try:
        check_ends(path)
        with path.open("rb") as file:
            opened = os.fstat(file.fileno())
            if max_bytes is not None and opened.st_size > max_bytes:
                raise TooLarge(f"the file has {opened.st_size:,} bytes; the limit is {max_bytes:,}")
            yield file
            read = os.fstat(file.fileno())
        if (read.st_size, read.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns):
            raise BadAdapterFile("it was written to while it was read")
    except IsADirectoryError as error:
        meant = min(path.glob("*.safetensors"), default=None)
        raise BadAdapterFile("it is a folder" + (f"; is {meant.name} in it meant?" if meant else "")) from error
    except OSError as error:
        raise BadAdapterFile(f"cannot be read: {error.strerror or error}") from error


def _header(file: BufferedReader) -> safetensors_file.Header:
    size = os.fstat(file.fileno()).st_size
    try:
        return safetensors_file.read_header(file, size)
    except ValueError as error:
        file.seek(0)
        raise _not_safetensors(file.read(2), error) from error


def _data(file: BufferedReader, size: int, between: Callable[[], None]) -> NDArray[np.uint8]:
    """The next `size` bytes of the file, read a MiB between two calls of `between`."""
    try:
        data_B = np.empty(size, np.uint8)
    except MemoryError as error:
        raise BadAdapterFile(f"its tensors have {size:,} bytes, more memory than can be had") from error
    read = 0
    while count := file.readinto(data_B[read : read + 2**20].data):
        read += count
        between()
    return data_B[:read]


def _tensors(header: safetensors_file.Header, data_B: NDArray[np.uint8]) -> dict[str, Tensor]:
    """The tensors by name, as views of `data_B`."""
    tensors = {}
    for name, stored in header.tensors.items():
        if stored.dtype not in DTYPES:
            raise BadAdapterFile(f"{_short(name)} has dtype {_short(stored.dtype)}; {', '.join(DTYPES)} is needed")
        try:
            tensors[name] = safetensors_file.tensor(stored, data_B)
        except ValueError as error:
            raise _not_safetensors(b"", error) from error
    return tensors


def _not_safetensors(start: bytes, error: Exception) -> BadAdapterFile:
    # Checked only now: a safetensors file whose header has a certain length begins with the same bytes.
    if start[:1] == b"\x80" or start == b"PK":
        return BadAdapterFile("this is a pickle or zip file, not safetensors; pickle is never loaded")
    what = faults(error) if isinstance(error, ValidationError) else error
    return BadAdapterFile(f"not a whole safetensors file: {_short(what)}")


def _version(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], between: Callable[[], None]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        between()
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _info(metadata: Mapping[str, str]) -> AdapterInfo:
    if metadata.get("format") != FORMAT:
        raise BadAdapterFile(
            f"not a neutral-residue adapter: its metadata lacks format={FORMAT!r}; LoRA files are not served"
        )
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise BadAdapterFile(
            f"written in adapter format {_short(version)!r}; this nr-serve reads format {FORMAT_VERSION}"
        )
    known = {spec.name for spec in fields(AdapterInfo)}
    values = {
        name: text if name in _TEXTS else _json(name, text) for name, text in metadata.items() if name in known
    }
    try:
        return _CHECKED.validate_python(values)
    except ValidationError as error:
        wrong = [(each["loc"][0], fault_text(each)) for each in error.errors()]
        raise BadAdapterFile("; ".join(f"metadata {name}: {message}" for name, message in wrong)) from error


def _short(text: object) -> str:
    """Text from a file's author, cut to the length that a message may have."""
    return str(text)[:_LONGEST_TEXT]


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadAdapterFile(f"metadata {name} is not JSON: {text[:40]!r}") from error


def _check_base(info: AdapterInfo, base: Base) -> None:
    if (info.layers, info.d) != (base.layers, base.d):
        raise BadAdapterFile(
            f"made for a base with {info.layers} layers of width {info.d} ({info.base}); "
            f"{base.name} has {base.layers} of {base.d}"
        )
    if info.base_fingerprint != base.fingerprint:
        raise BadAdapterFile(
            f"made for another base: {info.base} ({info.base_fingerprint}), not {base.name} ({base.fingerprint})"
        )


def _blocks(
    tensors: Mapping[str, Tensor], info: AdapterInfo, between: Callable[[], None]
) -> tuple[Block | None, ...]:
    by_layer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or int(match[1]) >= info.layers:
            raise BadAdapterFile(f"unexpected tensor {_short(name)!r} for a base with {info.layers} layers")
        if tensor.dtype not in DTYPES.values():
            raise BadAdapterFile(f"{name} has dtype {tensor.dtype}; {', '.join(DTYPES)} is needed")
        by_layer.setdefault(int(match[1]), {})[match[2]] = tensor
    if not by_layer:
        raise BadAdapterFile("the file holds no block")
    blocks: list[Block | None] = []
    for layer in range(info.layers):
        between()
        blocks.append(_block(layer, by_layer[layer], info.d) if layer in by_layer else None)
    return tuple(blocks)


def _block(layer: int, named: Mapping[str, Tensor], d: int) -> Block:
    missing = [n for n in ("block_gate", "w_in", "w_gate", "w_out") if n not in named]
    if missing:
        raise BadAdapterFile(f"layer {layer} lacks {', '.join(missing)}")
    bias = named.get("block_gate_bias", torch.zeros(()))
    h = (named["w_in"].shape[0] if named["w_in"].dim() == 2 else 0) or "h"  # "h" never equals a size
    wanted = {"w_in": (h, d), "block_gate": (d,), "w_gate": (h, d), "w_out": (d, h)}
    for name, shape in wanted.items():
        found = tuple(named[name].shape)
        if found != shape:
            raise BadAdapterFile(
                f"layers.{layer}.{name} has shape {list(found)}, wanted [{', '.join(map(str, shape))}]"
            )
    if bias.numel() != 1:
        raise BadAdapterFile(f"layers.{layer}.block_gate_bias has shape {list(bias.shape)}, wanted []")
    bias = bias.reshape(())
    # After the shapes were checked: torch cannot compute with more than 64 dimensions.
    for name, tensor in {**named, "block_gate_bias": bias}.items():
        if not _finite(tensor):
            raise BadAdapterFile(f"layers.{layer}.{name} holds NaN or infinite values")
    return Block(named["block_gate"], bias, named["w_in"], named["w_gate"], named["w_out"])


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite. With numpy: it takes a tenth of torch's time and no threads from the step."""
    if tensor.dtype is not torch.bfloat16:
        return bool(np.isfinite(tensor.numpy()).all())
    # numpy has no bfloat16. Infinity and NaN are the values whose exponent bits are all ones.
    exponents = tensor.view(torch.int16).numpy() & 0x7F80
    return not bool((exponents == 0x7F80).any())
