"""docs/api.md says what the API does."""

import json
import re
from pathlib import Path

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from nr_serve.api.errors import _TYPES
from nr_serve.api.schemas import ChatBody, CompletionBody
from nr_serve.neutral.format import write_adapter
from tests import tiny
from tests.fakes import serving
from tests.unit.servers import Loop, running

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```http\n(\w+) (\S+)\n(.+?)\n```", PAGE, re.S)
BODIES = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody}
OPENAIS = (completion_create_params, chat_create_params)


def section(title: str) -> list[list[str]]:
    """The rows of a section's table."""
    table = re.search(rf"^## {title}\n(.+?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.+\|$", table, re.M)][
        2:
    ]


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    """Of a server over the real engine with a tiny base, on which "hu" is loaded."""
    folder, model = tmp_path_factory.mktemp("page"), tiny.model()
    tiny.save(model, folder / "tiny")
    adapter = tiny.adapter(model, 1)
    write_adapter(folder / "hu.safetensors", adapter.info, adapter.blocks)
    with running(lambda deliver: Loop(folder / "tiny", deliver), tiny.tokenizer()) as (served, _):
        loaded = served.http.put("/v1/adapters/hu", content=(folder / "hu.safetensors").read_bytes())
        assert loaded.status_code == 201, loaded.text
        yield served.http


@pytest.mark.parametrize(("method", "path", "body"), EXAMPLES)
def test_every_example_is_answered(http, method, path, body):
    body = json.loads(body.replace("smollm2-135m-instruct", http.get("/v1/models").json()["data"][0]["id"]))
    answer = http.request(method, path, json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", BODIES)
def test_the_refused_fields_are_all_on_the_page(path):
    rows = {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in section("Fields that are refused")}
    assert rows[path] == sorted(BODIES[path].not_supported)


def test_the_fields_beyond_openais_are_all_on_the_page():
    named = {name for row in section("Fields beyond OpenAI's") for name in re.findall(r"`(\w+)`", row[0])}
    theirs = {name for each in OPENAIS for name in each.CompletionCreateParamsBase.__annotations__} | {"stream"}
    assert named == {name for body in BODIES.values() for name in body.model_fields} - theirs


def test_the_errors_are_all_on_the_page():
    assert {int(code): kind for code, kind, _ in section("Errors")} == _TYPES


def test_the_routes_of_adapters_are_all_on_the_page():
    named = {each for row in section("Adapters") for each in re.findall(r"`([A-Z]+ /[^`]+)`", row[0])}
    with serving() as served:
        paths = served.http.get("/openapi.json").json()["paths"]
    routes = {f"{m.upper()} {path}" for path, methods in paths.items() for m in methods if "adapter" in path}
    assert named == routes
