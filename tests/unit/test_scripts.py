"""The demo and the measurements that run against a server, as far as they can without a model."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.fakes import serving

ROOT = Path(__file__).parents[2]


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_neutrality_is_measured_with_an_adapter_loaded(tmp_path, capsys):
    (tmp_path / "en.x.heldout.txt").write_text("one two three four five\nsix\n")
    asked = ["--corpus", str(tmp_path), "--source", "en.x", "--prompts", "1", "--words", "3", "--tokens", "2"]
    with serving() as server:
        load("loadtests/neutrality.py").main(["--url", server.url, *asked])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["prompts"], result["equal"], result["fired"]) == (1, 1, {"hu": 0.5})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_demo_ends_if_its_stream_does():
    with serving() as server, pytest.raises(SystemExit, match="stream ended"):
        load("examples/demo.py").load_beside_a_stream(server.url, "no such model")


def test_the_demos_commands_ask_its_own_server(monkeypatch):
    monkeypatch.setenv("NR_URL", "http://127.0.0.1:9")
    demo, seen = load("examples/demo.py"), []
    monkeypatch.setattr(
        demo, "subprocess", SimpleNamespace(run=lambda args, check, env: seen.append(env["NR_URL"]))
    )
    demo.run("http://127.0.0.1:1", "list-adapters")
    assert seen == ["http://127.0.0.1:1"]
