"""Tool calls: read from text in whatever pieces it comes, and asked for in OpenAI's ways."""

import json
import random

import pytest

from nr_serve.api.body import MOST_BRACKETS
from nr_serve.api.context import Context
from nr_serve.api.structured import json_rule
from nr_serve.api.tool_support import tool_fault
from nr_serve.api.tools import MOST_CLOSES, Call, FunctionName, Tool, ToolName, ToolReader, toolbox
from nr_serve.engine.guide import Guide
from nr_serve.engine.model.sampler import allowed
from tests import tiny
from tests.fakes import ByteTokenizer, events, letters, serving

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
FORM = '<tool_call>{"name":'


def tagged(name, arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def read(pieces):
    """Content, and calls as (name, arguments), of an answer that comes in these pieces."""
    reader, content, calls = ToolReader(), "", []
    for piece in pieces:
        text, more = reader.push(piece)
        content, calls = content + text, calls + more
    return content + reader.finish(), [(call.name, json.loads(call.arguments)) for call in calls]


def in_pieces(text, rng):
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


ANSWERS = {
    "": ("", []),
    "no call <tool": ("no call <tool", []),
    "a < b \n ": ("a < b \n ", []),
    tagged("f", {}): ("", [("f", {})]),
    f"Let me see.\n{tagged('f', {'x': 1})}\n": ("Let me see.", [("f", {"x": 1})]),
    f"{tagged('f', {})}\n{tagged('g', {'y': [None]})}": ("", [("f", {}), ("g", {"y": [None]})]),
    f"a{tagged('f', {})} b {tagged('f', {})} c": ("a b c", [("f", {}), ("f", {})]),
    tagged("f", {"x": "</tool_call>"}): ("", [("f", {"x": "</tool_call>"})]),
    tagged("f", {"x": "<tool_call> é🙂"}): ("", [("f", {"x": "<tool_call> é🙂"})]),
    "x <tool_call>not json</tool_call> y": ("x <tool_call>not json</tool_call> y", []),
    '<tool_call>{"name": "f"}</tool_call>': ('<tool_call>{"name": "f"}</tool_call>', []),
    '<tool_call>{"name": 1, "arguments": {}}</tool_call>': (
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>', []
    ),
    '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>': (
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', []
    ),
    "<tool_call>[1]</tool_call>": ("<tool_call>[1]</tool_call>", []),
    f"{tagged('f', {})}\n<tool_call>\n{{\"name\": ": ('\n<tool_call>\n{"name": ', [("f", {})]),
}  # fmt: skip


@pytest.mark.parametrize("text", ANSWERS)
def test_calls_are_read_whatever_pieces_the_answer_comes_in(text):
    rng = random.Random(text)
    assert read([text]) == ANSWERS[text]
    assert read(text) == ANSWERS[text]
    for _ in range(200):
        assert read(in_pieces(text, rng)) == ANSWERS[text]


def test_content_comes_as_soon_as_it_cannot_be_a_call():
    reader = ToolReader()
    got = [reader.push(piece)[0] for piece in ("Hi", " ", "there", " <to", "p>", "<tool_call>", "x")]
    assert got == ["Hi", "", " there", "", " <top>", "", ""]


def test_every_call_has_an_id_of_its_own():
    assert Call("f", "{}").id != Call("f", "{}").id


# The grammar: which answers it lets through

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["x"]}},
    "required": ["city"],
    "additionalProperties": False,
}
STRICT = [Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": CITY, "strict": True}})]
FREE = [Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": CITY}})]
NAMED = ToolName(type="function", function=FunctionName(name="f"))
GOOD, WRONG = tagged("f", {"city": "x"}), tagged("f", {"city": "y"})


def accepted(grammar, text):
    """Whether an answer may be this text and end there."""
    tokenizer = tiny.tokenizer()
    progress = Guide(grammar, tokenizer.for_grammars(tiny.VOCAB, [299])).begin()
    for token_id in tokenizer.encode(text):
        if progress.complete or not allowed(progress, tiny.VOCAB)[token_id]:
            return False
        progress.take(token_id)
    return bool(progress.complete or allowed(progress, tiny.VOCAB)[299])


@pytest.mark.parametrize(
    ("choice", "parallel", "good", "bad"),
    [
        ("auto", None, ["", "hi", "a < b", GOOD, f"hi {GOOD}", f"{GOOD}\n{GOOD} ok"],
         [WRONG, "a <tool_call> b", tagged("g", {})]),
        ("auto", False, ["", "hi", GOOD, f"hi {GOOD}"], [WRONG, f"{GOOD}\n{GOOD}", f"{GOOD} ok"]),
        ("required", None, [GOOD, f"{GOOD}\n{GOOD}"], ["", "hi", WRONG, f"hi {GOOD}"]),
        ("required", False, [GOOD], ["", "hi", WRONG, f"{GOOD}\n{GOOD}"]),
        (NAMED, None, [GOOD], ["", "hi", WRONG, f"{GOOD}\n{GOOD}"]),
    ],
)  # fmt: skip
def test_the_grammar_lets_through_what_the_choice_allows(choice, parallel, good, bad):
    grammar = toolbox(STRICT, choice, parallel).grammar()
    assert {text: accepted(grammar, text) for text in good} == dict.fromkeys(good, True)
    assert {text: accepted(grammar, text) for text in bad} == dict.fromkeys(bad, False)


@pytest.mark.parametrize("schema", [{}, {"properties": {"city": {"type": "string"}}}, {"anyOf": [{}, CITY]}])
@pytest.mark.parametrize("strict", [None, True])
def test_arguments_are_an_object_whatever_else_their_schema_allows(schema, strict):
    function = {"name": "f", "parameters": schema, "strict": strict}
    grammar = toolbox([Tool.model_validate({"type": "function", "function": function})], "required", None).grammar()
    assert accepted(grammar, GOOD)
    assert not any(accepted(grammar, tagged("f", arguments)) for arguments in (1, "x", None, [{}]))


def test_with_a_form_an_answer_is_in_it_or_calls():
    grammar = toolbox(FREE, "auto", None).grammar(json_rule({"type": "integer"}))
    assert all(accepted(grammar, text) for text in ("12", GOOD, f"{GOOD}\n{GOOD}"))
    assert not any(accepted(grammar, text) for text in ("", "hi", f"12{GOOD}", WRONG))
    assert not accepted(toolbox(FREE, "required", None).grammar(json_rule({"type": "integer"})), "12")


def test_a_free_choice_of_tools_that_are_not_strict_needs_no_grammar():
    assert toolbox(FREE, None, None).grammar() is None
    assert toolbox(STRICT, "none", None).grammar() is None


# Through the API: the fake engine says what the test wants, and the template shows the tools


@pytest.fixture(scope="module")
def server():
    def template(self, messages, tokenize, add_generation_prompt, tools=None, **more):
        shown = "".join(f"[{m['role']}]{m['content']}{m.get('tool_calls', '')}" for m in messages)
        return FORM * bool(tools) + "".join(tool["function"]["name"] + ";" for tool in tools or ()) + shown

    with pytest.MonkeyPatch.context() as patch, serving() as served:
        patch.setattr(ByteTokenizer, "apply_chat_template", template)
        yield served


def said(server, text, **body):
    server.engine.answer = lambda submit: [*text.encode(), 257]
    try:
        return server.chat(max_tokens=len(text.encode()) + 1, stop_token_ids=[257], **body)
    finally:
        server.engine.answer = letters


def test_an_answer_with_calls_has_openais_shape(server):
    text = f"Hm.\n{tagged('weather', {'city': 'Őr'})}{tagged('clock', {})}"
    choice = said(server, text, tools=TOOLS).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["role"], message["content"], message["refusal"]) == ("assistant", "Hm.", None)
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert message["tool_calls"] == [
        {"id": ids[0], "type": "function", "function": {"name": "weather", "arguments": '{"city": "Őr"}'}},
        {"id": ids[1], "type": "function", "function": {"name": "clock", "arguments": "{}"}},
    ]
    assert bytes(server.asked().prompt_ids).decode() == f"{FORM}weather;clock;[user]hi"


def test_content_beside_no_text_is_null_and_without_calls_the_text(server):
    assert said(server, tagged("clock", {}), tools=TOOLS).json()["choices"][0]["message"]["content"] is None
    choice = said(server, "It rains.", tools=TOOLS).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It rains.", "stop")
    assert "tool_calls" not in choice["message"]


def test_a_stream_of_calls_numbers_them(server):
    text = f"Hm. {tagged('clock', {})}\n{tagged('clock', {})}"
    streamed = events(said(server, text, tools=TOOLS, stream=True))
    deltas = [event["choices"][0]["delta"] for event in streamed]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hm."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "clock"), (1, "clock")]
    assert [event["choices"][0]["finish_reason"] for event in streamed][-1] == "tool_calls"
    assert len(streamed) < 12, "nothing is sent while a call is being written"


def test_without_tools_or_with_none_chosen_an_answer_is_text(server):
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        message = said(server, tagged("clock", {}), **more).json()["choices"][0]["message"]
        assert message["content"] == tagged("clock", {})
    assert bytes(server.asked().prompt_ids) == b"[user]hi"


def test_calls_and_answers_of_tools_reach_the_template(server):
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"a": [1]}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": None},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
    ]
    assert server.chat(messages=messages, max_tokens=1).status_code == 200
    plain = call | {"function": {"name": "clock", "arguments": {"a": [1]}}}
    assert bytes(server.asked().prompt_ids).decode() == f"[user]hi[assistant]{[plain]}[tool]12:00"


def test_what_clients_send_back_of_earlier_answers_is_taken_and_changes_nothing(server):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    part = {"type": "text", "text": "hi"}
    plain = [
        {"role": "user", "content": [part]},
        {"role": "assistant", "content": "a", "tool_calls": [call]},
        {"role": "tool", "content": "b", "tool_call_id": "c"},
    ]
    echoed = [
        plain[0] | {"content": [part | {"cache_control": {"type": "ephemeral"}}], "reasoning": None},
        plain[1] | {"tool_calls": [call | {"index": 0}], "reasoning": "Hm.", "reasoning_content": "Hm."},
        plain[2],
    ]
    prompts = []
    for messages in (plain, echoed):
        assert server.chat(messages=messages, max_tokens=1).status_code == 200
        prompts.append(server.asked().prompt_ids)
    assert prompts[0] == prompts[1]
    for name in ("reasoning", "reasoning_content"):
        error = server.chat(messages=[{"role": "user", "content": "hi", name: "Hm."}]).json()["error"]
        assert (error["code"], error["param"]) == (400, f"messages[0].{name}")


def test_arguments_have_as_many_brackets_as_a_body_may_however_they_are_spelled(server):
    arguments = json.dumps('{"a": [' + "[]," * MOST_BRACKETS + "[]]}").replace("[", "\\u005b")
    body = '{"model": "base", "messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "function", '
    body += f'"function": {{"name": "f", "arguments": {arguments}}}}}]}}]}}'
    answer = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "opening brackets" in answer.json()["error"]["message"]


def test_tokenize_counts_the_tools_too(server):
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [CLOCK]}
    assert bytes(server.http.post("/tokenize", json=body).json()["tokens"]).decode() == f"{FORM}clock;[user]hi"
    error = server.http.post("/tokenize", json={"prompt": "hi", "tools": [CLOCK]}).json()["error"]
    assert error["param"] == "tools"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_wrong_tools_are_refused_by_name(server, body, param):
    response = server.chat(**body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_base_whose_template_has_no_place_for_tools_refuses_them(server, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "apply_chat_template", lambda self, messages, **more: "hi")
    error = server.chat(tools=TOOLS).json()["error"]
    assert (error["code"], error["param"]) == (400, "tools")
    assert server.chat(tools=TOOLS, tool_choice="none").status_code == 200


def test_a_base_that_cannot_write_the_tags_refuses_tools(server, monkeypatch):
    monkeypatch.setattr(Context, "tool_fault", property(lambda self: tool_fault(self.tokenizer)))  # not kept
    plain = ByteTokenizer.decode
    monkeypatch.setattr(
        ByteTokenizer, "decode", lambda *args, **more: plain(*args, **more).replace("<tool_call>", "")
    )
    assert server.chat(tools=TOOLS).json()["error"]["param"] == "tools"


def test_a_call_of_many_closing_tags_is_given_up_and_stays_content():
    few = '<tool_call>{"name": "f", "arguments": {"a": "' + "</tool_call>" * MOST_CLOSES + '"}}</tool_call>'
    content, calls = read([few[: len(few) // 2], few[len(few) // 2 :]])
    assert (content, calls) == ("", [("f", {"a": "</tool_call>" * MOST_CLOSES})])
    many = '<tool_call>{"a": "' + "</tool_call>" * 100_000
    assert read([many, "more"]) == (many + "more", [])


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
def test_a_call_with_what_is_no_json_number_stays_content(number):
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + number + "}}</tool_call>"
    assert read([text]) == (text, [])
