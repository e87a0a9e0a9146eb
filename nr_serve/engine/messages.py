"""What goes in and out of the engine: plain values and a guide, no tensors.

In: `Submit`, `Abort`, and commands, each of which is answered through a future. Out: one `StepEvents` a step.
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
    from nr_serve.engine.guide import Allowance, Guide

FinishReason = Literal["stop", "length", "error"]
"""Why the engine ended a request."""
Outcome = Literal["stop", "length", "abort", "error"]
"""How a request ended; of one that its caller aborted there is no further output."""
AdapterState = Literal["loading", "attached", "registered", "unloaded"]
Status = Literal["loading", "ready", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request's tokens are chosen and when it ends. Defaults are OpenAI's."""

    max_tokens: int = 16
    """0: only read the prompt, to score it."""
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
    """The same request with the same seed gets the same tokens, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    """Show the stop string or stop token that ends the answer."""
    special_tokens: bool = False
    """Show special tokens."""
    logprobs: int | None = None
    """Report each generated token's log probability, and this many of the likeliest tokens at its position."""
    prompt_logprobs: int | None = None
    """Report each prompt token's log probability, and this many of the likeliest tokens at its position."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values for parameters that a request leaves out: OpenAI's, unless the base brings its own."""

    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] = 1.0
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] = 0
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(strict=True, ge=0.01, le=10)] = 1.0


@dataclass(frozen=True, slots=True)
class Submit:
    """A request. `adapters`: names; None for every attached adapter (the gates route); () for the base alone."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapters: tuple[str, ...] | None = None
    selected: str = ""
    """Name of the selection in the metrics' labels."""
    priority: int = 0
    """Lower runs first."""
    gates: bool = False
    """Report, per token and adapter, the share of its blocks that fired."""
    guide: Guide | None = None
    allowance: Allowance | None = None
    """Time for the guide, shared by the answers of one request; None: this one has its own."""
    """Grammar that the answer follows; the answer ends when the grammar is complete."""
    cache_salt: str | None = None
    """Pages of the prefix cache are shared only between requests with the same salt."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The client is gone: drop the request and give back its pages. Unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Token:
    """One token, with what the request asked to be told of it."""

    id: int
    text: str
    """Decoded alone; incomplete UTF-8 shows as U+FFFD."""
    logprob: float | None = None
    """Natural logarithm of its probability before temperature and penalties, among the tokens a guide allows."""
    top: tuple[tuple[int, str, float], ...] = ()
    """(id, text, logprob) of the likeliest tokens, best first."""
    gates: dict[str, float] | None = None
    """Share of each adapter's blocks that fired: at this prompt token, or while this answer token was chosen."""


@dataclass(frozen=True, slots=True)
class Output:
    """One step's output for one request."""

    request_id: str
    tokens: tuple[Token, ...] = ()
    text: str = ""
    """Text to show now. A tail that may become a stop string, or an incomplete character, is held back."""
    prompt: tuple[Token, ...] | None = None
    """The prompt's tokens, in the first output only, if `prompt_logprobs` or `gates` asks for them."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or token id that ended the answer; None if none did, or the end-of-sequence token did."""
    error: NrError | None = None
    """Why the request failed, if `finish_reason` is "error"."""
    started: float | None = None
    """`time.monotonic()` at the request's first step, in seconds; in every output that a step makes."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache, so not computed, when the request was first admitted."""


@dataclass(frozen=True, slots=True)
class PrefixTokens:
    """Counts of tokens looked up in the prefix cache when requests are admitted, or admitted again."""

    asked: int = 0
    """Tokens looked up: all that a request has by then."""
    found: int = 0
    """Tokens found in the prefix cache."""
    neutral: int = 0
    """Tokens found in pages that were computed under another selection."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """Counts and time of one step."""

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
    """Everything a step hands over. `report` is None when the outputs came without a forward pass."""

    outputs: tuple[Output, ...]
    report: StepReport | None = None
    adapters_changed: bool = False
    """Whether an adapter that diverged was unloaded, or put back as it was, without a command."""
    loads_failed: int = 0
    """Loads answered with success whose adapter was then found to diverge."""


# Commands: each is answered through a future with the value named in its docstring, or with an NrError.


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Read, check, attach and publish an adapter. Answer: `AdapterView`. A failure leaves names as they were."""

    name: str
    path: Path
    replace: bool = False
    pinned: bool | None = None
    """None: as the version that it replaces."""
    threshold: float | None = None
    """None: the file's own threshold."""
    routed: bool | None = None
    """Whether requests to the base's name may use it; None: as the version that it replaces, or else they may."""


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Detach and forget an adapter; requests in flight keep their version. Answer: its last `AdapterView`."""

    name: str


@dataclass(frozen=True, slots=True)
class PatchAdapter:
    """Change an adapter's settings (None: leave). Answer: `AdapterView`, once a new threshold acts."""

    name: str
    pinned: bool | None = None
    threshold: float | None = None
    routed: bool | None = None


@dataclass(frozen=True, slots=True)
class ReadStatistics:
    """Read the adapters and the engine's counts. Answer: `EngineStatistics`."""


Command = LoadAdapter | UnloadAdapter | PatchAdapter | ReadStatistics


@dataclass(frozen=True, slots=True)
class AdapterView:
    """A registered adapter, as clients see it."""

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
    routed: bool
    requests: int
    """Requests in flight that selected any version of the adapter."""
    loaded_at: float
    """Unix time."""
    load_seconds: float
    gates: AdapterGates
    neutrality: Neutrality | None = None
    """Leak on each probe text; None until measured at the current threshold."""
    measuring: bool = False
    """Whether the leak is being measured."""


@dataclass(frozen=True, slots=True)
class Leak:
    """How often an adapter's gates fired on one probe text."""

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
    """One adapter's gate counts over the tokens that selected it. Lists have one entry per layer group."""

    layer_groups: tuple[str, ...] = ()
    """Names of the layer groups, such as "0-9"."""
    fired: tuple[int, ...] = ()
    """Token-layers whose gate fired."""
    seen: tuple[int, ...] = ()
    """Token-layers evaluated."""
    mass: float = 0.0
    """Sum of gate values."""
    fired_by_selected: Mapping[str, int] = field(default_factory=dict)
    """Name of a selection -> token-layers whose gate fired on its tokens, even if it leaves the adapter out."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """The registered adapters with their counts since the start, and current numbers, for the metrics."""

    adapters: Mapping[str, AdapterView]
    """The registered adapters, by name."""
    slots_used: int
    slots_total: int
    running: int
    waiting: int
    pages_used: int
    pages_total: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine serves; constant once it is ready."""

    model: str
    """Name under which the base is served."""
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
