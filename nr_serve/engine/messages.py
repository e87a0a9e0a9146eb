"""What goes in and out of the engine: plain values and a guide, no tensors.

In: `Submit` and `Abort`, and commands, each answered through a future. Out: one `StepEvents` a step.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from nr_serve.errors import NrError

if TYPE_CHECKING:
    from nr_serve.engine.guide import Guide

FinishReason = Literal["stop", "length", "abort", "error"]
AdapterState = Literal["loading", "attached", "registered"]
Status = Literal["loading", "ready", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request's tokens are chosen and when it ends. Defaults are OpenAI's."""

    max_tokens: int = 16
    """0: only read the prompt (for scoring it)."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """Same seed, same request: same tokens, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    """Show the stop string, or the token, that ends the answer."""
    special_tokens: bool = False
    """Show special tokens."""
    logprobs: int | None = None
    """Report each new token's log probability and this many of the likeliest."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What holds where a request says nothing: OpenAI's, but for what the base brings along."""

    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] = 1.0
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] = 0
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(strict=True, ge=0.01, le=10)] = 1.0


@dataclass(frozen=True, slots=True)
class Submit:
    """A request. `adapters` None: every attached adapter, the gates route; (): the frozen base alone."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapters: tuple[str, ...] | None = None
    selected: str = ""
    """Label of the selection in the metrics."""
    priority: int = 0
    """Lower runs first."""
    gates: bool = False
    """Report, per token and adapter, the share of its blocks that fired."""
    guide: Guide | None = None
    """The answer follows this grammar, and ends when it is complete."""
    cache_salt: str | None = None
    """No page is shared with requests of another salt."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The client is gone: drop the request, give its pages back. Unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Token:
    """One token and what was asked about it."""

    id: int
    text: str
    """Decoded alone; incomplete UTF-8 shows as U+FFFD."""
    logprob: float | None = None
    """Natural logarithm of its probability before temperature and penalties, among the tokens a guide allows."""
    top: tuple[tuple[int, str, float], ...] = ()
    """(id, text, logprob) of the likeliest tokens, best first."""
    gates: Mapping[str, float] | None = None
    """Share of an adapter's blocks that fired: at this token if it is in the prompt, else while it was written."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one step gave one request."""

    request_id: str
    tokens: tuple[Token, ...] = ()
    text: str = ""
    """Text to show now; a tail that may become a stop string, or half a character, is held back."""
    prompt: tuple[Token, ...] | None = None
    """The prompt's tokens, once, with the first output, if `prompt_logprobs` or `gates` asked for them."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or token id that ended it, if one did (None for the end-of-sequence token)."""
    error: NrError | None = None
    """Why it ended, if finish_reason is "error"."""
    started: float | None = None
    """`time.monotonic()` at its first step, in seconds; in every output of its steps."""
    cached_tokens: int = 0
    """Tokens of its prompt that were not computed when it was first admitted, but found in the prefix cache."""


@dataclass(frozen=True, slots=True)
class PrefixTokens:
    """Tokens of requests that were looked up in the prefix cache."""

    asked: int = 0
    """All tokens of requests as they were admitted."""
    found: int = 0
    """Those that were not computed again."""
    neutral: int = 0
    """Those of them in pages that were computed under another selection."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step in figures."""

    seconds: float
    prefill_tokens: int
    decode_tokens: int
    requests: int
    """Requests that had tokens in this step."""
    preemptions: int
    """Requests put back in the queue by this step."""
    prefix: PrefixTokens = PrefixTokens()


@dataclass(frozen=True, slots=True)
class StepEvents:
    """The one hand-over a step. `report` is None when outputs came without a forward pass."""

    outputs: tuple[Output, ...]
    report: StepReport | None = None
    adapters_changed: bool = False
    """An adapter turned out to diverge, and was unloaded or put back, without a command."""
    loads_failed: int = 0
    """Loads that were answered well, and turned out to be of such an adapter."""


# Commands: each is answered through a future with the value named in its docstring, or with an NrError.


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Read, check, attach, publish. Answer: `AdapterView` once published. A failure leaves names as they were."""

    name: str
    path: Path
    replace: bool = False
    pinned: bool | None = None
    """None: as the version it replaces."""
    threshold: float | None = None
    """None: the file's own."""


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Detach and forget; requests in flight keep their version. Answer: `AdapterView` as it was."""

    name: str


@dataclass(frozen=True, slots=True)
class PatchAdapter:
    """Change the dials given (None: leave). Answer: `AdapterView`, once a new threshold acts."""

    name: str
    pinned: bool | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class ListAdapters:
    """Answer: `tuple[AdapterView, ...]`, by name."""


@dataclass(frozen=True, slots=True)
class ReadGates:
    """Answer: `GateStatistics`, totals since the start."""


Command = LoadAdapter | UnloadAdapter | PatchAdapter | ListAdapters | ReadGates


@dataclass(frozen=True, slots=True)
class AdapterView:
    """A registered adapter as people see it."""

    name: str
    version: str
    domain: str
    state: AdapterState
    slot: int | None
    nbytes: int
    h: int
    carry: float
    threshold: float
    pinned: bool
    requests: int
    """Requests in flight that selected any version of it."""
    loaded_at: float
    """Unix time."""
    load_seconds: float
    gates: AdapterGates
    neutrality: Neutrality | None = None
    """Its leak on each probe text; None until it was measured at its threshold."""
    measuring: bool = False
    """Whether that is under way."""


@dataclass(frozen=True, slots=True)
class Leak:
    """What an adapter's gates did on one probe text."""

    fired: int
    """Token-layers on which a gate fired."""
    seen: int
    """Token-layers evaluated."""
    tokens: int
    """Length of the text as measured."""

    @property
    def rate(self) -> float:
        """Share of the token-layers on which a gate fired."""
        return self.fired / self.seen


Neutrality = Mapping[str, Leak]
"""An adapter's leak on each probe text, by the text's name."""


@dataclass(frozen=True, slots=True)
class AdapterGates:
    """One adapter's gate totals, over tokens that selected it. Lists have one entry per layer group."""

    layer_groups: tuple[str, ...] = ()
    """Names such as "0-9"."""
    fired: tuple[int, ...] = ()
    """Token-layers whose gate fired."""
    seen: tuple[int, ...] = ()
    """Token-layers evaluated."""
    mass: float = 0.0
    """Sum of gate values."""


@dataclass(frozen=True, slots=True)
class GateStatistics:
    """Totals for the metrics."""

    adapters: Mapping[str, AdapterGates]
    cross: Mapping[tuple[str, str], int]
    """(adapter, selected) -> token-layers on which the adapter's gate was open on that selection's traffic."""
    slots_used: int
    slots_total: int
    running: int
    waiting: int
    pages_used: int
    pages_total: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine serves; fixed once it is ready."""

    model: str
    """Served name of the base."""
    fingerprint: str
    layers: int
    d: int
    vocab_size: int
    max_model_len: int
    """Longest prompt plus answer, in tokens."""
    device: str
    dtype: str
    eos_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""
    sampling: SamplingDefaults = SamplingDefaults()
