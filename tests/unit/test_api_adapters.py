import asyncio
import os
import pathlib
import tempfile
import threading

import pytest

from nr_serve.api import files
from nr_serve.api.bridge import AsyncEngine
from nr_serve.engine.messages import (
    LoadAdapter,
    ReadStatistics,
    Sampling,
    StepEvents,
    Submit,
    UnloadAdapter,
)
from nr_serve.metrics import Metrics
from tests.fakes import FakeEngine, letters, serving, view
from tests.waiting import PATIENCE, until


@pytest.fixture
def server(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "da.safetensors").write_bytes(b"good file")
    (tmp_path / "secret.safetensors").write_bytes(b"good secret")
    with serving(adapter_dir=[tmp_path / "in"], max_adapter_gib=100 / 2**30) as served:
        yield served


def put(server, name, content=b"good da", **flags):
    return server.http.put(f"/v1/adapters/{name}", content=content, params=flags)


def test_an_uploaded_file_is_loaded_and_gone_from_disk(server):
    response = put(server, "da", pinned=True, threshold=0.25)
    body = response.json()
    assert response.status_code == 201
    assert (body["name"], body["pinned"], body["threshold"], body["slot"]) == ("da", True, 0.25, 1)
    assert not server.engine.last_load().path.exists()
    assert server.complete(model="da", max_tokens=1).status_code == 200


def test_a_second_adapter_of_one_domain_is_warned_of_unless_one_of_them_is_not_routed(caplog):
    with serving() as served:
        assert put(served, "aside", routed=False).status_code == 201
        assert not caplog.records
        assert put(served, "twin").status_code == 201
        assert [each.getMessage() for each in caplog.records] == [
            "adapters hu, twin all act on hu for the base's name"
        ]


def test_a_name_that_is_taken_needs_replace(server):
    error = put(server, "hu").json()["error"]
    assert (error["code"], error["type"]) == (409, "ConflictError")
    assert server.engine.commands == [ReadStatistics()], "it is said before the upload, by the names that are known"
    assert put(server, "hu", replace=True).status_code == 200


def test_a_replacement_stays_pinned_unless_told_otherwise(server):
    load = {"name": "da", "path": "da.safetensors", "replace": True}
    assert server.http.post("/v1/adapters", json=load).json()["pinned"] is False
    assert put(server, "da", replace=True, pinned=True).json()["pinned"] is True
    assert put(server, "da", replace=True).json()["pinned"] is True
    assert server.http.post("/v1/adapters", json=load).json()["pinned"] is True
    again = {"lora_name": "da", "lora_path": "da.safetensors", "load_inplace": True}
    assert server.http.post("/v1/load_lora_adapter", json=again).status_code == 200
    assert server.http.get("/v1/adapters/da").json()["pinned"] is True
    assert server.http.post("/v1/adapters", json=load | {"pinned": False}).json()["pinned"] is False


def test_an_adapter_may_be_kept_from_requests_to_the_base(server):
    assert server.http.get("/v1/adapters/hu").json()["routed"] is True
    assert put(server, "da", routed=False).json()["routed"] is False
    assert server.http.patch("/v1/adapters/da", json={"routed": True}).json()["routed"] is True
    load = {"name": "da", "path": "da.safetensors", "replace": True, "routed": False}
    assert server.http.post("/v1/adapters", json=load).json()["routed"] is False


def test_an_adapter_that_the_engine_unloads_by_itself_is_gone_here_too(server):
    del server.engine.adapters["hu"]
    server.engine.deliver(StepEvents((), adapters_changed=True, loads_failed=1))
    until(lambda: "hu" not in [card["id"] for card in server.http.get("/v1/models").json()["data"]])
    assert server.complete(model="hu", max_tokens=1).status_code == 404
    metrics = server.http.get("/metrics").text
    assert "nr_adapter_unloads_total 1.0" in metrics
    assert "nr_adapter_load_failures_total 1.0" in metrics
    assert put(server, "hu").status_code == 201, "its name is free"


@pytest.mark.parametrize("name", ["a b", "-a", ".a", "a" * 65, "base", "base@none", "é"])
def test_a_name_that_could_be_mistaken_is_refused(server, name):
    response = put(server, name)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "name")


@pytest.mark.parametrize(("content", "status"), [(b"bad", 400), (b"", 400), (b"good" + b"x" * 100, 413)])
def test_a_bad_file_is_refused_and_changes_nothing(server, content, status):
    assert put(server, "da", content).status_code == status
    assert put(server, "da", iter([content])).status_code == status  # of a length not said beforehand
    assert [a["name"] for a in server.http.get("/v1/adapters").json()["data"]] == ["hu"]


@pytest.mark.parametrize(
    "flags",
    [
        {"replace": "maybe"}, {"threshold": "x"}, {"threshold": "nan"}, {"threshold": "1e300"}, {"treshold": "0.3"},
        {"x-y": "1"},
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_by_name(server, flags):
    response = put(server, "da", **flags)
    assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(flags)))


def test_a_file_on_the_server_is_loaded_by_any_path_inside_the_folder(server, tmp_path):
    for i, path in enumerate(
        ("da.safetensors", str(tmp_path / "in" / "da.safetensors"), str(tmp_path / "in"), ".")
    ):
        response = server.http.post("/v1/adapters", json={"name": f"da{i}", "path": path})
        assert response.status_code == 201, response.text


def test_paths_outside_the_folder_are_forbidden_whether_they_exist_or_not(server, tmp_path):
    os.symlink(tmp_path / "secret.safetensors", tmp_path / "in" / "link.safetensors")
    os.symlink(tmp_path, tmp_path / "in" / "up")
    outside = ["../secret.safetensors", str(tmp_path / "secret.safetensors"), "/etc/passwd", "/no/such/file"]
    answers = set()
    for path in [*outside, "link.safetensors", "up/secret.safetensors"]:
        response = server.http.post("/v1/adapters", json={"name": "x", "path": path})
        answers.add((response.status_code, response.text))
    ((status, text),) = answers
    assert status == 403
    assert str(tmp_path) not in text


def test_a_file_over_the_limit_on_the_server_is_refused(server, tmp_path):
    (tmp_path / "in" / "da.safetensors").write_bytes(b"good" + b"x" * 100)
    response = server.http.post("/v1/adapters", json={"name": "x", "path": "da.safetensors"})
    assert (response.status_code, response.json()["error"]["type"]) == (413, "RequestTooLargeError")


def test_folders_on_the_way_need_not_be_readable():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        root, us = pathlib.Path(name).resolve(), os.geteuid()
        (root / "team").mkdir()
        (root / "team" / "da.safetensors").write_bytes(b"good")
        for path, mode in ((root, 0o755), (root / "team", 0o311), (root / "team" / "da.safetensors", 0o644)):
            path.chmod(mode)
        if us == 0:  # whom no mode keeps out
            os.seteuid(65534)
        try:
            with files.allowed_file([root], "team/da.safetensors", "path", 100) as path:
                size = path.stat().st_size
        finally:
            os.seteuid(us)
    assert size == 4


def swap(folder, how):
    """Put something else in the place of the file or the folder that was just checked."""
    sub = folder / "in" / "sub"
    if how == "folder by a link":
        (folder / "outside").mkdir()
        (folder / "outside" / "da.safetensors").write_bytes(b"good secret")
        sub.rename(folder / "in" / "old")
        sub.symlink_to(folder / "outside")
        return
    (sub / "da.safetensors").unlink()
    if how == "file by a link":
        (sub / "da.safetensors").symlink_to(folder / "secret.safetensors")
    elif how == "file by a pipe":
        os.mkfifo(sub / "da.safetensors")


@pytest.mark.parametrize("how", ["folder by a link", "file by a link", "file by a pipe", "gone"])
@pytest.mark.parametrize("when", ["before it is opened", "after"])
def test_what_is_swapped_after_the_check_is_never_read(server, tmp_path, monkeypatch, how, when):
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "da.safetensors").write_bytes(b"good checked")
    real = files._open_beneath

    def open_beneath(root, path):
        if when == "after":
            handle = real(root, path)
            swap(tmp_path, how)
            return handle
        swap(tmp_path, how)
        return real(root, path)

    monkeypatch.setattr(files, "_open_beneath", open_beneath)
    response = server.http.post("/v1/adapters", json={"name": "x", "path": "sub/da.safetensors"})
    if when == "after":
        assert (response.status_code, response.json()["version"]) == (201, b"good checked".hex()[:12])
    else:
        assert (response.status_code, response.json()["error"]["param"]) == (400, "path")
        assert not [each for each in server.engine.commands if isinstance(each, LoadAdapter)]


def test_no_file_stays_open_after_a_load(server):
    def loads() -> int:
        for name, path in (("a", "da.safetensors"), ("b", "nope"), ("a", "da.safetensors")):
            server.http.post("/v1/adapters", json={"name": name, "path": path, "replace": True})
        return len(os.listdir("/dev/fd"))

    assert loads() == loads()


@pytest.mark.parametrize(
    ("path", "status"),
    [("nope.safetensors", 404), ("x" * 5000, 400), ("a\0b", 400), ("", 400)],
)
def test_unusable_paths_inside_are_refused(server, path, status):
    response = server.http.post("/v1/adapters", json={"name": "x", "path": path})
    assert (response.status_code, response.json()["error"]["param"]) == (status, "path")


def test_a_path_where_nothing_is_is_answered_with_where_paths_begin(server):
    response = server.http.post("/v1/adapters", json={"name": "x", "path": "nope.safetensors"})
    assert response.json()["error"]["message"].endswith("paths are relative to --adapter-dir")


def test_without_a_folder_nothing_on_the_server_can_be_loaded():
    with serving() as server:
        response = server.http.post("/v1/adapters", json={"name": "x", "path": "/etc/passwd"})
        assert response.status_code == 403


def test_dials_change_and_the_rest_stays(server):
    body = server.http.patch("/v1/adapters/hu", json={"threshold": 0.5}).json()
    assert (body["threshold"], body["pinned"]) == (0.5, False)
    assert server.http.patch("/v1/adapters/hu", json={"pinned": True}).json()["threshold"] == 0.5


def test_every_answer_shows_an_adapter_in_the_same_way(server, tmp_path):
    listed = server.http.get("/v1/adapters/hu").json()
    assert server.http.patch("/v1/adapters/hu", json={}).json() == listed
    (tmp_path / "in" / "da.safetensors").write_bytes(b"good")
    posted = server.http.post("/v1/adapters", json={"name": "da", "path": "da.safetensors"}).json()
    assert posted == server.http.get("/v1/adapters/da").json()
    put = server.http.put("/v1/adapters/sk", content=b"good").json()
    assert put == server.http.get("/v1/adapters/sk").json()
    assert server.http.delete("/v1/adapters/hu").json() == listed | {"deleted": True}


def test_an_unknown_adapters_place_in_the_request_is_named(server):
    path = "/v1/adapters/da"
    for answer in (server.http.patch(path, json={}), server.http.delete(path), server.http.get(path)):
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "name")
        assert answer.json()["error"]["message"] == "The adapter `da` does not exist"


def test_an_unloaded_adapter_is_no_model_any_more(server):
    body = server.http.delete("/v1/adapters/hu").json()
    assert (body["deleted"], body["fired_by_selected"]) == (True, {"base": 4})
    assert server.complete(model="hu").status_code == 404
    assert server.http.delete("/v1/adapters/hu").status_code == 404
    assert server.http.get("/v1/adapters/hu").status_code == 404


def test_an_adapter_shows_what_its_gates_did(server):
    (body,) = server.http.get("/v1/adapters").json()["data"]
    assert body == server.http.get("/v1/adapters/hu").json()
    assert body["gates"]["fired_rate"] == 0.2
    assert body["gates"]["layer_groups"][0] == {"layers": "0-1", "fired": 3, "seen": 10, "fired_rate": 0.3}
    assert body["fired_by_selected"] == {"base": 4}


def test_an_adapter_shows_its_leak_on_every_probe_text_and_null_until_it_was_measured(server):
    body = server.http.get("/v1/adapters/hu").json()
    expected = {"prose": {"leak": 0.0025, "tokens": 100}, "code": {"leak": 0.0075, "tokens": 100}}
    assert body["neutrality"] == expected
    assert put(server, "da").json()["neutrality"] == expected
    server.engine.adapters["hu"] = view("hu", neutrality=None)
    assert server.http.patch("/v1/adapters/hu", json={"pinned": True}).json()["neutrality"] is None
    assert server.http.get("/v1/adapters").json()["data"][0]["neutrality"] is None


def test_what_the_engine_does_for_a_client_that_goes_away_is_noted():
    standing, go_on = threading.Event(), threading.Event()

    def held(submit):
        standing.set()
        assert go_on.wait(PATIENCE)
        return letters(submit)

    class Held(FakeEngine):
        def __init__(self, deliver) -> None:
            super().__init__(deliver)
            self.answer = held

    async def unload() -> None:
        engine = AsyncEngine(Held, Metrics())
        async with engine.running():
            while engine.status != "ready":
                await asyncio.sleep(0.01)
            answer = asyncio.create_task(anext(engine.generate([Submit("r", (1,), Sampling(), selected="base")])))
            await asyncio.to_thread(standing.wait, PATIENCE)
            call = asyncio.create_task(engine.call(UnloadAdapter("hu")))
            await asyncio.sleep(0)  # it begins, and so does the task that it waits for
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert "hu" in engine.adapters
            go_on.set()
            await answer
            await engine.call(ReadStatistics())
            assert engine.adapters == {}

    asyncio.run(unload())


def test_vllms_routes_answer_as_vllm_does(server):
    load = {"lora_name": "da", "lora_path": "da.safetensors"}
    response = server.http.post("/v1/load_lora_adapter", json=load)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'da' added successfully.")
    assert server.http.post("/v1/load_lora_adapter", json=load).status_code == 400
    assert server.http.post("/v1/load_lora_adapter", json=load | {"load_inplace": True}).status_code == 200
    response = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "da"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'da' removed successfully.")


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        ("load", {"lora_name": "da"}, 400),
        ("load", {"lora_path": "da"}, 400),
        ("load", {"lora_name": "da", "lora_path": "nope"}, 404),
        ("load", {"lora_name": "da", "lora_path": "/etc/passwd"}, 403),
        ("load", {"lora_name": "da", "lora_path": ".", "base_model_name": "other"}, 400),
        ("unload", {}, 400),
        ("unload", {"lora_name": "da"}, 404),
    ],
)
def test_vllms_routes_refuse_as_vllm_does(server, route, body, status):
    assert server.http.post(f"/v1/{route}_lora_adapter", json=body).status_code == status
