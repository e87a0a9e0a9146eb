"""The training methods: what each adds to a base and trains in it, of equal size except finetuning.

neutral     gated blocks (arXiv 2410.02744)
adapter     the same blocks with a gate that is always 1 and no local loss: a parallel adapter (arXiv 2110.04366)
lora        a low-rank update of every linear layer (arXiv 2106.09685), by PEFT
finetune    every parameter of the base
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from nr_serve.neutral.format import naming, read_adapter
from nr_serve.train.blocks import VARIANCE, AdapterModule, is_gate
from nr_serve.train.frozen_base import FrozenBase
from nr_serve.train.learner import Learner
from nr_serve.train.recipe import BadRecipe, Recipe


def make_learner(recipe: Recipe, base: FrozenBase, *, restored: bool = False) -> Learner:
    """The learner of a recipe's method, whose trained parameters require a gradient. Changes the base in place.

    With `restored`, a checkpoint's weights are loaded next: the file that the recipe starts from is not read.
    Raises BadRecipe if the blocks do not fit the base, or the file they start from; BadAdapterFile.
    """
    base.model.requires_grad_(False)
    adapter = None
    if recipe.method in ("neutral", "adapter"):
        adapter = fresh_blocks(recipe, base, restored=restored)
    elif recipe.method == "lora":
        add_lora(recipe, base)
    else:
        base.model.requires_grad_(True)
    if recipe.run.gradient_checkpointing:
        checkpoint_layers(base.model)
    return Learner(
        base.model,
        adapter,
        local=recipe.loss if recipe.method == "neutral" else None,
        lm_on_original=recipe.lm_on_original,
    )


def checkpoint_layers(model: Any) -> None:
    """In training, store only each layer's input and compute the rest again in the backward pass."""
    # The old name, deprecated where the new one exists, is the only one in transformers 5.17.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def fresh_blocks(recipe: Recipe, base: FrozenBase, *, restored: bool = False) -> AdapterModule:
    """The blocks as training starts; their gates take a gradient only if the recipe trains them.

    With `restored`, the file that the recipe starts from is not read.
    Raises BadRecipe if they do not fit the base, or the file they start from; BadAdapterFile.
    """
    blocks, gate = recipe.blocks, recipe.gate
    kind = "none" if recipe.method == "adapter" else gate.kind
    adapter = AdapterModule.fresh(
        blocks.widths(base.parameters, base.d, base.layers),
        base.d,
        blocks.carry,
        recipe.run.seed,
        variance=VARIANCE[blocks.init],
        gate_variance=VARIANCE["he" if gate.init == "he" else "paper"],
        kind=kind,
    )
    if blocks.start is not None and not restored:
        adapter = _started(Path(blocks.start), adapter, base)
    adapter.threshold = recipe.threshold
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(not is_gate(name) or (gate.trained and recipe.method == "neutral"))
    return adapter


def start_version(recipe: Recipe) -> str | None:
    """Version of the adapter file that the recipe starts from; None if there is none, or the file is gone.

    Raises BadAdapterFile.
    """
    if recipe.blocks.start is None or not Path(recipe.blocks.start).exists():
        return None
    with naming(Path(recipe.blocks.start)):
        return read_adapter(Path(recipe.blocks.start)).version


def _started(file: Path, fresh: AdapterModule, base: FrozenBase) -> AdapterModule:
    """The blocks and gates of an adapter file. Raises BadRecipe if they are not of the shape of the fresh ones."""
    with naming(file):
        started = AdapterModule.from_file(read_adapter(file, base.identity))
    there, here = _shape(started), _shape(fresh)
    for name, wanted in here.items():
        if there[name] != wanted:
            raise BadRecipe(f"blocks.start: {name} is {there[name]} in {file} and {wanted} in the recipe")
    return started


def _shape(adapter: AdapterModule) -> dict[str, Any]:
    modules = map(adapter.layer, range(adapter.depth))
    widths = [0 if module is None else module.w_in.shape[0] for module in modules]
    return {"the carry": adapter.carry, "the kind of gate": adapter.kind, "the width of blocks, by layer": widths}


def block_parameters(recipe: Recipe, base: FrozenBase) -> int:
    """Number of parameters in the recipe's blocks, without their gates."""
    return sum(3 * h * base.d for h in recipe.blocks.widths(base.parameters, base.d, base.layers))


def lora_rank(recipe: Recipe, base: FrozenBase) -> int:
    """The recipe's rank; by default the rank at which LoRA has as many parameters as the blocks.

    Raises BadRecipe for a rank above the base's width, because the update would not be of low rank.
    """
    rank = recipe.lora.rank
    if rank is not None:
        if rank > base.d:
            raise BadRecipe(f"lora.rank is {rank:,}; the base is {base.d:,} wide")
        return rank
    return rank_for(base.model, block_parameters(recipe, base))


def rank_for(model: Any, parameters: int) -> int:
    """The rank at which LoRA, on every linear layer except the head, comes nearest to so many parameters."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return max(1, round(parameters / sum(layer.in_features + layer.out_features for layer in layers)))


def add_lora(recipe: Recipe, base: FrozenBase) -> None:
    """Give a base the recipe's low-rank update, in place."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.run.seed)
        inject_lora(base.model, lora_rank(recipe, base), recipe.lora.alpha)


def inject_lora(model: Any, rank: int, alpha: int) -> list[nn.Parameter]:
    """Give every linear layer except the output head a low-rank update, in place, by PEFT; return its parameters.

    The update is scaled by alpha / rank. B starts at 0, so the model starts out equal to the base.
    """
    from peft import LoraConfig, inject_adapter_in_model  # transformers' own way demands certain peft versions

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config._name_or_path,
    )
    inject_adapter_in_model(config, model)
    made = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in made:
        parameter.data = parameter.data.float()  # in bfloat16, small updates would be lost
    return made


def save_lora(folder: Path, base: FrozenBase) -> None:
    """Write a base's `add_lora` update as a folder that PEFT can read."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(base.model)
    folder.mkdir(parents=True, exist_ok=True)
    base.model.peft_config["default"].save_pretrained(folder)
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}  # as in a PeftModel
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
