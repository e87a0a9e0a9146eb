import threading

import pytest

from nr_serve.api.context import Context
from nr_serve.api.tool_support import tool_fault
from tests.fakes import BOS, ByteTokenizer, serving, view

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.mark.parametrize(
    ("model", "adapters", "selection", "selected"),
    [
        ("base", None, None, "base"),
        ("base@none", None, (), "base@none"),
        ("hu", None, ("hu",), "hu"),
        ("base", ["hu"], ("hu",), "hu"),
        ("base@none", ["hu"], ("hu",), "hu"),
        ("hu", [], (), "base@none"),
    ],
)
def test_model_and_adapters_say_what_may_fire(server, model, adapters, selection, selected):
    assert server.complete(model=model, adapters=adapters, max_tokens=1).json()["model"] == model
    assert server.asked().adapters == selection
    assert server.asked().selected == selected


def test_a_selection_has_one_name_in_whatever_order_it_is_given():
    with serving() as server:
        server.http.put("/v1/adapters/da", content=b"good")
        for adapters in (["hu", "da"], ["da", "hu"]):
            assert server.complete(model="hu", adapters=adapters, max_tokens=1).status_code == 200
            assert (server.asked().adapters, server.asked().selected) == (tuple(adapters), "da+hu")


def test_an_adapter_on_its_way_back_into_a_slot_is_served():
    with serving() as server:
        server.engine.adapters["hu"] = view("hu", state="loading")
        assert server.http.get("/v1/adapters/hu").json()["state"] == "loading"
        assert server.complete(model="hu").status_code == 200
        assert server.complete(adapters=["hu"]).status_code == 200


def test_an_unknown_model_is_refused_in_openais_words(server):
    for answer in (server.complete(model="nope"), server.chat(model="nope"), server.http.get("/v1/models/nope")):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (404, 404, "NotFoundError")
        assert (error["message"], error["param"]) == (
            "The model `nope` does not exist; GET /v1/models lists those that do",
            "model",
        )


def test_unknown_or_repeated_adapters_are_refused(server):
    error = server.complete(adapters=["hu", "da"]).json()["error"]
    assert (error["code"], error["param"]) == (404, "adapters[1]")
    error = server.complete(adapters=["hu", "hu"]).json()["error"]
    assert (error["code"], error["param"]) == (400, "adapters")


def test_models_are_the_base_the_bare_base_and_the_adapters(server):
    cards = server.http.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"], card["root"]) for card in cards] == [
        ("base", None, "base"), ("base@none", "base", "base"), ("hu", "base", "base")
    ]  # fmt: skip
    assert cards[2]["version"] == "v1"
    assert (cards[2]["language"], cards[2]["state"]) == ("hu", "attached")
    for card in cards:
        assert card["object"] == "model"
        assert server.http.get(f"/v1/models/{card['id']}").json() == card


def test_tokenize_and_detokenize_are_each_others_inverse(server):
    body = server.http.post("/tokenize", json={"prompt": "hő", "return_token_strs": True}).json()
    assert body["tokens"] == [BOS, *"hő".encode()]
    assert (body["count"], body["max_model_len"]) == (4, 200)
    assert body["token_strs"][:2] == ["<s>", "h"]
    back = server.http.post("/detokenize", json={"tokens": body["tokens"], "model": "hu"}).json()
    assert back == {"prompt": "<s>hő"}


def test_text_is_made_and_read_off_the_event_loop(monkeypatch):
    threads = set()

    def noted(work):
        def working(*args, **more):
            threads.add(threading.current_thread().name)
            return work(*args, **more)

        return working

    monkeypatch.setattr(ByteTokenizer, "encode", noted(ByteTokenizer.encode))
    monkeypatch.setattr(ByteTokenizer, "decode", noted(ByteTokenizer.decode))
    with serving() as server:
        tokens = server.http.post("/tokenize", json={"prompt": "hi", "return_token_strs": True}).json()["tokens"]
        server.http.post("/detokenize", json={"tokens": tokens})
    assert threads == {"nr-text_0"}


def test_tokenize_refuses_tools_that_a_chat_refuses(server, monkeypatch):
    def template(self, messages, tools=None, **more):
        return f"{tools}"  # it names them, and says nothing of how they are called

    monkeypatch.setattr(ByteTokenizer, "apply_chat_template", template)
    monkeypatch.setattr(Context, "tool_fault", property(lambda self: tool_fault(self.tokenizer)))  # not kept
    body = {"messages": HI, "tools": [TOOL]}
    tokenized, chat = server.http.post("/tokenize", json=body).json(), server.chat(**body).json()
    assert tokenized["error"]["param"] == "tools"
    assert tokenized == chat


def test_tokenize_takes_messages_too(server):
    body = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    assert bytes(body["tokens"]) == b"[user]x[assistant]"


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "nope"}, "model"),
        ("/tokenize", {"prompt": "x", "tools": [TOOL]}, "tools"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "x", "continue_final_message": False}, "continue_final_message"),
        ("/tokenize", {"prompt": "x", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("/tokenize", {"messages": HI, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"messages": HI, "tools": [TOOL]}, "tools"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [97] * 1025}, "tokens"),
    ],
)
def test_wrong_tokenizer_requests_are_refused_by_name(server, route, body, param):
    response = server.http.post(route, json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param
