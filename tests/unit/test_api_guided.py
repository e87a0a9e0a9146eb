"""Guided answers over HTTP: the real engine, a tiny random model at temperature 1, and the openai package."""

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from nr_serve.api import context as context_module
from nr_serve.api import guides
from nr_serve.api.app import create_app
from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.context import Context
from nr_serve.api.schemas import CompletionBody
from nr_serve.config import ServeConfig
from nr_serve.engine.guide import MAX_GRAMMAR_BYTES
from nr_serve.engine.loop import EngineLoop
from nr_serve.errors import QueueFull
from nr_serve.metrics import Metrics
from tests import fakes, tiny
from tests.fakes import events, listening
from tests.waiting import PATIENCE

TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{% endfor %}<assistant>"""
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": -5, "maximum": 99}, "b": {"enum": ["x", "yé"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SPACES = [tiny.tokenizer().encode(space)[0] for space in " \n\t"]
SHORT = {"logit_bias": {str(i): -100 for i in SPACES}}
"""Keeps the answers of a random model short, and the tests fast."""
HI = [{"role": "user", "content": "hi"}]


class City(BaseModel):
    name: str = Field(max_length=3)
    size: Literal["big", "small"]


def tool(name, schema, **more):
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


TOOLS = [
    tool("ab", SCHEMA),
    tool("city", {"$ref": "#/$defs/c", "$defs": {"c": City.model_json_schema()}}),
    tool("now", None),
]
CHECKS = {"ab": SCHEMA, "city": City.model_json_schema(), "now": {"maxProperties": 0}}


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    base = tiny.save(tiny.model(max_position_embeddings=1024), tmp_path_factory.mktemp("long"))
    tokenizer = tiny.tokenizer()
    tokenizer.hf.chat_template = TEMPLATE
    config = ServeConfig(model=str(base), served_model_name="tiny", pages=200, slot_width=8, slots=1)
    engine = AsyncEngine(lambda deliver: EngineLoop(config, base, tokenizer, deliver), Metrics())
    ready = threading.Event()
    engine.on_status = lambda status: ready.set()
    app = create_app(engine, tokenizer, config)
    with listening(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
        assert ready.wait(PATIENCE)
        made = tokenizer.for_grammars
        tokenizer.for_grammars = lambda *args: (
            pytest.fail("too late") if tokenizer._for_grammars is None else made(*args)
        )
        yield http


@pytest.fixture(scope="module")
def client(http):
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(http, **body):
    return http.post("/v1/completions", json={"model": "tiny", "prompt": "hi", "max_tokens": 60, **SHORT} | body)


def chat(http, **body):
    return http.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": HI, "max_tokens": 80, **SHORT} | body
    )


def finished(response):
    """Texts of the answers that ended before their length."""
    assert response.status_code == 200, response.text
    texts = [
        c["text"] if "text" in c else c["message"]["content"]
        for c in response.json()["choices"]
        if c["finish_reason"] == "stop"
    ]
    assert len(texts) > 1
    return texts


NAMED = {"type": "json_schema", "json_schema": {"name": "ab", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": NAMED},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA), "guided_decoding_backend": "guidance"},
    ],
)
@pytest.mark.parametrize("ask", [complete, chat])
def test_a_schema_is_kept_to_by_whatever_name_it_is_given(http, ask, asked):
    for text in finished(ask(http, n=3, seed=1, **asked)):
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    "asked", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_json_mode_gives_objects(http, asked):
    assert all(isinstance(json.loads(text), dict) for text in finished(chat(http, n=8, seed=1, **asked)))


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", r"\d{2}/[a-f]+é?", r"\d{2}/[a-f]+é?"),
        ("choice", ["yes", 'n"o\n', "é🙂", "yes sir"], 'yes|n"o\n|é🙂|yes sir'),
        ("grammar", 'start: "a"+ b\nb: /[0-9]/', "a+[0-9]"),
        ("grammar", 'root ::= "a"+ b\nb ::= [0-9]', "a+[0-9]"),
    ],
)
def test_a_regex_a_choice_or_a_grammar_is_kept_to(http, kind, value, pattern):
    for asked in ({"structured_outputs": {kind: value}}, {f"guided_{kind}": value}):
        for text in finished(complete(http, n=6, seed=0, **asked)):
            assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({}, r"\{\s*\"a\"\s*:\s*\d\s*\}"),
        ({"disable_any_whitespace": True}, r"\{\"a\":\d\}"),
        ({"whitespace_pattern": ""}, r"\{\"a\":\d\}"),
        ({"whitespace_pattern": "-"}, r"\{-?\"a\"-?:-?\d-?\}"),
    ],
)
def test_space_between_tokens_of_json_is_the_clients_choice(http, asked, pattern):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    texts = finished(complete(http, n=6, seed=0, structured_outputs={"json": schema} | asked, logit_bias=None))
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert any(" " in text for text in texts) == (not asked)


def test_a_stream_says_what_the_whole_answer_says(http):
    asked = {"response_format": NAMED, "seed": 3}
    whole = chat(http, **asked).json()["choices"][0]
    streamed = [event["choices"][0] for event in events(chat(http, stream=True, **asked))]
    assert "".join(part["delta"].get("content") or "" for part in streamed) == whole["message"]["content"]
    assert streamed[-1]["finish_reason"] == whole["finish_reason"] == "stop"


def test_best_of_returns_the_likeliest_per_token_of_all_answers(http):
    asked = {"seed": 5, "structured_outputs": {"regex": "[ab]{1,8}"}}
    choices = complete(http, n=12, logprobs=0, **asked).json()["choices"]
    mean = lambda c: sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"])  # noqa: E731
    want = [choice["text"] for choice in sorted(choices, key=mean, reverse=True)[:3]]
    assert want != [choice["text"] for choice in choices[:3]]
    assert [c["text"] for c in complete(http, n=3, best_of=12, **asked).json()["choices"]] == want


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": NAMED["json_schema"]}}, "response_format.json_schema"),
        ({"response_format": NAMED | {"json_schema": {"name": "a b"}}}, "response_format.json_schema.name"),
        ({"guided_json": {"type": "foo"}}, "guided_json"),
        ({"guided_json": {"not": {}}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[" * 100_000}, "guided_json"),
        ({"guided_json": "true"}, "guided_json"),
        ({"guided_json": {"x-guidance": {"lenient": True}}}, "guided_json"),
        ({"guided_json": {"$ref": "https://example.com/schema"}}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "(" * 100_000}, "guided_regex"),
        ({"guided_regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "guided_regex"),
        ({"guided_json": {"enum": ["a" * MAX_GRAMMAR_BYTES]}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "start: b"}, "guided_grammar"),
        ({"guided_grammar": "root ::= " + "(" * 50_000}, "guided_grammar"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"json": {}}, "response_format": NAMED}, "structured_outputs.json"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "structured_outputs"),
        (
            {"structured_outputs": {"json": "{}", "disable_any_whitespace": True, "whitespace_pattern": "-"}},
            "structured_outputs.whitespace_pattern",
        ),
        (
            {"structured_outputs": {"json": "{}", "whitespace_pattern": ""}, "guided_whitespace_pattern": "-"},
            "guided_whitespace_pattern",
        ),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
)  # fmt: skip
def test_a_form_that_is_none_is_refused_by_name_before_anything_runs(http, asked, param):
    response = chat(http, **asked)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_a_schema_that_cannot_be_compiled_in_time_is_refused_and_holds_up_no_other(http):
    endless = complete(http, guided_json={"type": "integer", "multipleOf": 123456789})
    assert (endless.status_code, endless.json()["error"]["param"]) == (400, "guided_json")
    assert complete(http, guided_regex="[ab]{3}next").status_code == 200


def test_a_refusal_says_what_is_wrong_with_an_expression(http):
    message = complete(http, guided_regex="([0-9]{4").json()["error"]["message"]
    assert message.startswith('guided_regex: the grammar cannot be used: invalid regex "([0-9]{4"')
    assert message.endswith("unclosed counted repetition")
    message = complete(http, guided_grammar="start: nothing").json()["error"]["message"]
    assert message == 'guided_grammar: the grammar cannot be used: at 1(8): unknown name: "nothing"'


def test_grammars_are_compiled_on_a_thread_of_their_own_and_not_for_ever(http, monkeypatch):
    threads, may_end, compile_ = [], threading.Event(), guides._compile

    def slow(*args):
        threads.append(threading.current_thread().name)
        assert may_end.wait(PATIENCE)
        return compile_(*args)

    monkeypatch.setattr(guides, "_compile", slow)
    monkeypatch.setattr(guides, "COMPILE_SECONDS", 0.2)
    response = complete(http, guided_regex="a")
    for free in ({}, {"response_format": {"type": "text"}}):
        assert complete(http, max_tokens=1, **free).status_code == 200, "it waits for another's grammar"
    may_end.set()
    assert (response.status_code, threads) == (400, ["nr-guide_0"])
    assert "not compiled within 0.2 s" in response.json()["error"]["message"]


def test_a_grammar_waits_only_so_long_for_others_and_is_not_to_blame_for_them(http, monkeypatch):
    begun, may_end, compiled, compile_ = threading.Event(), threading.Event(), [], guides._compile

    def slow(context, body, tools):
        compiled.append(body.guided_regex)
        begun.set()
        assert may_end.wait(PATIENCE)
        return compile_(context, body, tools)

    monkeypatch.setattr(guides, "_compile", slow)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(complete, http, guided_regex="a")
        assert begun.wait(PATIENCE)
        monkeypatch.setattr(guides, "COMPILE_SECONDS", 0.2)
        second = complete(http, guided_regex="b")
        assert (second.status_code, second.json()["error"]["type"]) == (429, "RateLimitError")
        assert second.headers["retry-after"] == "1"
        monkeypatch.undo()
        may_end.set()
        first.result(PATIENCE)
    assert complete(http, guided_regex="c").status_code == 200
    assert compiled == ["a"], "the second was given up before its turn"


def test_a_grammar_is_compiled_once_however_often_it_is_asked_for(http, monkeypatch):
    made, guide = [], context_module.Guide
    monkeypatch.setattr(context_module, "Guide", lambda *args: made.append(args) or guide(*args))
    asked = {"guided_regex": "[ab]{3}once", "seed": 1, "temperature": 1}
    texts = [complete(http, **asked).json()["choices"][0]["text"] for _ in range(3)]
    assert (len(set(texts)), len(made)) == (1, 1)


def test_only_so_many_grammars_wait():
    async def ask() -> None:
        context = Context(AsyncEngine(fakes.FakeEngine, Metrics()), fakes.tokenizer(), ServeConfig(max_waiting=2))
        body = CompletionBody(model="base", prompt="hi", guided_regex="a")
        go_on = asyncio.Event()

        async def hold() -> None:
            async with context.grammars.turn("x"):
                await go_on.wait()

        held = [asyncio.create_task(hold()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="2 grammars"):
            await guides.guide_for(context, body)
        go_on.set()
        await asyncio.gather(*held)

    asyncio.run(ask())


# Tools


def calls_of(choice):
    return [
        (c["function"]["name"], json.loads(c["function"]["arguments"]))
        for c in choice["message"].get("tool_calls", ())
    ]


def called(http, **asked):
    """The calls of each answer that ended with some."""
    choices = chat(http, tools=TOOLS, n=4, seed=2, max_tokens=150, **asked).json()["choices"]
    found = [calls_of(choice) for choice in choices if choice["finish_reason"] == "tool_calls"]
    assert found
    for name, arguments in (call for calls in found for call in calls):
        jsonschema.validate(arguments, CHECKS[name])
    assert all(c["message"]["content"] is None for c in choices if c["finish_reason"] == "tool_calls")
    return found


def test_a_required_call_is_made_and_its_arguments_are_valid(http):
    found = called(http, tool_choice="required")
    assert all(calls for calls in found)
    assert all(len(calls) == 1 for calls in called(http, tool_choice="required", parallel_tool_calls=False))


def test_several_calls_may_be_made_at_once(http):
    biased = {"logit_bias": {"299": -100}}  # the end is unlikely: one more call
    answer = chat(http, tools=[tool("now", None)], tool_choice="required", max_tokens=130, **biased).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(calls_of(answer["choices"][0])) > 1


def test_a_named_function_is_called_once(http):
    for calls in called(http, tool_choice={"type": "function", "function": {"name": "city"}}):
        assert [name for name, _ in calls] == ["city"]


def test_only_allowed_tools_are_called(http):
    names = [{"type": "function", "function": {"name": name}} for name in ("now", "ab")]
    found = called(
        http, tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}}
    )
    assert {name for calls in found for name, _ in calls} <= {"now", "ab"}


def test_an_answer_is_in_the_form_asked_for_or_calls_a_tool(http):
    asked = {
        "tools": [tool("ab", SCHEMA)],
        "response_format": NAMED,
        "n": 8,
        "seed": 0,
        "logit_bias": SHORT["logit_bias"] | {"27": 2},
    }
    choices = chat(http, max_tokens=100, **asked).json()["choices"]
    kinds = {choice["finish_reason"] for choice in choices}
    assert {"stop", "tool_calls"} <= kinds
    for choice in choices:
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        for _, arguments in calls_of(choice):
            jsonschema.validate(arguments, SCHEMA)


def test_keywords_beyond_grammars_are_refused_of_strict_tools_alone(http):
    odd = {
        "type": "object",
        "properties": {"a": {"type": "array", "maxItems": 2, "uniqueItems": True, "items": {"enum": [1]}}},
    }
    required = {"tool_choice": "required", "max_tokens": 5}
    assert chat(http, tools=[tool("f", odd)], **required).status_code == 200
    error = chat(http, tools=[tool("f", odd, strict=True)], **required).json()["error"]
    assert (error["code"], error["param"]) == (400, "tools")
    assert "uniqueItems" in error["message"]


# The openai package's helpers


def test_parse_gives_an_object_of_the_clients_type(client):
    answer = client.chat.completions.parse(
        model="tiny", messages=HI, response_format=City, max_completion_tokens=80, **SHORT, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, City)


CITY = [openai.pydantic_function_tool(City, name="city")]
ONE_CALL = {
    "model": "tiny", "tools": CITY, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 120,
    "seed": 1, **SHORT,
}  # fmt: skip


def test_parse_gives_the_arguments_of_calls_too(client):
    answer = client.chat.completions.parse(messages=HI, **ONE_CALL)
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, City)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_stream_gives_the_same_object(client):
    asked = {"model": "tiny", "messages": HI, "response_format": City, "max_tokens": 120, **SHORT, "seed": 1}
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == client.chat.completions.parse(**asked).choices[0].message.parsed
    assert final.usage.completion_tokens > 5


def test_stream_gives_the_arguments_of_calls_too(client):
    with client.chat.completions.stream(messages=HI, **ONE_CALL) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, City)


def test_a_conversation_goes_on_after_a_call(client):
    first = client.chat.completions.create(messages=HI, **ONE_CALL).choices[0].message
    answer = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "done"}
    again = client.chat.completions.create(
        model="tiny", messages=[*HI, first, answer], tools=CITY, tool_choice="none", max_tokens=3
    )
    assert again.choices[0].message.tool_calls is None
