"""Recipes: what is refused and what it says, sizes, and which run continues which."""

import copy
import math
from pathlib import Path

import pytest

from nr_serve.train.recipe import BadRecipe, Recipe
from nr_serve.train.recipe_file import parse_recipe, read_recipe, read_toml

SMALL = {
    "domain": "hu",
    "data": {"target": ["hu.*"], "original": ["en.*"]},
    "blocks": {"h": 16},
    "run": {"tokens": 8192, "window": 128, "batch_tokens": 512},
}


def recipe(**sections) -> Recipe:
    values = copy.deepcopy(SMALL)
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return parse_recipe(values)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"gate": {"percentil": 99}}, "recipe: gate.percentil: "),
        ({"speed": "fast"}, "recipe: speed: "),
        ({"run": {"tokens": "many"}}, "run.tokens"),
        ({"run": {"batch_tokens": 500}}, "batch_tokens (500) is not a multiple of window (128)"),
        (
            {"run": {"original_share": 0.5, "background_share": 0.4}},
            "original_share and run.background_share may leave a step without a target window",
        ),
        ({"run": {"tokens": 100}}, "tokens is less than one step"),
        ({"blocks": {"capacity": 0.1}}, "exactly one of h and capacity"),
        ({"blocks": {"carry": 1.0}}, "blocks.carry"),
        ({"gate": {"init": "paper"}}, "must be trained"),
        ({"gate": {"trained": True}, "run": {"original_share": 0}}, "need run.original_share above 0"),
        ({"gate": {"kind": "none"}, "run": {"original_share": 0}}, "need run.original_share above 0"),
        ({"gate": {"init": "paper", "trained": True, "threshold": 0.3}}, "random gates hardly pass a threshold"),
        ({"gate": {"kind": "none", "threshold": 0.1}}, "always open"),
        ({"gate": {"threshold": 1.1e6}}, "gate.threshold: Input should be less than or equal to 1000000"),
        ({"gate": {"steepness": 5.1e6}}, "gate.steepness: Input should be less than or equal to 5000000"),
        ({"loss": {"kind": "l2"}}, "loss.kind"),
        *(
            ({"method": method, "blocks": {"start": "a.safetensors"}}, f"and method '{method}' has none")
            for method in ("lora", "finetune")
        ),
        ({"data": {"target": []}}, "data.target"),
        *(({"domain": name}, "domain: ") for name in ("../hu", "/hu", "", ".", "a\nb", "a b", "h" * 65)),
        ({"run": {"lr": math.inf}}, "run.lr: Input should be a finite number"),
        ({"run": {"weight_decay": math.inf}}, "run.weight_decay: Input should be a finite number"),
        ({"run": {"tokens": 10**23}}, "run.tokens: Input should be less than"),
        ({"run": {"warmup_tokens": 10**23}}, "run.warmup_tokens: Input should be less than"),
        ({"run": {"window": 10**12, "batch_tokens": 10**12}}, "run.window: Input should be less than"),
        ({"run": {"lr": 1e300}}, "run.lr: Input should be less than"),
        ({"run": {"out_lr_ratio": 1e300}}, "run.out_lr_ratio: Input should be less than"),
        ({"run": {"weight_decay": 1e300}}, "run.weight_decay: Input should be less than"),
        ({"loss": {"alpha": 1e300}}, "loss.alpha: Input should be less than"),
        ({"loss": {"open": 1e300}}, "loss.open: Input should be less than"),
        # Beyond these, float32 tells the target's logits from no other's.
        ({"gate": {"ridge": 1e300}}, "gate.ridge: Input should be less than or equal to 10000"),
        ({"gate": {"target_weight": 1e-12}}, "gate.target_weight: Input should be greater than or equal to"),
        ({"gate": {"steepness": 1e-46}}, "gate.steepness: Input should be greater than or equal to"),
        ({"run": {"lr": True}}, "run: lr: true and false are no numbers"),
        ({"blocks": {"h": True, "carry": False}}, "h, carry: true and false are no numbers"),
        ({"blocks": {"h": 10**12}}, "recipe: blocks.h: Input should be less than"),
        ({"blocks": {"h": [16, 10**12]}}, "blocks.h.1: Input should be less than"),
        ({"lora": {"rank": 10**12}}, "lora.rank: Input should be less than"),
        ({"run": {"seed": 2**32}}, "run.seed: Input should be less than"),
    ],
)
def test_a_wrong_recipe_is_refused_by_the_key(sections, said):
    with pytest.raises(BadRecipe, match=r".") as error:
        recipe(**sections)
    assert said in error.value.message


def test_a_fitted_gates_threshold_is_a_fifth_of_its_steepness_unless_given():
    assert recipe().threshold == pytest.approx(0.6)
    assert recipe(gate={"steepness": 2}).threshold == pytest.approx(0.4)
    assert recipe(gate={"threshold": 0.2}).threshold == 0.2
    assert recipe(gate={"kind": "relu"}).threshold == 0
    assert recipe(method="adapter").threshold == 0


def test_all_faults_are_told_at_once():
    with pytest.raises(BadRecipe) as error:
        parse_recipe({"domain": "hu", "x": 1})
    assert all(name in error.value.message for name in ("x: ", "data", "blocks", "run"))


def test_a_file_that_is_missing_or_not_toml_is_refused(tmp_path: Path):
    with pytest.raises(BadRecipe, match="cannot read"):
        read_recipe(tmp_path / "none.toml")
    for text in ("a = = 1", "a = " + "9" * 5000, "a = " + "[" * 9999 + "]" * 9999):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(BadRecipe, match=r"bad.toml is not TOML"):
            read_recipe(tmp_path / "bad.toml")


def test_the_mark_that_some_editors_begin_with_is_no_part_of_a_recipe(tmp_path: Path):
    (tmp_path / "marked.toml").write_text('domain = "hu"\n', encoding="utf-8-sig")
    assert read_toml(tmp_path / "marked.toml") == {"domain": "hu"}


def test_a_key_set_below_what_is_no_section_is_refused(tmp_path: Path):
    (tmp_path / "r.toml").write_text("run = 5\n")
    with pytest.raises(BadRecipe, match=r"run\.lr: run is not a section"):
        read_recipe(tmp_path / "r.toml", {"run.lr": 1})


@pytest.mark.parametrize(("capacity", "h"), [(0.05, 128), (0.2, 512), (0.0001, 16)])
def test_capacity_gives_the_width(capacity, h):
    sized = recipe(blocks={"h": None, "capacity": capacity})
    assert sized.blocks.widths(134_515_008, 576, 30) == (h,) * 30


def test_widths_may_differ_between_layers():
    sized = recipe(blocks={"h": [16, 0, 32]})
    assert sized.blocks.widths(10**6, 64, 3) == (16, 0, 32)
    with pytest.raises(BadRecipe, match=r"blocks\.h lists 3 widths; the base has 4 layers"):
        sized.blocks.widths(10**6, 64, 4)
    with pytest.raises(BadRecipe, match="no layer has a block"):
        recipe(blocks={"h": [0, 0]})


def test_every_field_says_what_it_is():
    def sections(model):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if hasattr(inner, "model_fields"):
                yield from sections(inner)
            else:
                yield name, field

    assert [name for name, field in sections(Recipe) if not field.description] == []


def test_only_what_is_logged_or_saves_memory_or_time_may_change_on_resume():
    first = recipe()
    assert recipe(run={"log_every": 1, "validate_every": 512}).changed(first, 4096) == {}
    saves = {"accumulate": 2, "gradient_checkpointing": True, "compile": True}
    assert recipe(run=saves).changed(first, 4096) == {}
    assert recipe(run={"lr": 1e-4}).changed(first, 4096) == {"run.lr": (1e-4, 4e-3)}
    assert recipe(gate={"percentile": 99}).changed(first, 0) == {"gate.percentile": (99, 99.5)}


def test_when_a_run_that_may_stop_is_measured_decides_what_it_becomes():
    first = recipe(run={"patience": 2})
    changed = recipe(run={"patience": 2, "validate_every": 512, "log_every": 1}).changed(first, 4096)
    assert list(changed) == ["run.validate_every"]


def test_the_budget_may_grow_until_the_learning_rate_falls():
    level = {"schedule": "constant-decay", "decay_share": 0.25}
    first, longer = recipe(run=level), recipe(run=level | {"tokens": 16384})
    assert longer.changed(first, 6144) == {}
    assert list(longer.changed(first, 6145)) == ["run.tokens"]
    assert list(recipe(run={"tokens": 16384}).changed(recipe(), 4096 + 10_000)) == ["run.tokens"]


def test_the_budget_may_shrink_to_what_the_run_has_taken_but_not_below():
    rising = {"schedule": "cosine", "warmup_tokens": 100_000}  # the rate does not depend on the budget yet
    first, shorter = recipe(run=rising), recipe(run=rising | {"tokens": 4096})
    assert shorter.changed(first, 4096) == {}
    assert shorter.changed(first, 4608) == {"run.tokens": (4096, 8192)}


SHIPPED = sorted((Path(__file__).parents[2] / "adapters").glob("*/recipe.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_recipes_are_read(path: Path):
    shipped = read_recipe(path)
    assert parse_recipe(shipped.dump()) == shipped
    assert shipped.domain == path.parent.name


def test_a_local_loss_that_cannot_move_anything_is_refused():
    with pytest.raises(BadRecipe, match=r"it needs gate\.trained"):
        recipe(loss={"kind": "cross-entropy"})
    assert recipe(loss={"kind": "cross-entropy"}, gate={"trained": True}, run={"original_share": 0.1}).gate.trained


@pytest.mark.parametrize("method", ["finetune", "lora", "adapter"])
def test_a_share_of_text_that_is_not_read_takes_no_window(method):
    step = {"window": 128, "batch_tokens": 256, "original_share": 0.1, "background_share": 0.1}
    assert recipe(method=method, run=step).plan.fewest_targets == 1
    with pytest.raises(BadRecipe, match="without a target window"):
        recipe(run=step)


@pytest.mark.parametrize(
    ("gate", "idle"),
    [
        ({"percentile": 99.0, "min_found": 0.3}, ["blocks.init", "gate.min_found"]),
        ({"percentile": 99.0, "refit": False}, ["blocks.init", "gate.percentile"]),
        ({"init": "closed-form", "trained": True}, ["blocks.init", "gate.init"]),
    ],
)
def test_where_blocks_are_gone_on_from_keys_of_their_start_do_nothing(gate, idle):
    begun = {"start": "a.safetensors", "init": "paper"}
    assert recipe(gate=gate, blocks=begun).idle == idle
    assert recipe(gate=gate).idle == []
    assert recipe(gate=gate, blocks=begun, method="adapter").idle == ["blocks.init"]
