"""The GPU's attention, bank and graphs on tiny shapes: on a CUDA device, or else through Triton's interpreter."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from nr_serve.engine.adapters.registry import Version
from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.model import attention, gpu_attention, gpu_operators, gpu_sampler, graphs
from nr_serve.engine.model.attention import KVCache
from nr_serve.engine.model.batch import Table, build_batch
from nr_serve.engine.model.graphs import Graphs, Padding, size_of
from nr_serve.engine.model.runner import Runner
from nr_serve.engine.model.warm_up import warm_up
from nr_serve.engine.scheduler import Piece, spans
from nr_serve.neutral import kernels
from nr_serve.neutral.gpu_bank import GpuBank
from nr_serve.neutral.host import host_blocks
from nr_serve.neutral.step import Trial
from nr_serve.neutral.torch_bank import TorchBank
from tests import tiny
from tests.unit import stepped
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def naive(query_nHD, keys_NKD, values_NKD, scale, window=None):
    """Attention of the last n of N tokens, in float64, head by head."""
    (n, H, _), N = query_nHD.shape, len(keys_NKD)
    out_nHD = torch.zeros_like(query_nHD, dtype=torch.float64)
    for i in range(n):
        end = N - n + i + 1
        start = 0 if window is None else max(0, end - window)
        for h in range(H):
            k = h // (H // keys_NKD.shape[1])
            logits_N = keys_NKD[start:end, k].double() @ query_nHD[i, h].double() * scale
            out_nHD[i, h] = logits_N.softmax(0) @ values_NKD[start:end, k].double()
    return out_nHD


@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize(("H", "K", "D", "page_size"), [(6, 2, 24, 4), (3, 3, 16, 1), (16, 1, 32, 16)])
def test_single_tokens_attend_to_the_pages_of_their_table(H, K, D, page_size, window, monkeypatch):
    monkeypatch.setattr(gpu_attention, "LEAST_PART", 64)
    lengths = [1, page_size, 97, 130]
    pages = -(-140 // page_size)
    pool = torch.randperm(4 * pages, generator=torch.Generator().manual_seed(1)).view(4, pages)
    keys_CKD, values_CKD = rand(4 * pages * page_size, K, D, seed=2), rand(4 * pages * page_size, K, D, seed=3)
    table_BM = pool.to(torch.int32)
    unread = torch.ones(len(keys_CKD), dtype=torch.bool)
    cells = []
    for b, length in enumerate(lengths):
        own = (pool[b][:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        cells.append(own)
        unread[own] = False
        table_BM[b, -(-length // page_size) :] = 2**30
    keys_CKD[unread.to(DEVICE)], values_CKD[unread.to(DEVICE)] = NAN, NAN
    query_BHD = rand(4, H, D, seed=4)
    # As a graph has it: the table's rows are columns in memory.
    table = Table(
        table_BM.T.contiguous().to(DEVICE).T, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), page_size
    )
    out_BHD = gpu_attention.attend_one(query_BHD, keys_CKD, values_CKD, table, 0.3, window)
    for b, own in enumerate(cells):
        want_1HD = naive(query_BHD[b : b + 1], keys_CKD[own], values_CKD[own], 0.3, window)
        torch.testing.assert_close(out_BHD[b : b + 1].double(), want_1HD, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize(("n", "N"), [(5, 5), (4, 11), (1, 6)])
def test_a_chunk_attends_to_what_came_before_it(n, N, window):
    query_nHD, keys_NKD, values_NKD = rand(n, 6, 8, seed=1), rand(N, 2, 8, seed=2), rand(N, 2, 8, seed=3)
    got = gpu_attention.attend_chunk(query_nHD, keys_NKD, values_NKD, 0.4, window)
    want = naive(query_nHD, keys_NKD, values_NKD, 0.4, window)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (2, 2), (3, 4), (129, 256), (256, 256), (257, None)])
def test_a_step_goes_to_the_smallest_graph_that_holds_it(tokens, size):
    assert size_of(tokens) == size


PAGE, PAGES, SLOTS, ROWS = 4, 24, 3, 5


class Engine:
    """A tiny base with the GPU's bank, attention and graphs; pages PAGES - 1 and row ROWS - 1 are the padding's."""

    def __init__(self, kind="llama", **overrides):
        base = tiny.model(kind, **overrides)
        self.naive = tiny.Naive(base)
        self.model = base.to(DEVICE).requires_grad_(False)
        self.bank = GpuBank(
            layers=tiny.LAYERS, d=tiny.D, slots=SLOTS, width=16, rows=ROWS, device=DEVICE, dtype=torch.float32,
            labels=7, pages=PAGES,
        )  # fmt: skip
        self.cache = KVCache(
            layers=tiny.LAYERS, cells=PAGES * PAGE, heads=2, head_size=16, device=DEVICE, dtype=torch.float32,
            attend=gpu_attention.attend,
        )  # fmt: skip
        attention.register()
        self.model.set_attn_implementation(attention.NAME)
        host_blocks(self.model, self.bank.add_residues)
        step, self.captures = graphs.model_step(self.model, self.bank, self.cache), []
        capture = graphs.capture_cuda() if DEVICE.type == "cuda" else graphs.uncaptured
        self.graphs = Graphs(
            step, slots=SLOTS, page_size=PAGE, longest=40, padding=Padding(ROWS - 1, PAGES - 1, self.bank.labels),
            device=DEVICE, sizes=(4,), capture=lambda f: (self.captures.append(f), capture(f))[1],
        )  # fmt: skip

    def attach(self, slot, adapter):
        for _ in self.bank.attach(slot, adapter, 0.0):
            pass

    @torch.inference_mode()
    def prefill(self, requests):
        pieces = [Piece(r, 0, len(r.tokens)) for r in requests]
        batch = build_batch(
            pieces, [0] * len(pieces), page_size=PAGE, spare_cell=self.cache.spare_cell, slots=SLOTS, paged=True,
            device=DEVICE,
        )  # fmt: skip
        self.bank.begin(batch.tokens)
        ids, positions = batch.input_ids_T[None], batch.positions_T[None]
        logits = self.model(
            input_ids=ids, position_ids=positions, use_cache=False, nr_batch=batch, nr_cache=self.cache
        ).logits[0]
        self.bank.end()
        return [logits[end - 1] for _, end in spans(pieces)]

    @torch.inference_mode()
    def decode(self, requests):
        pieces = [Piece(r, len(r.tokens) - 1, 1) for r in requests]
        return self.graphs.run(pieces, [0] * len(pieces), attached=bool(self.bank.attached))


def request(i, tokens, slots=()):
    """On pages of its own, which are out of order."""
    pages = [5 * i + j for j in (3, 1, 0, 2, 4)]
    selection = tuple(Version(str(s), "", None, 0.0, slot=s) for s in slots)
    return SimpleNamespace(tokens=list(tokens), pages=pages, row=i, selection=selection)


def grow(engine, requests, chosen, steps):
    """Decode greedily; every step's logits are those of the naive loop with the adapters `chosen`."""
    for r, logits_V in zip(requests, engine.prefill(sorted(requests, key=lambda r: len(r.tokens))), strict=True):
        r.tokens.append(int(logits_V.argmax()))
    for _ in range(steps):
        decoded = engine.decode(requests)
        assert (decoded.open_BS is None) == (not engine.bank.attached)
        for r, adapters, logits_V in zip(requests, chosen, decoded.logits_BV, strict=True):
            want_V = engine.naive.logits(r.tokens, adapters)[-1]
            torch.testing.assert_close(logits_V.cpu(), want_V, atol=1e-3, rtol=1e-3)
            r.tokens.append(int(want_V.argmax()))


def three(engine):
    """Fresh requests: one adapter, two, none."""
    engine.bank.state_LRS.fill_(NAN)
    rng = random.Random(0)
    prompts = [[rng.randrange(290) for _ in range(n)] for n in (2, 5, 9)]
    return [
        request(i, tokens, slots) for i, (tokens, slots) in enumerate(zip(prompts, ([0], [0, 2], []), strict=True))
    ]


def test_steps_by_graph_give_the_naive_loops_logits_over_swaps():
    engine = Engine()
    with torch.inference_mode():
        engine.graphs.warm_up()  # before anything is attached, as a server does
    a0, a1, a2 = (tiny.adapter(tiny.model(), seed=i, carry=0.4 * i) for i in range(3))
    engine.attach(0, a0)
    engine.attach(2, a1)
    grow(engine, three(engine), [[a0], [a0, a1], []], steps=2)
    engine.attach(0, a2)
    grow(engine, three(engine), [[a2], [a2, a1], []], steps=2)
    engine.bank.detach(0)
    engine.bank.detach(2)
    grow(engine, three(engine), [[], [], []], steps=1)
    assert len(engine.captures) == engine.graphs.captured == 2


def test_steps_by_graph_look_back_as_far_as_a_layers_window():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    engine = Engine(kind="gemma3_text", layer_types=kinds, sliding_window=5)
    a0, a1 = (tiny.adapter(tiny.model(), seed=i, carry=0.4 * i) for i in range(2))
    engine.attach(0, a0)
    engine.attach(2, a1)
    grow(engine, three(engine), [[a0], [a0, a1], []], steps=1)


def test_padding_touches_nothing_of_the_requests_and_is_counted_nowhere():
    engine = Engine()
    engine.attach(0, tiny.adapter(tiny.model(), seed=0))
    engine.prefill([request(0, [1, 2, 3], [0]), request(1, [4, 5, 6], [0]), request(2, [7, 8, 9], [0])])
    engine.bank.read_totals()
    kept = [t.clone() for t in (engine.cache.keys_LCKD, engine.bank.state_LRS, engine.bank.page_state_LNS)]
    decoded = engine.decode([request(i, [1, 2, 3, 4], [0]) for i in range(3)])
    assert decoded.selected_BS.tolist() == [[True, False, False]] * 3
    assert decoded.open_BS.shape == (3, SLOTS)
    changed = [(a != b) & ~(a.isnan() & b.isnan()) for a, b in zip(kept, (
        engine.cache.keys_LCKD, engine.bank.state_LRS, engine.bank.page_state_LNS), strict=True)]  # fmt: skip
    cells = changed[0].any(0).flatten(1).any(1).nonzero().flatten().tolist()
    assert cells == [3 * PAGE + 3, 8 * PAGE + 3, 13 * PAGE + 3, (PAGES - 1) * PAGE]
    assert changed[1][:, 3].any().item() is False  # a row that runs, but not in this step
    assert changed[2].any(0).any(1).nonzero().flatten().tolist() == [3, 8, 13]
    totals = engine.bank.read_totals()
    assert [row[0] for row in totals.seen_LS] == [3] * tiny.LAYERS
    assert len(totals.cross_KS) == engine.bank.labels


@pytest.mark.parametrize("trial", [None, Trial(first=0, slot=1, threshold=-0.3)], ids=["counted", "on trial"])
def test_the_bank_counts_what_the_bank_on_the_cpu_counts(trial):
    shape = {"layers": tiny.LAYERS, "d": tiny.D, "slots": SLOTS, "width": 16, "rows": ROWS, "pages": 6, "labels": 7}
    banks = [cls(**shape, device=DEVICE, dtype=torch.float32) for cls in (TorchBank, GpuBank)]
    pieces = [Piece(request(0, range(6), [0]), 0, 6), Piece(request(1, range(9), [0, 1]), 2, 7)]
    got = []
    for bank in banks:
        for slot in range(2):
            adapter = tiny.adapter(tiny.model(), seed=slot, carry=0.5, bare_layers=[1] if slot else [])
            for _ in bank.attach(slot, adapter, 0.1):
                pass
        batch = build_batch(pieces, [3, 5], page_size=PAGE, spare_cell=0, slots=SLOTS, device=DEVICE)
        batch.tokens = replace(
            batch.tokens, trial=trial,
            end_E=torch.tensor([3, 7], device=DEVICE), page_E=torch.tensor([2, 4], device=DEVICE),
            selected_TS=batch.tokens.selected_TS.T.contiguous().T,  # by columns in memory, as a graph has it
        )  # fmt: skip
        bank.begin(batch.tokens)
        y = [bank.add_residues(i, rand(13, tiny.D, seed=i), rand(13, tiny.D, seed=9)) for i in range(tiny.LAYERS)]
        got.append((torch.stack(y), bank.end(), bank.state_LRS, bank.page_state_LNS, bank.read_totals()))
    (y, opened, state, page_state, totals), (y2, opened2, state2, page_state2, totals2) = got
    torch.testing.assert_close(y2, y, atol=1e-4, rtol=1e-4)
    assert torch.equal(opened2, opened)
    torch.testing.assert_close(state2[:, :, :2], state[:, :, :2], equal_nan=True, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(page_state2[:, :, :2], page_state[:, :, :2], equal_nan=True, atol=1e-5, rtol=1e-5)
    for name in ("fired_LS", "seen_LS", "cross_KS"):
        assert getattr(totals2, name) == getattr(totals, name)
    assert totals2.mass_S == pytest.approx(totals.mass_S, rel=1e-5)
    assert any(map(any, totals2.fired_LS)) == (trial is None)
    assert torch.equal(banks[1].threshold_S, banks[0].threshold_S)


def test_a_step_that_cannot_begin_leaves_the_bank_as_it_was(monkeypatch):
    shape = {"layers": tiny.LAYERS, "d": tiny.D, "slots": SLOTS, "width": 16, "rows": ROWS, "pages": 6, "labels": 7}
    bank = GpuBank(**shape, device=DEVICE, dtype=torch.float32)
    for _ in bank.attach(1, tiny.adapter(tiny.model(), seed=1), 0.1):
        pass
    before, seen = bank.threshold_S.clone(), bank._seen_LS.clone()
    batch = build_batch([Piece(request(0, range(6), [0]), 0, 6)], [3], page_size=PAGE, spare_cell=0, slots=SLOTS,
                        device=DEVICE)  # fmt: skip

    def full(*_, **__):
        raise torch.OutOfMemoryError

    for trial in (None, Trial(first=0, slot=1, threshold=-0.3)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros_like", full)
            with pytest.raises(torch.OutOfMemoryError):
                bank.begin(replace(batch.tokens, trial=trial))
        assert bank.end() is None
        assert torch.equal(bank.threshold_S, before)
        assert torch.equal(bank._seen_LS, seen)


@pytest.fixture
def by_kernels(monkeypatch):
    """Engines made in this test run by the kernels, wherever they run."""
    monkeypatch.setattr(stepped, "Runner", partial(Runner, kernels=True))


def answers(core, prompts, selections, tokens):
    """Greedy answers, and how many tokens of the prompts were found in the prefix cache."""
    for i, (prompt, selection) in enumerate(zip(prompts, selections, strict=True)):
        sampling = Sampling(max_tokens=tokens, temperature=0, logprobs=1, ignore_eos=True)
        assert core.add(Submit(str(i), tuple(prompt), sampling, selection)) is None
    found, got = 0, [[] for _ in prompts]
    while not core.idle:
        events = core.step()
        found += events.report.prefix.found
        for output in events.outputs:
            assert output.error is None
            got[int(output.request_id)].extend(output.tokens)
    core.check()
    return got, found


def test_the_engine_by_kernels_equals_the_naive_loop_and_shares_pages_that_graphs_filled(by_kernels):
    base = tiny.model()
    naive = tiny.Naive(base)
    made = {f"a{i}": tiny.adapter(base, seed=i, carry=0.4 + 0.4 * i) for i in range(2)}
    core, adapters = stepped.engine(base.to(DEVICE), pages=24, budget=16, running=2, slots=2)
    for name, adapter in made.items():
        stepped.load(adapters, name, adapter)
    prompts, selections = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13]], [("a1",), None]
    for already in (0, 2 * 8):  # the second time two pages each, of which decodes filled the second
        got, found = answers(core, prompts, selections, tokens=3)
        assert found == already
        for prompt, selection, tokens in zip(prompts, selections, got, strict=True):
            chosen = [made[name] for name in selection or made]
            ids = [token.id for token in tokens]
            logprobs_TV = naive.logits([*prompt, *ids], chosen).log_softmax(-1)[len(prompt) - 1 : -1]
            for token, logprobs_V in zip(tokens, logprobs_TV, strict=True):
                # Sums are taken in another order, so a near tie may fall the other way.
                assert float(logprobs_V.max() - logprobs_V[token.id]) < 1e-3
                assert token.logprob == pytest.approx(float(logprobs_V[token.id]), abs=1e-3)
            prompt += [*ids, 20]


def test_a_device_that_cannot_capture_is_served_without_graphs(by_kernels, monkeypatch, caplog):
    def refuse(graphs):
        raise RuntimeError("no capture here")

    monkeypatch.setattr(Graphs, "warm_up", refuse)
    base = tiny.model()
    answer, _ = tiny.Naive(base).greedy([1, 2, 3], 2)
    core, _ = stepped.engine(base.to(DEVICE), pages=24, budget=16, running=2, slots=1)
    assert "no capture here" in caplog.text
    (got,), _ = answers(core, [[1, 2, 3]], [()], tokens=2)
    assert [token.id for token in got] == answer


def test_a_runner_on_a_cpu_needs_no_triton():
    program = """if True:
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        from nr_serve.config import ServeConfig
        from nr_serve.engine.model.runner import Runner
        from tests import tiny
        runner = Runner(tiny.model(), tiny.tokenizer(), ServeConfig(pages=40), "tiny")
        assert runner.graphs is None
        assert "nr_serve.neutral.kernels" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself is run where there is a GPU")
def test_the_script_for_a_gpu_runs_on_tiny_shapes():
    """Through Triton's interpreter; its figures mean nothing there."""
    command = [sys.executable, "loadtests/gpu.py", "--tiny", "--device", "cpu"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"ceilings", "bases", "training"} <= set(found)
    assert found["failed"] == []
    assert set(found["bases"]["tiny"]["decode"]) == {"2"}
    assert found["bases"]["tiny"]["swaps"]["same_as_at_first"]
    assert found["bases"]["tiny"]["stalls"]["steps_a_load"] >= 1
    assert set(found["training"]) == {"shape", "neutral", "half", "lora", "neutral_to_lora", "half_to_lora"}


class Spy:
    """In the place of a kernel: notes what Triton would compile a variant for."""

    def __init__(self, kernel, met):
        self.kernel, self.met = kernel, met
        options = getattr(kernel, "kwargs", None) or vars(kernel)
        self.plain = set(options.get("do_not_specialize") or ())
        self.unaligned = set(options.get("do_not_specialize_on_alignment") or ())

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.met.add((self.kernel.fn.__name__, *self.specialised(args), *sorted(constants.items())))
            return self.kernel[grid](*args, **constants)

        return launch

    def specialised(self, args):
        for name, arg in zip(self.kernel.arg_names, args, strict=False):
            if isinstance(arg, torch.Tensor):
                yield name, arg.dtype, name in self.unaligned or arg.data_ptr() % 16 == 0
            elif isinstance(arg, int) and name not in self.plain:
                yield name, 1 if arg == 1 else arg % 16 == 0


def test_traffic_meets_no_variant_of_a_kernel_that_the_warm_up_did_not(by_kernels, monkeypatch):
    base = tiny.model()
    core, adapters = stepped.engine(base.to(DEVICE), pages=60, budget=70, running=2, slots=2)
    met: set = set()
    for module in (kernels, gpu_attention, gpu_operators, gpu_sampler):
        for name, value in list(vars(module).items()):
            if name.startswith("_") and hasattr(value, "arg_names") and name not in ("_then", "_scaled"):
                monkeypatch.setattr(module, name, Spy(value, met))
    runner = core._runner
    with torch.inference_mode():
        runner.graphs._graphs.clear()
        runner.graphs.warm_up()
    warm_up(runner, 70)
    known = set(met)
    for name in ("a0", "a1"):
        stepped.load(adapters, name, tiny.adapter(tiny.model(), seed=len(name)))
    prompts = [(3, 0), (16, 0), (17, 3), (40, 2), (80, 1)]
    for i, (length, adapter) in enumerate(prompts):
        sampling = Sampling(max_tokens=3, temperature=i % 2, top_p=0.9, ignore_eos=True, logit_bias={5: 1.0 + i})
        selection = (f"a{adapter}",) if adapter < 2 else None
        assert core.add(Submit(str(i), tuple(range(length)), sampling, selection)) is None
    while not core.idle:
        assert not any(output.error for output in core.step().outputs)
    assert met == known
