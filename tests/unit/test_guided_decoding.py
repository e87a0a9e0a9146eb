"""Guided answers: against jsonschema and re, against plain log probabilities, and with and without preemption."""

import itertools
import json
import random
import re
from contextlib import nullcontext
from types import SimpleNamespace

import jsonschema
import pytest
import torch

from nr_serve.engine.guide import MAX_GRAMMAR_BYTES, Allowance, Guide
from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.model.sampler import allowed
from nr_serve.errors import BadRequest
from tests import tiny
from tests.unit.stepped import engine

EOS = 299
TOKENIZER = tiny.tokenizer()
LETTERS = {TOKENIZER.token_text(i): i for i in range(256)}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["é", "b"]}, "maxItems": 3},
        "next": {"$ref": "#/$defs/next"},
    },
    "required": ["name", "age", "next"],
    "additionalProperties": False,
    "$defs": {"next": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
}
WORD = r"(ab|c){2,5}-[0-9]{1,4}"
SUM = 'start: term ("+" term)*\nterm: /[0-9]/ | "(" start ")"'


def is_json(text):
    jsonschema.validate(json.loads(text), SCHEMA)


def is_word(text):
    assert re.fullmatch(WORD, text)


def is_sum(text):
    assert re.fullmatch(r"[0-9+()]+", text)
    eval(text)  # Python's grammar is the reference


KINDS = {"json": (f"start: %json {json.dumps(SCHEMA)}", is_json), "regex": (f"start: /{WORD}/", is_word)}
KINDS |= {"lark": (SUM, is_sum)}


def guide(grammar):
    return Guide(grammar, TOKENIZER.for_grammars(tiny.VOCAB, [EOS]))


def answers(submits, **limits):
    """Run requests together: for each, its tokens, text, and why it ended."""
    core, _ = engine(tiny.model(), **({"pages": 400, "budget": 64, "running": 8} | limits))
    assert [core.add(submit) for submit in submits] == [None] * len(submits)
    got = {submit.request_id: [[], "", None] for submit in submits}
    while not core.idle:
        for output in core.step().outputs:
            assert output.error is None
            mine = got[output.request_id]
            mine[0] += output.tokens
            mine[1] += output.text
            mine[2] = output.finish_reason
    core.check()
    return list(got.values()), core.scheduler.preemptions


def one(grammar, **sampling):
    submit = Submit("r", (1, 2, 3), Sampling(**({"max_tokens": 60} | sampling)), (), guide=guide(grammar))
    return answers([submit])[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_finished_answer_of_a_random_model_has_the_form_asked_for(kind):
    grammar, check = KINDS[kind]
    compiled = guide(grammar)
    submits = [
        Submit(str(seed), (seed % 200, 7), Sampling(max_tokens=150, seed=seed), (), guide=compiled)
        for seed in range(60)
    ]
    got, _ = answers(submits)
    finished = [text for _, text, reason in got if reason == "stop"]
    for text in finished:
        check(text)
    assert len(finished) > 30
    assert len(set(finished)) > 10


def test_preempted_answers_are_those_of_a_server_with_room():
    rng = random.Random(0)
    grammars = [None, *(grammar for grammar, _ in KINDS.values())]
    submits = [
        Submit(
            str(seed),
            tuple(rng.randrange(250) for _ in range(rng.randint(1, 20))),
            Sampling(max_tokens=rng.randint(10, 60), seed=seed, logprobs=2, temperature=rng.choice([0, 1])),
            (),
            guide=guide(grammars[seed % 4]) if grammars[seed % 4] else None,
        )
        for seed in range(24)
    ]
    roomy, none = answers(submits, running=1)
    tight, some = answers(submits, pages=24, budget=13)
    assert (none, some > 5) == (0, True)
    for a, b in zip(roomy, tight, strict=True):
        assert (a[1], a[2]) == (b[1], b[2])
        assert [t.id for t in a[0]] == [t.id for t in b[0]]
        assert [t.logprob for t in a[0]] == pytest.approx([t.logprob for t in b[0]], abs=1e-3)


def test_log_probabilities_are_those_among_the_allowed_tokens():
    tokens, text, reason = one("start: /[abc]{4}/", temperature=0, logprobs=3)
    assert (len(text), reason) == (4, "stop")
    naive, ids = tiny.Naive(tiny.model()), [1, 2, 3]
    allowed = [LETTERS[c] for c in "abc"]
    for token in tokens:
        logprobs = naive.logits(ids)[-1][allowed].log_softmax(-1)
        assert token.id == allowed[int(logprobs.argmax())]
        assert token.logprob == pytest.approx(float(logprobs.max()), abs=1e-4)
        assert {i: p for i, _, p in token.top} == pytest.approx(
            dict(zip(allowed, logprobs.tolist(), strict=True)), abs=1e-4
        )
        ids.append(token.id)


def test_draws_follow_the_probabilities_among_the_allowed_tokens():
    compiled, draws = guide("start: /[abcde]/"), 600
    submits = [Submit(str(s), (1, 2), Sampling(seed=s, temperature=1.5), (), guide=compiled) for s in range(draws)]
    got, _ = answers(submits, running=64)
    logits = tiny.Naive(tiny.model()).logits([1, 2])[-1][[LETTERS[c] for c in "abcde"]]
    expected = (draws * (logits / 1.5).double().softmax(-1)).tolist()
    counts = [sum(text == c for _, text, _ in got) for c in "abcde"]
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    assert statistic < 18.5, "0.999 quantile of chi-square with 4 degrees of freedom"


@pytest.mark.parametrize(
    ("bias", "more", "text"),
    [
        (100, {}, "aa"),
        (-100, {}, "aaaa"),
        (100, {"min_tokens": 3}, "aaa"),
        (100, {"min_tokens": 9}, "aaaa"),  # nothing is left to say
        (-100, {"stop": ("aaa",)}, ""),
        (-100, {"stop": ("aaax",)}, "aaaa"),  # what was held back comes out
        (-100, {"stop_token_ids": (LETTERS["a"],)}, ""),
        (-100, {"stop": ("aaa",), "include_stop": True}, "aaa"),
        (-100, {"stop_token_ids": (LETTERS["a"],), "include_stop": True}, "a"),
        (100, {"include_stop": True}, "aa"),  # its last token is special
        (100, {"include_stop": True, "special_tokens": True}, "aa<299>"),
    ],
)
def test_an_answer_ends_where_its_grammar_lets_it(bias, more, text):
    _, got, reason = one("start: /a{2,4}/", logit_bias={EOS: bias}, **more)
    assert (got, reason) == (text, "stop")


def test_a_complete_grammar_ends_the_answer_at_its_last_token():
    tokens, text, reason = one('start: "ab"', max_tokens=2)
    assert ([t.id for t in tokens], text, reason) == ([LETTERS["a"], LETTERS["b"]], "ab", "stop")
    assert one('start: "ab"', max_tokens=1)[1:] == ["a", "length"]


def test_answers_begun_in_one_guide_go_their_own_ways():
    compiled = guide('start: "ab" | "cd"')
    first, second = compiled.begin(), compiled.begin()
    first.take(LETTERS["a"])
    assert allowed(first, tiny.VOCAB).nonzero()[:, 0].tolist() == [LETTERS["b"]]
    assert set(allowed(second, tiny.VOCAB).nonzero()[:, 0].tolist()) == {LETTERS["a"], LETTERS["c"]}
    first.take(LETTERS["b"])
    assert first.complete
    assert not second.complete
    with pytest.raises(BadRequest, match="cannot be followed"):
        second.take(LETTERS["b"])


def test_a_vocabulary_wider_than_the_tokenizers_gives_no_token_that_does_not_exist():
    wide = tiny.tokenizer().for_grammars(tiny.VOCAB + 20, [EOS])
    tokens = allowed(Guide("start: /(.|\\n)*/", wide).begin(), tiny.VOCAB + 20)
    assert tokens.shape == (tiny.VOCAB + 20,)
    assert not tokens[tiny.VOCAB :].any()
    assert tokens[EOS]


@pytest.mark.parametrize(
    "grammar",
    ["", "start: /[/", "start: b", 'start: %json {"type": "foo"}', 'start: %json {"enum": []}', "x" * 200_000],
)
def test_a_grammar_that_is_none_is_refused_with_the_reason(grammar):
    assert MAX_GRAMMAR_BYTES < 200_000
    with pytest.raises(BadRequest, match="grammar"):
        guide(grammar)


@pytest.mark.parametrize(
    "grammar", ["start: s\ns: s s | /[a-z ]/", "start: a\na: /[a-z]/ a | /[a-z]/ a a | /[a-z]/"]
)
def test_a_short_grammar_whose_tokens_grow_dearer_and_dearer_is_given_up(grammar):
    tokenizer = tiny.tokenizer()
    tokenizer.hf.add_tokens(["a" * length for length in range(2, 60)])
    progress = Guide(grammar, tokenizer.for_grammars(tiny.VOCAB + 100, [EOS])).begin()

    def write(tokens):
        for _ in range(tokens):
            progress.allowed_bits()
            progress.take(LETTERS["a"])

    write(3)
    with pytest.raises(BadRequest, match="Too many items"):
        write(60)


@pytest.mark.parametrize(("step", "given_up"), [(0.0009, False), (0.003, True)])
def test_an_answer_whose_tokens_take_too_long_in_the_mean_is_given_up(step, given_up, monkeypatch):
    progress = guide("start: /[ab]*/").begin()
    clock = (step * i for i in itertools.count())  # a step of it for a mask, and one for a token
    monkeypatch.setattr("nr_serve.engine.guide.time", SimpleNamespace(thread_time=lambda: next(clock)))

    def write(tokens):
        for _ in range(tokens):
            assert progress.allowed_bits() == progress.allowed_bits() == progress.allowed_bits()
            progress.take(LETTERS["a"])

    write(20)
    with pytest.raises(BadRequest, match="more than 2 ms a token") if given_up else nullcontext():
        write(200)


def test_the_answers_of_a_request_share_what_their_grammar_may_take_at_once(monkeypatch):
    compiled, seconds = guide("start: /[ab]*/"), itertools.count()
    monkeypatch.setattr("nr_serve.engine.guide.time", SimpleNamespace(thread_time=lambda: 0.03 * next(seconds)))
    for answers_each, given_up in ((3, False), (4, True)):  # 0.03 s each of 0.1 s, and 0.002 s each
        shared = Allowance(answers_each)
        with pytest.raises(BadRequest, match="more than 2 ms a token") if given_up else nullcontext():
            for _ in range(answers_each):
                compiled.begin(shared).allowed_bits()
    for _ in range(9):
        compiled.begin().allowed_bits()


def test_a_schema_of_nothing_but_itself_is_refused_with_the_reason():
    with pytest.raises(BadRequest, match="the grammar cannot be used: no text can follow it"):
        guide('start: %json {"$ref": "#"}')


@pytest.mark.parametrize("ending", ["logits gone wild", "too complex"])
def test_an_answer_that_cannot_go_on_ends_alone(ending, monkeypatch):
    core, _ = engine(tiny.model(), pages=400, budget=64, running=8)
    core.add(Submit("guided", (1,), Sampling(), (), guide=guide("start: /[ab]{9}/")))
    core.add(Submit("free", (1,), Sampling(max_tokens=4, ignore_eos=True), ()))
    if ending == "logits gone wild":
        monkeypatch.setattr(
            "nr_serve.engine.model.sampler.adjust", lambda logits, request: torch.full_like(logits, torch.nan)
        )
    else:
        monkeypatch.setattr(
            "nr_serve.engine.guide.Progress.allowed_bits", lambda *args: (_ for _ in ()).throw(BadRequest("x"))
        )
    last = {}
    while not core.idle:
        for output in core.step().outputs:
            last[output.request_id] = output
    core.check()
    assert last["guided"].finish_reason == "error"
    assert last["guided"].error.status == 400
    assert last["free"].finish_reason == "length"
