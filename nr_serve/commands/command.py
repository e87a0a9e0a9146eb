"""Base classes and checks that the commands share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from nr_serve.client import DEFAULT_URL, Client
from nr_serve.config import FLAGS, spelled
from nr_serve.errors import BadRequest


class Command(BaseSettings):
    """A command whose fields are flags alone: no environment variable sets them behind the user's back."""

    model_config = FLAGS | SettingsConfigDict(cli_enforce_required=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the command line only."""
        return (init_settings,)


class Remote(Command):
    """A command that talks to a running server."""

    url: str | None = Field(None, description=f"the server (default: $NR_URL, or {DEFAULT_URL})")
    key: SecretStr | None = Field(None, description="its key (default: $NR_ADMIN_KEY, or $NR_API_KEY)")

    def client(self) -> Client:
        """A client of the server."""
        key = self.key.get_secret_value() if self.key else None
        key = key or os.environ.get("NR_ADMIN_KEY") or os.environ.get("NR_API_KEY")
        return Client(self.url or os.environ.get("NR_URL") or DEFAULT_URL, key)


def check_flags(command: Command, needs: Mapping[str, str], packages: Mapping[str, str]) -> None:
    """Refuse a flag that has no effect without another one, or that needs a package which is not installed."""
    for flag, needed in needs.items():
        if flag in command.model_fields_set and getattr(command, flag) and not getattr(command, needed):
            raise BadRequest(f"{spelled(flag)} does nothing without {spelled(needed)}", param=flag)
    for flag, module in packages.items():
        if getattr(command, flag):
            check_package(module, spelled(flag))


def check_package(module: str, what: str) -> None:
    """Raise BadRequest if a package of the extra `train`, which `what` needs, is not installed."""
    if find_spec(module) is None:
        raise BadRequest(f"{what} needs {module}, of the extra `train`")
