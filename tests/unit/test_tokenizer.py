"""Text that grows by tokens is the text of all tokens."""

import random

import pytest

from nr_serve.errors import BadRequest
from nr_serve.tokenizer import Detokenizer, Tokenizer
from tests import tiny

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.hf.eos_token_id


def bytes_as_ids(data: bytes) -> list[int]:
    """Ids of single bytes, by the tokenizer's own table of them."""
    return [TOKENIZER.hf.convert_tokens_to_ids(c) for c in _table(data)]


def _table(data: bytes) -> str:
    """GPT-2's published map from bytes to printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return "".join(chr(b) if b in printable else chr(256 + rest.index(b)) for b in data)


def pushed(ids, prompt=()):
    detokenizer = Detokenizer(TOKENIZER, prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_random_ids_add_up_to_the_whole(seed):
    rng = random.Random(seed)
    for _ in range(60):
        ids = [rng.randrange(tiny.VOCAB) for _ in range(rng.randint(0, 30))]
        assert "".join(pushed(ids)) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_text_of_many_bytes_add_up_and_are_whole_characters(seed):
    rng = random.Random(seed)
    for _ in range(60):
        text = "".join(rng.choices("aé漢🙂 \n\u0301\u200d👩🏽", k=rng.randint(1, 20)))
        prompt = "".join(rng.choices("aé漢🙂 ", k=rng.randint(0, 9)))
        pieces = pushed(bytes_as_ids(text.encode()), bytes_as_ids(prompt.encode()))
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        # As early as it can be: each character comes with its last byte.
        assert [p for p in pieces if p] == list(text)


def test_a_token_that_begins_the_next_character_shows_the_one_it_ends():
    class TwoBytes:
        def decode(self, ids, *, special_tokens=False):
            text = "aé漢漢b".encode()
            return b"".join(text[2 * i : 2 * i + 2] for i in ids).decode(errors="replace")

    detokenizer = Detokenizer(TwoBytes(), ())
    assert [detokenizer.push(i) for i in range(5)] == ["a", "é", "漢", "", "漢b"]


def test_bytes_that_are_no_text_come_out_once_as_replacement_characters():
    for data in (
        b"\xff\xfea",
        b"\xe6\xbc",
        b"a\xf0\x9f\x99b",
        b"\x80" * 5 + b"z",
        b"\xc3\xc3\xa9",
        b"\xef\xbf\xbd!",
    ):
        assert "".join(pushed(bytes_as_ids(data))) == data.decode(errors="replace")


def test_bytes_that_never_become_text_are_not_held_back_for_ever():
    pieces = pushed(bytes_as_ids(b"a" + b"\x80" * 60 + "zé".encode()))
    assert "".join(pieces) == "a" + "\ufffd" * 60 + "zé"
    assert "\ufffd" in "".join(pieces[:30])


def test_special_tokens_are_not_text_unless_asked_for():
    ids = [*bytes_as_ids(b"ab"), EOS]
    assert TOKENIZER.decode(ids) == "ab"
    assert TOKENIZER.decode(ids, special_tokens=True) == "ab<299>"
    assert TOKENIZER.token_text(EOS) == "<299>"
    assert pushed([ids[0], EOS, ids[1]]) == ["a", "", "b", ""]


def test_encode_and_decode_are_inverse():
    for text in ("", "a", " a  b\n", "árvíztűrő 🙂"):
        assert TOKENIZER.encode(text) == bytes_as_ids(text.encode())
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_messages_become_a_prompt_and_a_template_may_refuse_them():
    messages = [{"role": "user", "content": "hi"}]
    assert TOKENIZER.chat_prompt(messages) == "<user>hi\n<assistant>"
    hf = tiny.tokenizer().hf
    hf.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRequest, match="roles must alternate"):
        Tokenizer(hf).chat_prompt(messages)
    hf.chat_template = None
    with pytest.raises(BadRequest, match="no chat template"):
        Tokenizer(hf).chat_prompt(messages)


def test_a_template_takes_variables_but_not_what_the_server_sets():
    hf = tiny.tokenizer().hf
    hf.chat_template = "{{ messages[0].content }}{{ ' thinks' if enable_thinking is not false }}"
    messages = [{"role": "user", "content": "hi"}]
    assert Tokenizer(hf).chat_prompt(messages) == "hi thinks"
    assert Tokenizer(hf).chat_prompt(messages, variables={"enable_thinking": False, "other one": [1]}) == "hi"
    for name in ("tools", "tokenize", "chat_template", "add_generation_prompt", "return_dict", "messages", "self"):
        with pytest.raises(BadRequest, match=f"not a variable of chat templates: {name}"):
            Tokenizer(hf).chat_prompt(messages, variables={name: True})


def test_a_template_without_a_place_for_tools_or_calls_refuses_them():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(BadRequest, match="template does not use them"):
        TOKENIZER.chat_prompt(messages[:1], tools=[{"type": "function"}])
    with pytest.raises(BadRequest, match="does not write `tool_calls`"):
        TOKENIZER.chat_prompt(messages)
    hf = tiny.tokenizer().hf
    hf.chat_template = (
        "{{ tools | tojson if tools }}{% for m in messages %}{{ m.tool_calls | default | tojson }}{% endfor %}"
    )
    assert '"name": "f"' in Tokenizer(hf).chat_prompt(messages[1:], tools=[{"type": "function"}])


def test_a_template_that_refuses_the_messages_without_their_calls_takes_them_with_them():
    hf = tiny.tokenizer().hf
    hf.chat_template = (
        "{% set turn = namespace(user=true) %}{% for m in messages %}"
        "{% if m.role == 'user' or (m.role == 'assistant' and m.tool_calls is not defined) %}"
        "{% if (m.role == 'user') != turn.user %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% set turn.user = not turn.user %}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{{ m.tool_calls | default('') }}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calls = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    messages = [{"role": "user", "content": "hi"}, *calls, *calls]
    assert Tokenizer(hf).chat_prompt(messages).count("'name': 'f'") == 2
    with pytest.raises(BadRequest, match="roles must alternate"):
        Tokenizer(hf).chat_prompt([{"role": "user", "content": "hi"}, *messages])


def test_the_face_for_grammars_is_made_once_and_needs_an_end():
    made = TOKENIZER.for_grammars(tiny.VOCAB, [EOS, 298])
    assert TOKENIZER.for_grammars(tiny.VOCAB, [EOS, 298]) is made
    assert made.eos_tokens == [EOS, 298]
    with pytest.raises(BadRequest, match="cannot follow a grammar"):
        tiny.tokenizer().for_grammars(tiny.VOCAB, [])


def test_the_bytes_of_tokens_add_up_to_those_of_the_text_also_within_characters():
    text = "törölni szeretné őű 🎉 你"
    for ids in (TOKENIZER.encode(text, special_tokens=False), bytes_as_ids(text.encode())):
        assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()
    assert TOKENIZER.token_bytes(EOS) == TOKENIZER.token_text(EOS).encode()
