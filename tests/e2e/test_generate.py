"""`nr-serve generate` on the page's own example: killed and started again, it answers as a server does."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ADAPTER
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
(REQUESTS,) = re.findall(r"```jsonl\n(.*?)```", PAGE, re.S)
TO_FILE, TO_OUTPUT = re.findall(r"^    nr-serve (generate .+)$", PAGE, re.M)


@pytest.fixture
def place(tmp_path):
    """A folder with what the page's commands name."""
    (tmp_path / "adapters").symlink_to(ROOT / "adapters")
    (tmp_path / "requests.jsonl").write_text(REQUESTS, encoding="utf-8")
    return tmp_path


def start(place, words, **more):
    return subprocess.Popen([sys.executable, "-m", "nr_serve.cli", *words, "--max-running", "1"], cwd=place, **more)


def answered(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_killed_run_goes_on_and_its_answers_are_those_of_a_server(place, url, client):
    answers = place / "answers.jsonl"
    with start(place, shlex.split(TO_FILE)) as process:
        until(lambda: (answers.exists() and answers.read_bytes().endswith(b"\n")) or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    before = answered(answers)
    assert before
    with start(place, shlex.split(TO_FILE)) as process:
        assert process.wait() == 0
    after = answered(answers)
    assert after[: len(before)] == before

    client.load(ADAPTER, "hu")
    asked = {each["custom_id"]: each for each in map(json.loads, REQUESTS.splitlines())}
    assert sorted(each["custom_id"] for each in after) == sorted(asked)
    for each in after:
        request, response = asked[each["custom_id"]], each["response"]
        over_http = httpx.post(url + request["url"], json=request["body"], timeout=300).json()
        assert response["status_code"] == 200
        assert response["body"].keys() == over_http.keys()
        assert response["body"]["choices"] == over_http["choices"]
        assert response["body"]["usage"] == over_http["usage"]


def test_standard_input_and_output(place):
    words = shlex.split(TO_OUTPUT)
    words = words[: words.index("<")]
    line = REQUESTS.splitlines()[0]
    with start(place, words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(line)
    assert process.returncode == 0
    (answer,) = map(json.loads, out.splitlines())
    assert answer["custom_id"] == json.loads(line)["custom_id"]
