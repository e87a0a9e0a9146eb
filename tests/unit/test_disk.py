"""Files written whole or not at all."""

import os

import pytest

from nr_serve.disk import check_file, whole, write_text
from nr_serve.errors import BadRequest
from tests.unit.room import no_room


def write(path, last):
    with whole(path) as part, part.open("w") as file:
        file.write("half, ")
        file.write(last)


def test_a_file_takes_its_place_only_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "state.json"
    write(path, "old")
    write(path, "new")
    with pytest.raises(TypeError):
        write(path, None)
    assert path.read_text() == "half, new"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_do_not_meet(tmp_path):
    path = tmp_path / "state.json"
    with whole(path) as first, whole(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the one that ended last"


def test_what_is_there_and_is_no_file_is_not_replaced(tmp_path):
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for odd, fault in {pipe: "a device or a pipe", tmp_path: "Is a directory", loop: "Too many levels"}.items():
        for refuse in (check_file, lambda path: write_text(path, "x")):
            with pytest.raises(BadRequest, match=f"cannot write {odd}: .*{fault}"):
                refuse(odd)
    assert pipe.is_fifo()
    assert loop.is_symlink()
    assert set(tmp_path.iterdir()) == {pipe, loop}


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    path, link = tmp_path / "v1", tmp_path / "latest"
    link.symlink_to("v1")
    write_text(link, "new")
    assert path.read_text() == "new"
    assert link.is_symlink()


def test_a_name_may_be_as_long_as_the_disk_takes_and_a_longer_one_is_refused_before(tmp_path):
    write_text(tmp_path / ("n" * 255), "x")
    with pytest.raises(BadRequest, match="File name too long"):
        check_file(tmp_path / ("n" * 256))


def test_a_text_that_finds_no_room_leaves_the_old_one(tmp_path):
    path = tmp_path / "card.md"
    write_text(path, "old")
    with no_room(), pytest.raises(BadRequest, match=r"cannot write .*card\.md: File too large"):
        write_text(path, "new" * 100)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
