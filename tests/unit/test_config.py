"""Settings: a flag wins over the environment, the environment over the file; what is unknown is refused."""

import re
from pathlib import Path

import pytest
from pydantic_settings import SettingsError

from nr_serve.cli import main, parse
from nr_serve.commands.generate import Generate
from nr_serve.config import GROUPS, ServeConfig
from nr_serve.names import adapter_entry


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NR_CONFIG", "NR_SLOTS", "NR_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nr.toml"
    path.write_text('slots = 3\nport = 1\nmax_running = 7\nadapter = ["a=x,y.safetensors"]\napi_key = "secret"\n')
    return path


def settings(*args) -> ServeConfig:
    return parse(ServeConfig, "serve", list(args))


def refused(capsys, *args) -> str:
    assert main(["serve", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_flag_wins_over_the_environment_and_that_over_the_file(file, monkeypatch):
    monkeypatch.setenv("NR_SLOTS", "4")
    monkeypatch.setenv("NR_PORT", "2")
    config = settings("--config", str(file), "--slots", "5")
    assert (config.slots, config.port, config.max_running, config.page_size) == (5, 2, 7, 16)
    assert config.adapter == ["a=x,y.safetensors"], "in the file a list is a list"
    assert config.api_key.get_secret_value() == "secret"


def test_the_environment_may_name_the_file(file, monkeypatch):
    monkeypatch.setenv("NR_CONFIG", str(file))
    assert settings().slots == 3


def test_an_unknown_key_of_the_file_is_refused_with_what_may_be_meant(file, capsys):
    file.write_text("slot = 3\n")
    assert refused(capsys, "--config", str(file)) == (
        f"error: {file}: there is no setting `slot`; is `slots` meant?"
    )
    file.write_text('config = "other.toml"\n')
    assert "no setting `config`" in refused(capsys, "--config", str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slots = 0", "--slots: "),
        ("slots = ", "is not TOML: "),
        ("slots = " + "[" * 9999 + "]" * 9999, "is not TOML: "),
    ],
)
def test_a_wrong_value_in_the_file_is_refused(file, text, message, capsys):
    file.write_text(text)
    assert message in refused(capsys, "--config", str(file))


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    assert "cannot read" in refused(capsys, "--config", str(tmp_path / "none.toml"))
    assert "/dev/zero is longer than 1,048,576 bytes" in refused(capsys, "--config", "/dev/zero")


def test_an_unknown_variable_is_refused_but_not_those_of_others(monkeypatch, capsys):
    kubernetes = ("NR_SERVE_SERVICE_HOST", "NR_SERVE_PORT_8000_TCP", "NR_SERVE_EPP_SERVICE_PORT_HTTP")
    for name in ("NR_CACHE", "NR_URL", "OTHER_SLOT", *kubernetes):
        monkeypatch.setenv(name, "x")
    settings()
    monkeypatch.setenv("NR_SLOT", "3")
    assert refused(capsys) == "error: the environment: there is no setting `NR_SLOT`; is `NR_SLOTS` meant?"
    monkeypatch.delenv("NR_SLOT")
    monkeypatch.setenv("NR_SERVE_MODEL_NAME", "x")
    assert "is `NR_SERVED_MODEL_NAME` meant?" in refused(capsys)
    with pytest.raises(SettingsError, match="NR_SERVE_MODEL_NAME"):  # it reads the same variables
        parse(Generate, "generate", ["in.jsonl", "out.jsonl"])


def test_a_base_in_the_folder_at_hand_has_the_folders_name(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    names = [settings().base_name(model) for model in (".", "../tiny/", "org/llama-3.1")]
    assert names == ["tiny", "tiny", "llama-3.1"]
    assert settings("--served-model-name", "en").base_name(".") == "en"


@pytest.mark.parametrize(
    ("entry", "name", "path"),
    [
        ("hu=/a/run=3/x.safetensors", "hu", "/a/run=3/x.safetensors"),
        ("/a/run=3/x.safetensors", "x", "/a/run=3/x.safetensors"),
        ("hu=x=3.safetensors", "hu", "x=3.safetensors"),
        ("x.safetensors", "x", "x.safetensors"),
        ("=x.safetensors", "x", "x.safetensors"),
    ],
)
def test_an_adapter_is_named_before_the_first_equals_sign(entry, name, path):
    assert adapter_entry(entry) == (name, Path(path))


def test_the_help_shows_every_setting_once_in_its_group(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: nr-serve serve [FLAG ...]\n")
    titles = [f"\n{group.__doc__}:\n" for group in GROUPS]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    for group, start, end in zip(GROUPS, places, [*places[1:], len(text)], strict=True):
        shown = re.findall(r"^  --([a-z-]+)", text[start:end], re.M)
        assert [name.replace("-", "_") for name in shown] == list(group.model_fields)
    assert sum(len(group.model_fields) for group in GROUPS) == len(ServeConfig.model_fields)
