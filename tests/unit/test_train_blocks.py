"""Blocks in training: what is skipped changes neither the output nor a gradient, and nothing crosses documents."""

import pytest
import torch

from nr_serve.neutral import math
from nr_serve.neutral.format import Block
from nr_serve.neutral.host import host_blocks
from nr_serve.train import losses
from nr_serve.train.activations import GATES
from nr_serve.train.attach import Attached
from nr_serve.train.blocks import VARIANCE, AdapterModule
from nr_serve.train.measure import measure
from nr_serve.train.text.pack import Windows
from tests import tiny

T = 12


def windows(*, documents: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 256, (3, T), generator=torch.Generator().manual_seed(1))
    offset = torch.arange(T) % (T // documents)
    return ids, offset.expand(3, T).contiguous()


def module(*, carry: float = 0.5, bias: float = 0.0) -> AdapterModule:
    made = AdapterModule.from_file(tiny.adapter(tiny.model(), 3, carry=carry))
    for i in range(tiny.LAYERS):
        made.layer(i).bias.data.fill_(bias)
    return made


def attached_loss(adapter: AdapterModule) -> torch.Tensor:
    model = tiny.model().requires_grad_(False)
    attached = Attached(model, [adapter])
    ids, offset = windows()
    attached.begin(offset)
    logits = model(ids, use_cache=False, position_ids=offset).logits
    labels = losses.next_token_labels(ids, offset)
    return losses.lm_loss(logits, labels) / (labels != -100).sum()


def naive_loss(adapter: AdapterModule) -> torch.Tensor:
    """Every document alone, every block dense, by the definition."""
    model = tiny.model().requires_grad_(False)

    def add(layer, x, y):
        block = adapter.layer(layer)
        m = math.carry(math.gate_logit(x[0], block.gate, block.bias), adapter.carry)
        return y + math.residue(x[0], math.block_gate(m), block.w_in, block.w_gate, block.w_out)[None]

    host_blocks(model, add)
    ids, _ = windows()
    sums = []
    for document in ids.view(-1, T // 2):
        logits = model(document[None], use_cache=False).logits[0, :-1]
        sums.append(torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum"))
    return torch.stack(sums).sum() / (len(sums) * (T // 2 - 1))


@pytest.mark.parametrize("carry", [0.0, 0.5])
@pytest.mark.parametrize("bias", [-0.5, 0.0, 50.0], ids=["few fire", "half fire", "all fire"])
def test_loss_and_gradients_equal_a_dense_implementation_of_separate_documents(carry, bias):
    ours, theirs = module(carry=carry, bias=bias), module(carry=carry, bias=bias)
    loss, expected = attached_loss(ours), naive_loss(theirs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = q.grad.abs().max().clamp_min(1e-3)
        assert torch.allclose(p.grad / scale, q.grad / scale, atol=2e-4), name


def test_nothing_fired_leaves_the_base_bit_for_bit():
    model = tiny.model()
    ids, offset = windows(documents=1)
    expected = model(ids, use_cache=False).logits
    attached = Attached(model, [module(bias=-1e6)])
    record = attached.begin(offset)
    assert torch.equal(model(ids, use_cache=False, position_ids=offset).logits, expected)
    assert not any(record.fired[0])


def test_a_document_does_not_see_the_one_packed_before_it():
    model = tiny.model()
    attached = Attached(model, [module()])
    ids, offset = windows()
    outputs = []
    for change in (0, 7):
        changed = ids.clone()
        changed[:, : T // 2] = (changed[:, : T // 2] + change) % 256
        attached.begin(offset)
        outputs.append(model(changed, use_cache=False, position_ids=offset).logits[:, T // 2 :])
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_packed_documents_read_as_each_alone_of_bases_with_a_sliding_window_too(kind):
    window = {} if kind == "llama" else {"sliding_window": 3}
    model = tiny.model(kind, **window)
    ids, offset = windows()
    [read] = measure(model, Attached(model, [module(bias=-1e6)]), {"x": Windows(ids, offset)}).values()
    alone = tiny.model(kind, **window)
    for i, window_ids in enumerate(ids):
        halves = window_ids.view(2, -1)
        nats = [alone(half[None], labels=half[None], use_cache=False).loss.item() * (T // 2 - 1) for half in halves]
        assert read.nats_N[i] == pytest.approx(sum(nats), rel=1e-4)


def test_fresh_blocks_start_as_the_paper_says_and_add_nothing():
    d, h, layers = 48, 64, 3
    adapter = AdapterModule.fresh([h] * layers, d, carry=0.5, seed=0)
    block = adapter.layer(1)
    assert not block.w_out.any()
    for weight in (block.w_in, block.w_gate):
        assert weight.var().item() == pytest.approx(1 / (d * layers), rel=0.1)


@pytest.mark.parametrize(("start", "variance"), [("paper", 1 / (48 * 3)), ("he", 2 / 48)])
def test_starts_have_the_variance_they_are_named_for(start, variance):
    adapter = AdapterModule.fresh([64, 0, 32], 48, carry=0.5, seed=0, variance=VARIANCE[start])
    assert adapter.layer(1) is None
    assert [adapter.layer(i).w_in.shape for i in (0, 2)] == [(64, 48), (32, 48)]
    assert adapter.layer(0).w_gate.var().item() == pytest.approx(variance, rel=0.1)


def test_a_gate_with_a_ceiling_is_the_papers_up_to_it():
    m = torch.tensor([-2.0, 0.0, 0.25, 0.5, 1.5, 40.0])
    assert GATES["relu1"](m - 0.25).tolist() == [0.0, 0.0, 0.0, 0.25, 1.0, 1.0]
    assert GATES["relu"](m - 0.25).tolist() == [0.0, 0.0, 0.0, 0.25, 1.25, 39.75]


def test_a_gate_of_kind_none_is_open_to_one_but_on_a_texts_first_token():
    adapter = AdapterModule.fresh([16], 8, carry=0.8, seed=0, kind="none")
    x = torch.randn(5, 8)
    m = adapter.layer(0).carried(x, torch.arange(5), adapter.carry)
    assert math.block_gate(m).tolist() == [0, 1, 1, 1, 1]


def test_local_loss_on_a_stream_without_gradient_reaches_every_block():
    model = tiny.model().requires_grad_(False)
    adapter = module()
    attached = Attached(model, [adapter])
    ids, offset = windows()
    with torch.no_grad():
        record = attached.begin(offset, losses.l1)
        model.model(ids, use_cache=False, position_ids=offset)
    record.local_sum.backward()
    assert all(adapter.layer(i).w_out.grad.any() for i in range(tiny.LAYERS))
    assert all(adapter.layer(i).gate.grad.any() for i in range(tiny.LAYERS))


def test_local_loss_does_not_count_the_targets_tokens():
    model = tiny.model().requires_grad_(False)
    attached = Attached(model, [module()])
    ids, offset = windows()
    sums = []
    for rows in ([False, False, False], [False, True, True], [True, False, False]):
        target = torch.tensor(rows)[:, None].expand_as(ids)
        record = attached.begin(offset, losses.l1_relative, target)
        model.model(ids, use_cache=False, position_ids=offset)
        sums.append(record.local_sum.item())
    assert sums[0] == pytest.approx(sums[1] + sums[2], rel=1e-5)


def test_local_losses_follow_their_formulas():
    output = losses.LayerOutput(
        m_T=torch.tensor([0.0, 2.0, -1.0]),
        target_T=torch.tensor([False, True, False]),
        r_fd=torch.tensor([[1.0, -3.0], [0.0, 2.0]]),
        ffn_fd=torch.tensor([[2.0, 2.0], [-1.0, 0.0]]),
    )
    assert float(losses.l1(output)) == pytest.approx((4 + 2) / 2)
    assert float(losses.l1_relative(output)) == pytest.approx(4 / 4 + 2 / 1)
    s = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64).sigmoid()
    assert float(losses.cross_entropy(output)) == pytest.approx(
        float(-(1 - s[0]).log() - s[1].log() - (1 - s[2]).log())
    )


def test_labels_stop_at_the_end_of_a_document_and_of_a_window():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    offset = torch.tensor([[0, 1, 0, 1, 2]])
    assert losses.next_token_labels(ids, offset).tolist() == [[6, -100, 8, 9, -100]]


def test_export_keeps_the_gate_in_float32_and_rounds_the_weights_to_bfloat16():
    block = module().export(torch.bfloat16)[0]
    assert isinstance(block, Block)
    assert (block.gate.dtype, block.bias.dtype, block.w_in.dtype) == (torch.float32, torch.float32, torch.bfloat16)
