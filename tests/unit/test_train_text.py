"""Text: documents to windows, and what each step reads."""

from pathlib import Path

import pytest
import torch

from nr_serve.train.recipe import BadRecipe, Data, Run
from nr_serve.train.text import (
    PIECE_CHARACTERS,
    Classes,
    Mix,
    Windows,
    chat_documents,
    find_files,
    pack,
    read_classes,
    read_documents,
)
from tests import tiny


def test_documents_are_separated_by_empty_lines_and_long_ones_cut_at_paragraphs(tmp_path: Path):
    path = tmp_path / "hu.a.train.txt"
    path.write_text("egy\nkettő\n\nhárom\n\n\n" + "\n".join(["x" * 5000] * 3) + "\n", encoding="utf-8")
    documents = read_documents(path)
    assert documents[:2] == ["egy\nkettő", "három"]
    assert [len(d) for d in documents[2:]] == [5000, 5000, 5000]
    assert all(len(d) <= PIECE_CHARACTERS for d in documents)


def test_packing_restarts_the_offset_at_each_document_and_window():
    windows = pack(tiny.tokenizer().hf, ["aaaaa", "bbb", "cccccc"], 4, None, seed=0)
    assert windows.ids_NT.shape == (3, 4)
    flat, offset = windows.ids_NT.flatten().tolist(), windows.offset_NT.flatten().tolist()
    expected, at = [], 0
    for i, token in enumerate(flat):
        at = 0 if i % 4 == 0 or token != flat[i - 1] else at + 1
        expected.append(at)
    assert offset == expected


def test_packing_stops_at_the_limit_and_is_decided_by_the_seed():
    documents = [chr(97 + i) * 10 for i in range(20)]
    hf = tiny.tokenizer().hf
    limited = pack(hf, documents, 8, 50, seed=1)
    assert len(limited) == 6
    assert torch.equal(limited.ids_NT, pack(hf, documents, 8, 50, seed=1).ids_NT)
    assert not torch.equal(limited.ids_NT, pack(hf, documents, 8, 50, seed=2).ids_NT)


def test_chat_documents_use_the_template():
    assert chat_documents(tiny.tokenizer().hf, ["kérdés\nválasz"]) == [
        "<user>kérdés\n<assistant>válasz\n<assistant>"
    ]


def test_a_glob_without_text_is_refused(tmp_path: Path):
    with pytest.raises(BadRecipe, match=r"matches 'hu\.\*'"):
        find_files(tmp_path, ["hu.*"])


def test_too_little_text_is_refused(tmp_path: Path):
    for name in ("hu.a.txt", "en.a.txt"):
        (tmp_path / name).write_text("rövid\n")
    run = Run(tokens=512, window=128, batch_tokens=512)
    with pytest.raises(BadRecipe, match="fills 0 windows of 128 tokens"):
        read_classes(tmp_path, Data(target=("hu.*",), original=("en.*",)), tiny.tokenizer().hf, run)


def numbered(start: int, count: int) -> Windows:
    ids = torch.arange(start, start + count)[:, None].expand(count, 8)
    return Windows(ids, torch.arange(8).expand(count, 8))


def mix(**run) -> Mix:
    classes = Classes(
        target=numbered(0, 20),
        original={"a": numbered(100, 3), "b": numbered(200, 5)},
        background={"da": numbered(300, 2)},
    )
    return Mix(classes, Run(**({"tokens": 8000, "window": 8, "batch_tokens": 32} | run)))


def test_shares_hold_over_a_run_and_every_target_window_is_read_before_any_twice():
    read = {"target": [], "original": [], "background": []}
    order = mix(original_share=0.1, background_share=0.15)
    for step in range(100):
        parts = order.batch(step)
        assert sum(len(p) for p in parts if p is not None) == 4
        for part, windows in zip(read, parts, strict=True):
            read[part] += windows.ids_NT[:, 0].tolist() if windows is not None else []
    assert {part: len(ids) for part, ids in read.items()} == {"target": 300, "original": 40, "background": 60}
    assert sorted(read["target"][:20]) == list(range(20))
    assert read["target"][:20] != read["target"][20:40]
    assert [i // 100 for i in read["original"][:4]] == [1, 2, 1, 2]


def test_a_batch_depends_on_the_step_alone():
    straight, jumped = mix(), mix()
    for step in range(50):
        straight.batch(step)
    for ours, theirs in zip(straight.batch(50), jumped.batch(50), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours.ids_NT, theirs.ids_NT)
