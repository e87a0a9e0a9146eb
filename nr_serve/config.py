"""The server's settings: one definition gives the flags, the NR_* environment variables and their help.

A flag wins over the environment, the environment over the default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from nr_serve.errors import BadRequest
from nr_serve.names import adapter_entry, check_adapter_name

FLAGS = SettingsConfigDict(
    extra="forbid", cli_kebab_case=True, cli_implicit_flags=True, cli_hide_none_type=True, cli_avoid_json=True
)
"""How every command's fields become flags."""

PROBE_TOKENS = 512
"""Longest probe text; what a file holds beyond is not read."""


class ServeConfig(BaseSettings):
    """Serve a base model with adapters over OpenAI's HTTP API."""

    model_config = FLAGS | SettingsConfigDict(env_prefix="NR_", frozen=True, populate_by_name=True)

    model: str = Field("default", description="base model: a local folder, a hub name, or `default`")
    served_model_name: str | None = Field(None, description="name clients use for the base (default: the folder's)")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    adapter: Annotated[list[str], NoDecode] = Field(
        [], description="adapter to attach at start, FILE or NAME=FILE; may be repeated"
    )
    adapter_dir: Annotated[list[Path], NoDecode] = Field(
        [], description="folder that POST /v1/adapters may load from; may be repeated"
    )
    slots: int = Field(8, ge=1, le=1024, description="adapters attached at once")
    slot_width: int | None = Field(
        None, ge=1, description="widest block a slot holds (default: 20% of the base's parameters)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="type of weights and activations")
    threads: int | None = Field(None, ge=1, description="CPU threads for the model (default: torch's choice)")
    max_model_len: int | None = Field(
        None, ge=1, description="longest prompt plus answer, tokens (default: base's)"
    )
    max_batch_tokens: int = Field(512, ge=1, description="most tokens in one step; never less than --max-running")
    max_running: int = Field(64, ge=1, description="most requests in one step")
    max_waiting: int = Field(1024, ge=1, description="longest queue; further requests get 429")
    page_size: int = Field(16, ge=1, description="tokens a page of KV cache holds")
    kv_cache_gib: float = Field(1.0, gt=0, description="memory for the KV cache, GiB")
    pages: int | None = Field(None, ge=1, description="pages of KV cache (default: from --kv-cache-gib)")
    max_adapter_gib: float = Field(2.0, gt=0, description="largest adapter file taken, GiB")
    max_leak: float | None = Field(
        None,
        ge=0,
        le=1,
        description="refuse an adapter, or a threshold, whose gates fire on more than this share of a probe text's "
        "token-layers (default: never)",
    )
    probe_text: Annotated[list[Path], NoDecode] = Field(
        [],
        description=f"text an adapter must be neutral on, a UTF-8 file, its first {PROBE_TOKENS} tokens; "
        "may be repeated (default: English of several kinds)",
    )
    api_key: SecretStr | None = Field(None, description="key that clients must send (default: none needed)")
    admin_key: SecretStr | None = Field(None, description="key that adapter changes need (default: none needed)")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what to log")

    @field_validator("adapter", "adapter_dir", "probe_text", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Lists come as one text, from the environment and from repeated flags."""
        if not isinstance(value, str):
            return value
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("adapter")
    @classmethod
    def _check_names(cls, entries: list[str]) -> list[str]:
        for entry in entries:
            try:
                check_adapter_name(adapter_entry(entry)[0])
            except BadRequest as error:
                raise ValueError(f"{entry}: {error.message}") from error
        return entries

    def base_name(self, model: str | Path) -> str:
        """What clients call the base that was loaded from `model`."""
        return self.served_model_name or Path(model).name


def settings_table() -> str:
    """The settings as a Markdown table; docs/settings.md holds it."""
    rows = ["| flag | environment | meaning |", "| --- | --- | --- |"]
    for name, setting in ServeConfig.model_fields.items():
        default = setting.default
        shown = f" (default: {default})" if default not in (None, []) else ""
        rows.append(f"| `--{name.replace('_', '-')}` | `NR_{name.upper()}` | {setting.description}{shown} |")
    return "\n".join(rows)
