import pytest

from nr_serve.api import ask
from tests.fakes import ByteTokenizer, events, serving, usage

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_CALL = CALL | {"function": {"name": "f", "arguments": "[1]"}}


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


def test_an_answer_has_openais_shape_and_the_template_is_used(server):
    body = server.chat(max_tokens=3).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    message = {"role": "assistant", "content": "abc", "refusal": None}
    assert body["choices"] == [
        {"index": 0, "message": message, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert bytes(server.asked().prompt_ids) == b"[user]hi[assistant]"  # no BOS besides the template's own
    assert body["usage"] == usage(19, 3)


def test_parts_are_joined_and_a_developer_is_the_system(server):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    server.chat(messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}], max_tokens=1)
    assert bytes(server.asked().prompt_ids) == b"[system]x[user]a\nb[assistant]"


def test_variables_reach_the_template(server, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "apply_chat_template", lambda self, messages, **more: f"{more.get('fast')}")
    for given, prompt in ((None, b"None"), ({}, b"None"), ({"fast": 1}, b"1")):
        assert server.chat(max_tokens=1, chat_template_kwargs=given).status_code == 200
        assert bytes(server.asked().prompt_ids) == prompt
        body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": given}
        assert bytes(server.http.post("/tokenize", json=body).json()["tokens"]) == prompt
    for given in ({"messages": []}, [1], "fast"):
        error = server.chat(chat_template_kwargs=given).json()["error"]
        assert (error["code"], error["param"].split(".")[0]) == (400, "chat_template_kwargs"), given


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}])
def test_parts_that_are_no_text_are_refused_in_a_sentence(server, part):
    content = [{"type": "text", "text": "what is this?"}, part]
    error = server.chat(messages=[{"role": "user", "content": content}]).json()["error"]
    assert error["param"] == "messages[0].content"
    assert error["message"].endswith("only parts of type `text` are supported by this server")


def test_without_a_length_the_rest_of_the_context_is_there(server):
    server.chat(stop="a")
    assert server.asked().sampling.max_tokens == 200 - 19


def test_max_completion_tokens_and_max_tokens_are_one(server):
    for given in ({"max_tokens": 2}, {"max_completion_tokens": 2}, {"max_tokens": 2, "max_completion_tokens": 2}):
        assert server.chat(**given).json()["usage"]["completion_tokens"] == 2
    error = server.chat(max_tokens=2, max_completion_tokens=3).json()["error"]
    assert (error["code"], error["param"]) == (400, "max_tokens")
    for name in ("max_tokens", "max_completion_tokens"):
        assert server.chat(**{name: 199}).json()["error"]["param"] == name


def test_a_stream_begins_with_the_role_and_ends_with_a_reason(server):
    streamed = events(server.chat(max_tokens=2, n=2, seed=0, stream=True))
    assert {event["object"] for event in streamed} == {"chat.completion.chunk"}
    deltas = [event["choices"][0] for event in streamed]
    assert [d["delta"] for d in deltas[:2]] == [{"role": "assistant", "content": ""}] * 2
    for index, text in ((0, "ab"), (1, "bc")):
        mine = [d for d in deltas[2:] if d["index"] == index]
        assert "".join(d["delta"]["content"] for d in mine) == text
        assert [d["finish_reason"] for d in mine] == [None, "length"]


def test_a_stream_shows_whole_characters_and_every_token_only_if_asked_of_tokens(server, monkeypatch):
    monkeypatch.setattr(server.engine, "answer", lambda submit: list("ő".encode()) * 9)
    streamed = events(server.chat(max_tokens=4, stream=True))
    assert [event["choices"][0]["delta"]["content"] for event in streamed] == ["", "ő", "ő"]
    for asked in ({"logprobs": True}, {"gates": True}, {"return_token_ids": True}):
        assert len(events(server.chat(max_tokens=4, stream=True, **asked))) == 1 + 4, asked


def test_an_answer_of_unsaid_length_ends_where_no_more_could_be_reported(server, monkeypatch):
    monkeypatch.setattr(ask, "MAX_REPORTED", 120)
    report = {"n": 2, "logprobs": True, "top_logprobs": 1, "gates": True}
    choices = server.chat(**report).json()["choices"]
    # For each answer the gates of 19 tokens of the prompt, and three entries a token.
    assert [len(choice["logprobs"]["content"]) for choice in choices] == [13, 13]
    assert server.chat(**report, max_tokens=13).status_code == 200
    assert server.chat(**report, max_tokens=14).json()["error"]["param"] == "logprobs"
    assert server.chat().status_code == 200
    assert server.asked().sampling.max_tokens == server.engine.info.max_model_len - 19, "it reports nothing"


def test_the_bytes_of_logprobs_add_up_to_the_answer_where_characters_are_several_tokens(server, monkeypatch):
    monkeypatch.setattr(server.engine, "answer", lambda submit: list("ő🎉".encode()) * 9)
    choice = server.chat(logprobs=True, max_tokens=6).json()["choices"][0]
    assert choice["message"]["content"] == "ő🎉"
    assert bytes(byte for each in choice["logprobs"]["content"] for byte in each["bytes"]) == "ő🎉".encode()


def test_logprobs_have_bytes_and_the_likeliest(server):
    content = server.chat(max_tokens=1, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    top = [{"token": "a", "logprob": -0.25, "bytes": [97]}, {"token": "b", "logprob": -0.5, "bytes": [98]}]
    assert content == [{"token": "a", "logprob": -1.5, "bytes": [97], "top_logprobs": top}]
    bare = server.chat(max_tokens=1, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert bare[0]["top_logprobs"] == []


def test_what_vllm_says_of_the_prompt_stands_beside_the_choices(server):
    asked = {"max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True, "gates": True}
    body = server.chat(**asked).json()
    first = events(server.chat(**asked, stream=True))[1]
    for answer in (body, first):
        assert answer["prompt_token_ids"] == list(b"[user]hi[assistant]")
        assert len(answer["prompt_logprobs"]) == 19
        assert answer["choices"][0]["token_ids"] == [97]
        assert answer["choices"][0]["gates"]["tokens"] == [{"hu": 0.5}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", "x"), ("tool_choice", "auto"), ("functions", [{}]), ("function_call", "auto"),
        ("response_format", "x"), ("modalities", ["audio"]), ("audio", {}), ("store", True),
        ("metadata", "x"), ("prediction", {}), ("reasoning_effort", "low"), ("web_search_options", {}),
        ("parallel_tool_calls", True), ("verbosity", "low"), ("safety_identifier", {}), ("prompt_cache_key", 1),
        ("top_logprobs", 2), ("logprobs", 1), ("max_tokens", 0), ("max_completion_tokens", 0), ("messages", []),
        ("messages", "hi"), ("prompt", "hi"), ("continue_final_message", True), ("best_of", 1), ("echo", True),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(server, field, value):
    response = server.chat(**{field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "function", "content": "x", "name": "y"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "tool_call_id": "y"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "assistant", "content": "x", "tool_calls": [CALL]}, "messages"),  # the template drops them
        ({"role": "user", "content": "x", "mood": "y"}, "messages[0].mood"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [BAD_CALL]}, "messages[0].tool_calls[0].function.arguments"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content"),
        ({"role": "assistant", "content": "I speak first"}, "messages"),
    ],
)
def test_a_wrong_message_is_refused_with_its_place(server, message, param):
    response = server.chat(messages=[message])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_what_asks_for_nothing_is_taken(server):
    assert server.chat(
        tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"], store=False,
        metadata=None, service_tier="default", max_tokens=1,
    ).status_code == 200  # fmt: skip


def test_messages_too_long_are_refused_as_openai_does(server):
    error = server.chat(messages=[{"role": "user", "content": "x" * 300}], max_tokens=5).json()["error"]
    assert "(317 in the messages, 5 in the completion)" in error["message"]
    assert error["param"] == "messages"
