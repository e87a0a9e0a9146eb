"""What every JSON body is made of. Types are strict, unknown fields are errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator


def whole_characters(text: str) -> str:
    """Return `text`; ValueError if it is none: JSON can spell half a surrogate pair, which nothing else takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("not text: it holds half a surrogate pair") from error
    return text


def _is_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        whole_characters(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


Text = Annotated[str, AfterValidator(whole_characters)]
TokenIds = Annotated[list[StrictInt], Field(fail_fast=True, max_length=2**20)]
Name = Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
"""What OpenAI takes as the name of a function or a schema."""
JsonObject = Annotated[dict[str, Any], AfterValidator(_is_json)]
"""An object that is passed on as it is."""
MAX_FIELDS = 256
"""Fields of an object that are looked at."""
NotSupported = Mapping[str, Sequence[Any]]


def at_most(entries: int) -> BeforeValidator:
    """For a dict: refuse more entries before any is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise ValueError(f"it has {len(value)} entries; at most {entries} are taken")
        return value

    return BeforeValidator(check)


class Body(BaseModel):
    """A JSON body, or an object in one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    not_supported: ClassVar[NotSupported] = {}
    """Known fields this server does not have, and the values of each that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:  # each unknown one would be named
            raise ValueError(f"it has {len(data)} fields; at most {MAX_FIELDS} are read")
        for name, harmless in cls.not_supported.items():
            if data.get(name) is not None and data[name] not in harmless:
                raise ValueError(f"`{name}` is not supported by this server")
        return {
            name: value
            for name, value in data.items()
            if name not in cls.not_supported and not cls._is_unset(name, value)
        }

    @classmethod
    def _is_unset(cls, name: str, value: Any) -> bool:
        """Whether a client spells out that it leaves a field at its default, which is not null: OpenAI's may."""
        field = cls.model_fields.get(name)
        return value is None and field is not None and not field.is_required() and field.default is not None
