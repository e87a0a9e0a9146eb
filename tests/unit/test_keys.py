"""The key file: hashes of long keys, each with a role and limits, read again when it changes."""

import os
import tomllib

import pytest

from nr_serve.cli import main
from nr_serve.config import ServeConfig
from nr_serve.errors import BadRequest
from nr_serve.keys import Keys, make_key, read_key_file
from tests.fakes import serving

CHANGE = ("DELETE", "/v1/adapters/x")
ASK = ("GET", "/v1/models")


def entry(name: str, role: str = "inference", **more) -> tuple[str, str]:
    """A new key, and its lines for the file."""
    secret, key = make_key(name, role)
    lines = {"name": name, "role": role, "sha256": key.sha256} | more
    return secret, "[[key]]\n" + "".join(f"{k} = {v!r}\n" for k, v in lines.items())


def status(served, request, secret=None) -> int:
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    return served.http.request(*request, headers=headers).status_code


def replace(path, text) -> None:
    """As an editor does: the new file takes the old one's place."""
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.toml"


def test_each_key_opens_what_its_role_says(path):
    (alice, a), (bob, b), (root, r) = entry("alice"), entry("bob"), entry("root", "admin")
    path.write_text(a + b + r)
    with serving(key_file=path) as served:
        for key in (alice, bob, root):
            assert status(served, ASK, key) == 200
        assert status(served, CHANGE, alice) == status(served, CHANGE, bob) == 403
        assert status(served, CHANGE, root) == 404
        for request in (ASK, CHANGE):
            assert status(served, request) == status(served, request, "x" * 46) == 401


def test_the_simple_keys_work_beside_the_file(path):
    alice, text = entry("alice")
    path.write_text(text)
    with serving(key_file=path, api_key="user", admin_key="admin") as served:
        assert [status(served, ASK, key) for key in (alice, "user", "admin")] == [200, 200, 200]
        assert [status(served, CHANGE, key) for key in (alice, "user", "admin")] == [403, 403, 404]


@pytest.mark.parametrize("left", ["", "# no key yet\n", "key = []\n"])
def test_a_file_without_keys_ends_the_start_and_later_changes_nothing(path, left):
    alice, text = entry("alice")
    path.write_text(text)
    with serving(key_file=path) as served:
        path.write_text(left)
        assert (status(served, ASK), status(served, ASK, alice), status(served, CHANGE)) == (401, 200, 401)
    with pytest.raises(BadRequest, match="holds no key"):
        Keys(ServeConfig(key_file=path))


def test_a_file_cut_off_within_a_line_changes_nothing(path):
    alice, text = entry("alice", requests_at_once=40)
    path.write_text(text)
    keys = Keys(ServeConfig(key_file=path))
    for end in (end for end in range(len(text)) if not text[:end].endswith("\n")):
        replace(path, text[:end])
        assert keys.find(alice.encode()).requests_at_once == 40, text[:end]


def test_a_changed_file_counts_from_the_next_request_on_and_a_wrong_one_changes_nothing(path, caplog):
    (alice, a), (bob, b) = entry("alice"), entry("bob")
    path.write_text(a)
    with serving(key_file=path) as served:
        assert (status(served, ASK, alice), status(served, ASK, bob)) == (200, 401)
        replace(path, b)
        assert (status(served, ASK, alice), status(served, ASK, bob)) == (401, 200)
        replace(path, b + "[[key]]\nname = 1")
        assert (status(served, ASK, alice), status(served, ASK, bob)) == (401, 200)
        assert "the keys stay as they were" in caplog.text
        path.unlink()
        assert status(served, ASK, bob) == 200
        replace(path, a)
        assert (status(served, ASK, alice), status(served, ASK, bob)) == (200, 401)


def test_a_file_rewritten_with_its_old_size_and_time_is_read_again(path):
    (amy, a), (bob, b) = entry("amy"), entry("bob")
    path.write_text(a)
    before = path.stat()
    keys = Keys(ServeConfig(key_file=path))
    assert keys.find(amy.encode()).name == "amy"
    path.write_text(b)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert keys.find(amy.encode()) is None
    assert keys.find(bob.encode()).name == "bob"


def test_a_file_that_is_gone_is_said_once(path, caplog):
    alice, text = entry("alice")
    path.write_text(text)
    keys = Keys(ServeConfig(key_file=path))
    path.unlink()
    assert [keys.find(alice.encode()).name for _ in range(3)] == ["alice"] * 3
    (record,) = caplog.records
    assert (record.levelname, str(path) in record.getMessage()) == ("ERROR", True)


def test_a_short_key_opens_nothing_through_the_file(path, monkeypatch):
    monkeypatch.setattr("nr_serve.keys.secrets.token_urlsafe", lambda _: "x" * 28)
    secret, text = entry("short")
    path.write_text(text)
    keys = Keys(ServeConfig(key_file=path))
    assert len(secret) == 31
    assert keys.find(secret.encode()) is None
    monkeypatch.setattr("nr_serve.keys.secrets.token_urlsafe", lambda _: "x" * 29)
    secret, text = entry("long")
    replace(path, text)
    assert keys.find(secret.encode()).name == "long"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[key]]\nname = 'a'\nrole = 'inference'\n", "key.0.sha256"),
        ("[[key]]\nname = 'a'\nrole = 'root'\nsha256 = '" + "0" * 64 + "'\n", "key.0.role"),
        ("[[key]]\nname = 'a b'\nrole = 'admin'\nsha256 = '" + "0" * 64 + "'\n", "key.0.name"),
        ("[[key]]\nname = 'a'\nrole = 'admin'\nsha256 = 'my password'\n", "key.0.sha256"),
        ("[[keys]]\n", "keys"),
        ("x", "not TOML"),
        ("x = " + "[" * 5000 + "]" * 5000 + "\n", "not TOML"),
        ("[[key]]\nname = 'api-key'\nrole = 'admin'\nsha256 = '" + "0" * 64 + "'\n", "--api-key gives"),
        ("[[key]]\nname = 'admin-key'\nrole = 'admin'\nsha256 = '" + "0" * 64 + "'\n", "--admin-key gives"),
        (entry("a")[1] + entry("a")[1], "name twice"),
        ((text := entry("a")[1]) + text.replace("'a'", "'b'", 1), "sha256 twice"),
    ],
)
def test_a_wrong_file_is_refused_and_says_where(path, text, message):
    path.write_text(text)
    with pytest.raises(BadRequest, match=message) as caught:
        read_key_file(path)
    assert "my password" not in caught.value.message


def test_make_key_shows_the_key_once_and_gives_its_line(path, capsys):
    assert main(["make-key", "alice", "--role", "admin"]) == 0
    shown = capsys.readouterr()
    secret = shown.err.split()[-1]
    path.write_text(shown.out)
    assert secret not in shown.out
    (key,) = tomllib.loads(shown.out)["key"]
    assert (key["name"], key["role"]) == ("alice", "admin")
    assert Keys(ServeConfig(key_file=path)).find(secret.encode()).name == "alice"
    assert main(["make-key", "a b"]) == main(["make-key", "api-key"]) == 1


def test_a_missing_key_file_ends_the_start(path):
    with pytest.raises(BadRequest, match="cannot read the key file"):
        Keys(ServeConfig(key_file=path))
