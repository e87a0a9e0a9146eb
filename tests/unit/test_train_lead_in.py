"""Text that a page of other text or a chat leads into, and what a tokenizer puts around text."""

from itertools import product

import pytest
import torch

from nr_serve.errors import BadRequest
from nr_serve.train.recipe import BadRecipe
from nr_serve.train.text.frames import Chat, Frames, find_frames, render_exchange
from nr_serve.train.text.lead_in import PAGES, QUESTIONS, in_chat, led_into
from nr_serve.train.text.pack import Windows
from tests import tiny

LENGTH = 40
CHAT = Chat((500, 501), (502, 503, 504))


def numbered(first: int, rows: int, *documents: int) -> Windows:
    """Windows of consecutive numbers, each of documents of these lengths."""
    offsets = torch.cat([torch.arange(length) for length in documents or (LENGTH,)])
    assert len(offsets) == LENGTH
    return Windows(torch.arange(first, first + rows * LENGTH).view(rows, LENGTH), offsets.expand(rows, LENGTH))


ORIGINAL = {"a": numbered(10_000, 1), "b": numbered(20_000, 1)}


def test_every_other_window_continues_a_page_or_a_chat_in_turn():
    own = numbered(0, 400)
    rows, whole = led_into(own, ORIGINAL, Frames((), CHAT)).windows.ids_NT.tolist(), own.ids_NT.tolist()
    assert rows[::2] == whole[::2]
    asked, pages = set(), set()
    for row, text in zip(rows[1::4], whole[1::4], strict=True):
        taken = LENGTH - row[::-1].index(text[0]) - 1 if text[0] in row else LENGTH
        source = "a" if row[0] < 20_000 else "b"
        assert row == (ORIGINAL[source].ids_NT[0, :taken].tolist() + text)[:LENGTH]
        pages.add((source, taken))
    for row, text in zip(rows[3::4], whole[3::4], strict=True):
        question = row.index(502) - 2
        assert row == [500, 501, *text[:question], 502, 503, 504, *text[question:]][:LENGTH]
        asked.add(question)
    assert pages == set(product("ab", (int(share * LENGTH) for share in PAGES)))
    assert asked == {int(share * LENGTH) for share in QUESTIONS}


def test_without_room_for_a_chat_only_pages_lead_in():
    for chat in (None, Chat((500,) * 11, (502,) * 10)):
        rows = led_into(numbered(0, 40), ORIGINAL, Frames((), chat)).windows.ids_NT
        assert (rows[1::2, 0] >= 10_000).all()


@pytest.mark.parametrize("row", [1, 3], ids=["page", "chat"])
def test_only_the_first_document_of_a_window_continues_something(row):
    own = numbered(0, 4, 20, 13, 7)
    read = led_into(own, ORIGINAL, Frames((), CHAT))
    ids, offsets, since = (x[row].tolist() for x in (read.windows.ids_NT, read.windows.offset_NT, read.own_NT))
    before = ids.index(int(own.ids_NT[row, 0]))
    first = before + 20 + {1: 0, 3: 3}[row]
    assert offsets == [*range(first), *range(13), *range(7)][:LENGTH]
    assert since == [*([0] * before), *range(1, first - before + 1), *range(13), *range(7)][:LENGTH]
    assert ids[first:] == own.ids_NT[row, 20:].tolist()[: LENGTH - first]
    assert read.own_NT[0].tolist() == read.windows.offset_NT[0].tolist() == own.offset_NT[0].tolist()


def test_a_page_is_of_one_document():
    page = numbered(10_000, 1, 1, 39)
    rows = led_into(numbered(0, 40), {"a": page}, Frames()).windows.ids_NT
    assert [row[:3] for row in rows.tolist()[1::2]] == [[10_000, 40 * i, 40 * i + 1] for i in range(1, 40, 2)]


def test_the_documents_own_beginning_is_left_out_where_something_leads_in():
    own = numbered(0, 4).ids_NT.tolist()
    with_it, without = (
        led_into(numbered(0, 4), ORIGINAL, Frames(beginning, CHAT)).windows.ids_NT.tolist()
        for beginning in ((), (0, 0))
    )
    taken, question = with_it[1].index(own[1][0]), with_it[3].index(502) - 2
    assert without[1] == (with_it[1][:taken] + own[1][2:])[:LENGTH]
    assert without[3][: question + 5] == [500, 501, *own[3][2 : question + 2], 502, 503, 504]
    assert without[3][question + 5 :] == own[3][question + 2 :][: LENGTH - question - 5]


def test_text_is_never_changed_in_place():
    own = numbered(0, 8)
    led_into(own, ORIGINAL, Frames((), CHAT))
    assert torch.equal(own.ids_NT, numbered(0, 8).ids_NT)
    assert torch.equal(own.offset_NT, numbered(0, 8).offset_NT)


def test_each_document_is_a_chat_of_its_own():
    read = in_chat(numbered(0, 2, 30, 10), Frames((0,), CHAT))
    expected = [500, 501, 1, 2, 502, 503, 504, *range(3, 30), 500, 501, 31, 502, 503, 504]
    assert read.ids_NT.tolist() == [expected, [i if i >= 500 else i + 40 for i in expected]]
    assert read.offset_NT[0].tolist() == [*range(34), *range(6)]


@pytest.mark.parametrize(
    ("chat", "message"),
    [(None, "no chat template"), (Chat((500,) * 11, (502,) * 10), "takes more than half of 40 tokens")],
)
def test_without_a_template_or_room_for_it_there_is_no_chat(chat, message):
    with pytest.raises(BadRequest, match=message):
        in_chat(numbered(0, 2), Frames((), chat))


def test_frames_are_the_templates_and_the_tokenizers_own():
    hf = tiny.tokenizer().hf
    frames = find_frames(hf, chat=True)
    assert frames.chat is not None
    assert hf.decode(frames.chat.opening) == "<user>"
    assert hf.decode(frames.chat.between) == "\n<assistant>"
    assert list(frames.beginning) == []
    assert find_frames(hf, chat=False).chat is None
    hf.chat_template = None
    assert find_frames(hf, chat=True).chat is None


@pytest.mark.parametrize(
    "date", ["date_string or strftime_now('%d %b %Y')", "strftime_now('%d %b %Y')", "strftime_now(format='%d')"]
)
def test_a_template_that_takes_a_date_reads_the_same_every_day(date):
    hf = tiny.tokenizer().hf
    hf.chat_template = "{{ " + date + " }}" + hf.chat_template
    frames = find_frames(hf, chat=True)
    assert frames.chat is not None
    assert hf.decode(frames.chat.opening) == "01 Jan 2026<user>"


@pytest.mark.parametrize("before", ["", "\n", "  {% if true %}\n  {% endif %}"])
def test_a_template_is_read_as_it_is(before):
    hf = tiny.tokenizer().hf
    hf.chat_template = before + hf.chat_template
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert render_exchange(hf, "a", "b") == hf.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "does not keep what is said"),
        ("{{ messages[1].content }}{{ messages[0].content }}", "does not keep what is said"),
        ("{{ raise_exception('no users') }}", "refuses an exchange: no users"),
    ],
)
def test_a_template_that_does_not_take_an_exchange_is_refused(template, message):
    hf = tiny.tokenizer().hf
    hf.chat_template = template
    assert find_frames(hf, chat=False).chat is None
    with pytest.raises(BadRecipe, match=message):
        find_frames(hf, chat=True)
