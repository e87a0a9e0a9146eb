"""Structured answers: OpenAI's `response_format`, vLLM's `structured_outputs` and older `guided_*`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from llguidance import LLMatcher, grammar_from
from pydantic import Field, model_validator

from nr_serve.api.body import Body, JsonObject, Name, NotSupported, Text
from nr_serve.engine.guide import MAX_GRAMMAR_BYTES
from nr_serve.errors import BadRequest

ANY_OBJECT = {"type": "object"}
WHITESPACE = r"[ \n\t]{0,24}"
"""White space allowed between two JSON tokens by default; limited, as unsure models fill pages with it."""

Pattern = Annotated[Text, Field(max_length=MAX_GRAMMAR_BYTES)]
Schema = Pattern | JsonObject
Choice = Annotated[list[Text], Field(min_length=1, max_length=1024)]


class JsonSchema(Body):
    """OpenAI's `json_schema`. Every answer keeps to the schema, `strict` or not."""

    name: Name
    description: Text | None = Field(None, description="for people; the model does not see it")
    schema_: JsonObject | None = Field(None, alias="schema", description="default: any object")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_belongs_to_its_type(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("`json_schema` is required with `type`: json_schema, and only allowed with it")
        return self


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar and json_object."""

    json_: Schema | None = Field(None, alias="json", description="a JSON schema")
    regex: Pattern | None = None
    choice: Choice | None = None
    grammar: Pattern | None = Field(None, description="Lark or GBNF")
    json_object: bool | None = Field(None, description="any JSON object")
    whitespace_pattern: Pattern | None = Field(None, description=f"between tokens of JSON; default {WHITESPACE}")
    disable_any_whitespace: bool = False

    not_supported: ClassVar[NotSupported] = {
        "disable_additional_properties": [False],
        "disable_fallback": [False],
        "structural_tag": [],
    }


_NOTHING = StructuredOutputs.model_validate({})


class FormFields(Body):
    """The fields that ask for a form; one of them may be given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(None, description="older name of structured_outputs.json")
    guided_regex: Pattern | None = Field(None, description="older name of structured_outputs.regex")
    guided_choice: Choice | None = Field(None, description="older name of structured_outputs.choice")
    guided_grammar: Pattern | None = Field(None, description="older name of structured_outputs.grammar")
    guided_whitespace_pattern: Pattern | None = Field(None, description="older name of whitespace_pattern")

    not_supported: ClassVar[NotSupported] = {"guided_decoding_backend": ["auto", "guidance"]}


@dataclass(frozen=True)
class Form:
    """A required answer format as a grammar."""

    grammar: str
    param: str
    """The request field that asked for it."""
    rule: str | None = None
    """If the format is JSON, its grammar as a rule for use in a larger grammar."""


def has_form(fields: FormFields) -> bool:
    """Whether the fields ask for any format."""
    given = {name for name in FormFields.model_fields if getattr(fields, name) is not None}
    return bool(given - {"response_format"} or (fields.response_format and fields.response_format.type != "text"))


def form_of(fields: FormFields) -> Form | None:
    """The format asked for, if any. Raises BadRequest if it has no grammar, or if several are given."""
    asked = _asked(fields)
    _check_one(asked)
    if not asked and fields.structured_outputs is not None:
        raise BadRequest(
            "`structured_outputs` needs one of json, regex, choice, grammar and json_object",
            param="structured_outputs",
        )
    whitespace = _whitespace(fields)
    if whitespace is not None and all(kind != "json" for kind, _ in asked.values()):
        given = "structured_outputs" if fields.guided_whitespace_pattern is None else "guided_whitespace_pattern"
        raise BadRequest(f"{given}: a whitespace pattern needs a JSON format", param=given)
    for param, (kind, value) in asked.items():
        try:
            return _form(param, kind, value, WHITESPACE if whitespace is None else whitespace)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{param}: {error}", param=param) from error
    return None


def json_rule(schema: Any, whitespace: str = WHITESPACE, *, lenient: bool = False) -> str:
    """A JSON schema as the right side of a Lark rule; no white space between tokens if `whitespace` is "".

    With `lenient`, keywords that a grammar cannot express are ignored; otherwise they are errors.
    """
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    if "x-guidance" in schema:
        raise ValueError("`x-guidance` is not supported")
    spaced = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    return f"%json {json.dumps(schema | {'x-guidance': spaced | {'lenient': lenient}})}"


def _asked(fields: FormFields) -> dict[str, tuple[str, Any]]:
    """Every format asked for, by request field, as (kind, value)."""
    asked: dict[str, tuple[str, Any]] = {}
    response, outputs = fields.response_format, fields.structured_outputs or _NOTHING
    if response is not None and response.type == "json_object":
        asked["response_format"] = ("json", ANY_OBJECT)
    if response is not None and response.json_schema is not None:
        schema = response.json_schema.schema_
        asked["response_format.json_schema.schema"] = ("json", ANY_OBJECT if schema is None else schema)
    if outputs.json_object:
        asked["structured_outputs.json_object"] = ("json", ANY_OBJECT)
    both = {
        "json": (outputs.json_, fields.guided_json),
        "regex": (outputs.regex, fields.guided_regex),
        "choice": (outputs.choice, fields.guided_choice),
        "grammar": (outputs.grammar, fields.guided_grammar),
    }
    for kind, values in both.items():
        for name, value in zip((f"structured_outputs.{kind}", f"guided_{kind}"), values, strict=True):
            if value is not None:
                asked[name] = (kind, value)
    return asked


def _whitespace(fields: FormFields) -> str | None:
    """Pattern for the white space between JSON tokens, if the client gives one; "" forbids white space."""
    outputs = fields.structured_outputs or _NOTHING
    asked = {
        "structured_outputs.disable_any_whitespace": "" if outputs.disable_any_whitespace else None,
        "structured_outputs.whitespace_pattern": outputs.whitespace_pattern,
        "guided_whitespace_pattern": fields.guided_whitespace_pattern,
    }
    given = {name: pattern for name, pattern in asked.items() if pattern is not None}
    _check_one(given)
    return next(iter(given.values()), None)


def _check_one(given: Mapping[str, Any]) -> None:
    """Raise BadRequest, naming the second field, if several fields are given."""
    if len(given) > 1:
        raise BadRequest(f"give one of {', '.join(f'`{name}`' for name in given)}", param=list(given)[1])


def _form(param: str, kind: str, value: Any, whitespace: str) -> Form:
    if kind == "json":
        rule = json_rule(json.loads(value) if isinstance(value, str) else value, whitespace)
        return Form(f"start: {rule}", param, rule)
    if kind == "regex":
        return Form(LLMatcher.grammar_from_regex(value), param)
    if kind == "choice":
        return Form("start: " + " | ".join(json.dumps(each) for each in value), param)
    return Form(grammar_from("grammar", value), param)
