import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nr_serve.cli import main, parse
from nr_serve.commands import COMMANDS
from nr_serve.commands.remote import _leak, _warnings
from nr_serve.config import ServeConfig
from nr_serve.errors import BadRequest, NrError
from nr_serve.neutral.format import AdapterInfo, Block, read_adapter, write_adapter
from nr_serve.serve import bind
from nr_serve.train.frozen_base import load_base
from tests import tiny
from tests.fakes import serving
from tests.tiny_run import RECIPE


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NR_URL", "NR_API_KEY", "NR_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server():
    with serving(admin_key="k") as served:
        yield served


@pytest.fixture
def against(server, monkeypatch):
    """The environment names the server and its key: no flag is needed."""
    monkeypatch.setenv("NR_URL", server.url)
    monkeypatch.setenv("NR_ADMIN_KEY", "k")
    return server


@pytest.fixture
def hu(tmp_path):
    path = tmp_path / "hu.safetensors"
    d, h = 8, 4
    block = Block(*(torch.ones(shape) for shape in ((d,), (), (h, d), (h, d), (d, h))))
    info = AdapterInfo("base", "f00d", 2, d, carry=0.5, domain="hu", results={"loss": {"hu": 1.25}})
    write_adapter(path, info, (block, None))
    return path


def _fingerprint(folder: Path) -> str:
    return load_base(str(folder)).fingerprint


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (settings, _) in COMMANDS.items():
        assert f"  {name} " in text
        assert settings.__doc__.splitlines()[0] in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps_and_refuses_an_unknown_flag(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: nr-serve {name}" in text
    assert "None" not in text
    with pytest.raises(SystemExit) as end:
        main([name, "x", "--no-such-flag"])
    assert end.value.code == 2


def test_every_setting_is_a_flag_with_its_text_as_help(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, field in ServeConfig.model_fields.items():
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text)
        assert field.description[:30] in text


def test_a_flag_wins_over_the_environment_and_lists_repeat(monkeypatch):
    monkeypatch.setenv("NR_PORT", "1")
    monkeypatch.setenv("NR_SLOTS", "3")
    config = parse(
        ServeConfig, "serve", ["--port", "2", "--adapter", "a", "--adapter", "b=c", "--adapter-dir", "/x"]
    )
    assert (config.port, config.slots, config.adapter) == (2, 3, ["a", "b=c"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["serve", "--port", "x"], "--port"),
        (["serve", "--slots", "0"], "--slots"),
        (["nonsense"], "nonsense"),
        (["serve", "--adapter", "a.safetensors", "--adapter", "a b=c"], "--adapter: a b=c: an adapter's name"),
        (["serve", "--adapter", "_x.safetensors"], "--adapter: _x.safetensors: an adapter's name"),
        (["evaluate", "f", "--corpus", "x", "--windows", "0"], "--windows"),
        (["calibrate", "f", "--corpus", "c", "--out", "o", "--carry", "0.9995"], "--carry"),
    ],
)
def test_a_wrong_setting_is_named_and_ends_with_2(args, message, capsys):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_an_adapter_is_loaded_listed_and_unloaded_with_no_further_flag(against, tmp_path, capsys):
    path = tmp_path / "da.safetensors"
    path.write_bytes(b"good da")
    assert main(["load-adapter", str(path)]) == 0
    loaded = "da: version 676f6f642064, slot 1, loaded in 0.25 s, leak 0.75% (code)\n"
    printed = capsys.readouterr()
    assert printed.out == loaded
    assert printed.err.startswith("warning: requests to the base's name get the sum of hu and da on hu")
    assert main(["list-adapters"]) == 0
    header, hu, da = capsys.readouterr().out.splitlines()
    assert header.split()[-1] == "FIRED"
    assert hu.split()[-1] == "20.00%"
    assert hu.split()[-3:-1] == ["0.75%", "(code)"]
    assert da.split()[:4] == ["da", "676f6f642064", "hu", "attached"]
    assert main(["load-adapter", str(path), "--replace", "--pin", "--threshold", "0.5", "--name", "da"]) == 0
    capsys.readouterr()
    assert (against.engine.last_load().pinned, against.engine.last_load().routed) == (True, None)
    assert main(["load-adapter", str(path), "--replace", "--no-route"]) == 0
    assert (against.engine.last_load().pinned, against.engine.last_load().routed) == (None, False)
    assert "warning" not in capsys.readouterr().err
    assert main(["list-adapters"]) == 0
    assert "\nda (pinned, not routed)  " in capsys.readouterr().out
    capsys.readouterr()
    assert main(["unload-adapter", "da"]) == 0
    assert capsys.readouterr().out == "da: unloaded\n"


def test_the_key_is_the_flags_or_the_admin_variables_or_the_other_variables(monkeypatch, capsys):
    with serving(api_key="k") as served:
        monkeypatch.setenv("NR_URL", served.url)
        monkeypatch.setenv("NR_API_KEY", "k")
        assert main(["list-adapters"]) == 0
        monkeypatch.setenv("NR_ADMIN_KEY", "wrong")
        assert main(["list-adapters"]) == 1
        assert main(["list-adapters", "--key", "k"]) == 0


def test_a_taken_name_is_refused_with_the_flags_that_help(against, tmp_path, capsys):
    path = tmp_path / "hu.safetensors"
    path.write_bytes(b"good")
    assert main(["load-adapter", str(path)]) == 1
    assert "replace it, or choose another name (--replace, --name)" in capsys.readouterr().err


def test_a_replacement_for_another_domain_and_a_second_file_on_one_are_told():
    def told(name, domain, *, routed=True, beside=True):
        before = [
            {"name": "x", "domain": "hu", "routed": True},
            {"name": "y", "domain": "sk", "routed": beside},
            {"name": "z", "domain": "", "routed": True},
        ]
        return [w[:38] for w in _warnings({"name": name, "domain": domain, "routed": routed}, before)]

    moved, summed = "x was for hu before, and is for sk now", "requests to the base's name get the su"
    assert told("x", "hu") == told("w", "") == told("w", "da") == []
    assert told("x", "sk") == [moved, summed]
    assert told("x", "sk", routed=False) == told("x", "sk", beside=False) == [moved]
    assert told("z", "da") == ["z was for no domain before, and is for"]


@pytest.mark.parametrize(
    ("leaks", "shown"),
    [({"a": 0.0, "b": 0.0}, "0.00%"), ({"a": 1e-5, "b": 0.0}, "0.00%"), ({"a": 0.0, "b": 0.0075}, "0.75% (b)")],
)
def test_no_text_is_named_for_a_leak_of_nothing(leaks, shown):
    assert _leak({"neutrality": {name: {"leak": leak} for name, leak in leaks.items()}}) == shown


@pytest.mark.parametrize(
    ("flag", "meant"), [("--modle", "--model"), ("--modle=x", "--model"), ("--pot", "--port"), ("--bogus", None)]
)
def test_a_misspelt_flag_is_answered_with_the_one_that_may_be_meant(flag, meant, capsys):
    with pytest.raises(SystemExit) as end:
        main(["serve", flag])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"unrecognized arguments: {flag}" in error
    assert ("meant?" in error) == (meant is not None)
    assert meant is None or f"is `{meant}` meant?" in error


def test_help_shows_defaults_in_plain_words(capsys):
    told = ""
    for name in ("serve", "evaluate"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        told += " ".join(capsys.readouterr().out.split())
    assert "began alike (default: yes)" in told
    assert "(default: *.heldout.txt)" in told
    assert "True" not in told
    assert "['" not in told


def test_flags_win_over_the_environment_for_the_client_too(server, monkeypatch, capsys):
    monkeypatch.setenv("NR_URL", "http://127.0.0.1:9")
    assert main(["list-adapters", "--url", server.url, "--key", "k"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["unload-adapter", "nope"], "`nope` does not exist"),
        (["load-adapter", "/no/such.safetensors"], "/no/such.safetensors: cannot be read: No such file"),
        (["load-adapter", __file__], f"{__file__}: not a whole safetensors file"),
        (["inspect", "/no/such.safetensors"], "/no/such.safetensors: cannot be read: No such file"),
        (["inspect", __file__], f"{__file__}: not a whole safetensors file"),
        (["list-adapters", "--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
    ],
)
def test_what_goes_wrong_is_one_line_on_stderr_and_a_1(against, args, message, capsys):
    assert main(args) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_inspect_prints_a_file_for_people_and_for_programs(hu, capsys):
    assert main(["inspect", str(hu)]) == 0
    text = capsys.readouterr().out
    assert "loss.hu: 1.25" in text
    assert "f00d" in text
    assert main(["inspect", str(hu), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["layers"], summary["blocks"], summary["h"], summary["carry"]) == (2, 1, 4, 0.5)
    assert summary["parameters"] == 8 + 1 + 3 * 32


def test_fetch_model_prints_the_folder_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nr_serve.default_model.fetch_model", lambda out: out)
    assert main(["fetch-model", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path)


def test_train_hands_its_flags_and_the_changed_recipe_to_the_trainer(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("nr_serve.train.run.train", lambda *args, **more: calls.append((*args, more)) or "file")
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(base="b", tokens=256, lr=0.1, gate=""))
    flags = [
        "--corpus",
        "c",
        "--out",
        "o",
        "--resume",
        "--tensorboard",
        "--set",
        "run.lr=0.5",
        "--set",
        "method=lora",
    ]
    assert main(["train", str(path), *flags]) == 0
    ((recipe, out, corpus, more),) = calls
    assert (recipe.run.lr, recipe.method, recipe.run.tokens) == (0.5, "lora", 256)
    assert (str(out), str(corpus), more) == ("o", "c", {"resume": True, "tensorboard": True})
    assert capsys.readouterr().out == "file\n"


def test_a_key_that_is_missing_or_wrong_is_asked_for_as_the_command_takes_it(server, capsys):
    for given in ([], ["--key", "wrong"]):
        assert main(["unload-adapter", "x", "--url", server.url, *given]) == 1
        assert capsys.readouterr().err.endswith("; here: --key KEY, $NR_ADMIN_KEY or $NR_API_KEY\n")


@pytest.mark.parametrize(
    ("key", "near"), [("run.tokns", "run.tokens"), ("lr", "run.lr"), ("run.lr.x", "run.lr"), ("zzz", None)]
)
def test_an_unknown_key_that_is_set_is_refused_with_the_one_that_may_be_meant(tmp_path, capsys, key, near):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(base="b", tokens=256, lr=0.01, gate=""))
    assert main(["train", str(path), "--corpus", "c", "--out", "o", "--set", f"{key}=3"]) == 1
    meant = f"; did you mean {near}?" if near else ""
    assert capsys.readouterr().err == f"error: a recipe has no key '{key}'{meant}\n"


def test_what_is_set_is_not_cut_at_commas(capsys):
    values = ["blocks.h=[0,16,0]", 'data.target=["a, b", "c"]', "domain=x,y"]
    flags = [f"--set={values[0]}", "--set", values[1], "--set", values[2]]
    train = parse(COMMANDS["train"][0], "train", ["r.toml", "--corpus", "c", *flags, "--out", "o", "--resume"])
    assert (train.set, train.resume, train.out) == (values, True, Path("o"))
    for wrong in (["--set"], ["--set", "--resume"], ["--set", "a=1", "--set"]):
        with pytest.raises(SystemExit):
            parse(COMMANDS["train"][0], "train", ["r.toml", "--corpus", "c", "--out", "o", *wrong])
        assert "argument --set: expected one argument" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(ServeConfig, "serve", ["--set", "a=1"])


@pytest.mark.parametrize("value", ["a,b", "[ab]*", '["x"]', "a\nb", 'a"b', "true", "12", "back\\", "\udcff", " a "])
def test_values_of_flags_that_may_be_repeated_are_taken_as_they_are_written(value):
    asked = parse(COMMANDS["evaluate"][0], "evaluate", [value, "b", "--corpus", "c", "--source", value])
    assert (asked.files, asked.source) == ([Path(value), Path("b")], [value])


def test_export_adapter_hands_its_flags_on_and_prints_the_file(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("nr_serve.train.export.export_run", lambda *args, **more: calls.append((*args, more)) or 7)
    assert main(["export-adapter", "r", "f", "--threshold", "0.3"]) == 0
    assert capsys.readouterr().out == "7\n"
    assert main(["export-adapter", "r", "f"]) == 0
    assert calls == [(Path("r"), Path("f"), {"threshold": t}) for t in (0.3, None)]


def test_calibrate_hands_its_flags_on_and_prints_the_file(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        "nr_serve.train.calibrate.calibrate", lambda *args, **more: calls.append((*args, more)) or 7
    )
    beside = ["--beside", "a", "--beside", "b"]
    assert main(["calibrate", "f", *beside, "--corpus", "c", "--out", "o", "--set", "percentile=99.9"]) == 0
    assert capsys.readouterr().out == "7\n"
    more = {"base": "default", "carry": None, "changes": {"percentile": 99.9}}
    assert calls == [(Path("f"), [Path("a"), Path("b")], Path("c"), Path("o"), more)]


def test_sweep_compares_the_runs_that_ended_and_fails_if_one_did(monkeypatch, capsys):
    ends = {"a": Path("made"), "b": BadRequest("diverged")}
    compared, read, swept = [], [], []
    of_one_domain = dict.fromkeys("ab", SimpleNamespace(domain="hu", base="default"))
    monkeypatch.setattr("nr_serve.evaluate.compare.check_sources", lambda *args: None)
    monkeypatch.setattr("nr_serve.train.sweep.read_sweep", lambda *args: read.append(args) or of_one_domain)
    monkeypatch.setattr("nr_serve.train.sweep.run_sweep", lambda *args: swept.append(args) or ends)
    monkeypatch.setattr(
        "nr_serve.evaluate.compare.compare_runs", lambda *args, **more: compared.append(args) or "c"
    )
    monkeypatch.setattr("nr_serve.evaluate.compare.write_comparison", lambda *args: [Path("x.md")])
    assert main(["sweep", "s.toml", "--corpus", "c", "--out", "o", "--set", "run.tokens=9"]) == 1
    assert read == [(Path("s.toml"), {"run.tokens": 9})]
    assert swept == [(of_one_domain, Path("o"), Path("c"))]
    assert compared == [({"a": Path("o/a")}, Path("c"), [])]
    assert capsys.readouterr().out == "x.md\n"


@pytest.fixture
def evaluated(tmp_path):
    """Arguments that evaluate a tiny adapter, hu, beside its base."""
    base = tiny.model()
    folder = tiny.save(base, tmp_path / "tiny")
    made = tiny.adapter(base, 1, carry=0.5)
    write_adapter(
        tmp_path / "hu.safetensors", replace(made.info, base_fingerprint=_fingerprint(folder)), made.blocks
    )
    (tmp_path / "en.x.heldout.txt").write_text("Some text to read.\n\n" * 20)
    args = ["evaluate", str(tmp_path / "hu.safetensors"), "--corpus", str(tmp_path), "--model", str(folder)]
    return [*args, "--window", "16", "--windows", "2"]


def test_evaluate_prints_loss_and_fired_shares_with_and_without_the_adapters(evaluated, capsys):
    assert main([*evaluated, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    source = report["sources"]["en.x"]
    assert (source["tokens"], list(report["adapters"])) == (32, ["hu"])
    assert source["before"] != source["after"]
    assert 0 < source["fired"]["hu"] < 1
    assert main(evaluated) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["CHANGE", "FIRED", "hu"]
    assert row.split()[4] == f"{source['after'] / source['before'] - 1:+.2%}"


def test_evaluate_writes_a_card_and_says_where_it_cannot(evaluated, tmp_path, capsys):
    assert main([*evaluated, "--card", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text().startswith("# hu\n")
    assert main([*evaluated, "--card", str(tmp_path / "no" / "card.md")]) == 1
    assert "card.md: No such file" in capsys.readouterr().err


def test_evaluate_tells_two_files_of_one_name_apart_or_refuses(evaluated, capsys):
    assert main([*evaluated[:2], *evaluated[1:]]) == 1
    assert "two adapters have the same name" in capsys.readouterr().err


def test_a_port_in_use_is_said_before_anything_is_loaded(capsys):
    with bind("127.0.0.1", 0) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1]), "--model", "/no/such"]) == 1
    assert "Address already in use" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_said(capsys):
    assert main(["serve", "--port", "0", "--model", "/no/such"]) == 1
    assert capsys.readouterr().err == "error: there is no model folder /no/such\n"


def test_a_folder_of_adapters_that_is_not_there_is_said_before_the_base_is_looked_for(tmp_path, capsys):
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "no", tmp_path / "file"):
        args = ["serve", "--port", "0", "--model", "/no/such", "--adapter-dir", str(wrong)]
        assert main([*args, "--adapter-dir", str(tmp_path)]) == 1
        assert capsys.readouterr().err == f"error: --adapter-dir {wrong}: there is no such folder\n"


def test_a_wrong_adapter_file_is_named_before_the_base_is_looked_for(tmp_path, hu, capsys):
    none, other = tmp_path / "none.safetensors", tmp_path / "other.safetensors"
    other.write_bytes(hu.read_bytes().replace(b"neutral-residues", b"neutral-somethin"))
    wrong = {
        none: "cannot be read: No such file",
        other: "not a neutral-residue adapter",
        tmp_path: "it is a folder",
    }
    for path, reason in wrong.items():
        args = ["serve", "--port", "0", "--model", "/no/such", "--adapter", str(hu), "--adapter", f"x={path}"]
        assert main(args) == 1
        assert capsys.readouterr().err.startswith(f"error: {path}: {reason}")


@pytest.mark.parametrize(("args", "name"), [([], "base-x"), (["--served-model-name", "b"], "b")])
def test_an_adapter_of_the_bases_name_is_refused_before_anything_is_loaded(tmp_path, hu, args, name, capsys):
    folder = tmp_path / "base-x"
    folder.mkdir()
    assert main(["serve", "--port", "0", "--model", str(folder), "--adapter", f"{name}={hu}", *args]) == 1
    assert capsys.readouterr().err == f"error: `{name}` is the base's name; give the adapter another\n"


def test_an_engine_that_cannot_start_ends_the_server_with_its_reason(monkeypatch, capsys):
    from tests import fakes

    def build(config, model, tokenizer, deliver):
        engine = fakes.FakeEngine(deliver)
        engine.failure = "this base has no per-layer mlp"
        return engine

    monkeypatch.setattr("nr_serve.assemble.EngineLoop", build)
    monkeypatch.setattr("nr_serve.assemble.load_tokenizer", lambda model: fakes.tokenizer())
    assert main(["serve", "--port", "0", "--model", "x", "--host", "127.0.0.1"]) == 1
    assert capsys.readouterr().err.endswith("error: this base has no per-layer mlp\n")


@pytest.mark.parametrize("flags", [[], ["--admin-key", "k"]])
def test_without_a_key_a_server_that_others_could_reach_does_not_start(flags, capsys):
    assert main(["serve", "--host", "0.0.0.0", "--port", "0", "--model", "/no/such", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --host 0.0.0.0 can be reached from other machines, and no key is set")
    assert "--allow-no-key" in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0", "--allow-no-key"], "anyone who reaches 0.0.0.0 may use this server and change its"),
        (["--host", "127.0.0.1"], "no key is set: only this machine can reach the server"),
        (["--host", "::1"], "no key is set: only this machine can reach the server"),
        (["--host", "0.0.0.0", "--api-key", "k"], ""),
        (["--host", "0.0.0.0", "--key-file", "f"], ""),
    ],
)
def test_it_is_said_who_can_reach_a_server_without_a_key(flags, said, caplog):
    from nr_serve.serve import _check_reach

    caplog.set_level("INFO")
    _check_reach(parse(ServeConfig, "serve", flags))
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


def test_chunks_are_sent_at_once():
    accepted = []

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport):
            accepted.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    async def connect(listener):
        server = await asyncio.get_running_loop().create_server(Protocol, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection(*listener.getsockname())
            while not accepted:
                await asyncio.sleep(0)
            writer.close()

    with bind("127.0.0.1", 0) as listener:
        asyncio.run(connect(listener))
    assert all(accepted), "Nagle's algorithm would hold a stream's chunks back"


def test_a_host_that_is_not_ours_is_refused():
    with pytest.raises(NrError, match="cannot listen on"):
        bind("192.0.2.1", 0)


def test_help_shows_the_no_of_a_flag_that_is_on_and_of_no_other(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert "--no-prefix-cache" in text
    assert "--no-allow-no-key" not in text
    with pytest.raises(SystemExit):
        main(["load-adapter", "--help"])
    text = capsys.readouterr().out
    assert "--route, --no-route" in text
    assert "--replace, --no-replace" not in text


def test_an_output_without_room_is_told_in_a_line(hu):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "nr_serve.cli", "inspect", str(hu)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: cannot write the output: No space left on device\n")


@pytest.mark.parametrize("closed", ["0", "1", "2"])
def test_a_closed_standard_stream_is_none_of_the_files_that_are_opened(hu, closed):
    program = (
        f"import os; os.close({closed}); os.execv(os.sys.executable, [os.sys.executable, '-c', "
        "'import os, sys; from nr_serve.cli import main; code = main(sys.argv[1:]); "
        'open(os.devnull); print(os.open(os.devnull, 0), file=open(sys.argv[-1] + ".fd", "w")); '
        "sys.exit(code)', *os.sys.argv[1:]])"
    )
    done = subprocess.run([sys.executable, "-c", program, "inspect", str(hu)], capture_output=True, text=True)
    assert done.returncode == 0
    assert int(Path(f"{hu}.fd").read_text()) > 2
    assert done.stderr == ""
    assert ("domain" in done.stdout) == (closed != "1")


def test_what_the_output_cannot_encode_is_escaped(hu):
    adapter = read_adapter(hu)
    write_adapter(hu, replace(adapter.info, results={"change": "1% ± 2%"}), adapter.blocks)
    command = [sys.executable, "-m", "nr_serve.cli", "inspect", str(hu)]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"1% \xb1 2%" in done.stdout


def test_a_package_that_is_not_installed_is_said_with_the_extra_that_has_it(monkeypatch, capsys):
    def missing(command):
        raise ModuleNotFoundError("No module named 'bs4'", name="bs4")

    settings, _ = COMMANDS["fetch-corpus"]
    monkeypatch.setitem(COMMANDS, "fetch-corpus", (settings, missing))
    assert main(["fetch-corpus", "x.toml", "--out", "x"]) == 1
    assert "error: bs4 is not installed; the extra `train` has" in capsys.readouterr().err
