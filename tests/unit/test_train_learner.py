"""The learner: its loss and gradients against a dense implementation, for every method, gate and local loss."""

import pytest
import torch
import torch.nn.functional as F

from nr_serve.neutral.host import host_blocks, unhost_blocks
from nr_serve.train.activations import GATES
from nr_serve.train.blocks import AdapterModule
from nr_serve.train.learner import Learner
from nr_serve.train.methods import checkpoint_layers
from nr_serve.train.recipe import Loss
from tests import tiny

T = 10


def part(seed: int, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 256, (count, T), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(T).expand(count, T).contiguous()


def adapter(kind: str, **options) -> AdapterModule:
    made = AdapterModule.from_file(tiny.adapter(tiny.model(), 3, carry=0.5, **options))
    made.kind = kind
    return made


def learner(kind: str, local: Loss | None, *, lm_on_original: bool = False, **options) -> Learner:
    base = tiny.model().requires_grad_(False)
    return Learner(base, adapter(kind, **options), local=local, lm_on_original=lm_on_original)


FORMULAS = {
    "relu": lambda m: torch.where(m > 0, m, 0),
    "relu1": lambda m: torch.where(m > 0, m, 0).clamp(max=1),
    "elu": lambda m: torch.where(m > 0, m, m.exp() - 1),
    "sigmoid": lambda m: 1 / (1 + (-m).exp()),
    "tanh": lambda m: (m.exp() - (-m).exp()) / (m.exp() + (-m).exp()),
}


def dense(made: AdapterModule, batch, local: Loss, *, lm_on_original: bool) -> torch.Tensor:
    """LM loss + alpha * local loss with every block dense; a block's local loss does not reach the stream."""
    model = tiny.model().requires_grad_(False)
    terms, hinges, now = [], [], {"is_target": None}

    def add(layer, x, y):
        block = made.layer(layer)
        if block is None:
            return y
        if now["is_target"] is not None:
            x, y = x.detach(), y.detach()
        z = x @ block.gate + block.bias
        m = [torch.zeros_like(z[:, 0])]
        for t in range(1, T):
            m.append(made.carry * m[-1] + (1 - made.carry) * z[:, t])
        m = torch.stack(m, dim=1)
        over = m - made.threshold
        g = FORMULAS[made.kind](over)
        r = g[..., None] * F.linear(F.silu(F.linear(x, block.w_gate)) * F.linear(x, block.w_in), block.w_out)
        if now["is_target"] is None:
            hinges.append(torch.relu(1 - over[:targets]).sum())
        else:
            is_target = now["is_target"][:, None].expand_as(m)
            if local.kind == "cross-entropy":
                terms.append(F.binary_cross_entropy_with_logits(m, is_target.float(), reduction="sum"))
            else:
                scale = y.abs().sum(-1) if local.kind == "l1-relative" else float(x.shape[-1])
                terms.append((r.abs().sum(-1) / scale)[~is_target].sum())
        return y + r

    host_blocks(model, add)
    spoken = [batch[name][0] for name in (("target", "original") if lm_on_original else ("target",))]
    targets = len(spoken[0])
    ids = torch.cat(spoken)
    logits = model(ids, use_cache=False).logits[:, :-1]
    lm = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    names = ["target"] * (local.kind == "cross-entropy") + ["original", "background"]
    ids = torch.cat([batch[name][0] for name in names])
    now["is_target"] = torch.cat([torch.full((len(batch[name][0]),), name == "target") for name in names])
    model.model(ids, use_cache=False)
    hinge = torch.stack(hinges).sum() / (spoken[0].numel() * len(made.layers))
    return lm + local.open * hinge + local.alpha * torch.stack(terms).sum() / (ids.numel() * len(made.layers))


@pytest.mark.parametrize("kind", list(GATES))
@pytest.mark.parametrize("local", ["l1", "l1-relative", "cross-entropy"])
@pytest.mark.parametrize("lm_on_original", [False, True])
@pytest.mark.parametrize(("opens", "threshold"), [(0.0, 0.0), (2.0, 0.25)])
@pytest.mark.parametrize("bare_layers", [(), (1,)])
def test_loss_and_gradients_equal_a_dense_implementation(
    kind, local, lm_on_original, opens, threshold, bare_layers
):
    batch = {"target": part(1), "original": part(2, 1), "background": part(3, 1)}
    loss = Loss(alpha=3.0, kind=local, open=opens)
    ours = learner(kind, loss, lm_on_original=lm_on_original, bare_layers=bare_layers)
    theirs = adapter(kind, bare_layers=bare_layers)
    ours.adapter.threshold = theirs.threshold = threshold
    output = ours(**batch)
    expected = dense(theirs, batch, loss, lm_on_original=lm_on_original)
    assert output["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    means = {name: (total / over).item() for name, (total, over) in output["sums"].items()}
    if not opens:
        assert output["loss"].item() == pytest.approx(means["lm"] + 3 * means["local"], rel=1e-5)
    output["loss"].backward()
    expected.backward()
    for (name, p), q in zip(ours.adapter.named_parameters(), theirs.parameters(), strict=True):
        scale = q.grad.abs().max().clamp_min(1e-4)
        assert torch.allclose(p.grad / scale, q.grad / scale, atol=5e-4), name


def test_the_local_loss_alone_moves_every_part_of_a_block():
    made = learner("relu", Loss(alpha=1.0, kind="l1"))
    with_quiet = {"target": part(1), "original": part(2)}
    grads = []
    for batch in ({"target": part(1)}, with_quiet):
        made.zero_grad(set_to_none=True)
        made(**batch)["loss"].backward()
        grads.append({name: p.grad.clone() for name, p in made.adapter.named_parameters()})
    assert all((grads[0][name] != grads[1][name]).any() for name in grads[0])


def test_the_hinge_is_there_without_the_local_loss():
    batch = {"target": part(1), "original": part(2)}
    losses = [learner("relu", Loss(alpha=0.0, open=opens))(**batch)["loss"].item() for opens in (0.0, 2.0, 4.0)]
    assert losses[0] < losses[1]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_changes_no_gradient():
    batch = {"target": part(1), "original": part(2)}
    grads, passes = [], []
    for checkpointing in (False, True):
        made, calls = learner("relu", Loss(open=1.0)), []
        made.train()
        if checkpointing:
            checkpoint_layers(made.base)
        made.base.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        made(**batch)["loss"].backward()
        grads.append([p.grad for p in made.adapter.parameters()])
        passes.append(len(calls))
        assert not made.attached.now.hinges, "they would keep the layers' tensors until the next pass"
    assert passes[1] == passes[0] + 1, "the layer is computed again in the backward pass"
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_compiling_changes_no_gradient():
    batch = {"target": part(1), "original": part(2)}
    grads = []
    for compiled in (False, True):
        made = learner("relu", Loss(open=1.0))
        # All of torch.compile but the compiler of machine code, which takes minutes.
        call = torch.compile(made, backend="eager") if compiled else made
        call(**batch)["loss"].backward()
        grads.append([p.grad for p in made.adapter.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_a_layers_ffn_is_compiled_once_for_all_layers():
    model = tiny.model(num_hidden_layers=12)
    host_blocks(model, torch.compiler.disable(lambda layer, x, y: y + layer * x))
    ids = part(1)[0]
    expected = model(ids, use_cache=False).logits
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # 8 by default, and the rest not compiled
        found = torch.compile(model, backend="eager")(ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_batch_on_which_no_gate_fires_is_a_step_of_no_length():
    made = learner("relu", Loss(open=0.0))
    for i in range(tiny.LAYERS):
        made.adapter.layer(i).bias.data.fill_(-1e6)
    output = made(target=part(1), original=part(2))
    output["loss"].backward()
    assert all(not p.grad.any() for p in made.adapter.parameters())
    assert [output["sums"][name][0] for name in ("target_fired", "other_fired")] == [0, 0]


def test_unhosting_gives_the_model_its_own_layers_back():
    model = tiny.model()
    names = [name for name, _ in model.named_modules()]
    host_blocks(model, lambda layer, x, y: y)
    assert [name for name, _ in model.named_modules()] != names
    unhost_blocks(model)
    assert [name for name, _ in model.named_modules()] == names
