"""Plots: the same values give the same bytes, and what they show is what was measured."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nr_serve.errors import BadRequest
from nr_serve.evaluate.pareto import Point, unbeaten
from nr_serve.evaluate.plots import heat_map, loss_curves, panels, pareto
from nr_serve.evaluate.tables import markdown
from nr_serve.train.log import training_losses
from tests.unit.room import no_room
from tests.waiting import PATIENCE

POINTS = [Point("neutral", 0.0005, 0.28), Point("lora", 0.09, 0.33), Point("worse", 0.1, 0.2)]


def draw(folder: Path, suffix: str) -> dict[str, bytes]:
    """Every kind of plot, by name."""
    folder.mkdir(exist_ok=True)
    paths = {name: folder / f"{name}{suffix}" for name in ("pareto", "heat", "curves", "panels")}
    pareto(paths["pareto"], POINTS, title="Learning against forgetting")
    heat_map(paths["heat"], ["hu", "en"], ["0", "1"], [[0.8, None], [0.0, 0.01]], title="Gate rate", written=True)
    loss_curves(paths["curves"], {"train": [(0, 4.0), (100, 3.0)], "en.a": [(0, 3.5)]}, title="Loss")
    lines = {"in": {"hu": [(-1, 0.0), (0, 0.4)], "da": [(-1, 0.1)]}, "out": {"hu": [(-1, 0.7)]}, "": {}}
    panels(paths["panels"], lines, title="Switches", x_label="tokens")
    return {name: path.read_bytes() for name, path in paths.items()}


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_values_give_the_same_bytes(tmp_path, suffix):
    ours = draw(tmp_path / "ours", suffix)
    program = (
        "import sys; from pathlib import Path; from tests.unit.test_evaluate_plots import draw; "
        f"draw(Path(sys.argv[1]), {suffix!r})"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "theirs")], check=True, timeout=PATIENCE)
    assert ours == {name: (tmp_path / "theirs" / f"{name}{suffix}").read_bytes() for name in ours}
    assert len(set(ours.values())) == 4


def test_other_values_give_another_plot(tmp_path):
    for name, rate in {"a": 0.0, "b": 0.01}.items():
        heat_map(tmp_path / f"{name}.png", ["en"], ["0"], [[rate]], title="Gate rate")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_names_are_drawn_as_they_are(tmp_path):
    name = r"a$\frac{b$"
    loss_curves(tmp_path / "a.svg", {name: [(0, 4.0), (100, 3.0)]}, title=name)
    assert (tmp_path / "a.svg").stat().st_size > 0
    assert markdown([["RUN"], ["a|b"]])[-1] == "| a&#124;b |"


def test_the_front_holds_exactly_the_points_that_no_other_beats():
    g = random.Random(0)
    points = [Point(str(i), round(g.random(), 1), round(g.random(), 1)) for i in range(60)]

    def beats(a: Point, b: Point) -> bool:
        return (
            a.forgotten <= b.forgotten
            and a.learned >= b.learned
            and (a.forgotten, a.learned) != (b.forgotten, b.learned)
        )

    expected = {(p.forgotten, p.learned) for p in points if not any(beats(other, p) for other in points)}
    front = unbeaten(points)
    assert {(p.forgotten, p.learned) for p in front} == expected
    assert [p.forgotten for p in front] == sorted(p.forgotten for p in front)
    assert [p.label for p in unbeaten(POINTS)] == ["neutral", "lora"]


def test_a_log_becomes_a_curve_and_a_resumed_runs_repeated_steps_count_once(tmp_path):
    entries = [
        {"event": "gates", "layers": {}},
        {"event": "heldout", "sources": {"hu.a": {"before": 5.0, "after": 5.0}}},
        {"event": "step", "step": 2, "tokens": 100, "lm": 4.5, "tokens_a_second": 1.0},
        {"event": "step", "step": 4, "tokens": 200, "lm": 4.4, "tokens_a_second": 1.0},
        {"event": "step", "step": 2, "tokens": 100, "lm": 4.6, "tokens_a_second": 1.0},
        {"event": "step", "step": 4, "tokens": 200, "lm": 4.3, "tokens_a_second": 1.0},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert training_losses(log) == [(100, 4.6), (200, 4.3)]


def test_what_cannot_be_read_or_written_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="cannot read"):
        training_losses(tmp_path / "absent.jsonl")
    (tmp_path / "log.jsonl").write_text('{"event": "gates"}\n{"event": "step"}\n')
    with pytest.raises(BadRequest, match=r"log\.jsonl line 2"):
        training_losses(tmp_path / "log.jsonl")
    with pytest.raises(BadRequest, match="cannot write"):
        loss_curves(tmp_path / "absent" / "x.svg", {"train": [(0, 1.0)]}, title="Loss")
    with pytest.raises(BadRequest, match=r"\.svg or \.png"):
        pareto(tmp_path / "x.jpeg", POINTS, title="x")


def test_a_plot_that_finds_no_room_leaves_the_old_one(tmp_path):
    old = draw(tmp_path, ".svg")
    with no_room(), pytest.raises(BadRequest, match=r"cannot write .*pareto\.svg: File too large"):
        draw(tmp_path, ".svg")
    assert {path.stem: path.read_bytes() for path in tmp_path.iterdir()} == old
