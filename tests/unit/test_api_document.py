"""/openapi.json is true: what routes answer has the form it says, and every field of OpenAI's is known."""

import json

import jsonschema
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from nr_serve.api.schemas import ChatBody, CompletionBody
from tests.fakes import events, serving

ASKED = {"max_tokens": 2, "n": 2, "prompt_logprobs": 1, "return_token_ids": True, "gates": True}
ANSWERED = [
    ("post", "/v1/completions", {"prompt": "hi"}),
    ("post", "/v1/completions", {"prompt": "hi", "logprobs": 2, "echo": True, "stop": "b", **ASKED}),
    ("post", "/v1/chat/completions", {"service_tier": "auto"}),
    ("post", "/v1/chat/completions", {"logprobs": True, "top_logprobs": 2, **ASKED}),
    ("post", "/v1/completions", {"prompt": "hi", "temperature": -1}),
    ("post", "/v1/chat/completions", {"model": "nope"}),
    ("post", "/tokenize", {"prompt": "hi", "return_token_strs": True}),
    ("post", "/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
    ("post", "/detokenize", {"tokens": [104]}),
    ("post", "/detokenize", {"tokens": [1000]}),
    ("get", "/v1/models", None),
    ("get", "/v1/models/{model}", "hu"),
    ("get", "/v1/models/{model}", "base@none"),
    ("get", "/v1/models/{model}", "nope"),
]


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def document(server):
    return server.http.get("/openapi.json").json()


def schema_of(document, method, route, status, kind="application/json"):
    answer = document["paths"][route][method]["responses"][str(status)]
    return {**answer["content"][kind]["schema"], "components": document["components"]}


@pytest.mark.parametrize(("method", "route", "given"), ANSWERED)
def test_answers_have_the_form_the_document_says(server, document, method, route, given):
    if method == "get":
        response = server.http.get(route.replace("{model}", given or ""))
    else:
        base = {"model": "base"} | ({"messages": [{"role": "user", "content": "hi"}]} if "chat" in route else {})
        response = server.http.post(route, json=base | given)
    jsonschema.validate(response.json(), schema_of(document, method, route, response.status_code))


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_streams_example_is_of_the_form_that_is_streamed(server, document, route):
    ask = server.chat if "chat" in route else server.complete
    chunk = events(ask(stream=True, max_tokens=1))[-1]
    content = document["paths"][route]["post"]["responses"]["200"]["content"]["text/event-stream"]
    first, done, end = content["example"].split("\n\n")
    example = json.loads(first.removeprefix("data: "))
    assert (done, end) == ("data: [DONE]", "")
    assert example.keys() == chunk.keys()
    assert example["choices"][0].keys() == chunk["choices"][0].keys()


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_every_body_and_answer_has_an_example_that_fits(document, route):
    operation = document["paths"][route]["post"]
    for content in (
        operation["requestBody"]["content"],
        *(operation["responses"][s]["content"] for s in ("200", "400")),
    ):
        schema = {**content["application/json"]["schema"], "components": document["components"]}
        name = schema["$ref"].rsplit("/", 1)[-1]
        example = content["application/json"].get("example") or document["components"]["schemas"][name]["example"]
        jsonschema.validate(example, schema)


def test_every_bound_is_json_schemas(document):
    keys = set()

    def walk(part):
        if isinstance(part, dict):
            keys.update(part)
        for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            walk(each)

    walk(document["components"]["schemas"])
    assert "minimum" in keys
    assert not keys & {"ge", "gt", "le", "lt"}


def test_the_fields_of_a_message_that_only_some_templates_write_say_so(document):
    fields = document["components"]["schemas"]["Message"]["properties"]
    assert all("templates" in fields[name]["description"] for name in ("name", "tool_call_id"))


OPENAIS = {CompletionBody: completion_create_params, ChatBody: chat_create_params}


@pytest.mark.parametrize("body", OPENAIS)
def test_every_field_of_openais_is_honoured_or_refused_by_name(body):
    base = OPENAIS[body].CompletionCreateParamsBase.__annotations__
    theirs = {*base, *OPENAIS[body].CompletionCreateParamsStreaming.__annotations__}
    ours = {field.alias or name for name, field in body.model_fields.items()}
    assert "stream" in theirs
    assert theirs <= ours | body.not_supported.keys()
    assert not ours & body.not_supported.keys()


def test_every_field_that_is_not_supported_is_refused_with_its_name(server):
    for ask, body in ((server.complete, CompletionBody), (server.chat, ChatBody)):
        for name in body.not_supported:
            answer = ask(**{name: {"asks": "something"}})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
            assert ask(**{name: None}).status_code == 200, name
