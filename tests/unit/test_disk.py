"""Files written whole or not at all."""

import pytest

from nr_serve.disk import whole


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
