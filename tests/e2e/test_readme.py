"""What the README shows is run."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_LINES = [
    line.split("#")[0].strip() for line in README.splitlines() if re.match(r"    nr-serve [a-z]", line)
]


def test_the_commands_against_a_running_server_work(url, client):
    remote = [
        line for line in COMMAND_LINES if line.split()[1] in ("load-adapter", "list-adapters", "unload-adapter")
    ]
    assert len(remote) == 3
    for line in remote:
        done = subprocess.run(
            [sys.executable, "-m", "nr_serve.cli", *shlex.split(line)[1:]],
            cwd=ROOT,
            env={"NR_URL": url},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "hu" in done.stdout
    assert client.adapters() == []


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_every_python_example_prints_an_answer(code, url, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    try:
        exec(code.replace("http://127.0.0.1:8000", url), names)
    finally:
        if "server" in names:
            names["server"].close()
    assert capsys.readouterr().out.strip()


def test_the_tokens_on_the_apis_page_are_those_of_the_default_base(url):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    asked, given = (
        json.loads(re.search(pattern, page)[1]) for pattern in (r"/detokenize\n(.+)", r"gives `(\{.+\})`")
    )
    assert httpx.post(f"{url}/detokenize", json=asked, trust_env=False).json() == given


def without_numbers(line: str) -> str:
    return re.sub(r"[\d.]+", "#", " ".join(line.split()))


def test_the_demo_shows_what_the_readme_says():
    done = subprocess.run(
        [sys.executable, "examples/demo.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    (sample,) = re.findall(r"`make demo` prints.*?```\n(.*?)```", README, re.S)
    assert set(map(without_numbers, sample.splitlines())) <= set(map(without_numbers, out.splitlines())), out
    assert out.count("  = the base's answer") >= 3, out  # neutral is measured, not promised to the last token
    losses = dict(re.findall(r"  (Hungarian|English) +([\d.]+ +[\d.]+)", out))
    before, after = map(float, losses["Hungarian"].split())
    assert after < before - 0.5
    before, after = map(float, losses["English"].split())
    assert after == pytest.approx(before, rel=0.002)
    shared = float(re.search(r"([\d.]+) requests a pass", out)[1])
    assert shared > 4
