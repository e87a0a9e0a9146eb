"""Target text that a page of other text or a chat leads into, and what a tokenizer puts around text."""

import pytest
import torch

from nr_serve.train.text.frames import Chat, Frames, find_frames
from nr_serve.train.text.lead_in import PAGES, QUESTIONS, led_into
from nr_serve.train.text.pack import Windows
from tests import tiny

LENGTH = 20
TARGET = Windows(torch.arange(9 * LENGTH).view(9, LENGTH), torch.arange(LENGTH).expand(9, LENGTH) % 7)
PAGE = list(range(1000, 1000 + LENGTH))
ORIGINAL = {"en": Windows(torch.tensor([PAGE]), torch.arange(LENGTH).expand(1, LENGTH))}
CHAT = Chat((500, 501), (502, 503, 504))


def rows(frames: Frames) -> list[list[int]]:
    return led_into(TARGET, ORIGINAL, frames).windows.ids_NT.tolist()


def test_every_other_window_continues_a_page_or_a_chat_in_turn():
    own = TARGET.ids_NT.tolist()
    read = rows(Frames((), CHAT))
    for i in (0, 2, 4, 6, 8):
        assert read[i] == own[i]
    for i, share in ((1, PAGES[0]), (5, PAGES[1])):
        taken = int(share * LENGTH)
        assert read[i] == (PAGE[:taken] + own[i])[:LENGTH]
    for i, share in ((3, QUESTIONS[0]), (7, QUESTIONS[1])):
        asked = int(share * LENGTH)
        assert read[i] == [500, 501, *own[i][:asked], 502, 503, 504, *own[i][asked:]][:LENGTH]


def test_without_a_chat_template_or_room_for_it_pages_lead_in():
    own, taken = TARGET.ids_NT.tolist(), [int(share * LENGTH) for share in PAGES]
    for chat in (None, Chat((500,) * 6, (502,) * 5)):
        read = rows(Frames((), chat))
        assert [read[i] for i in (1, 3, 5)] == [
            (PAGE[:t] + own[i])[:LENGTH] for i, t in zip((1, 3, 5), taken, strict=True)
        ]


def test_a_window_that_continues_something_is_one_text_and_the_rest_keeps_its_documents():
    read = led_into(TARGET, ORIGINAL, Frames((), CHAT))
    for i in (0, 2):
        assert read.windows.offset_NT[i].tolist() == TARGET.offset_NT[i].tolist() == read.own_NT[i].tolist()
    for i, before in ((1, int(PAGES[0] * LENGTH)), (3, len(CHAT.opening))):
        assert read.windows.offset_NT[i].tolist() == list(range(LENGTH))
        assert read.own_NT[i].tolist() == [0] * before + list(range(1, LENGTH - before + 1))


def test_the_targets_own_beginning_is_left_out_where_something_leads_in():
    taken = int(PAGES[0] * LENGTH)
    assert rows(Frames((0, 1)))[1] == (PAGE[:taken] + TARGET.ids_NT[1, 2:].tolist())[:LENGTH]


def test_text_is_never_changed_in_place():
    before = TARGET.ids_NT.clone(), TARGET.offset_NT.clone()
    led_into(TARGET, ORIGINAL, Frames((), CHAT))
    assert torch.equal(TARGET.ids_NT, before[0])
    assert torch.equal(TARGET.offset_NT, before[1])


def test_frames_are_the_templates_and_the_tokenizers_own():
    hf = tiny.tokenizer().hf
    frames = find_frames(hf, chat=True)
    assert frames.chat is not None
    assert hf.decode(frames.chat.opening) == "<user>"
    assert hf.decode(frames.chat.between) == "\n<assistant>"
    assert list(frames.beginning) == []
    assert find_frames(hf, chat=False).chat is None


@pytest.mark.parametrize(
    "template",
    [None, "{{ messages[0].content }}", "{{ messages[1].content }}{{ messages[0].content }}", "always the same"],
)
def test_a_template_that_does_not_keep_both_speakers_in_order_gives_no_chat(template):
    hf = tiny.tokenizer().hf
    hf.chat_template = template
    assert find_frames(hf, chat=True).chat is None
