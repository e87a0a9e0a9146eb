"""The server's settings: one definition gives the flags, the NR_* environment variables, the keys of the settings
file, their help and their page in the documentation.

A flag wins over the environment, the environment over the file, the file over the default.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from nr_serve.errors import BadRequest
from nr_serve.names import adapter_entry, base_name, check_adapter_name

FLAGS = SettingsConfigDict(
    extra="forbid", cli_kebab_case=True, cli_implicit_flags=True, cli_hide_none_type=True, cli_avoid_json=True
)
"""How the fields of every command become flags."""

MAX_LOGPROBS = 20
"""The limit in OpenAI's API."""
PROBE_TOKENS = 512
"""Longest probe text, in tokens; the rest of a file is not read."""

ALIKE = 0.75
"""How alike a flag or a key must be to be suggested; `--bogus` and `--host` are at 0.62."""

_PREFIX = "NR_"
_OTHERS = ("NR_CACHE", "NR_URL")
"""Environment variables that are not settings of the server: the cache folder, and the client's server."""
_KUBERNETES = re.compile(
    r"NR_SERVE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_(ADDR|PORT|PROTO))?)?)"
)
"""Variables that Kubernetes sets in every container if a Service is called nr-serve, or nr-serve-canary, say."""


def _split(value: Any) -> Any:
    """Split a list that is given as one string, as in the environment and in repeated flags."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


def _check_names(entries: list[str]) -> list[str]:
    for entry in entries:
        try:
            check_adapter_name(adapter_entry(entry)[0])
        except BadRequest as error:
            raise ValueError(f"{entry}: {error.message}") from error
    return entries


Texts = Annotated[list[str], NoDecode, BeforeValidator(_split)]
Paths = Annotated[list[Path], NoDecode, BeforeValidator(_split)]


class ModelSettings(BaseModel):
    """Model: what is served"""

    model: str = Field("default", description="base model: a local folder, a hub name, or `default`")
    served_model_name: str | None = Field(
        None, description="name clients use for the base (default: its folder's, or the last part of its hub name)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the model runs; with auto, on a GPU if torch sees one"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="type of weights and activations; with auto, bfloat16 on a GPU, the faster one on a CPU",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of the model (default: torch's choice, fewer where a control group limits CPUs)",
    )
    compile: bool = Field(
        True,
        description="use fast layers for Llama, Mistral, Qwen 2 and Qwen 3; on a CPU they are compiled at the "
        "first start, with a C++ compiler",
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="longest prompt plus answer, tokens (default: the base's, or what the KV cache holds)",
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="sampling where a request says nothing: as the base's generation_config.json has it, or as "
        "OpenAI's API",
    )


class AdapterSettings(BaseModel):
    """Adapters: which, from where, and how neutral"""

    adapter: Annotated[Texts, AfterValidator(_check_names)] = Field(
        [], description="adapter to attach at start, FILE or NAME=FILE; may be repeated"
    )
    slots: int = Field(8, ge=1, le=1024, description="adapters attached at once")
    slot_width: int | None = Field(
        None,
        ge=1,
        description="widest block (h) an adapter may have (default: that of 20% of the base's parameters)",
    )
    max_adapter_gib: float = Field(2.0, gt=0, le=2**20, description="largest adapter file taken, GiB")
    max_leak: float | None = Field(
        None,
        ge=0,
        le=1,
        description="refuse an adapter, or a threshold, whose gates fire on more than this share of a probe text's "
        "token-layers, such as 0.01 (default: never)",
    )
    probe_text: Paths = Field(
        [],
        description=f"text an adapter must be neutral on, a UTF-8 file, its first {PROBE_TOKENS} tokens; "
        "may be repeated (default: English of several kinds)",
    )


class EngineSettings(BaseModel):
    """Engine: how much runs at once"""

    max_batch_tokens: int = Field(512, ge=1, description="most tokens in one step; never less than --max-running")
    max_running: int = Field(64, ge=1, description="most requests in one step")
    max_waiting: int = Field(1024, ge=1, description="longest queue; further requests get 429")
    page_size: int = Field(16, ge=1, description="tokens a page of KV cache holds")
    kv_cache_gib: float = Field(1.0, gt=0, le=2**20, description="memory for the KV cache, GiB")
    pages: int | None = Field(
        None, ge=1, description="pages of KV cache, in place of --kv-cache-gib (default: from it)"
    )
    prefix_cache: bool = Field(True, description="reuse the KV cache of earlier requests that began alike")


class HttpSettings(BaseModel):
    """HTTP: where it listens, and how long and how much it takes"""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    adapter_dir: Paths = Field([], description="folder that POST /v1/adapters may load from; may be repeated")
    max_body_mib: float = Field(4.0, gt=0, le=2**20, description="largest JSON body taken, MiB")
    max_answers: int | None = Field(
        None,
        ge=1,
        description="answers a request may ask for, prompts times n; at most --max-waiting (default: that)",
    )
    max_logprobs: int = Field(
        MAX_LOGPROBS, ge=0, le=MAX_LOGPROBS, description="likeliest tokens a request may ask for at each place"
    )
    request_timeout: float | None = Field(
        None, gt=0, description="seconds a request may take; then it is aborted with 504 (default: no limit)"
    )
    grace_period: float = Field(30.0, ge=0, description="seconds running answers may go on after SIGTERM")


class SecuritySettings(BaseModel):
    """Security: who may ask, from where, and how often"""

    api_key: SecretStr | None = Field(None, description="key that clients must send (default: none needed)")
    admin_key: SecretStr | None = Field(
        None, description="key that changes of adapters need (default: --api-key, if it is the only key)"
    )
    key_file: Path | None = Field(
        None, description="TOML file of keys by hash, read again when it changes; see `nr-serve make-key`"
    )
    allow_no_key: bool = Field(False, description="let other machines ask without a key")
    key_requests_per_minute: float | None = Field(
        None, gt=0, description="requests a key may send in a minute; further ones get 429 (default: no limit)"
    )
    key_requests_at_once: int | None = Field(
        None, ge=1, description="answers a key may have under way; further ones get 429 (default: no limit)"
    )
    allowed_host: Texts = Field(
        [],
        description="host name the server answers to, or `*`; may be repeated (default: with no key, only this "
        "machine's names; with a key, any)",
    )
    cors_origin: Texts = Field(
        [], description="origin whose pages may call the server, or `*`; may be repeated (default: none)"
    )


class LoggingSettings(BaseModel):
    """Logging: what is written to stderr"""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what to log")
    log_format: Literal["text", "json"] = Field("text", description="a line of text, or of JSON, for each event")
    log_health: bool = Field(False, description="log requests for /health, /ready and /metrics too")
    log_prompts: bool = Field(False, description="log the prompts' text")


class ObservabilitySettings(BaseModel):
    """Observability: metrics and traces"""

    metrics_compat: Literal["none", "vllm"] = Field(
        "none", description="show the metrics under another server's names too"
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern="^https?://",
        description="OTLP collector that gets a trace of each request, such as http://127.0.0.1:4318 (default: no "
        "traces); needs the extra `otel`",
    )


class FileSettings(BaseModel):
    """Settings: a file of them"""

    config: Path | None = Field(None, description="TOML file of settings; flags and environment win over it")


GROUPS: tuple[type[BaseModel], ...] = (
    ModelSettings,
    AdapterSettings,
    EngineSettings,
    HttpSettings,
    SecuritySettings,
    LoggingSettings,
    ObservabilitySettings,
    FileSettings,
)
"""The groups of settings, in the order of the help and of the documentation."""


class ServeConfig(
    FileSettings,
    ObservabilitySettings,
    LoggingSettings,
    SecuritySettings,
    HttpSettings,
    EngineSettings,
    AdapterSettings,
    ModelSettings,
    BaseSettings,
):
    """Serve a base model with adapters over OpenAI's HTTP API.

    Every flag is an environment variable too (--max-running is NR_MAX_RUNNING) and a key of the file that --config
    names (max_running = 64).
    """

    model_config = FLAGS | SettingsConfigDict(env_prefix=_PREFIX, frozen=True, populate_by_name=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Sources by priority: flags, the environment, then the file that one of them names."""
        return (init_settings, env_settings, _SettingsFile(settings_cls, {}))

    @property
    def needs_key(self) -> bool:
        """Whether requests need a key; `admin_key` alone guards only what changes the server."""
        return self.api_key is not None or self.key_file is not None

    @property
    def max_adapter_bytes(self) -> int:
        """`max_adapter_gib` in bytes."""
        return int(self.max_adapter_gib * 2**30)

    def base_name(self, model: str | Path) -> str:
        """Name that clients use for the base loaded from `model`."""
        return self.served_model_name or base_name(model)


class _SettingsFile(InitSettingsSource):
    """The settings in the file that a flag or NR_CONFIG names."""

    def __call__(self) -> dict[str, Any]:
        """Read the file, if one is named. Raises SettingsError."""
        path = self.current_state.get("config")
        return {} if path is None else _read_file(Path(path))


_MOST_BYTES = 2**20  # largest settings file; guards against devices, which have no end


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise SettingsError(f"{path} is longer than {_MOST_BYTES:,} bytes")
        settings = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise SettingsError(f"{path} is not TOML: {error}") from error
    _refuse_unknown(settings, ServeConfig.model_fields.keys() - {"config"}, str(path))
    return settings


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise SettingsError for a variable that looks like a setting but is not one: it would be ignored."""
    known = {f"{_PREFIX}{name.upper()}" for name in ServeConfig.model_fields} | set(_OTHERS)
    named = [name.upper() for name in environment if name.upper().startswith(_PREFIX)]
    _refuse_unknown([name for name in named if not _KUBERNETES.fullmatch(name)], known, "the environment")


def _refuse_unknown(names: Iterable[str], known: Iterable[str], place: str) -> None:
    for name in sorted(set(names) - set(known)):
        close = difflib.get_close_matches(name, known, 1, ALIKE)
        hint = f"; is `{close[0]}` meant?" if close else ""
        raise SettingsError(f"{place}: there is no setting `{name}`{hint}")


def spelled(name: str) -> str:
    """A field's name, spelled as a flag."""
    return "--" + name.replace("_", "-")


def settings_tables() -> str:
    """The settings as Markdown, one table per group; docs/settings.md contains it."""
    sections = []
    for group in GROUPS:
        rows = [f"### {group.__doc__}", "", "| flag | environment | meaning |", "| --- | --- | --- |"]
        sections.append("\n".join(rows + [_row(name) for name in group.model_fields]))
    return "\n\n".join(sections)


def _row(name: str) -> str:
    setting = ServeConfig.model_fields[name]
    meaning, flag = setting.description or "", spelled(name)
    if get_origin(setting.annotation) is Literal:
        meaning += f": {', '.join(map(str, get_args(setting.annotation)))}"
    if setting.default is True:
        meaning += f" (default: yes; `--no-{flag.removeprefix('--')}` turns it off)"
    elif setting.default not in (None, [], False):
        meaning += f" (default: {setting.default})"
    return f"| `{flag}` | `{_PREFIX}{name.upper()}` | {meaning} |"
