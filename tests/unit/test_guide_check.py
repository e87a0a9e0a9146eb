"""Grammars are compiled in another process first, which ends where one takes too much."""

import json
import subprocess
import threading

import pytest

from nr_serve.engine import guide_check
from nr_serve.engine.guide import Guide
from nr_serve.engine.guide_check import GuideCheck
from nr_serve.errors import BadRequest, NrError
from tests import tiny
from tests.waiting import PATIENCE

EOS = (299,)
TOKENIZER = tiny.tokenizer()
FINE = 'start: "a" | "b"'
ENDLESS = 'start: %json {"type": "integer", "multipleOf": 123456789}'
ALL_OF = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i % 26)}{i}.*"} for i in range(40)]}


@pytest.fixture
def checks():
    made = GuideCheck()
    yield made
    made.stop()


def check(checks: GuideCheck, grammar: str) -> None:
    TOKENIZER.for_grammars(tiny.VOCAB, EOS)
    checks.check(grammar, TOKENIZER.as_json, tiny.VOCAB, EOS)


def test_a_grammar_is_taken_or_refused_for_the_reason_that_compiling_it_gives(checks):
    check(checks, FINE)
    first = checks._process
    for wrong in ("start: nothing", "start: /(/", 'start: "a'):
        with pytest.raises(BadRequest) as ours:
            Guide(wrong, TOKENIZER.for_grammars(tiny.VOCAB, EOS))
        with pytest.raises(BadRequest) as theirs:
            check(checks, wrong)
        assert theirs.value.message == ours.value.message
    check(checks, FINE)
    assert checks._process is first, "it is not started again"


@pytest.mark.parametrize("grammar", [ENDLESS, f"start: %json {json.dumps(ALL_OF)}"], ids=["multipleOf", "allOf"])
def test_a_grammar_that_takes_too_much_is_given_up_and_the_next_one_is_not(checks, grammar):
    with pytest.raises(BadRequest, match="takes more than 2 s or 512 MiB"):
        check(checks, grammar)
    check(checks, FINE)


def test_stopping_does_not_wait_for_a_grammar(checks, monkeypatch):
    check(checks, FINE)
    process, asked = checks._process, threading.Event()
    exchange = guide_check._exchange
    monkeypatch.setattr(guide_check, "_exchange", lambda *args: asked.set() or exchange(*args))
    errors = []

    def compile_() -> None:
        try:
            check(checks, ENDLESS)
        except BadRequest as error:
            errors.append(error)

    thread = threading.Thread(target=compile_)
    thread.start()
    assert asked.wait(PATIENCE)
    checks.stop()
    thread.join(PATIENCE)
    assert len(errors) == 1
    assert process.poll() is not None


def test_the_process_ends_with_the_server_that_started_it(checks):
    check(checks, FINE)
    checks._process.stdin.close()
    assert checks._process.wait(PATIENCE) == 0


def test_where_there_can_be_no_process_the_error_is_the_servers(checks, monkeypatch):
    def broken() -> subprocess.Popen:
        return subprocess.Popen(["false"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(guide_check, "_start", broken)
    with pytest.raises(NrError, match="cannot be started") as error:
        check(checks, FINE)
    assert error.value.status == 500
