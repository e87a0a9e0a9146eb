"""Packing, overlap, and the cache of packed text."""

import os
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BatchEncoding, PreTrainedTokenizerFast

from nr_serve.train.file_cache import TORN_AFTER_S
from nr_serve.train.recipe import Data, Run
from nr_serve.train.text import read_classes
from nr_serve.train.text.overlap import FEWEST_GRAMS, grams, overlap
from nr_serve.train.text.pack import NEAR, Packed, Windows, pack
from nr_serve.train.text.token_cache import TokenCache, tokenizer_key
from tests import tiny
from tests.unit.room import no_room


def test_packing_restarts_the_offset_at_each_document_and_window():
    windows = pack(tiny.tokenizer().hf, ["aaaaa", "bbb", "cccccc"], 4, None, seed=0).windows
    assert windows.ids_NT.shape == (3, 4)
    flat, offset = windows.ids_NT.flatten().tolist(), windows.offset_NT.flatten().tolist()
    expected, at = [], 0
    for i, token in enumerate(flat):
        at = 0 if i % 4 == 0 or token != flat[i - 1] else at + 1
        expected.append(at)
    assert offset == expected
    pairs = [(at, token) for at, token in enumerate(flat) if at % 4 < 3]
    assert windows.labelled == sum(flat[at + 1] == token for at, token in pairs)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, words as GPT-2 splits them."""
    alphabet = ByteLevel.alphabet()
    bytes_alone = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone)


def test_a_cut_document_goes_on_at_its_next_word():
    hf = word_tokenizer()
    windows = pack(hf, ["ab cdefg hi, jk lm nop qrs"], 6, None, seed=0).windows
    assert [hf.decode(row) for row in windows.ids_NT] == ["ab cde", " hi, j", " lm no"]
    assert windows.offset_NT.tolist() == [[0, 1, 2, 3, 4, 5]] * 3


def test_a_document_without_a_word_near_goes_on_where_it_was_cut():
    hf = word_tokenizer()
    windows = pack(hf, ["x" * 20 + "y" * 20], 4, None, seed=0).windows
    assert hf.decode(windows.ids_NT.flatten()) == "x" * 20 + "y" * 20


def test_a_next_word_is_near_within_so_many_tokens():
    hf = word_tokenizer()
    for left_out, second in ((NEAR - 1, " y z"), (NEAR, "xxxx")):
        windows = pack(hf, ["x" * (4 + left_out) + " y z"], 4, None, seed=0).windows
        assert hf.decode(windows.ids_NT[1]) == second


def test_a_tokenizer_that_tells_no_words_cuts_anywhere():
    hf = word_tokenizer()

    def slow(documents, **how):
        return BatchEncoding({"input_ids": hf(documents, **how)["input_ids"]})

    windows = pack(slow, ["ab cdefg hi"], 5, None, seed=0).windows
    assert [hf.decode(row) for row in windows.ids_NT] == ["ab cd", "efg h"]


def test_packing_stops_at_the_limit_and_is_decided_by_the_seed():
    documents = [chr(97 + i) * 10 for i in range(20)]
    hf = tiny.tokenizer().hf
    limited = pack(hf, documents, 8, 50, seed=1).windows
    assert len(limited) == 6
    assert torch.equal(limited.ids_NT, pack(hf, documents, 8, 50, seed=1).windows.ids_NT)
    assert not torch.equal(limited.ids_NT, pack(hf, documents, 8, 50, seed=2).windows.ids_NT)


@pytest.mark.parametrize(("limit", "read"), [(1000, 256), (25_600, 256), (25_601, 512)])
def test_only_as_many_documents_are_tokenised_as_the_limit_needs(limit, read):
    hf = tiny.tokenizer().hf
    seen = []

    def counting(documents, **how):
        seen.extend(documents if isinstance(documents, list) else [])
        return hf(documents, **how)

    pack(counting, ["x" * 100] * 5000, 8, limit, seed=0)
    assert len(seen) == read
    assert len(pack(hf, [], 8, None, seed=0).windows) == 0


def prose(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


def test_overlap_is_the_share_of_the_shorter_texts_8_grams():
    a = grams([prose(0, 20_000)])
    assert overlap(a, a) == 1
    assert overlap(a, grams([prose(30_000, 20_000)])) == 0
    assert overlap(a, grams([prose(10_000, 20_000)])) == pytest.approx(0.5, abs=0.05)
    assert overlap(a, grams([prose(500, 2000)])) == overlap(grams([prose(500, 2000)]), a) == 1
    assert overlap(a, grams([prose(0, 20_000).replace(" ", ",  ").upper()])) == 1
    assert overlap(a, grams(prose(i, 7) for i in range(0, 20_000, 7))) == 0


def test_a_gram_is_of_eight_words_whatever_signs_they_are_spelt_with():
    g = random.Random(0)
    text = [f"कि{chr(g.randint(0x0915, 0x0939))}ा{chr(g.randint(0x0915, 0x0939))}ी" for _ in range(8000)]
    found = len(grams([" ".join(text)]))
    in_parts = grams([" ".join(text[i : i + 7]) for i in range(0, 8000, 7)])
    assert found > 500
    assert len(in_parts) == 0, "no part has eight words"


@pytest.mark.parametrize("first", [0x4E00, 0x3041, 0x0E01], ids=["Chinese", "Japanese", "Thai"])
def test_where_no_spaces_are_written_each_sign_is_a_word(first):
    signs = random.Random(0).choices([chr(first + i) for i in range(40)], k=4000)
    a, b = (grams(["".join(signs[start : start + 2000])]) for start in (0, 1000))
    assert overlap(a, b) == pytest.approx(0.5, abs=0.1)
    assert overlap(a, grams(["".join(signs[2000:])])) == 0


def test_texts_too_short_to_tell_do_not_overlap():
    short = grams([prose(0, 100)])
    assert 0 < len(short) < FEWEST_GRAMS
    assert overlap(short, short) == overlap(short, grams([])) == 0


def made(value: int, windows: int = 4) -> Packed:
    ids = torch.full((windows, 8), value)
    return Packed(Windows(ids, torch.arange(8).expand(windows, 8)), torch.tensor([value, value + 1]))


def not_made() -> Packed:
    raise AssertionError("packed again")


def same(a: Packed, b: Packed) -> bool:
    pairs = [(p.windows.ids_NT, p.windows.offset_NT, p.grams) for p in (a, b)]
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(*pairs, strict=True))


def test_what_was_packed_is_read_back_and_packed_once(tmp_path: Path):
    cache = TokenCache(tmp_path / "tokens")
    assert same(cache.packed(["a", None], lambda: made(1)), made(1))
    assert same(cache.packed(["a", None], not_made), made(1))
    assert same(cache.packed(["a", 1], lambda: made(2)), made(2))
    assert len(list(cache.folder.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-40] + bytes(40)),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
    ],
    ids=["cut", "empty", "zeros at the end", "zeros"],
)
def test_a_damaged_file_is_packed_again_and_said(tmp_path: Path, damage, capsys):
    cache = TokenCache(tmp_path)
    cache.packed(["a"], lambda: made(1))
    (path,) = tmp_path.iterdir()
    damage(path)
    assert same(cache.packed(["a"], lambda: made(1)), made(1))
    assert f"{path} is damaged, and is made again" in capsys.readouterr().err
    assert same(cache.packed(["a"], not_made), made(1))


def test_nothing_is_left_of_packing_that_fails(tmp_path: Path):
    with pytest.raises(AssertionError, match="packed again"):
        TokenCache(tmp_path / "tokens").packed(["a"], not_made)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    cache = TokenCache(tmp_path / "file")
    assert same(cache.packed(["a"], lambda: made(1)), made(1))
    assert "cannot keep anything" in capsys.readouterr().err


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, capsys):
    cache = TokenCache(tmp_path)
    with no_room():
        assert same(cache.packed(["a"], lambda: made(1)), made(1))
    assert f"cannot keep anything in {tmp_path}: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_file_that_cannot_be_put_in_place(tmp_path: Path, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full)
    assert same(TokenCache(tmp_path).packed(["a"], lambda: made(1)), made(1))
    assert f"cannot keep anything in {tmp_path}: no space" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_file_used_longest_ago_goes_when_the_folder_is_full(tmp_path: Path):
    one = TokenCache(tmp_path / "one")
    one.packed(["x"], lambda: made(0))
    size = next(one.folder.iterdir()).stat().st_size
    cache = TokenCache(tmp_path / "tokens", most_bytes=2 * size)
    for age, key in ((300, "a"), (200, "b")):
        before = set(cache.folder.glob("*"))
        cache.packed([key], lambda: made(1))
        (new,) = set(cache.folder.glob("*")) - before
        os.utime(new, (new.stat().st_mtime - age,) * 2)
    cache.packed(["a"], not_made)  # used now
    cache.packed(["c"], lambda: made(1))
    assert len(list(cache.folder.iterdir())) == 2
    cache.packed(["a"], not_made)
    cache.packed(["c"], not_made)
    with pytest.raises(AssertionError):
        cache.packed(["b"], not_made)


def test_a_killed_processs_remains_go_after_a_day(tmp_path: Path):
    old, young = tmp_path / ".a.1.part", tmp_path / ".b.2.part"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (old.stat().st_mtime - TORN_AFTER_S - 60,) * 2)
    TokenCache(tmp_path).packed(["a"], lambda: made(1))
    assert (old.exists(), young.exists()) == (False, True)


def test_a_tokenizers_key_is_decided_by_its_files():
    assert tokenizer_key(tiny.tokenizer().hf) == tokenizer_key(tiny.tokenizer().hf)
    other, template = tiny.tokenizer().hf, tiny.tokenizer().hf
    other.add_tokens(["egy"])
    template.chat_template += " "
    assert len({tokenizer_key(hf) for hf in (tiny.tokenizer().hf, other, template)}) == 3


RUN = Run(tokens=4096, window=16, batch_tokens=128)


def corpus(folder: Path) -> Path:
    folder.mkdir()
    for language in ("hu", "en", "da"):
        (folder / f"{language}.a.txt").write_text("\n\n".join(f"{language} {i}\nsor" for i in range(200)))
    return folder


DATA = Data(target=("hu.*",), original=("en.*",), background=("da.*",))


@pytest.mark.parametrize(
    ("data", "run", "packed_again"),
    [
        ({}, {}, 0),
        ({}, {"tokens": 40960}, 0),
        ({}, {"seed": 1}, 4),
        ({}, {"window": 32}, 4),
        ({"target_tokens": 640}, {}, 1),
        ({"text_field": "body"}, {}, 0),
    ],
)
def test_text_is_packed_again_only_where_it_differs(tmp_path: Path, monkeypatch, data, run, packed_again):
    folder, cache = corpus(tmp_path / "corpus"), TokenCache(tmp_path / "tokens")
    hf = tiny.tokenizer().hf
    first = read_classes(folder, DATA, hf, RUN, cache)
    packings = []
    monkeypatch.setattr("nr_serve.train.text.read.pack", lambda *a, **how: (packings.append(a), pack(*a, **how))[1])
    changed = DATA.model_copy(update=data), RUN.model_copy(update=run)
    again = read_classes(folder, changed[0], hf, changed[1], cache)
    assert len(packings) == packed_again
    assert torch.equal(first.target.ids_NT, again.target.ids_NT) == (packed_again == 0)
    fresh = read_classes(folder, changed[0], hf, changed[1], TokenCache(tmp_path / "fresh"))
    assert fresh.digest() == again.digest()


def test_another_bound_is_another_text(tmp_path: Path):
    folder, cache = corpus(tmp_path / "corpus"), TokenCache(tmp_path / "tokens")
    for tokens in (320, 640):
        data = DATA.model_copy(update={"target_tokens": tokens})
        assert read_classes(folder, data, tiny.tokenizer().hf, RUN, cache).target.ids_NT.numel() == tokens


def test_a_changed_file_is_packed_again(tmp_path: Path):
    folder, cache = corpus(tmp_path / "corpus"), TokenCache(tmp_path / "tokens")
    hf = tiny.tokenizer().hf
    first = read_classes(folder, DATA, hf, RUN, cache)
    times = (folder / "da.a.txt").stat()
    (folder / "da.a.txt").write_text((folder / "da.a.txt").read_text().replace("sor", "ros"))
    os.utime(folder / "da.a.txt", (times.st_atime, times.st_mtime))
    again = read_classes(folder, DATA, hf, RUN, cache)
    assert torch.equal(first.target.ids_NT, again.target.ids_NT)
    assert not torch.equal(first.background["da"].ids_NT, again.background["da"].ids_NT)


def test_the_cache_is_in_the_folder_that_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("NR_CACHE", str(tmp_path / "named"))
    read_classes(corpus(tmp_path / "corpus"), DATA, tiny.tokenizer().hf, RUN)
    assert len(list((tmp_path / "named" / "tokens").iterdir())) == 4
