"""Keys: who may ask, who may change adapters, and how much. Kept as hashes, in a file that may change while served.

A key is long and random, so its plain SHA-256 cannot be reversed; a password must not be used as a key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from nr_serve.config import ServeConfig
from nr_serve.errors import BadRequest, faults
from nr_serve.names import NAME

log = logging.getLogger(__name__)

MIN_LENGTH = 32
"""Least number of characters of a key in a key file; `make_key` makes 46."""
_API_KEY, _ADMIN_KEY = "api-key", "admin-key"
_RESERVED = (_API_KEY, _ADMIN_KEY)
"""Names of the keys given as settings: a key in the file would share their limits and their name in the log."""

Role = Literal["inference", "admin"]


class Key(BaseModel):
    """One [[key]] entry of a key file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(pattern=NAME, description="whose it is; shown in the log")
    role: Role = Field(description="inference, or admin, which may change adapters too")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="the key's hash")
    requests_per_minute: float | None = Field(
        default=None, gt=0, description="instead of --key-requests-per-minute"
    )
    requests_at_once: int | None = Field(default=None, ge=1, description="instead of --key-requests-at-once")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: tuple[Key, ...] = ()


def make_key(name: str, role: Role) -> tuple[str, Key]:
    """A new key's secret, and its entry for a key file. Raises BadRequest."""
    if name in _RESERVED:
        raise BadRequest(f"`{name}` is the name of the key that --{name} gives; choose another")
    secret = "nr-" + secrets.token_urlsafe(32)
    try:
        return secret, Key(name=name, role=role, sha256=_digest(secret.encode()))
    except ValidationError as error:
        raise BadRequest("a key's name is 1 to 64 letters, digits, dots, hyphens and underscores") from error


def read_key_file(path: Path) -> tuple[Key, ...]:
    """The keys in a file. Raises BadRequest; also if there is no key in it, or if the file is cut off."""
    try:
        text = path.read_text(encoding="utf-8")
        keys = _Table.model_validate(tomllib.loads(text)).key
    except OSError as error:
        raise BadRequest(f"cannot read the key file {path}: {error.strerror}") from error
    except ValidationError as error:
        raise BadRequest(f"the key file {path} is wrong at {faults(error)}") from error
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise BadRequest(f"the key file {path} is not TOML: {error}") from error
    if not keys:
        raise BadRequest(f"the key file {path} holds no key")
    if not text.endswith("\n"):  # a number cut short is still a valid number
        raise BadRequest(f"the key file {path} is cut off: its last line has no end")
    for each in ("name", "sha256"):
        if len({getattr(key, each) for key in keys}) < len(keys):
            raise BadRequest(f"the key file {path} has a {each} twice")
    for key in keys:
        if key.name in _RESERVED:
            raise BadRequest(f"the key file {path}: `{key.name}` is the name of the key that --{key.name} gives")
    return keys


class Keys:
    """The keys in the settings and in the key file, which is read again when it has changed."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises BadRequest if the key file cannot be read."""
        self.guards_inference = config.needs_key
        self.guards_changes = self.guards_inference or config.admin_key is not None
        # If it is the only key, the API key also guards adapter changes, so it must allow them.
        alone = config.admin_key is None and config.key_file is None
        self._simple = (
            *_simple(_API_KEY, "admin" if alone else "inference", config.api_key),
            *_simple(_ADMIN_KEY, "admin", config.admin_key),
        )
        self._path = config.key_file
        self._seen = self._state()
        self._filed = () if self._path is None else read_key_file(self._path)

    def find(self, secret: bytes) -> Key | None:
        """The key with this secret; None if there is none. Takes the same time whichever key matches."""
        self._read_again()
        filed = self._filed if len(secret) >= MIN_LENGTH else ()
        digest, found = _digest(secret), None
        for key in (*filed, *self._simple):
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found

    def _read_again(self) -> None:
        """Read the file's keys again if it has changed; an invalid file changes nothing."""
        if self._path is None or self._state() == self._seen:
            return
        self._seen = self._state()
        try:
            self._filed = read_key_file(self._path)
        except BadRequest as error:
            log.error("the keys stay as they were: %s", error.message)
        else:
            log.info("read %d keys from %s", len(self._filed), self._path)

    def _state(self) -> tuple[int, ...]:
        """The file's identity and times; differs once the file was changed, replaced or removed."""
        try:
            stat = self._path.stat() if self._path is not None else None
        except OSError:
            stat = None
        return () if stat is None else (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)


def _simple(name: str, role: Role, secret: SecretStr | None) -> tuple[Key, ...]:
    if secret is None:
        return ()
    return (Key(name=name, role=role, sha256=_digest(secret.get_secret_value().encode())),)


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
