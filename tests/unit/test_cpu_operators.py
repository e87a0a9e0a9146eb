"""The compiled operators against float64, one token and head at a time; and what happens where there are none."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nr_serve.assemble import assemble
from nr_serve.config import ServeConfig
from nr_serve.engine.model import cpu_operators as module
from nr_serve.engine.model.cpu_operators import CpuOperators, begin, cpu_operators
from nr_serve.errors import UnsupportedBase
from tests.compiled import SHARING, computed_by, operators_or_skip

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SIZES = (1, 7, 16, 48, 576, 1000)
FAR = 2**62


@pytest.fixture(scope="module")
def operators() -> CpuOperators:
    return operators_or_skip()


def contexts(lengths, key_heads, size, dtype):
    """Keys and values of contexts of those lengths, in cells anywhere among others that hold NaN; and the cells."""
    keys, values = (torch.full((300, key_heads, size), torch.nan).to(dtype) for _ in range(2))
    cells = torch.full((len(lengths), max(lengths)), 299)  # a cell that holds NaN
    order = torch.randperm(299)
    for row, length in enumerate(lengths):
        cells[row, :length] = order[row * 40 : row * 40 + length]
        for store in (keys, values):
            store[cells[row, :length]] = torch.randn(length, key_heads, size).to(dtype)
    return keys, values, cells


def softmax_attention(query, keys, values, seen):
    """In float64, a token and head at a time, over the cells that each token has seen; logits times 0.3."""
    heads, key_heads = query.shape[1], keys.shape[1]
    want = torch.empty(query.shape, dtype=torch.float64)
    for token, cells in enumerate(seen):
        for head in range(heads):
            of = head // (heads // key_heads)
            weights = (0.3 * keys[cells, of].double() @ query[token, head].double()).softmax(0)
            want[token, head] = weights @ values[cells, of].double()
    return want


def close(got, want, dtype):
    assert got.dtype == dtype
    scale = max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=ROUNDING[dtype] * scale)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_is_the_formula(operators, dtype, size):
    torch.manual_seed(size)
    for rows in ((1,), (1, 3), (130,)):
        x, weight = (3 * torch.randn(*rows, size)).to(dtype), torch.randn(size).to(dtype)
        wide = x.double()
        want = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        close(operators.rms_norm(x, weight, 1e-5), want, dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", SIZES)
def test_silu_mul_is_the_formula(operators, dtype, size):
    torch.manual_seed(size)
    for rows in ((1,), (1, 3), (130,)):
        both = (4 * torch.randn(*rows, 2 * size)).to(dtype)
        gate, up = both.double().chunk(2, -1)
        close(operators.silu_mul(both), F.silu(gate) * up, dtype)


def test_silu_holds_far_out(operators):
    x = torch.tensor([-200.0, -88.0, -80.0, -20.0, 0.0, 88.0, 200.0, torch.inf, torch.nan, -1e38, 1e38])
    got = operators.silu_mul(torch.cat([x, torch.ones_like(x)]))
    torch.testing.assert_close(got, F.silu(x.double()).float(), rtol=1e-5, atol=1e-37, equal_nan=True)


def test_amx_is_compiled_in_only_where_the_system_grants_it(monkeypatch):
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    for granted in (True, False):
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda granted=granted: granted)
        assert ("-mno-amx-bf16" in module._flags()) is not granted
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    assert "-mno-amx-bf16" not in module._flags()


def test_silu_mul_of_values_far_out_stays_finite(operators):
    both = torch.tensor([[-1e4, 1e4, -200.0, 3.0, 2.0, 5.0]])
    torch.testing.assert_close(operators.silu_mul(both), torch.tensor([[0.0, 2e4, 0.0]]))


@pytest.mark.parametrize("size", [*SIZES, 1024, 1025, 49152])
@pytest.mark.parametrize("threads", SHARING)
def test_the_likeliest_is_the_first_highest_and_a_row_with_a_nan_has_none(operators, size, threads):
    rows = torch.randn(9, size)
    rows[1, size // 2 :] = rows[1].max()  # equals, the first of them anywhere
    rows[2], rows[3], rows[4] = -torch.inf, 0.0, -1e38
    rows[5, size // 3] = torch.inf
    rows[6, -1] = rows[7, 0] = rows[8, size // 2] = torch.nan
    wide = torch.cat([rows, torch.full((9, 3), torch.inf)], 1)[:, :size]  # not contiguous
    with computed_by(threads):
        for logits in (rows, wide):
            assert operators.likeliest(logits).tolist() == [*rows[:6].numpy().argmax(-1).tolist(), -1, -1, -1]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 16), (9, 3, 64), (2, 2, 6), (5, 1, 40)])
@pytest.mark.parametrize("normed", [True, False])
def test_rotate_turns_queries_and_keys_and_fills_the_cells(operators, dtype, heads, key_heads, size, normed):
    torch.manual_seed(size)
    tokens, cells = 7, torch.tensor([11, 3, 8, 0, 5, 12, 1])
    qkv = torch.randn(1, tokens, (heads + 2 * key_heads) * size).to(dtype)
    cos, sin = (torch.randn(1, tokens, size).to(dtype) for _ in range(2))
    norms = [torch.randn(size).to(dtype) if normed else None for _ in range(2)]
    stores = [torch.full((14, key_heads, size), 7.0).to(dtype) for _ in range(2)]
    query = operators.rotate(qkv, cos, sin, *stores, cells, *norms, 1e-5)
    each = qkv[0].double().view(tokens, -1, size)
    turning = each[:, : heads + key_heads]
    if normed:
        weights = torch.stack([norms[0]] * heads + [norms[1]] * key_heads).double()
        turning = weights * turning / (turning.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    first, second = turning.chunk(2, -1)
    turned = torch.cat([-second, first], -1) * sin[0].double()[:, None]
    want = turning * cos[0].double()[:, None] + turned
    close(query, want[:, :heads], dtype)
    close(stores[0][cells], want[:, heads:], dtype)
    assert torch.equal(stores[1][cells], qkv[0].view(tokens, -1, size)[:, heads + key_heads :])
    untouched = sorted(set(range(14)) - set(cells.tolist()))
    assert all(bool((store[untouched] == 7).all()) for store in stores)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 16), (9, 3, 64), (7, 1, 12), (32, 4, 128)])
@pytest.mark.parametrize("window", [FAR, 5])
@pytest.mark.parametrize("threads", SHARING)
def test_attend_is_softmax_attention_over_each_own_context(
    operators, dtype, heads, key_heads, size, window, threads
):
    torch.manual_seed(size)
    lengths = [1, 16, 17, 40, 3]
    keys, values, cells = contexts(lengths, key_heads, size, dtype)
    query = torch.randn(len(lengths), heads, size).to(dtype)
    positions = torch.tensor(lengths) - 1
    seen = [cells[row, max(0, length - window) : length] for row, length in enumerate(lengths)]
    want = softmax_attention(query, keys, values, seen)
    with computed_by(threads):
        got = operators.attend(query, keys, values, cells, positions, 0.3, window)
    close(got, want, dtype)
    alone = operators.attend(query[3:4], keys, values, cells[3:4], positions[3:4], 0.3, window)
    assert torch.equal(alone[0], got[3]), "what shares the step must not matter"


@pytest.mark.parametrize(
    ("heads", "key_heads", "size"), [(4, 2, 16), (9, 3, 64), (7, 1, 48), (32, 4, 128), (49, 1, 16)]
)
@pytest.mark.parametrize("window", [FAR, 60])
@pytest.mark.parametrize("threads", SHARING)
@pytest.mark.parametrize(("lengths", "count"), [([150], 150), ([131], 31), ([20, 9, 16], 3), ([2], 2)])
def test_attend_prompts_is_causal_attention_over_each_own_context(
    operators, heads, key_heads, size, window, threads, lengths, count
):
    if operators.attend_prompts is None:
        pytest.skip("no product of our own here")
    torch.manual_seed(size)
    keys, values, cells = contexts(lengths, key_heads, size, torch.bfloat16)
    query = torch.randn(len(lengths) * count, heads, size).bfloat16()
    positions = torch.tensor(lengths)[:, None] - count + torch.arange(count)
    places = enumerate(positions.flatten().tolist())
    seen = [cells[token // count, max(0, place + 1 - window) : place + 1] for token, place in places]
    want = softmax_attention(query, keys, values, seen)
    with computed_by(threads):
        got = operators.attend_prompts(query, keys, values, cells, positions, 0.3, window)
    close(got, want, torch.bfloat16)
    alone = operators.attend_prompts(query[-count:], keys, values, cells[-1:], positions[-1:], 0.3, window)
    assert torch.equal(alone, got[-count:]), "what shares the step must not matter"


@pytest.mark.parametrize("window", [FAR, 100])
def test_a_prompts_token_attends_alike_in_any_piece_and_beside_any_other_context(operators, window):
    if operators.attend_prompts is None:
        pytest.skip("no product of our own here")
    torch.manual_seed(0)
    keys, values = (torch.randn(500, 3, 64).bfloat16() for _ in range(2))
    query, cells, piece = torch.randn(400, 9, 64).bfloat16(), torch.randperm(500)[:400], torch.arange(12)

    def attend(query, cells, positions):
        return operators.attend_prompts(query, keys, values, cells, positions, 0.3, window)

    whole = attend(query, cells[None], torch.arange(400)[None])
    for end in range(12, 400):
        at = piece + end - 12
        assert torch.equal(attend(query[at], cells[None, :end], at[None]), whole[at])
        both = torch.stack([at, piece + 388])
        beside = attend(query[both.flatten()], torch.stack([cells, cells]), both)
        assert torch.equal(beside[:12], whole[at])


def test_threads_of_our_own_serve_several_callers_at_once(operators):
    x, weight = torch.randn(400, 576), torch.randn(576)
    want = operators.rms_norm(x, weight, 1e-5)
    together = threading.Barrier(3)

    def call():
        operators.share_among(4)
        together.wait()
        return all(torch.equal(operators.rms_norm(x, weight, 1e-5), want) for _ in range(200))

    with ThreadPoolExecutor(3) as callers:
        assert all(called.result() for called in [callers.submit(call) for _ in range(3)])


def test_who_shares_among_threads_of_our_own_leaves_the_other_threads_torch_alone(operators):
    with computed_by("two of torch"), ThreadPoolExecutor(1) as caller:
        caller.submit(operators.share_among, 2).result()
        assert caller.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2


def test_a_wrong_shape_or_type_is_an_error_not_a_crash(operators):
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError):
        operators.rms_norm(x, torch.ones(9), 1e-5)
    with pytest.raises(RuntimeError):
        operators.rms_norm(x.double(), torch.ones(8).double(), 1e-5)
    with pytest.raises(RuntimeError):
        operators.silu_mul(torch.randn(2, 7))
    query, keys, cells = torch.randn(1, 2, 16), torch.randn(5, 1, 16), torch.tensor([[0, 1]])
    for position, window in ((2, 9), (-1, 9), (1, 0)):
        with pytest.raises(RuntimeError):
            operators.attend(query, keys, keys, cells, torch.tensor([position]), 0.3, window)
        if operators.attend_prompts is not None:
            some = (each.bfloat16() for each in (query, keys, keys))
            with pytest.raises(RuntimeError):
                operators.attend_prompts(*some, cells, torch.tensor([[position]]), 0.3, window)


@pytest.fixture
def new_machine(monkeypatch, tmp_path):
    """Nothing compiled, and nothing remembered."""
    monkeypatch.setenv("NR_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "begin", begin.__wrapped__)
    monkeypatch.setattr(module, "cpu_operators", cpu_operators.__wrapped__)
    return tmp_path


@pytest.mark.parametrize(
    ("compiler", "said"), [("/nowhere/c++", "/nowhere/c++"), ("c++ '", "No closing quotation")]
)
def test_without_a_compiler_there_are_none_and_the_log_says_so(new_machine, monkeypatch, caplog, compiler, said):
    monkeypatch.setenv("CXX", compiler)
    assert module.cpu_operators() is None
    assert said in caplog.text


def test_the_compiler_may_be_given_with_arguments(new_machine, monkeypatch):
    monkeypatch.setenv("CXX", "nice -n 5 c++ -DX='a b'")
    commands = []

    def run(*batch):
        commands.extend(batch)
        if "-shared" in batch[0]:
            Path(batch[0][-1]).touch()

    monkeypatch.setattr(module, "_run", run)
    assert module._library().exists()
    assert len(commands) > 1
    assert {tuple(command[:5]) for command in commands} == {("nice", "-n", "5", "c++", "-DX=a b")}


def test_where_they_do_not_compile_there_are_none_and_the_log_says_why(new_machine, monkeypatch, caplog):
    compiler = new_machine / "c++"
    compiler.write_text("#!/bin/sh\necho 'unknown processor' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert module.cpu_operators() is None
    assert "unknown processor" in caplog.text
    assert not list((new_machine / "operators").glob("*")), "nothing half made stays"


@pytest.mark.parametrize(
    ("settings", "begins"),
    [({"device": "cpu"}, True), ({"device": "cpu", "compile": False}, False), ({"device": "cuda"}, False)],
)
def test_a_start_compiles_before_all_else_where_steps_will_use_it(settings, begins, monkeypatch):
    begun = []
    monkeypatch.setattr(module, "begin", lambda: begun.append(True))
    with pytest.raises(UnsupportedBase, match="/no/such"):
        assemble(ServeConfig(model="/no/such", **settings))
    assert bool(begun) is begins


def test_what_was_compiled_is_used_again(operators, new_machine, monkeypatch):
    made = module._library()
    assert list(made.parent.iterdir()) == [made]
    monkeypatch.setattr(module, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert module._library() == made


@pytest.fixture
def compiles_nothing(monkeypatch):
    monkeypatch.setattr(module, "_compile", lambda compiler, folder, library: library.touch())


def test_changed_sources_have_their_own_and_what_else_lies_there_does_not_count(
    new_machine, compiles_nothing, monkeypatch, tmp_path
):
    sources = tmp_path / "cpu"
    shutil.copytree(module._SOURCES, sources)
    monkeypatch.setattr(module, "_SOURCES", sources)
    first = module._library()
    (sources / "operators.o").write_bytes(b"\x80\xff")
    (sources / "__pycache__").mkdir()
    assert module._library() == first
    for name in ("operators.cpp", "compute.cpp", "residues.h"):
        with (sources / name).open("ab") as file:
            file.write(b"// \xff")
        changed = module._library()
        assert changed != first
        first = changed


def test_another_processor_has_its_own(new_machine, compiles_nothing, monkeypatch):
    first = module._library()
    monkeypatch.setattr(module, "cpuinfo", lambda *_: ["another"])
    assert module._library() != first
