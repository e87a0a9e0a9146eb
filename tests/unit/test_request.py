"""When an answer ends and which text it shows: against the whole text, cut naively."""

import random
from itertools import pairwise
from typing import ClassVar

import pytest

from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.request import AnswerText, Request
from nr_serve.tokenizer import Detokenizer

EOS = 256


class Pieces:
    """A tokenizer whose tokens are given byte strings; EOS and what lies beyond have no text."""

    def __init__(self, vocabulary: list[bytes]) -> None:
        self._vocabulary = vocabulary

    def decode(self, ids, *, special_tokens=False):
        return b"".join(self._vocabulary[i] for i in ids if i < len(self._vocabulary)).decode(errors="replace")


BYTES = Pieces([bytes([i]) for i in range(256)])


def request(tokenizer=BYTES, *, eos=(EOS,), prompt=(65,), **sampling) -> Request:
    sampling = Sampling(**{"max_tokens": 1000, **sampling})
    return Request(
        submit=Submit("r", tuple(prompt), sampling),
        eos_ids=frozenset(eos),
        seed=0,
        text=AnswerText(Detokenizer(tokenizer, prompt), sampling.stop, include_stop=sampling.include_stop),
        arrival=1,
    )


def answer(to: Request, ids):
    """Feed tokens until it ends: what was shown at each, why it ended, and how many tokens it took."""
    shown = []
    for used, token_id in enumerate(ids, start=1):
        text, ending = to.write(token_id, to.append(token_id))
        shown.append(text)
        if ending is not None:
            return shown, ending.reason, ending.stop, used
    return shown, None, None, len(shown)


def naive(tokenizer, ids, *, stop=(), max_tokens=1000, min_tokens=0, include_stop=False):
    """The text so far, decoded whole after every token, and cut where the first stop string begins, or behind it.

    A character counts once it is complete; a stop string counts once it ends after `min_tokens` tokens.
    """
    before = 0
    for used in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:used])
        if used < max_tokens:
            text = text.rstrip("\ufffd")
        if used >= min_tokens:
            found = [
                (at, s) for s in stop for at in range(len(text)) if text.startswith(s, at) and at + len(s) > before
            ]
            if found:
                at, s = min(found)
                return text[: at + len(s)] if include_stop else text[:at], "stop", s, used
        before = len(text)
        if used == max_tokens:
            return text, "length", None, used
    return None, None, None, len(ids)


ALPHABETS = {
    "letters": (["a", "b"], ["ab", "ba", "aab", "abab", "bbb", "b"]),
    "many bytes": (["é", "a", "漢", "🙂"], ["é", "漢a", "a🙂🙂", "🙂é", "éé"]),
}


@pytest.mark.parametrize("kind", ALPHABETS)
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_the_answer_is_the_whole_text_cut_at_the_first_stop_string(kind, cut):
    """`cut`: tokens are pieces of up to so many bytes, across characters and across stop strings."""
    rng = random.Random(f"{kind}{cut}")
    letters, stops = ALPHABETS[kind]
    reasons = []
    for _ in range(400):
        data = "".join(rng.choices(letters, k=rng.randint(1, 14))).encode()
        vocabulary = []
        while data:
            n = rng.randint(1, cut)
            vocabulary, data = [*vocabulary, data[:n]], data[n:]
        tokenizer, ids = Pieces(vocabulary), list(range(len(vocabulary)))
        limits = {"stop": tuple(rng.sample(stops, rng.randint(0, 3))), "max_tokens": rng.randint(1, len(ids))}
        limits["include_stop"] = rng.random() < 0.5
        shown, reason, stop, used = answer(request(tokenizer, prompt=(), **limits), ids)
        assert ("".join(shown), reason, stop, used) == naive(tokenizer, ids, **limits)
        reasons.append(reason)
    assert min(reasons.count("stop"), reasons.count("length")) > 40


@pytest.mark.parametrize("seed", range(3))
def test_stop_strings_that_end_before_min_tokens_do_not_count(seed):
    rng = random.Random(seed)
    skipped = 0
    for _ in range(400):
        ids = [ord(c) for c in rng.choices("aab", k=12)]
        limits = {"stop": (rng.choice(["ab", "aa", "aab", "b", "aba"]),), "max_tokens": 12}
        least = rng.randint(0, 12)
        shown, reason, stop, used = answer(request(min_tokens=least, prompt=(), **limits), ids)
        assert ("".join(shown), reason, stop, used) == naive(BYTES, ids, min_tokens=least, **limits)
        assert used >= least
        skipped += used > naive(BYTES, ids, **limits)[3]
    assert skipped > 100


def test_random_stop_strings_of_a_few_letters_end_the_answer_where_the_naive_search_does():
    rng = random.Random(7)
    lengths = []
    for _ in range(300):
        stops = tuple("".join(rng.choices("aab", k=rng.randint(1, 9))) for _ in range(rng.randint(1, 4)))
        data = "".join(rng.choices("aab", k=60)).encode()
        cuts = sorted({0, 60, *rng.sample(range(60), 20)})
        tokenizer = Pieces([data[a:b] for a, b in pairwise(cuts)])
        ids, least = list(range(len(cuts) - 1)), rng.randint(0, 10)
        limits = {"stop": stops, "max_tokens": len(ids), "min_tokens": least, "include_stop": rng.random() < 0.5}
        shown, reason, stop, used = answer(request(tokenizer, prompt=(), **limits), ids)
        assert ("".join(shown), reason, stop, used) == naive(tokenizer, ids, **limits)
        lengths.append(len(stop or ""))
    assert max(lengths) > 4


class Counted(str):
    """A stop string that counts the characters looked at."""

    looked: ClassVar[int] = 0

    def __getitem__(self, at):
        Counted.looked += 1
        return super().__getitem__(at)

    def startswith(self, prefix, *at):
        Counted.looked += len(prefix)
        return super().startswith(prefix, *at)


def test_a_long_stop_string_costs_a_few_looks_a_character():
    Counted.looked = 0
    ids = b"a" * 3000
    shown, reason, stop, _ = answer(request(stop=(Counted("a" * 1023 + "b"),), max_tokens=3000), ids)
    assert ("".join(shown), reason, stop) == ("a" * 3000, "length", None)
    assert 3000 <= Counted.looked <= 6 * 3000


def test_nothing_is_shown_twice_and_what_may_become_a_stop_string_is_held_back():
    shown, reason, stop, used = answer(request(stop=("STOP", "TON")), b"a STONE STO TOSTO")
    assert "".join(shown) == "a S"
    assert (reason, stop, used) == ("stop", "TON", 6)
    shown, *_ = answer(request(stop=("STOP",)), b"a STONE STO!")
    assert shown == ["a", " ", "", "", "", "STON", "E", " ", "", "", "", "STO!"]


def test_half_a_character_is_held_back_and_shown_once_whole():
    shown, *_ = answer(request(), "x🙂é".encode())
    assert shown == ["x", "", "", "", "🙂", "", "é"]


@pytest.mark.parametrize("stop", [(), ("x🙂",)])
def test_what_is_held_back_is_shown_when_the_length_ends_it(stop):
    shown, reason, *_ = answer(request(max_tokens=3, stop=stop), b"ax\xf0\x9f")
    assert "".join(shown) == "ax\ufffd"
    assert reason == "length"


def test_a_stop_string_completed_by_the_last_token_is_a_stop():
    shown, reason, stop, _ = answer(request(max_tokens=4, stop=("cd",)), b"abcd")
    assert ("".join(shown), reason, stop) == ("ab", "stop", "cd")


def test_the_end_of_sequence_token_ends_it_and_is_not_shown():
    shown, reason, stop, used = answer(request(stop=("bc",)), [97, 98, EOS, 99])
    assert ("".join(shown), reason, stop, used) == ("ab", "stop", None, 3)
    assert answer(request(ignore_eos=True, max_tokens=4), [97, 98, EOS, 99])[1:] == ("length", None, 4)
    # Once the length is reached, a token that ends the answer still says why it ended.
    assert answer(request(max_tokens=1), [EOS])[1] == "stop"


def test_a_stop_token_ends_it_and_is_named_and_not_shown():
    shown, reason, stop, used = answer(request(stop_token_ids=(99,)), b"abcd")
    assert ("".join(shown), reason, stop, used) == ("ab", "stop", 99, 3)
    shown, reason, stop, _ = answer(request(stop_token_ids=(EOS,), ignore_eos=True), [97, EOS])
    assert (reason, stop) == ("stop", EOS), "asked for by name, the end-of-sequence token stops it all the same"


def test_a_token_that_ends_it_is_shown_if_asked_for():
    shown, reason, stop, _ = answer(request(stop_token_ids=(99,), include_stop=True), b"abcd")
    assert ("".join(shown), reason, stop) == ("abc", "stop", 99)
    shown, *_ = answer(request(eos=(100,), include_stop=True, stop=("cde",)), b"abcd")
    assert "".join(shown) == "abcd", "with what was held back before it"


def test_tokens_before_min_tokens_do_not_stop_it():
    ids = [97, EOS, 99, 98, EOS, 99]
    shown, reason, stop, used = answer(request(min_tokens=5, stop_token_ids=(99,)), ids)
    assert ("".join(shown), reason, stop, used) == ("acb", "stop", None, 5)
    assert answer(request(min_tokens=3, stop_token_ids=(99,)), ids)[1:] == ("stop", 99, 3)
    # min_tokens counts the answer, not the prompt.
    assert answer(request(min_tokens=2, prompt=(65, 66, 67)), [EOS, EOS])[3] == 2


def test_a_request_counts_its_tokens():
    r = request(prompt=(1, 2, 3))
    assert (r.prompt_length, r.generated, r.remaining) == (3, 0, 3)
    r.computed = 3
    r.append(97)
    assert (r.tokens, r.generated, r.remaining) == ([1, 2, 3, 97], 1, 1)
    assert not r.reports_prompt
