"""The recipe of one adapter, as frozen models. Unknown keys are refused.

Does not import torch, so that a recipe can be checked without loading a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nr_serve.errors import BadRequest
from nr_serve.names import NAME
from nr_serve.neutral import MAX_THRESHOLD, block_width
from nr_serve.train.entries import DATASETS, names_source


def _at_most(most: float) -> AfterValidator:
    """Refuses numbers too large for torch and transformers; a validator does not show in the table of keys."""

    def check(value: float) -> float:
        if value > most:
            raise ValueError(f"Input should be less than or equal to {most}")
        return value

    return AfterValidator(check)


Count = Annotated[int, Field(ge=0), _at_most(2**53)]
Positive = Annotated[int, Field(gt=0), _at_most(2**53)]
Width = Annotated[int, Field(gt=0), _at_most(2**20)]
WidthOrZero = Annotated[int, Field(ge=0), _at_most(2**20)]
Seed = Annotated[int, Field(ge=0), _at_most(2**32 - 1)]
Weight = Annotated[float, Field(ge=0), _at_most(10**6)]
Factor = Annotated[float, Field(gt=0), _at_most(10**6)]
Share = Annotated[float, Field(ge=0, lt=1)]
Entries = tuple[str, ...]


class BadRecipe(BadRequest):
    """A recipe cannot be followed as it stands."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _tell_numbers_from_booleans(cls, values: Any) -> Any:
        """Refuse `true` and `false` for a number, which would be 1 and 0."""
        given = values if isinstance(values, dict) else {}
        numbers = {name for name, field in cls.model_fields.items() if field.annotation is not bool}
        wrong = [name for name, value in given.items() if isinstance(value, bool) and name in numbers]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: true and false are no numbers")
        return values


class Data(_Section):
    """Which text plays which part.

    An entry is a glob of files in the corpus folder, each named `<lang>.<source>...`, or a data set that the
    library `datasets` streams, `datasets:NAME[:CONFIG][@SPLIT]`, where NAME is one on the hub or a folder and SPLIT
    is `train` by default. After `!`, a glob leaves out of what the entries before it name:
    `["*.*.train.txt", "!cs.*"]`. A `.jsonl` file holds one document per line, any other one paragraph per line
    and an empty line between documents; both may be compressed, `.gz` or `.xz`.
    """

    target: Entries = Field(min_length=1, description="Text of the domain to learn.")
    original: Entries = Field(
        min_length=1,
        description="Text of the base's own domain: each source is a class the gates must stay shut on.",
    )
    background: Entries = Field(
        default=(),
        description="Text of other domains: each language and data set is a class the gates must stay shut on.",
    )
    heldout: Entries = Field(default=(), description="Text measured during training and never trained on.")
    text_field: str = Field(
        default="text", min_length=1, description="The field of JSONL lines and data sets that holds a document."
    )
    target_tokens: Positive | None = Field(
        default=None,
        description="Read no more of the target than this many tokens (default: all of it). A run reads them again "
        "and again, however long it is, so that it can be continued with a larger budget.",
    )
    end_of_text: bool = Field(
        default=False,
        description="End each document of the text trained on with the tokenizer's end-of-text token, so that "
        "answers learn where to end.",
    )
    chat: bool = Field(
        default=True,
        description="Also fit the gates to text in the base's chat template, if it has one: shut on original text, "
        "open on the target.",
    )

    @model_validator(mode="after")
    def _bounded(self) -> Data:
        if self.target_tokens is None and any(entry.startswith(DATASETS) for entry in self.target):
            raise ValueError("target_tokens is needed when the target is a data set, which may have no end")
        return self


class Blocks(_Section):
    """The shape of the blocks; give exactly one of `h` and `capacity`."""

    h: Width | tuple[WidthOrZero, ...] | None = Field(
        default=None, description="Width of every block, or one a layer (0: no block there)."
    )
    capacity: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Extra parameters as a share of the base's: h = capacity N / (3 d L), to a multiple of 16.",
    )
    init: Literal["paper", "he"] = Field(
        default="he", description="Variance of W_in and W_gate at the start: paper: 1 / (d L); he: 2 / d."
    )
    carry: float = Field(
        default=0.8, ge=0, le=0.999, description="a in m_t = a m_(t-1) + (1 - a) z_t; 0 is the paper's gate."
    )
    start: str | None = Field(
        default=None,
        description="An adapter file that training goes on from, as with more text. Its gates are used as they "
        "are, and fitted again after the last step only. Sizes, carry and kind must be the same. Not for lora and "
        "finetune.",
    )

    @model_validator(mode="after")
    def _one_size(self) -> Blocks:
        if (self.h is None) == (self.capacity is None):
            raise ValueError("give exactly one of h and capacity")
        if isinstance(self.h, tuple) and not any(self.h):
            raise ValueError("no layer has a block")
        return self

    def widths(self, parameters: int, d: int, layers: int) -> tuple[int, ...]:
        """Width h of each layer's block, for a base with this many parameters, width d and this many layers.

        Raises BadRecipe if the recipe lists widths for another number of layers, or if the blocks would be larger
        than the base.
        """
        if self.capacity is not None:
            return (block_width(self.capacity, parameters=parameters, d=d, layers=layers),) * layers
        assert self.h is not None
        widths = self.h if isinstance(self.h, tuple) else (self.h,) * layers
        if len(widths) != layers:
            raise BadRecipe(f"blocks.h lists {len(widths)} widths; the base has {layers} layers")
        if 3 * d * sum(widths) > parameters:
            raise BadRecipe(
                f"blocks.h makes blocks of {3 * d * sum(widths):,} parameters; the base has {parameters:,}"
            )
        return widths


@dataclass(frozen=True)
class ResolvedGate:
    """Values of the keys of `Gate` whose defaults or effect depend on other keys; described there."""

    steepness: float
    threshold: float
    refit: bool


FIT_KEYS = {
    "percentile",
    "background_percentile",
    "target_weight",
    "steepness",
    "ridge",
    "fit_tokens",
    "min_found",
    "refit",
}
"""Keys of `Gate` about how gates are fitted."""


class Gate(_Section):
    """How the gates look and start, and whether they train. Only a neutral run reads it."""

    kind: Literal["relu1", "relu", "elu", "sigmoid", "tanh", "none"] = Field(
        default="relu1",
        description="The gate as a function of the logit; relu, the paper's, is relu(m), and relu1 at most 1. Only "
        "these two, and none, can be served.",
    )
    init: Literal["closed-form", "logistic", "paper", "he"] = Field(
        default="logistic",
        description="closed-form: ridge regression against the other classes; logistic: logistic regression "
        "against them; paper: random, variance 1 / (d L); he: random, variance 2 / d.",
    )
    trained: bool = Field(default=False, description="Whether gradient steps move the gates.")
    percentile: float = Field(
        default=99.5,
        gt=50,
        lt=100,
        description="A fitted gate's logit is 0 at this percentile of the original class where that is highest.",
    )
    background_percentile: float = Field(
        default=99.0, gt=50, lt=100, description="The same for background classes."
    )
    target_weight: float = Field(
        default=0.01,
        ge=1e-9,
        lt=1,
        description="The target's share of the fit's weight; less of it, fewer misfires.",
    )
    steepness: float | None = Field(
        default=None,
        ge=1e-6,
        le=5 * MAX_THRESHOLD,
        description="Fitted gates are scaled until m averages this over the tokens of the target that open them "
        "(default: 3 for relu1, so that most of those are fully open, else 1).",
    )
    refit: bool = Field(
        default=True,
        description="Whether fitted gates that are not trained are fitted again after the last step, on the stream "
        "as the trained blocks leave it: those fitted to the base's misfire after blocks.",
    )
    fit_tokens: Positive = Field(
        default=6144,
        description=(
            "Tokens of each class, four times as many of the target, and of what adapters beside it learned: half "
            "fit the gates, half set where they open. Every other window of target and background text continues a "
            "page of original text, or a chat. Twice as many find more, and leak less or more, for twice the time."
        ),
    )
    ridge: float = Field(
        default=1e-4,
        gt=0,
        le=1e4,
        description="Ridge penalty, as a share of the mean variance of an input feature.",
    )
    threshold: float | None = Field(
        default=None,
        ge=0,
        le=MAX_THRESHOLD,
        description="What m must pass for a gate to open, in training and in the file: it trades some learning for "
        "less leak (default: a fifth of the steepness for fitted relu1 gates, else 0).",
    )
    min_found: Share = Field(
        default=0.0,
        description="Layers whose gate finds less than this share of the target, at threshold 0, get no block.",
    )

    @property
    def fitted(self) -> bool:
        """Whether the gates are fitted before training, rather than random or absent."""
        return self.kind != "none" and self.init in ("closed-form", "logistic")

    @property
    def resolved(self) -> ResolvedGate:
        """The keys whose defaults, or whose effect, depend on other keys."""
        steepness = self.steepness or (3.0 if self.kind == "relu1" else 1.0)
        threshold = steepness / 5 if self.kind == "relu1" and self.fitted else 0.0
        return ResolvedGate(
            steepness=steepness,
            threshold=threshold if self.threshold is None else self.threshold,
            refit=self.refit and self.fitted and not self.trained,
        )

    @model_validator(mode="after")
    def _learns(self) -> Gate:
        if self.kind != "none" and not self.fitted and not self.trained:
            raise ValueError(f"random gates (init = '{self.init}') must be trained")
        if self.kind == "none" and (self.trained or self.threshold):
            raise ValueError("a gate of kind 'none' is always open: it has nothing to train, and no threshold")
        if self.kind in ("relu", "relu1") and not self.fitted and self.threshold:
            raise ValueError("random gates hardly pass a threshold, so they would never learn: it must be 0")
        return self


class Loss(_Section):
    """The local loss, which keeps the blocks quiet on text not of the target. Only a neutral run reads it."""

    alpha: Weight = Field(default=100.0, description="Weight of the local loss beside the LM loss.")
    kind: Literal["l1", "l1-relative", "cross-entropy"] = Field(
        default="l1-relative",
        description="l1: the residue's l1 norm over d; l1-relative: over the l1 norm of the FFN's own output; "
        "cross-entropy: of the gate's logit, as a classifier of the target.",
    )
    lm_on_original: bool = Field(
        default=False, description="Whether the original windows of a batch carry the LM loss too."
    )
    open: Weight = Field(
        default=0.0,
        description="Weight of the hinge relu(1 - (m - threshold)) on the target's tokens, beside the LM loss: at "
        "high learning rates the blocks move the stream, and would shut the gates of the layers above.",
    )


class Lora(_Section):
    """The shape of the LoRA baseline. Only a lora run reads it."""

    rank: Width | None = Field(
        default=None, description="Rank on every linear layer (default: as many parameters as the blocks have)."
    )
    alpha: Positive = Field(default=32, description="LoRA's alpha: its update is scaled by alpha over rank.")


class Run(_Section):
    """The gradient steps."""

    tokens: Positive = Field(description="Budget: tokens of all windows, target and not, before training ends.")
    window: Annotated[int, Field(ge=8), _at_most(10**6)] = Field(default=256, description="Tokens a window.")
    batch_tokens: Positive = Field(
        default=1024, description="Tokens a step, over all processes; a multiple of the window."
    )
    accumulate: Positive = Field(
        default=1,
        description="Parts that each process takes a step in, one after the other, to save memory.",
    )
    original_share: Share = Field(
        default=0.1,
        description="Share of the windows that is original text, as in the paper: where a gate opens on it, the "
        "block learns to do little there. None is read where no loss would read it.",
    )
    background_share: Share = Field(
        default=0.1, description="Share of the windows that is background text, if there is a local loss."
    )
    lr: Annotated[float, Field(gt=0), _at_most(1e30)] = Field(
        default=4e-3, description="Peak learning rate of AdamW."
    )
    out_lr_ratio: Factor = Field(
        default=1.0,
        description="The blocks' W_out, and LoRA's B, learn this many times faster than the rest: they start at 0 "
        "(arXiv 2402.12354). 10 learns more in a short run, and makes gates leak more in a long one.",
    )
    weight_decay: Weight = Field(default=0.0, description="AdamW's weight decay.")
    clip: float = Field(default=1.0, gt=0, description="Gradients are scaled down to this norm.")
    warmup_tokens: Count = Field(default=10_000, description="Tokens over which the learning rate rises.")
    schedule: Literal["cosine", "constant-decay", "constant"] = Field(
        default="constant-decay",
        description="cosine: to 0 over the budget; constant-decay: constant, then linear to 0; constant: level.",
    )
    decay_share: float = Field(
        default=0.25, gt=0, le=1, description="Share of the budget, at its end, over which constant-decay falls."
    )
    seed: Seed = Field(default=0, description="Seed of the blocks' start and of the order of the text.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type the passes compute in (bfloat16: by autocast); what is trained is float32.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute each layer twice rather than keep what the backward pass needs."
    )
    compile: bool = Field(default=False, description="Compile the model with torch.compile.")
    log_every: Positive = Field(default=5, description="Steps between two lines of the log.")
    checkpoint_every: Positive = Field(
        default=10_000,
        description="Tokens between two checkpoints; with patience there is one at each measurement.",
    )
    validate_every: Positive = Field(
        default=50_000, description="Tokens between two measurements on held-out text."
    )
    validate_windows: Positive = Field(default=8, description="Windows of each held-out class measured then.")
    patience: Positive | None = Field(
        default=None,
        description="Stop after this many measurements without a better loss on the target's held-out text, and "
        "keep the best (default: run to the end).",
    )

    @model_validator(mode="after")
    def _fits(self) -> Run:
        if self.batch_tokens % self.window:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) is not a multiple of window ({self.window})")
        if self.tokens < self.batch_tokens:
            raise ValueError("tokens is less than one step")
        return self

    @property
    def windows_a_step(self) -> int:
        """Number of windows in one batch."""
        return self.batch_tokens // self.window

    @property
    def fewest_targets(self) -> int:
        """Least number of target windows in any batch."""
        windows = self.windows_a_step
        # Subtracts a little before rounding up: in floating point, 100 * 0.07 is slightly more than 7.
        others = (ceil(windows * share - 1e-9) for share in (self.original_share, self.background_share))
        return windows - sum(others)

    @property
    def steps(self) -> int:
        """Number of gradient steps in the budget."""
        return self.tokens // self.batch_tokens

    @property
    def decay_start(self) -> int:
        """Number of tokens after which the learning rate depends on the budget."""
        if self.schedule == "cosine":
            return self.warmup_tokens
        return self.tokens if self.schedule == "constant" else round(self.tokens * (1 - self.decay_share))

    def every(self, tokens: int) -> int:
        """A number of tokens as a number of steps, at least one."""
        return max(1, tokens // self.batch_tokens)


class Recipe(_Section):
    """Everything that decides what an adapter becomes, except the text itself."""

    base: str = Field(default="default", description="`default` (SmolLM2-135M), a folder or a model hub's name.")
    method: Literal["neutral", "adapter", "lora", "finetune"] = Field(
        default="neutral",
        description="neutral: gated blocks; adapter: blocks without gate and local loss; lora: PEFT's LoRA; "
        "finetune: all of the base. The last three put the LM loss on the original windows too, and read no "
        "background.",
    )
    domain: str = Field(pattern=NAME, description="What is learned: a language tag such as `hu`, or a name.")
    data: Data
    blocks: Blocks
    gate: Gate = Gate()
    loss: Loss = Loss()
    lora: Lora = Lora()
    run: Run

    @model_validator(mode="after")
    def _gates_that_a_loss_moves(self) -> Recipe:
        if self.has_local_loss and self.loss.kind == "cross-entropy" and not self.gate.trained:
            raise ValueError("loss.kind 'cross-entropy' moves the gates alone: it needs gate.trained = true")
        return self

    @model_validator(mode="after")
    def _kept_quiet_by_text(self) -> Recipe:
        moved = self.gate.trained or self.gate.kind == "none"
        if self.has_local_loss and moved and not self.run.original_share:
            raise ValueError("gates that are trained, or none, need run.original_share above 0 to stay neutral")
        return self

    @model_validator(mode="after")
    def _reads_target(self) -> Recipe:
        if self.plan.fewest_targets < 1:
            raise ValueError("run.original_share and run.background_share may leave a step without a target window")
        return self

    @model_validator(mode="after")
    def _starts_blocks(self) -> Recipe:
        if self.blocks.start is not None and self.method in ("lora", "finetune"):
            raise ValueError(f"blocks.start names blocks to go on from, and method '{self.method}' has none")
        return self

    @property
    def lm_on_original(self) -> bool:
        """Whether original windows have an LM loss."""
        return self.method != "neutral" or self.loss.lm_on_original

    @property
    def has_gates(self) -> bool:
        """Whether the blocks have gates that can shut."""
        return self.method == "neutral" and self.gate.kind != "none"

    @property
    def has_local_loss(self) -> bool:
        """Whether there is a local loss."""
        return self.method == "neutral" and self.loss.alpha > 0

    @property
    def plan(self) -> Run:
        """The gradient steps, without shares for text that no loss reads."""
        shares = {
            "original_share": self.run.original_share if self.lm_on_original or self.has_local_loss else 0.0,
            "background_share": self.run.background_share if self.has_local_loss else 0.0,
        }
        return self.run.model_copy(update=shares)

    @property
    def idle(self) -> list[str]:
        """The keys about the start of gates and blocks that were given and do nothing, because of other keys."""
        given = {f"gate.{key}" for key in self.gate.model_fields_set}
        given |= {f"blocks.{key}" for key in self.blocks.model_fields_set}
        idle: set[str] = set()
        if self.method == "neutral" and not self.gate.fitted:
            idle = {f"gate.{key}" for key in FIT_KEYS}
        elif self.method == "neutral" and self.blocks.start is not None:
            fits = FIT_KEYS - {"refit", "steepness"} | {"init"}
            idle = {"gate.min_found"} if self.gate.resolved.refit else {f"gate.{key}" for key in fits}
        if self.blocks.start is not None:
            idle.add("blocks.init")
        return sorted(given & idle)

    @property
    def base_dtype(self) -> str:
        """Type of the base's weights: float32 if they train."""
        return "float32" if self.method == "finetune" else self.run.dtype

    @property
    def threshold(self) -> float:
        """The threshold, in training and in the adapter file."""
        return self.gate.resolved.threshold if self.method == "neutral" else 0.0

    def with_gate(self, **changes: Any) -> Recipe:
        """The recipe with some keys of [gate] replaced; the values must have been checked."""
        return self.model_copy(update={"gate": self.gate.model_copy(update=changes)})

    def owns(self, source: str) -> bool:
        """Whether a source such as `hu.lohelp` belongs to the target."""
        return names_source(self.data.target, source)

    def dump(self) -> dict[str, Any]:
        """The recipe as plain values, for JSON."""
        return self.model_dump(mode="json")

    def changed(self, earlier: Recipe, tokens: int) -> dict[str, tuple[Any, Any]]:
        """The keys because of which a run of `earlier` that has read `tokens` tokens cannot go on as this recipe.

        Returns each with its value here and its value there; an empty dict if the run can continue. The budget may
        differ as long as it is not exceeded and the learning rate has not depended on it. Keys may differ that only
        log, or save memory or time, and `validate_every`, unless the run may stop because of what is measured.
        """
        idle = ("log_every", "checkpoint_every", "accumulate", "gradient_checkpointing", "compile")
        free = {f"run.{key}" for key in idle}
        if self.run.patience is None:
            free |= {"run.validate_every"}
        level = min(self.run.decay_start, earlier.run.decay_start)
        if self.run.tokens != earlier.run.tokens and tokens <= min(level, self.run.tokens):
            free |= {"run.tokens"}
        mine, other = _flat(self.dump()), _flat(earlier.dump())
        return {key: (mine[key], other[key]) for key in mine if key not in free and mine[key] != other[key]}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The values by full key, such as `run.lr`."""
    flat: dict[str, Any] = {}
    for section, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": each for key, each in value.items()}
        else:
            flat[section] = value
    return flat
