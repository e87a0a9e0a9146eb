"""Common types and base class of all JSON bodies. Types are strict, unknown fields are errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator


def whole_characters(text: str) -> str:
    """Return `text`; raise ValueError if it holds half a surrogate pair, which JSON can spell but UTF-8 cannot."""
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
"""What OpenAI accepts as the name of a function or a schema."""
JsonObject = Annotated[dict[str, Any], AfterValidator(_is_json)]
"""An object that is passed on unchanged."""
MOST_BRACKETS = 200_000
"""Most opening brackets in a body, even inside strings: parsing holds the GIL, 2 s for a million empty lists."""
MAX_FIELDS = 256
"""Most fields that an object may have."""
NotSupported = Mapping[str, Sequence[Any]]


def at_most(entries: int) -> BeforeValidator:
    """For a dict: refuse more entries than this before any of them is checked."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise ValueError(f"it has {len(value)} entries; at most {entries} are taken")
        return value

    return BeforeValidator(check)


class Body(BaseModel):
    """A JSON body, or an object in one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    not_supported: ClassVar[NotSupported] = {}
    """Known fields that are not supported, with the values of each that ask for nothing: these are accepted."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:  # the error would name each unknown field
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
        """Whether the value is null for a field whose default is not null: OpenAI's clients may send that."""
        field = cls.model_fields.get(name)
        return value is None and field is not None and not field.is_required() and field.default is not None
