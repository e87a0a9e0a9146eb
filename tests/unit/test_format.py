"""The adapter file comes back as it was written, and every other file is refused with the reason."""

import json
import os
import pickle
import zipfile
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nr_serve.errors import BadAdapterFile, NrError, TooLarge
from nr_serve.neutral.format import Adapter, AdapterInfo, Base, Block, read_adapter, read_info, write_adapter

D, LAYERS = 4, 3
BASE = Base("tiny", "f00d", LAYERS, D)
INFO = AdapterInfo(
    base="tiny",
    base_fingerprint="f00d",
    layers=LAYERS,
    d=D,
    carry=0.5,
    threshold=0.25,
    domain="hu",
    recipe={"steps": 3, "text": ["árvíztűrő", None]},
    results={"leak": 0.001},
)
QUICK = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def blocks(dtype=torch.float32, widths=(2, 0, 3)):
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    return tuple(Block(rand(D), rand(), rand(h, D), rand(h, D), rand(D, h)) if h else None for h in widths)


def parts(data: bytes) -> tuple[dict, bytes]:
    """Header and tensor bytes of a safetensors file, by its published layout."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def whole(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


@contextmanager
def editing(path):
    """The file's header and tensor bytes, both to be changed in place."""
    header, body = parts(path.read_bytes())
    changed = bytearray(body)
    yield header, changed
    path.write_bytes(whole(header, bytes(changed)))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(path, INFO, blocks())
    return path


def refused(path, match: str, base: Base | None = BASE, **options) -> None:
    with pytest.raises(BadAdapterFile, match=match):
        read_adapter(path, base, **options)


# What is written comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_back_to_the_bit(tmp_path, dtype):
    path, written = tmp_path / "a.safetensors", blocks(dtype)
    write_adapter(path, INFO, written)
    got = read_adapter(path, BASE)
    assert got.info == INFO
    write_adapter(path, INFO, written)  # the file may hold its metadata in another order now
    assert read_adapter(path, BASE).version == got.version
    write_adapter(path, replace(INFO, domain="other"), written)
    assert read_adapter(path, BASE).version != got.version
    assert got.h == 3
    assert [block and block.h for block in got.blocks] == [2, None, 3]
    for block, want in zip(got.blocks, written, strict=True):
        if want is None:
            continue
        for name in ("gate", "bias", "w_in", "w_gate", "w_out"):
            tensor, expected = getattr(block, name), getattr(want, name)
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected)
    assert got.nbytes == sum(D + 1 + 3 * h * D for h in (2, 3)) * dtype.itemsize
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_same_bytes_as_another_type_of_number_are_another_version(path):
    versions = []
    for dtype, name in ((torch.float16, "F16"), (torch.bfloat16, "BF16")):
        write_adapter(path, INFO, blocks(torch.float16))
        with editing(path) as (header, _):
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    entry["dtype"] = name
        adapter = read_adapter(path, BASE)
        assert adapter.blocks[0].w_in.dtype == dtype
        versions.append(adapter.version)
    assert versions[0] != versions[1]


def test_whoever_serves_it_may_read_what_another_user_wrote(path):
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_file_has_the_documented_names_shapes_and_values(path):
    header, body = parts(path.read_bytes())
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "neutral-residues"
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["recipe"]) == INFO.recipe
    shapes = {name: entry["shape"] for name, entry in header.items()}
    assert shapes == {
        f"layers.{i}.{name}": shape
        for i, h in ((0, 2), (2, 3))
        for name, shape in {
            "block_gate": [D],
            "block_gate_bias": [],
            "w_in": [h, D],
            "w_gate": [h, D],
            "w_out": [D, h],
        }.items()
    }
    start, stop = header["layers.2.w_out"]["data_offsets"]
    values = np.frombuffer(body[start:stop], dtype="<f4").reshape(D, 3)
    assert np.array_equal(values, blocks()[2].w_out.numpy())


def test_a_bias_that_is_absent_is_0(path):
    with editing(path) as (header, body):
        at, end = header.pop("layers.0.block_gate_bias")["data_offsets"]
        for entry in header.values():
            if "data_offsets" in entry and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [offset - (end - at) for offset in entry["data_offsets"]]
        del body[at:end]
    got = read_adapter(path, BASE)
    assert got.blocks[0].bias.shape == ()
    assert float(got.blocks[0].bias) == 0
    assert torch.equal(got.blocks[2].w_out, blocks()[2].w_out)


@pytest.mark.parametrize("length", [0x780, 0x880, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_or_zip_is_read(tmp_path, length):
    """The file begins with its header's length: one in 32 begins with the byte that pickles begin with."""
    path = tmp_path / "a.safetensors"
    write_adapter(path, INFO, blocks(widths=(1, 0, 0)))
    header, body = parts(path.read_bytes())
    text = json.dumps(header).encode()
    assert len(text) <= length
    path.write_bytes(length.to_bytes(8, "little") + text.ljust(length) + body)
    assert read_adapter(path, BASE).h == 1


def test_huge_and_foreign_metadata_are_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    info = replace(INFO, domain="日本語 ß", recipe={"é" * 50: "長" * 30_000}, results={"deep": [[[[1]]]]})
    write_adapter(path, info, blocks())
    assert read_adapter(path, BASE).info == info


# Refusals


@pytest.mark.parametrize(
    ("base", "match"),
    [
        (replace(BASE, fingerprint="beef"), "another base: tiny .f00d., not tiny .beef."),
        (replace(BASE, layers=4), "3 layers of width 4 .tiny.; tiny has 4 of 4"),
        (replace(BASE, d=8), "3 layers of width 4 .tiny.; tiny has 3 of 8"),
    ],
)
def test_another_base_is_refused(path, base, match):
    refused(path, match, base)
    assert read_adapter(path).info.base == "tiny", "without a base any adapter can be inspected"


def test_a_file_cut_anywhere_is_refused(path):
    data = path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    cuts = {0, 1, 7, 8, 9, header_end // 2, header_end - 1, header_end, header_end + 1, len(data) - 1}
    for cut in sorted(cuts | set(range(10, len(data), 97))):
        path.write_bytes(data[:cut])
        refused(path, "not a whole safetensors file")
    path.write_bytes(data + b"\0")
    refused(path, "not a whole safetensors file")


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("layers.0.block_gate", (D + 1,), r"block_gate has shape \[5\], wanted \[4\]"),
        ("layers.0.block_gate", (1, D), r"block_gate has shape \[1, 4\]"),
        ("layers.0.w_in", (2, D + 1), r"w_in has shape \[2, 5\], wanted \[2, 4\]"),
        ("layers.0.w_in", (3, D), r"w_gate has shape \[2, 4\], wanted \[3, 4\]"),
        ("layers.0.w_in", (2 * D,), r"w_in has shape \[8\], wanted \[h, 4\]"),
        ("layers.0.w_in", (0, D), r"w_in has shape \[0, 4\]"),
        ("layers.0.w_gate", (D, 2), r"w_gate has shape \[4, 2\], wanted \[2, 4\]"),
        ("layers.0.w_out", (2, D), r"w_out has shape \[2, 4\], wanted \[4, 2\]"),
        ("layers.0.block_gate_bias", (2,), "block_gate_bias has shape"),
        ("layers.1.w_in", (2, D), "layer 1 lacks block_gate, w_gate, w_out"),
        ("layers.3.w_in", (2, D), "unexpected tensor 'layers.3.w_in'"),
        ("layers.00.w_in", (2, D), "unexpected tensor"),
        ("layers.\u0660.w_in", (2, D), "unexpected tensor"),
        ("layers.0.w_in.weight", (2, D), "unexpected tensor"),
        ("layers.-1.w_in", (2, D), "unexpected tensor"),
        ("x", (1,), "unexpected tensor 'x'"),
        ("layers." + "1" * 5000 + ".w_in", (2, D), "unexpected tensor"),
        ("lm_head.weight", (2, D), "unexpected tensor"),
    ],
)
def test_wrong_shapes_and_names_are_refused(path, name, shape, match):
    rewrite(path, {name: torch.zeros(shape)})
    refused(path, match)


@pytest.mark.parametrize("name", ["block_gate", "block_gate_bias", "w_in", "w_gate", "w_out"])
def test_a_tensor_of_more_dimensions_than_torch_computes_with_is_refused(path, name):
    with editing(path) as (header, _):
        header[f"layers.2.{name}"]["shape"] = [1] * 70 + header[f"layers.2.{name}"]["shape"]
    refused(path, "shape: List should have at most 8 items")


def rewrite(path, changed: dict[str, torch.Tensor]) -> None:
    """Replace or add float32 tensors, without safetensors' or the project's own writer."""
    with editing(path) as (header, body):
        tensors = {name: (header[name], body[slice(*header[name]["data_offsets"])]) for name in [*header][1:]}
        tensors |= {n: ({"dtype": "F32", "shape": list(t.shape)}, t.numpy().tobytes()) for n, t in changed.items()}
        body.clear()
        for name, (entry, data) in tensors.items():
            header[name] = entry | {"data_offsets": [len(body), len(body) + len(data)]}
            body += data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["block_gate", "block_gate_bias", "w_in", "w_gate", "w_out"])
def test_values_that_are_not_finite_are_refused(path, value, name):
    shape = {"block_gate": (D,), "block_gate_bias": (), "w_out": (D, 3)}.get(name, (3, D))
    tensor = torch.zeros(shape)
    tensor.view(-1)[-1] = value
    rewrite(path, {f"layers.2.{name}": tensor})
    refused(path, f"layers.2.{name} holds NaN or infinite values")


REFUSED = "layers.1.block_gate has dtype"
UNKNOWN = "has dtype|not a whole safetensors file"  # torch may not have it


@pytest.mark.parametrize(
    ("dtype", "bits", "match"),
    [
        ("I32", 32, REFUSED), ("I64", 64, REFUSED), ("F64", 64, REFUSED), ("U8", 8, REFUSED), ("U16", 16, REFUSED),
        ("BOOL", 8, REFUSED), ("F8_E4M3", 8, REFUSED), ("C64", 64, REFUSED), ("F4", 4, UNKNOWN),
        ("F6_E2M3", 6, UNKNOWN), ("F8_E8M0", 8, UNKNOWN), ("F128", 128, UNKNOWN), ("f32", 32, UNKNOWN),
    ],
)  # fmt: skip
def test_other_types_of_number_are_refused(path, dtype, bits, match):
    with editing(path) as (header, body):
        ends = [len(body), len(body) + D * bits // 8]
        header["layers.1.block_gate"] = {"dtype": dtype, "shape": [D], "data_offsets": ends}
        body += bytes(D * bits // 8)
    refused(path, match)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was run",))

    path = tmp_path / "a.safetensors"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Evil(), protocol))
        refused(path, "pickle is never loaded" if protocol > 1 else "not a whole safetensors file")
    torch.save({"layers.0.w_in": torch.zeros(2, D)}, path)
    refused(path, "pickle is never loaded")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.safetensors", b"")
    refused(path, "pickle or zip file")


@pytest.mark.parametrize("length", [10 * 2**30, 2**63, 2**64 - 1, 0, 1])
def test_a_header_that_lies_about_its_length_is_refused(path, length):
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(path, "not a whole safetensors file")


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [10 * 2**28], "data_offsets": [0, 10 * 2**30]},
        {"shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"shape": [2**63], "data_offsets": [0, 16]},
        {"shape": [D], "data_offsets": [16, 0]},
        {"shape": [D], "data_offsets": [-16, 0]},
        {"shape": [-D], "data_offsets": [0, 16]},
        {"shape": [D], "data_offsets": [2**64 - 16, 2**64]},
        {"shape": [D], "data_offsets": [0, 12]},
        {"shape": "4", "data_offsets": [0, 16]},
        {"shape": [D]},
    ],
)
def test_tensors_that_claim_what_is_not_there_are_refused(path, entry):
    with editing(path) as (header, _):
        header["layers.0.block_gate"] = {"dtype": "F32"} | entry
    refused(path, "not a whole safetensors file")


@pytest.mark.parametrize("spaces", range(8))
def test_a_header_of_any_length_is_read_and_tensors_that_lie_anywhere(path, spaces):
    """Writers fill headers up to a multiple of 8, and sort by the size of a number; no reader may ask for it."""
    header, body = parts(path.read_bytes())
    written = read_adapter(path)
    odd = torch.tensor(0.5, dtype=torch.bfloat16)  # two bytes before all others
    for name, each in header.items():
        if name != "__metadata__":
            each["data_offsets"] = [place + 2 for place in each["data_offsets"]]
    bias = header.pop("layers.0.block_gate_bias")
    start, end = bias["data_offsets"]
    body = odd[None].view(torch.uint8).numpy().tobytes() + body
    for each in header.values():  # what came after the bias moves into its place
        if each.get("data_offsets", [0])[0] >= end:
            each["data_offsets"] = [place - (end - start) for place in each["data_offsets"]]
    body = body[:start] + body[end:]
    header["layers.0.block_gate_bias"] = {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + spaces)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    library = safetensors.torch.load_file(path)
    read = read_adapter(path)
    assert read.blocks[0].bias == odd
    for i, (block, before) in enumerate(zip(read.blocks, written.blocks, strict=True)):
        for name in ("w_in", "w_gate", "w_out") if block is not None else ():
            assert torch.equal(getattr(block, name), getattr(before, name))
            assert torch.equal(getattr(block, name), library[f"layers.{i}.{name}"])


def long_one(text: str) -> bytes:
    return text[:-1].encode() + b" " * 2**20 + b"}"


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.replace('"dtype"', '"dtype": "F32", "dtype"', 1).encode(),
        lambda text: text.replace("{", '{"__metadata__": {}, ', 1).encode(),
        long_one,
    ],
    ids=["utf-16", "a mark of byte order", "a field twice", "metadata twice", "a long one"],
)
def test_a_header_that_no_other_reader_takes_is_refused(path, encode):
    header, body = parts(path.read_bytes())
    text = encode(json.dumps(header))
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    refused(path, "not a whole safetensors file")


def test_other_work_gets_its_turn_at_each_mebibyte_of_a_file(path):
    turns = []
    size = 3 * 2**20 + 4
    metadata = parts(path.read_bytes())[0]["__metadata__"]
    odd = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    path.write_bytes(whole({"__metadata__": metadata, "odd": odd}, bytes(size)))
    # At its name, so all turns are those of reading.
    refused(path, "unexpected tensor 'odd'", between=lambda: turns.append(None))
    assert len(turns) == 4


def test_a_folder_is_refused_and_the_file_in_it_named(path):
    refused(path.parent, r"it is a folder; is a\.safetensors in it meant\?")


def test_results_that_would_not_be_read_back_are_not_written(path):
    before = path.read_bytes()
    with pytest.raises(BadAdapterFile, match=r"recipe and results make a header of [\d,]+ bytes; 1,048,576"):
        write_adapter(path, replace(INFO, results={"x": "y" * 2**20}), blocks())
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ([2**64 - 1, 0], "not a whole safetensors file"),
        ([0, 2**62, 2**62], "layer 1 lacks"),
        ([1] * 5000, "at most 8 items"),
    ],
)
def test_shapes_that_no_tensor_can_have_are_refused(path, shape, match):
    with editing(path) as (header, body):
        start = len(body)
        body += bytes(0 if 0 in shape else 4)
        header["layers.1.w_in"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(body)]}
    refused(path, match)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"format": None}, "not a neutral-residue adapter: its metadata lacks format"),
        ({"format": "lora"}, "LoRA files are not served"),
        ({"format_version": "2"}, "written in adapter format '2'; this nr-serve reads format 1"),
        ({"format_version": None}, "adapter format ''"),
        ({"base": None, "d": None}, "metadata base: Field required; metadata d: Field required"),
        ({"base_fingerprint": None}, "metadata base_fingerprint: Field required"),
        ({"layers": "three"}, "layers is not JSON"),
        ({"layers": "3.0"}, "metadata layers: Input should be a valid integer"),
        ({"layers": "true"}, "metadata layers: Input should be a valid integer"),
        ({"layers": "null"}, "metadata layers: Input should be a valid integer"),
        ({"layers": "0"}, "metadata layers: Input should be greater than 0"),
        ({"layers": "-3"}, "metadata layers: Input should be greater than 0"),
        ({"layers": "1000000000000"}, "metadata layers: Input should be less than or equal to 9999"),
        ({"layers": "9" * 6000}, "layers is not JSON|layers: Input should"),
        ({"d": "-4"}, "metadata d: Input should be greater than 0"),
        ({"gate": "elu"}, "metadata gate: Input should be 'relu' or 'relu1'"),
        ({"carry": "1"}, "metadata carry: Input should be less than 1"),
        ({"carry": "-0.1"}, "metadata carry: Input should be greater than or equal to 0"),
        ({"carry": "NaN"}, "metadata carry: Input should be a finite number"),
        ({"threshold": "Infinity"}, "metadata threshold: Input should be a finite number"),
        ({"threshold": "-0.1"}, "metadata threshold: Input should be greater than or equal to 0"),
        ({"threshold": "1e300"}, "metadata threshold: Input should be less than or equal to 1000000"),
        ({"threshold": "-1" + "0" * 400}, "metadata threshold: Input should be"),
        ({"threshold": '"0"'}, "metadata threshold: Input should be a valid number"),
        ({"recipe": "[]"}, "metadata recipe: Input should be a valid dictionary"),
        ({"recipe": "[" * 100_000}, "recipe is not JSON"),
        ({"results": "{"}, "results is not JSON"),
    ],
)
def test_metadata_that_is_missing_or_wrong_is_refused(path, changed, match):
    with editing(path) as (header, _):
        metadata = header["__metadata__"] | changed
        header["__metadata__"] = {name: value for name, value in metadata.items() if value is not None}
    refused(path, match, base=None)


def test_a_file_without_metadata_or_without_blocks_is_refused(path):
    with editing(path) as (header, _):
        metadata = header.pop("__metadata__")
    refused(path, "not a neutral-residue adapter")
    path.write_bytes(whole({"__metadata__": metadata}, b""))
    refused(path, "the file holds no block")


def test_what_is_no_file_is_refused(tmp_path):
    refused(tmp_path / "none.safetensors", "cannot be read: No such file")
    refused(tmp_path, "it is a folder")
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    refused(empty, "not a whole safetensors file")


def test_the_header_alone_is_read_and_refused_as_the_whole_is(path, tmp_path):
    assert read_info(path, max_bytes=path.stat().st_size) == INFO
    with pytest.raises(TooLarge):
        read_info(path, max_bytes=path.stat().st_size - 1)
    pickled, cut, empty = (tmp_path / name for name in ("pickle", "cut", "empty"))
    empty.write_bytes(b"")
    pickled.write_bytes(pickle.dumps({"a": 1}))
    cut.write_bytes(path.read_bytes()[:-1])
    for wrong in (pickled, cut, empty, tmp_path, tmp_path / "none"):
        with pytest.raises(BadAdapterFile) as whole:
            read_adapter(wrong)
        with pytest.raises(BadAdapterFile) as header:
            read_info(wrong)
        assert header.value.message.split(":")[0] == whole.value.message.split(":")[0]


def test_a_file_over_the_limit_is_too_large_before_it_is_read(path):
    size = path.stat().st_size
    assert isinstance(read_adapter(path, BASE, max_bytes=size), Adapter)
    path.write_bytes(b"not even an adapter".ljust(size))
    with pytest.raises(TooLarge, match=f"{size:,} bytes; the limit is {size - 1:,}"):
        read_adapter(path, BASE, max_bytes=size - 1)


def test_the_header_is_checked_before_the_tensors_are_read(path):
    def reading():
        pytest.fail("a tensor was read")

    refused(path, "made for another base", replace(BASE, fingerprint="beef"), between=reading)
    with editing(path) as (header, _):
        header["__metadata__"]["format"] = "pt"
    refused(path, "not a neutral-residue adapter", between=reading)


@pytest.mark.parametrize("change", [lambda data: data[:-4] + b"\0\0\0\0", lambda data: data[:-4]])
def test_a_file_that_is_written_to_while_it_is_read_is_refused(path, change):
    data = path.read_bytes()

    def write():
        path.write_bytes(change(data))
        os.utime(path, ns=(0, 0))

    refused(path, "it was written to while it was read", between=write)
    path.write_bytes(data)
    replaced = path.with_name("b.safetensors")
    write_adapter(replaced, replace(INFO, domain="other"), blocks())
    read = read_adapter(path, BASE, between=lambda: replaced.exists() and replaced.replace(path))
    assert read.info == INFO, "a new file in its place is not written into it"
    assert read_adapter(path, BASE).info.domain == "other"


def test_a_file_of_more_bytes_than_memory_is_refused(path, monkeypatch):
    def none(*_):
        raise MemoryError

    monkeypatch.setattr(np, "empty", none)
    refused(path, "its tensors have 280 bytes, more memory than can be had")


@pytest.mark.parametrize(
    ("info", "made", "match"),
    [
        (replace(INFO, carry=1.0), blocks(), "metadata carry"),
        (replace(INFO, gate="elu"), blocks(), "metadata gate"),
        (replace(INFO, threshold=float("nan")), blocks(), "metadata threshold"),
        (INFO, (None, None, None), "holds no block"),
        (INFO, (None, None, None, blocks()[0]), "unexpected tensor"),
        (replace(INFO, d=D + 1), blocks(), "wanted"),
        (INFO, (replace(blocks()[0], w_in=torch.full((2, D), float("nan"))), None, None), "NaN"),
    ],
)
def test_what_would_be_refused_is_not_written(tmp_path, info, made, match):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"the one before")
    with pytest.raises(BadAdapterFile, match=match):
        write_adapter(path, info, made)
    assert path.read_bytes() == b"the one before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("domain", ["x" * 201, "hu\x1b[2J", "two\nlines"])
def test_text_that_is_not_a_short_line_is_refused(path, tmp_path, domain):
    with editing(path) as (header, _):
        header["__metadata__"]["domain"] = domain
    refused(path, "metadata domain: ")
    with pytest.raises(BadAdapterFile, match="metadata domain: "):
        write_adapter(tmp_path / "c.safetensors", replace(INFO, domain=domain), blocks())
    assert not (tmp_path / "c.safetensors").exists()


# Any bytes at all

EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def read_any(path, data: bytes) -> None:
    path.write_bytes(data)
    reasons: list[str] = []
    for base in (BASE, None):
        try:
            adapter = read_adapter(path, base)
        except NrError as error:
            reasons.append(error.message)
            continue
        assert 0 <= adapter.info.carry < 1
        for block in filter(None, adapter.blocks):
            assert block.w_out.T.shape == block.w_in.shape == block.w_gate.shape == (block.h, adapter.info.d)
            assert block.gate.shape == (adapter.info.d,)
            assert all(
                torch.isfinite(t).all() for t in (block.gate, block.bias, block.w_in, block.w_gate, block.w_out)
            )
    assert all(reasons), "a refusal without a reason"


@QUICK
@given(edits=EDITS, cut=st.floats(0.9, 1) | st.just(1.0), in_header=st.booleans())
def test_no_change_of_bytes_raises_anything_but_a_refusal(path, edits, cut, in_header):
    write_adapter(path, INFO, blocks())
    data = bytearray(path.read_bytes())
    reach = 8 + int.from_bytes(data[:8], "little") if in_header else len(data)
    for place, value in edits:
        data[int(place * (reach - 1))] = value
    read_any(path, bytes(data[: int(cut * len(data))]))


@QUICK
@given(which=st.integers(0, 10), part=st.sampled_from(["all", "dtype", "shape", "data_offsets"]), junk=JUNK)
def test_no_header_raises_anything_but_a_refusal(path, which, part, junk):
    write_adapter(path, INFO, blocks())
    header, body = parts(path.read_bytes())
    name = sorted(header)[which % len(header)]
    if part == "all" or name == "__metadata__":
        header[name] = junk
    else:
        header[name][part] = junk
    read_any(path, whole(header, body))


@QUICK
@given(
    field=st.sampled_from(
        ["format_version", "base", "layers", "d", "carry", "threshold", "gate", "recipe", "results"]
    ),
    text=JUNK.map(json.dumps) | st.text(),
)
def test_no_metadata_raises_anything_but_a_refusal(path, field, text):
    write_adapter(path, INFO, blocks())
    header, body = parts(path.read_bytes())
    header["__metadata__"][field] = text
    read_any(path, whole(header, body))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    path = tmp_path / "pipe.safetensors"
    os.mkfifo(path)
    for read in (read_adapter, read_info):
        with pytest.raises(BadAdapterFile, match="cannot be read: it is a device or a pipe"):
            read(path)


@pytest.mark.parametrize("levels", [33, 500])
@pytest.mark.parametrize("name", ["recipe", "results"])
def test_metadata_too_deep_to_be_shown_are_refused(path, name, levels):
    with editing(path) as (header, _):
        header["__metadata__"][name] = '{"a":' * (levels - 1) + "[1]" + "}" * (levels - 1)
    with pytest.raises(BadAdapterFile, match=f"metadata {name}: nested more than 32 levels deep"):
        read_adapter(path)
