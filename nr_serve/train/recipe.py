"""The recipe of one adapter: a TOML file, read into frozen models. Unknown keys are refused.

Knows nothing of torch, so that a recipe can be checked without loading a model.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nr_serve.errors import BadRequest
from nr_serve.neutral import block_width

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Globs = tuple[str, ...]


class BadRecipe(BadRequest):
    """A recipe that cannot be trained as it stands."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(_Section):
    """Which text of the corpus folder plays which part. Globs of file names; a file is `<lang>.<source>...`."""

    target: Globs = Field(min_length=1, description="Text of the domain to learn.")
    original: Globs = Field(
        min_length=1, description="Text of the base's own domain: each file is a class the gates must stay shut on."
    )
    background: Globs = Field(
        default=(), description="Text of other domains: each language is a class the gates must stay shut on."
    )
    heldout: Globs = Field(default=(), description="Text measured during training and never trained on.")
    chat: bool = Field(
        default=True,
        description="Also keep the gates shut on original text wrapped in the base's chat template, if it has one.",
    )


class Blocks(_Section):
    """The shape of the blocks; give exactly one of `h` and `capacity`."""

    h: Positive | None = Field(default=None, description="Width of every block.")
    capacity: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Extra parameters as a share of the base's: h = capacity N / (3 d L), to a multiple of 16.",
    )
    carry: float = Field(
        default=0.5, ge=0, lt=1, description="a in m_t = a m_(t-1) + (1 - a) z_t; 0 is the paper's gate."
    )

    @model_validator(mode="after")
    def _one_size(self) -> Blocks:
        if (self.h is None) == (self.capacity is None):
            raise ValueError("give exactly one of h and capacity")
        return self

    def width(self, parameters: int, d: int, layers: int) -> int:
        """Width h of a block for a base with that many parameters, width d and layers; at least 16."""
        if self.h is not None:
            return self.h
        assert self.capacity is not None
        return block_width(self.capacity, parameters=parameters, d=d, layers=layers)


class Gate(_Section):
    """How the gates start, and whether they train."""

    init: Literal["closed-form", "paper"] = Field(
        default="closed-form",
        description="closed-form: ridge regression against the other classes; paper: random, variance 1/(d L).",
    )
    trained: bool = Field(default=False, description="Whether gradient steps move the gates.")
    percentile: float = Field(
        default=99.5,
        gt=50,
        lt=100,
        description="The threshold is the highest of every other class's percentile of the logit.",
    )
    fit_tokens: Positive = Field(default=8192, description="Tokens of each class that fit and calibrate the gates.")
    ridge: float = Field(
        default=1e-3, gt=0, description="Ridge penalty, as a share of the mean variance of an input feature."
    )
    min_found: Share = Field(
        default=0.0, description="Layers whose gate finds less than this share of the target get no block."
    )

    @model_validator(mode="after")
    def _learns(self) -> Gate:
        if self.init == "paper" and not self.trained:
            raise ValueError("random gates (init = 'paper') must be trained")
        return self


class Loss(_Section):
    """The local loss, which keeps the blocks quiet on text that is not the target's."""

    alpha: float = Field(default=1.0, ge=0, description="Weight of the local loss beside the LM loss.")
    kind: Literal["l1", "l1-relative"] = Field(
        default="l1-relative",
        description="l1: the residue's l1 norm over d; l1-relative: over the l1 norm of the FFN's own output.",
    )
    lm_on_original: bool = Field(
        default=False, description="Whether the original windows of a batch carry the LM loss too."
    )


class Run(_Section):
    """The gradient steps."""

    tokens: Positive = Field(description="Budget: tokens of all windows, target and not, before training ends.")
    window: int = Field(default=256, ge=8, description="Tokens a window.")
    batch_tokens: Positive = Field(default=1024, description="Tokens a step; a multiple of the window.")
    original_share: Share = Field(default=0.1, description="Share of the windows that is original text.")
    background_share: Share = Field(default=0.1, description="Share of the windows that is background text.")
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    clip: float = Field(default=1.0, gt=0, description="Gradients are scaled down to this norm.")
    warmup_tokens: int = Field(default=10_000, ge=0, description="Tokens over which the learning rate rises.")
    schedule: Literal["cosine", "constant-decay", "constant"] = Field(
        default="cosine",
        description="cosine: to 0 over the budget; constant-decay: constant, then linear to 0; constant: level.",
    )
    decay_share: float = Field(
        default=0.25, gt=0, le=1, description="Share of the budget, at its end, over which constant-decay falls."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the blocks' start and of the order of the text.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type the base computes in; the blocks' weights are float32."
    )
    log_every: Positive = Field(default=5, description="Steps between two lines of the log.")
    checkpoint_every: Positive = Field(default=10_000, description="Tokens between two checkpoints.")
    validate_every: Positive = Field(
        default=50_000, description="Tokens between two measurements on held-out text."
    )
    validate_windows: Positive = Field(default=8, description="Windows of each held-out class measured then.")

    @model_validator(mode="after")
    def _fits(self) -> Run:
        if self.batch_tokens % self.window:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) is not a multiple of window ({self.window})")
        if self.windows_a_step * (1 - self.original_share - self.background_share) < 1:
            raise ValueError("the shares leave less than one target window a step")
        if self.tokens < self.batch_tokens:
            raise ValueError("tokens is less than one step")
        return self

    @property
    def windows_a_step(self) -> int:
        """Windows in one batch."""
        return self.batch_tokens // self.window

    @property
    def steps(self) -> int:
        """Gradient steps in the budget."""
        return self.tokens // self.batch_tokens

    @property
    def decay_start(self) -> int:
        """Tokens after which the learning rate depends on the budget."""
        if self.schedule == "cosine":
            return self.warmup_tokens
        return self.tokens if self.schedule == "constant" else round(self.tokens * (1 - self.decay_share))


class Recipe(_Section):
    """Everything that decides what an adapter becomes, besides the text itself."""

    base: str = Field(default="default", description="`default` (SmolLM2-135M), a folder or a model hub's name.")
    domain: str = Field(min_length=1, description="What is learned: a language tag such as `hu`, or a name.")
    data: Data
    blocks: Blocks
    gate: Gate = Gate()
    loss: Loss = Loss()
    run: Run

    def dump(self) -> dict[str, Any]:
        """The recipe as plain values, for JSON."""
        return self.model_dump(mode="json")

    def continues(self, earlier: Recipe, tokens: int) -> bool:
        """Whether a run of `earlier` that has seen `tokens` is also the start of this recipe's run.

        The budget may differ while the learning rate has not depended on it; what is only logged may differ.
        """
        free = {"log_every", "checkpoint_every", "validate_every", "validate_windows"}
        if self.run.tokens != earlier.run.tokens and tokens <= min(self.run.decay_start, earlier.run.decay_start):
            free |= {"tokens"}
        mine, other = self.dump(), earlier.dump()
        for name in free:
            mine["run"].pop(name)
            other["run"].pop(name)
        return mine == other


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises BadRecipe, naming the key at fault."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRecipe(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(f"{path.name} is not TOML: {error}") from error
    return parse_recipe(values, path.name)


def parse_recipe(values: dict[str, Any], name: str = "recipe") -> Recipe:
    """Check a recipe's values. Raises BadRecipe, naming every key at fault."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(_fault(one) for one in error.errors())
        raise BadRecipe(f"{name}: {faults}") from error


def _fault(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key"
    return f"{key}: {error['msg'].removeprefix('Value error, ')}"
