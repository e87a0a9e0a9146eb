"""A run's log: lines that are whole, whatever killed the run that wrote them."""

import pytest
from transformers import TrainerState

from nr_serve.errors import BadRequest
from nr_serve.train import log
from nr_serve.train.trainer import Bar


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in (1, 2):
        log.Log(path).write({"event": "step", "step": step})
    assert log.read(path) == [{"event": "step", "step": 1}, {"event": "step", "step": 2}]


@pytest.mark.parametrize("tail", [b'{"event": "st', '{"event": "é'.encode()[:-1], b'{"event": "step", "step": 2}'])
def test_a_last_line_cut_by_a_kill_is_left_out_and_not_written_on(tmp_path, tail):
    path = tmp_path / "log.jsonl"
    log.Log(path).write({"event": "step", "step": 1})
    path.write_bytes(path.read_bytes() + tail)
    assert log.read(path) == [{"event": "step", "step": 1}]
    log.Log(path).write({"event": "end"})
    assert log.read(path) == [{"event": "step", "step": 1}, {"event": "end"}]


@pytest.mark.parametrize("line", ["{", "3", "[]", '{"step": 1}'])
def test_a_file_that_is_not_a_log_is_refused_by_its_line(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"event": "step"}}\n{line}\n{{"event": "end"}}\n')
    with pytest.raises(BadRequest, match=r"log\.jsonl line 2: not a line"):
        log.read(path)
    with pytest.raises(BadRequest, match="cannot read"):
        log.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("watched", [True, False])
def test_a_bar_is_drawn_for_people_who_watch_and_does_not_fill_a_log(watched, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: watched)
    bar, state = Bar(), TrainerState(max_steps=40, is_world_process_zero=True)
    bar.on_train_begin(None, state, None)
    for state.global_step in range(1, 41):
        bar.training_bar.last_print_t -= 1  # a step of a second
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, {"lm": 2.0, "tokens_a_second": 100.0})
    bar.on_train_end(None, state, None)
    drawn = capsys.readouterr().err
    assert "40/40" in drawn
    assert "lm 2.000, 100 tokens/s" in drawn
    assert (drawn.count("\r") > 20) == watched


def test_steps_of_before_a_run_was_resumed_are_no_part_of_the_bars_rate():
    bar = Bar()
    bar.on_train_begin(None, TrainerState(max_steps=40, global_step=30, is_world_process_zero=True), None)
    bar.training_bar.start_t -= 2
    bar.on_step_end(None, TrainerState(max_steps=40, global_step=32, is_world_process_zero=True), None)
    shown = bar.training_bar.format_dict
    assert (shown["n"], shown["initial"]) == (32, 30)
    assert (shown["n"] - shown["initial"]) / shown["elapsed"] < 1.01
    bar.close()
