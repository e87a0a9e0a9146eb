"""A file of answers is taken up by one run at a time, and stays as open or closed to others as it was."""

import pytest

from nr_serve import batch_file
from nr_serve.batch_file import answer_line, take_up
from nr_serve.errors import BadRequest


@pytest.fixture
def path(tmp_path):
    """A file of one answer and one failure."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(answer_line("a", 200, {}) + answer_line("b", 500, {}))
    return path


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_replaced_file_keeps_its_mode(path, mode):
    path.chmod(mode)
    file, kept = take_up(path)
    file.close()
    assert (kept, path.stat().st_mode & 0o777) == ({"a"}, mode)
    assert path.read_bytes().count(b"\n") == 1


def test_a_name_may_be_as_long_as_allowed(path):
    longest = path.rename(path.with_name("n" * 255))
    file, kept = take_up(longest)
    file.close()
    assert kept == {"a"}


@pytest.mark.parametrize("replaced", [True, False])
def test_a_second_run_is_refused_until_the_first_has_ended(path, replaced):
    if not replaced:
        path.write_bytes(answer_line("a", 200, {}))
    first, _ = take_up(path)
    before = path.read_bytes()
    with pytest.raises(BadRequest, match="another run writes"):
        take_up(path)
    assert path.read_bytes() == before
    first.write(answer_line("c", 200, {}))
    first.close()
    second, kept = take_up(path)
    second.close()
    assert kept == {"a", "c"}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_run_that_opened_the_file_before_it_was_replaced_is_refused(path, monkeypatch):
    """The lock of the old file is free again; the new file has the other run's."""
    lock, others = batch_file._lock, []

    def late(file, place):
        monkeypatch.undo()
        others.append(take_up(path)[0])
        lock(file, place)

    monkeypatch.setattr("nr_serve.batch_file._lock", late)
    with pytest.raises(BadRequest, match="another run writes"):
        take_up(path)
    others[0].close()
