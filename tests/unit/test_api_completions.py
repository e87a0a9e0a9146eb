from dataclasses import replace

import pytest

from nr_serve.api import ask
from nr_serve.api.answers import legacy_logprobs
from nr_serve.api.schemas import CompletionBody
from nr_serve.engine.messages import SamplingDefaults, Token
from tests.fakes import BOS, MAX_MODEL_LEN, ByteTokenizer, events, serving, usage

MOST_BYTES = 2 * MAX_MODEL_LEN  # the fake's vocabulary spells some bytes with two
LONG = "x" * (MOST_BYTES + 1)


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


def test_a_completion_has_openais_shape(server):
    body = server.complete(max_tokens=4).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "base"
    assert body["system_fingerprint"] == "f00d"
    assert body["choices"] == [
        {"index": 0, "text": "abcd", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"] == usage(3, 4)


def test_the_default_length_is_openais_and_fits_the_context(server):
    assert server.complete().json()["usage"]["completion_tokens"] == 16
    assert server.complete(prompt="x" * (MAX_MODEL_LEN - 5)).json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hi", [(BOS, 104, 105)]),
        (["hi", "ho"], [(BOS, 104, 105), (BOS, 104, 111)]),
        ([104, 105], [(104, 105)]),
        ([[104], [105]], [(104,), (105,)]),
    ],
)
def test_a_prompt_is_text_or_ids_or_a_list_of_either(server, prompt, ids):
    count = len(server.engine.submits)
    body = server.complete(prompt=prompt, max_tokens=1).json()
    assert [submit.prompt_ids for submit in server.engine.submits[count:]] == ids
    assert [choice["index"] for choice in body["choices"]] == list(range(len(ids)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_each_of_n_answers_has_a_seed_of_its_own_and_prompts_are_counted_once(server):
    body = server.complete(prompt=["x", "yy"], n=2, best_of=2, seed=7, max_tokens=2).json()
    assert [choice["text"] for choice in body["choices"]] == ["hi", "ij", "hi", "ij"]
    assert body["usage"] == usage(5, 8)


def test_every_sampling_field_reaches_the_engine(server):
    asked = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "logit_bias": {"97": -100, "98": 2.5}, "min_tokens": 2, "ignore_eos": True,
        "stop": ["zz"], "stop_token_ids": [250], "seed": 3, "logprobs": 2, "prompt_logprobs": 1, "max_tokens": 4,
    }  # fmt: skip
    assert server.complete(**asked, priority=-2, gates=True, user="me").status_code == 200
    submit, sampling = server.asked(), server.asked().sampling
    wanted = asked | {"logit_bias": {97: -100.0, 98: 2.5}, "stop": ("zz",), "stop_token_ids": (250,)}
    assert {name: getattr(sampling, name) for name in asked} == wanted
    assert (submit.priority, submit.gates, submit.selected, submit.adapters) == (-2, True, "base", None)
    assert (sampling.include_stop, sampling.special_tokens) == (False, False)
    more = {"include_stop_str_in_output": True, "skip_special_tokens": False, "cache_salt": "mine"}
    assert (submit.cache_salt, server.complete(**more).status_code) == (None, 200)
    assert (server.asked().sampling.include_stop, server.asked().sampling.special_tokens) == (True, True)
    assert server.asked().cache_salt == "mine"


def test_a_prompt_begins_with_bos_unless_told_otherwise(server):
    server.complete(prompt="hi", add_special_tokens=False)
    assert server.asked().prompt_ids == tuple(b"hi")


@pytest.mark.parametrize("off", [-1, 0, None])
def test_top_k_is_off_at_minus_one_and_zero(server, off):
    server.complete(top_k=off)
    assert server.asked().sampling.top_k == 0


def test_logprobs_are_parallel_lists(server):
    logprobs = server.complete(max_tokens=2, logprobs=1).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.5, -1.5],
        "top_logprobs": [{"a": -0.25}, {"a": -0.25, "b": -1.5}],
        "text_offset": [0, 1],
    }


@pytest.mark.parametrize(("prompt", "special"), [("é", 0), ([256, 195, 169], 3), ("</s>é", 4)])
def test_offsets_are_places_in_the_text_where_characters_are_several_tokens(server, monkeypatch, prompt, special):
    monkeypatch.setattr(server.engine, "answer", lambda submit: list("aőb".encode()) * 9)
    asked = {"prompt": prompt, "logprobs": 1, "max_tokens": 4}
    assert server.complete(**asked).json()["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1, 2]
    choice = server.complete(**asked, echo=True).json()["choices"][0]
    offsets = choice["logprobs"]["text_offset"]
    assert [choice["text"][at] for at in offsets[-6:]] == ["é", "é", "a", "ő", "ő", "b"]
    assert offsets[-6:] == [at + special for at in (0, 0, 1, 2, 2, 3)]


def test_offsets_and_reports_count_special_tokens_that_are_shown(server, monkeypatch):
    monkeypatch.setattr(server.engine, "answer", lambda submit: [97, 257, 98] * 9)
    asked = {"logprobs": 1, "max_tokens": 3, "gates": True}
    for skip, offsets, texts in ((True, [0, 1, 1], ["a", "", "b"]), (False, [0, 1, 5], ["a", "</s>", "b"])):
        choice = server.complete(**asked, skip_special_tokens=skip).json()["choices"][0]
        assert choice["logprobs"]["text_offset"] == offsets
        assert choice["gates"]["token_text"] == texts


@pytest.mark.parametrize("prompt", ["abcd", [256, 97, 98, 99, 100]])
def test_of_a_prompt_the_last_tokens_are_read_if_asked_for(server, prompt):
    for most, read in ((2, "cd"), (3, "bcd")):
        body = server.complete(prompt=prompt, truncate_prompt_tokens=most, echo=True, max_tokens=1).json()
        assert server.asked().prompt_ids == tuple(read.encode())
        assert (body["choices"][0]["text"], body["usage"]["prompt_tokens"]) == (f"{read}a", most)
    for most in (5, 50):
        server.complete(prompt=prompt, truncate_prompt_tokens=most)
        assert server.asked().prompt_ids == (256, *b"abcd")
    for prompt in (LONG, ["x", LONG]):
        assert server.complete(prompt=prompt, truncate_prompt_tokens=100).status_code == 200
        assert server.asked().prompt_ids == tuple(b"x" * 100)
    long = server.chat(messages=[{"role": "user", "content": LONG}], truncate_prompt_tokens=5)
    assert (long.status_code, len(server.asked().prompt_ids)) == (200, 5)
    server.chat(truncate_prompt_tokens=5)
    assert server.asked().prompt_ids == tuple(b"tant]")


@pytest.mark.parametrize(("max_tokens", "left"), [(None, 16), (0, 0), (30, 30)])
def test_of_a_prompt_as_much_is_read_as_leaves_room_for_the_answer(server, max_tokens, left):
    most = server.engine.info.max_model_len - left
    asked = {"truncate_prompt_tokens": -1, "max_tokens": max_tokens}
    assert server.complete(prompt=LONG, **asked, echo=True).status_code == 200
    assert server.asked().prompt_ids == tuple(b"x" * most)
    if max_tokens != 0:
        assert server.chat(messages=[{"role": "user", "content": LONG}], **asked).status_code == 200
        assert len(server.asked().prompt_ids) == most
    server.complete(prompt="abc", **asked, echo=True)
    assert server.asked().prompt_ids == (256, *b"abc")


def test_of_a_truncated_text_no_more_is_tokenised_than_could_be_read(server, monkeypatch):
    seen, encode = [], ByteTokenizer.encode

    def spy(self, text, **how):
        seen.append(text)
        return encode(self, text, **how)

    monkeypatch.setattr(ByteTokenizer, "encode", spy)
    end = "őb" * MOST_BYTES
    assert server.chat(messages=[{"role": "user", "content": end}], truncate_prompt_tokens=4).status_code == 200
    assert server.complete(prompt=f"a{end}", truncate_prompt_tokens=4).status_code == 200
    assert server.asked().prompt_ids == tuple("bőb".encode())
    assert [len(text.encode()) for text in seen] == [pytest.approx(MOST_BYTES, abs=1)] * 2


def test_the_answers_of_a_request_share_the_time_for_their_grammar(server):
    several = {"prompt": ["a", "b"], "n": 2, "max_tokens": 1}
    assert [server.complete(**several).status_code for _ in range(2)] == [200, 200]
    first, second = server.engine.submits[-8:-4], server.engine.submits[-4:]
    assert len({id(submit.allowance) for submit in first}) == len({id(submit.allowance) for submit in second}) == 1
    assert first[0].allowance is not second[0].allowance


def test_a_token_keeps_its_own_log_probability_where_a_likelier_one_looks_like_it():
    token = Token(195, "\ufffd", -2.0, ((197, "\ufffd", -0.1), (97, "a", -0.5)))
    assert legacy_logprobs([token], 2, [0])["top_logprobs"] == [{"a": -0.5, "\ufffd": -2.0}]


def test_echo_with_max_tokens_0_scores_the_prompt(server):
    body = server.complete(prompt=[104, 105, 106], echo=True, logprobs=1, max_tokens=0).json()
    choice = body["choices"][0]
    assert choice["text"] == "hij"
    assert choice["logprobs"]["tokens"] == ["h", "i", "j"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -1.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 0


def test_echo_puts_the_text_that_was_sent_before_the_answer(server):
    assert server.complete(prompt="hő", echo=True, max_tokens=2).json()["choices"][0]["text"] == "hőab"
    streamed = events(server.complete(prompt="hő", echo=True, max_tokens=2, stream=True))
    assert [event["choices"][0]["text"] for event in streamed] == ["hőa", "b"]


@pytest.mark.parametrize(
    ("field", "prompt", "fits"),
    [
        ("echo", "x" * 150, 60),
        ("echo", [120] * 150, 60),
        ("return_token_ids", [120] * 150, 3),  # 16 bytes for each
    ],
)
def test_what_is_repeated_in_every_answer_is_bounded(server, monkeypatch, field, prompt, fits):
    monkeypatch.setattr(ask, "ENTRY_BYTES", 30)
    monkeypatch.setattr(ask, "MAX_REPORTED", 300)
    asked = {"n": fits, field: True, "prompt": prompt, "max_tokens": 1}
    assert server.complete(**asked).status_code == 200
    error = server.complete(**{**asked, "n": fits + 1}).json()["error"]
    assert (error["code"], error["param"]) == (400, field)
    assert server.complete(**{**asked, "n": fits + 1, field: False}).status_code == 200


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
def test_a_report_of_nothing_but_the_tokens_own_counts_too(server, monkeypatch, field):
    monkeypatch.setattr(ask, "MAX_REPORTED", 8)
    error = server.complete(prompt="x" * 9, max_tokens=9, **{field: 0}).json()["error"]
    assert (error["code"], error["param"]) == (400, field)


def test_the_log_probabilities_that_rank_answers_count_too(server, monkeypatch):
    monkeypatch.setattr(ask, "MAX_REPORTED", 20)
    asked = {"prompt": "x", "max_tokens": 5}
    assert server.complete(**asked, best_of=4).status_code == 200
    error = server.complete(**asked, best_of=5).json()["error"]
    assert (error["code"], error["param"]) == (400, "best_of")


def test_gates_count_by_how_many_adapters_may_act(server, monkeypatch):
    monkeypatch.setattr(ask, "MAX_REPORTED", 20)
    asked = {"prompt": "x" * 9, "max_tokens": 1, "gates": True}  # ten tokens with BOS
    assert server.complete(**asked).status_code == 200
    monkeypatch.setattr(ask, "GATES_IN_ENTRY", 1)
    assert server.complete(**asked).json()["error"]["param"] == "gates"
    assert server.complete(model="base@none", **asked).status_code == 200


def test_prompt_logprobs_and_token_ids_are_vllms(server):
    choice = server.complete(prompt=[104, 105], prompt_logprobs=1, return_token_ids=True, max_tokens=1).json()
    choice = choice["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "97": {"logprob": -0.25, "rank": 1, "decoded_token": "a"},
            "105": {"logprob": -1.5, "rank": None, "decoded_token": "i"},
        },
    ]
    more = {"prompt": [104, 105], "echo": True, "max_tokens": 1}
    longer = server.complete(**more, prompt_logprobs=1, logprobs=3).json()["choices"][0]
    assert longer["prompt_logprobs"] == choice["prompt_logprobs"], "each is as long as it was asked for"
    longer = server.complete(**more, prompt_logprobs=3, logprobs=1).json()["choices"][0]
    assert longer["logprobs"]["top_logprobs"] == [None, {"a": -0.25, "i": -1.5}, {"a": -0.25}]
    assert choice["prompt_token_ids"] == [104, 105]
    assert choice["token_ids"] == [97]


def test_gates_are_reported_per_token_beside_whole_characters(server, monkeypatch):
    monkeypatch.setattr(server.engine, "answer", lambda submit: list("ő".encode()) * 9)
    choice = server.complete(prompt="é", gates=True, max_tokens=2).json()["choices"][0]
    assert choice["gates"] == {
        "prompt": [{"hu": 0.5}] * 3,
        "prompt_text": ["", "", "é"],
        "tokens": [{"hu": 0.5}] * 2,
        "token_text": ["", "ő"],
    }


def test_a_stream_says_what_the_whole_answer_says(server):
    asked = {"prompt": ["x", "y"], "n": 2, "seed": 1, "max_tokens": 3, "logprobs": 1, "gates": True, "echo": True}
    whole = server.complete(**asked).json()
    streamed = events(server.complete(**asked, stream=True))
    assert {event["id"] for event in streamed} == {streamed[0]["id"]}
    for choice in whole["choices"]:
        parts = [c for event in streamed for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["length"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [x for part in parts for x in part["logprobs"][name]] == choice["logprobs"][name]
        assert parts[0]["gates"]["prompt"] == choice["gates"]["prompt"]
        assert [x for part in parts for x in part["gates"]["tokens"]] == choice["gates"]["tokens"]


def test_a_stream_shows_whole_characters_and_every_token_only_if_asked_of_tokens(server, monkeypatch):
    monkeypatch.setattr(server.engine, "answer", lambda submit: list("ő".encode()) * 9)
    streamed = events(server.complete(max_tokens=4, stream=True))
    assert [event["choices"][0]["text"] for event in streamed] == ["ő", "ő"]
    for asked in ({"logprobs": 0}, {"gates": True}, {"return_token_ids": True}):
        assert len(events(server.complete(max_tokens=4, stream=True, **asked))) == 4, asked


def test_a_stream_reports_usage_at_its_end_if_asked(server):
    streamed = events(server.complete(max_tokens=2, stream=True, stream_options={"include_usage": True}))
    assert [event["usage"] for event in streamed[:-1]] == [None, None]
    assert streamed[-1]["choices"] == []
    assert streamed[-1]["usage"] == usage(3, 2)


def test_a_stream_reports_usage_all_along_if_asked(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = events(server.complete(max_tokens=2, stream=True, stream_options=options))
    assert [event["usage"]["completion_tokens"] for event in streamed] == [1, 2, 2]


def test_usage_says_what_the_prefix_cache_had_of_each_prompt_once():
    with serving() as server:
        server.engine.cached_tokens = lambda submit: len(submit.prompt_ids) - 1
        # Of two prompts, of 3 and 5 tokens with the BOS, whose second answers may find what the first computed.
        asked = {"prompt": ["hi", "hiya"], "n": 2, "max_tokens": 2}
        assert server.complete(**asked).json()["usage"] == usage(8, 8, cached=2 + 4)
        assert server.complete(**asked | {"max_tokens": 0, "echo": True}).json()["usage"] == usage(8, 0, cached=6)
        streamed = events(server.complete(**asked, stream=True, stream_options={"include_usage": True}))
        assert streamed[-1]["usage"] == usage(8, 8, cached=6)
        assert server.chat(max_tokens=1).json()["usage"] == usage(19, 1, cached=18)


def test_a_stop_ends_the_answer_and_is_named(server):
    choice = server.complete(stop="c").json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "c")
    choice = server.complete(stop_token_ids=[99]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", 99)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", 3), ("temperature", "0"), ("temperature", True), ("top_p", 0),
        ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", 2), ("presence_penalty", 3),
        ("frequency_penalty", -3), ("repetition_penalty", 0), ("n", 0), ("n", 129), ("n", "1"), ("best_of", 0),
        ("best_of", 129),
        ("suffix", "x"), ("logprobs", 21), ("logprobs", True), ("prompt_logprobs", -1), ("max_tokens", -1),
        ("max_tokens", 1.5), ("min_tokens", 17), ("stop", 5), ("stop", ""), ("stop", ["x"] * 17), ("stop", [1]),
        ("stop_token_ids", [258]), ("stop_token_ids", [-1]), ("stop_token_ids", "x"), ("seed", "x"), ("echo", 1),
        ("stream", "yes"), ("stream_options", {"include_usage": True}), ("logit_bias", {"x": 1}),
        ("logit_bias", {"258": 1}), ("logit_bias", {"9" * 5000: 1}),
        ("max_tokens", 10**100), ("top_k", 10**100), ("logit_bias", [1]), ("cache_salt", ""),
        ("cache_salt", 5), ("adapters", "hu"),
        ("priority", "x"),
        ("gates", "x"), ("prompt", ""), ("prompt", []), ("prompt", [258]), ("prompt", [-1]), ("prompt", None),
        ("prompt", 5), ("prompt", ["x", 5]), ("prompt", [True]), ("prompt", {"x": 1}), ("model", 5),
        ("model", None), ("service_tier", "flex"), ("unheard_of", 1), ("use_beam_search", True),
        ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_by_name(server, field, value):
    response = server.complete(**{field: value})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", [[97], []], "prompt[1]"),
        ("prompt", [[97], [258]], "prompt[1]"),
        ("logit_bias", {"97": 101}, "logit_bias"),
        ("stream_options", {"x": True}, "stream_options.x"),
    ],
)
def test_the_place_in_a_field_is_named(server, field, value, param):
    response = server.complete(**{field: value, "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


def test_an_empty_text_is_a_prompt_where_the_tokenizer_begins_one(server):
    assert len(server.complete(prompt=["x", ""]).json()["choices"]) == 2


def test_neither_nan_nor_half_a_character_passes(server):
    for text in ('{"model":"base","prompt":"x","temperature":NaN}', '{"model":"base","prompt":"\\ud800"}'):
        response = server.http.post("/v1/completions", content=text, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] in ("temperature", "prompt")


def test_what_asks_for_nothing_is_taken(server):
    nothing = dict.fromkeys(CompletionBody.model_fields.keys() - {"model", "prompt", "max_tokens"})
    assert server.complete(**nothing).status_code == 200
    assert server.complete(suffix="", cache_salt="any", response_format={"type": "text"}).status_code == 200


HINTS = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}}


def test_what_a_caller_notes_for_itself_changes_nothing(server):
    plain, noted = (ask.json() for ask in (server.complete(seed=1), server.complete(seed=1, **HINTS)))
    assert plain["choices"] == noted["choices"]


def test_a_base_may_bring_its_own_sampling_which_a_request_overrides(server, monkeypatch):
    def sampling(**asked):
        assert server.complete(**asked).status_code == 200
        last = server.engine.submits[-1].sampling
        return last.temperature, last.top_k, last.top_p, last.min_p, last.repetition_penalty

    assert sampling() == (1.0, 0, 1.0, 0.0, 1.0)
    own = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1)
    monkeypatch.setattr(server.engine, "info", replace(server.engine.info, sampling=own))
    assert sampling() == (0.6, 20, 0.95, 0.1, 1.1)
    asked = {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    assert sampling(**asked) == (0.0, 0, 1.0, 0.0, 1.0)


def test_the_tier_that_served_is_named_if_one_was_asked_for(server):
    assert server.complete(service_tier="auto").json()["service_tier"] == "default"
    assert "service_tier" not in server.complete().json()


def test_best_of_returns_the_answers_likeliest_per_token_best_first(server, monkeypatch):
    monkeypatch.setattr(server.engine, "logprob", lambda token_id: token_id - 200.0)  # the last letters
    body = server.complete(prompt=["x", "yy"], n=2, best_of=4, seed=7, max_tokens=2).json()
    assert [choice["text"] for choice in body["choices"]] == ["kl", "jk", "kl", "jk"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["logprobs"] for choice in body["choices"]] == [None] * 4, "they were not asked for"
    assert body["usage"] == usage(5, 16)
    assert [submit.sampling.seed for submit in server.engine.submits[-8:]] == [7, 8, 9, 10] * 2


def test_best_of_shows_each_prompt_and_as_many_of_the_likeliest_as_were_asked_for(server):
    asked = {"prompt": ["x", "y"], "best_of": 2, "max_tokens": 1}
    choices = server.complete(**asked, echo=True).json()["choices"]
    assert [choice["text"] for choice in choices] == ["xa", "ya"]
    for choice in server.complete(**asked, logprobs=2).json()["choices"]:
        assert choice["logprobs"]["top_logprobs"] == [{"a": -0.25, "b": -0.5}]


@pytest.mark.parametrize("more", [{"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}])
def test_best_of_below_n_or_streamed_is_refused(server, more):
    error = server.complete(**more).json()["error"]
    assert (error["code"], error["param"]) == (400, "best_of")


def test_a_prompt_too_long_is_refused_as_openai_does(server):
    error = server.complete(prompt="x" * (MAX_MODEL_LEN - 1)).json()["error"]  # with the BOS there is no room
    assert error["message"].startswith(
        "This model's maximum context length is 200 tokens. However, you requested 201"
    )
    assert error["param"] == "prompt"
    assert server.complete(max_tokens=198).json()["error"]["param"] == "max_tokens"
    assert server.complete(max_tokens=197).status_code == 200


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/completions", {"model": "base", "prompt": LONG}, "prompt"),
        ("/v1/completions", {"model": "base", "prompt": ["x", LONG]}, "prompt[1]"),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/tokenize", {"prompt": LONG}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    ],
)
def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(server, monkeypatch, route, body, param):
    monkeypatch.setattr(ByteTokenizer, "encode", lambda *args, **more: pytest.fail("tokenised"))
    response = server.http.post(route, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["message"].startswith("This model's maximum context length is 200 tokens, at most 400 bytes")


def test_text_that_might_fit_is_tokenised_to_see(server):
    error = server.complete(prompt="x" * MOST_BYTES).json()["error"]
    assert "you requested 402" in error["message"]
    assert server.http.post("/tokenize", json={"prompt": "x" * MOST_BYTES}).json()["count"] == MOST_BYTES + 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ["x"] * 3, "n": 2}, "n"),
        ({"prompt": ["x"] * 5}, "prompt"),
        ({"n": 5}, "n"),
        ({"best_of": 5}, "best_of"),
    ],
)
def test_more_answers_than_can_wait_are_refused_before_anything_is_built(monkeypatch, body, param):
    with serving(max_waiting=4) as server:
        assert server.complete(prompt=["x"] * 2, n=2, max_tokens=1).status_code == 200
        monkeypatch.setattr(ByteTokenizer, "encode", lambda *args, **more: pytest.fail("tokenised"))
        response = server.complete(**body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert "at most 4" in response.json()["error"]["message"]
        assert server.chat(n=5).json()["error"]["param"] == "n"


def test_a_base_whose_tokenizer_cannot_follow_a_grammar_refuses_them(server):
    response = server.complete(guided_regex="a")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "guided_regex")
    assert "tokenizer" in response.json()["error"]["message"]
