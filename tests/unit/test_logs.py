"""What a process logs, as text and as JSON."""

import inspect
import json
import logging
import signal
import subprocess
import sys
from asyncio import selector_events
from datetime import datetime

import pytest

from nr_serve.logs import JsonFormatter, TextFormatter, configure_logging, fields_of, quiet_progress_bars
from nr_serve.train.frozen_base import load_base
from tests.unit.servers import process
from tests.waiting import PATIENCE


def record(message: str, **fields) -> logging.LogRecord:
    made = logging.LogRecord("nr_serve.x", logging.INFO, __file__, 1, message, None, None)
    made.fields = fields
    return made


def test_text_and_json_say_the_same_in_one_line():
    made = record("request", path="/v1/x", status=200, prompts=["a\nb"])
    when = f"{datetime.fromtimestamp(made.created):%Y-%m-%d %H:%M:%S}"
    said = 'INFO nr_serve.x: request path="/v1/x" status=200 prompts=["a\\nb"]'
    assert TextFormatter().format(made) == f"{when} {said}"
    entry = json.loads(JsonFormatter().format(made))
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "info",
        "logger": "nr_serve.x",
        "message": "request",
        "path": "/v1/x",
        "status": 200,
        "prompts": ["a\nb"],
    }


def test_json_keeps_a_trace_in_its_line():
    made = record("a bug")
    try:
        raise RuntimeError("why")
    except RuntimeError as error:
        made.exc_info = (type(error), error, error.__traceback__)
    (line,) = JsonFormatter().format(made).splitlines()
    assert "RuntimeError: why" in json.loads(line)["trace"]
    assert fields_of(made) == {}


def test_the_hub_does_not_tell_of_each_try(base):
    hub = logging.getLogger("huggingface_hub.utils._http")
    for quiet in (lambda: configure_logging("info", "text"), lambda: load_base(str(base))):
        hub.setLevel("NOTSET")
        quiet()
        assert not hub.isEnabledFor(logging.WARNING)


def test_not_every_write_to_a_client_that_is_gone_is_logged(caplog):
    configure_logging("info", "text")
    selector_events.logger.warning("socket.send() raised exception.")
    selector_events.logger.warning("another")
    assert caplog.messages == ["another"]
    assert "'socket.send() raised exception.'" in inspect.getsource(selector_events)


@pytest.mark.parametrize(
    ("level", "form", "watched", "bars"),
    [
        ("info", "text", True, True),
        ("warning", "text", True, False),
        ("info", "json", True, False),
        ("info", "text", False, False),
    ],
)
def test_progress_bars_are_for_people_who_watch(level, form, watched, bars, monkeypatch):
    from transformers.utils import logging as transformers_logging

    monkeypatch.setattr("sys.stderr.isatty", lambda: watched)
    transformers_logging.enable_progress_bar()
    quiet_progress_bars(level, form)
    assert transformers_logging.is_progress_bar_enabled() is bars
    transformers_logging.enable_progress_bar()


@pytest.mark.parametrize(("level", "told"), [("info", True), ("warning", False)])
def test_a_server_says_that_it_is_ready_and_logs_from_its_level_on(level, told):
    with process("--log-level", level) as (server, client):
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=PATIENCE)
    assert out == f"ready: base on {client.url} (cpu, float32; adapters: hu)\n"
    assert ("stopped" in err) is told


def test_in_json_all_that_a_server_says_is_objects():
    with process("--log-format", "json") as (server, client):
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=PATIENCE)
    said = {entry["message"]: entry for entry in map(json.loads, err.splitlines())}
    assert (out, server.returncode) == ("", 0)
    about = {"model": "base", "address": client.url, "device": "cpu", "dtype": "float32", "adapters": ["hu"]}
    assert said["ready"].items() >= about.items()
    assert "stopped" in said


def test_in_json_a_start_that_fails_is_an_object_too():
    command = [sys.executable, "-m", "nr_serve.cli", "serve", "--port", "0", "--model", "/no/such"]
    done = subprocess.run([*command, "--log-format", "json"], capture_output=True, text=True, check=False)
    *_, last = map(json.loads, done.stderr.splitlines())
    assert (done.stdout, done.returncode) == ("", 1)
    assert (last["level"], last["message"]) == ("error", "there is no model folder /no/such")


def test_in_json_other_libraries_and_the_fetching_of_the_base_log_here_too():
    code = """
import logging, sys, warnings
from pathlib import Path
from nr_serve import assemble, default_model
from nr_serve.config import ServeConfig
from nr_serve.logs import configure_logging
configure_logging("info", "json")
import transformers
for name in ("transformers.models", "huggingface_hub.utils"):
    logging.getLogger(name).warning("hello")
warnings.warn("old")
default_model._fetch = lambda target, say: say("downloading")
assemble.load_tokenizer = lambda model: sys.exit()
assemble.assemble(ServeConfig(log_format="json"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = [entry["logger"] for entry in map(json.loads, done.stderr.splitlines())]
    assert said == ["transformers.models", "huggingface_hub.utils", "py.warnings", "nr_serve.assemble"]
