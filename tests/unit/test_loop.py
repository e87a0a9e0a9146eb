"""The engine's thread: what is asked of it is answered, whatever fails and whenever it stops."""

import gc
import queue
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import replace

import pytest

from nr_serve.config import ServeConfig
from nr_serve.engine import loop as module
from nr_serve.engine.adapters.canary import Canary
from nr_serve.engine.loop import EngineLoop
from nr_serve.engine.messages import (
    AdapterView,
    LoadAdapter,
    PatchAdapter,
    ReadStatistics,
    Sampling,
    Submit,
    UnloadAdapter,
)
from nr_serve.errors import (
    BadAdapterFile,
    BadRequest,
    Conflict,
    NotFound,
    NrError,
    QueueFull,
    TooLarge,
    Unavailable,
)
from nr_serve.neutral import format as format_module
from nr_serve.neutral.bank import Bank
from nr_serve.neutral.format import write_adapter
from tests import tiny
from tests.unit.stepped import Device
from tests.waiting import PATIENCE

PROMPT = tuple(range(40, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.model(), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapter files by name, and the adapters in them."""
    made = {name: tiny.adapter(tiny.model(), seed) for seed, name in enumerate(("a", "b"))}
    place = tmp_path_factory.mktemp("adapters")
    for name, adapter in made.items():
        write_adapter(place / f"{name}.safetensors", adapter.info, adapter.blocks)
    return place, made


class Loop(EngineLoop):
    """The real loop; tests wait for `up`, and reach its parts through `core` and `adapters`."""

    def __init__(self, folder, **config) -> None:
        settings = {"pages": 64, "page_size": 4, "slots": 2, "slot_width": 16, "max_running": 4, "device": "cpu"}
        settings["dtype"] = "float32"  # as the reference: on some processors `auto` is bfloat16
        self.up = threading.Event()
        self.delivered: queue.SimpleQueue = queue.SimpleQueue()
        self.hold = threading.Event()
        self.hold.set()
        super().__init__(ServeConfig(**settings | config), folder, tiny.tokenizer(), self.delivered.put)

    def _serve(self, core, adapters):
        self.core, self.adapters = core, adapters
        self.up.set()
        assert self.hold.wait(PATIENCE)
        super()._serve(core, adapters)

    def begin(self) -> "Loop":
        self.start()
        assert self.up.wait(PATIENCE), self.failure
        return self

    def pause_after_a_step(self) -> tuple[threading.Event, threading.Event]:
        """Hold the engine before its second step from now: an event set when it stands, and one to let it go on."""
        launch, reached, go_on = self.core.launch, threading.Event(), threading.Event()
        steps = []

        def held(**how):
            steps.append(1)
            if len(steps) == 2:
                reached.set()
                assert go_on.wait(PATIENCE)
            return launch(**how)

        self.core.launch = held
        return reached, go_on

    def views(self) -> tuple[AdapterView, ...]:
        return tuple(result(self.call(ReadStatistics())).adapters.values())

    def outputs(self, *wanted: str) -> dict[str, list]:
        """Every output, by request, until all of `wanted` ended."""
        got: dict[str, list] = {}
        left = set(wanted)
        while left:
            events = self.delivered.get(timeout=PATIENCE)
            assert events.outputs or events.report is not None, "a hand-over of nothing"
            for output in events.outputs:
                got.setdefault(output.request_id, []).append(output)
                if output.finish_reason is not None:
                    left.discard(output.request_id)
        return got

    def answer(self, request: Submit) -> tuple[list[int], str]:
        self.submit(request)
        outputs = self.outputs(request.request_id)[request.request_id]
        return [token.id for output in outputs for token in output.tokens], outputs[-1].finish_reason


@pytest.fixture
def make(folder):
    """Makes loops, not begun, by their settings; they are stopped at the end."""
    made = []

    def make(base=folder, **config) -> Loop:
        made.append(Loop(base, **config))
        return made[-1]

    yield make
    for each in made:
        each.hold.set()
        each.stop()


@pytest.fixture
def loop(make):
    return make().begin()


def ask(name: str, adapters=(), *, tokens=6, prompt=PROMPT) -> Submit:
    return Submit(name, prompt, Sampling(max_tokens=tokens, temperature=0, ignore_eos=True), adapters)


def expected(*adapters, tokens=6):
    return tiny.Naive(tiny.model()).greedy(PROMPT, tokens, adapters)[0]


def result(answer: Future):
    return answer.result(timeout=PATIENCE)


def error_of(answer: Future) -> NrError:
    error = answer.exception(timeout=PATIENCE)
    assert isinstance(error, NrError)
    return error


def test_a_request_is_answered_as_the_naive_loop_would(loop):
    assert loop.status == "ready"
    assert (loop.info.model, loop.info.layers, loop.info.d) == ("tiny", tiny.LAYERS, tiny.D)
    assert loop.answer(ask("r")) == (expected(), "length")


def test_every_step_is_one_hand_over_with_its_report(loop):
    for name in ("x", "y", "z"):
        loop.submit(ask(name, tokens=4))
    reports, ended = [], 0
    while ended < 3:
        events = loop.delivered.get(timeout=PATIENCE)
        reports.append(events.report)
        ended += sum(output.finish_reason is not None for output in events.outputs)
    assert None not in reports
    assert sum(report.prefill_tokens for report in reports) == 3 * len(PROMPT)
    assert sum(report.decode_tokens for report in reports) == 3 * 3
    assert loop.delivered.empty()


def test_before_it_is_ready_and_after_it_stopped_requests_are_refused(make, folder):
    loop = make()
    for refused in (lambda: loop.submit(ask("r")), lambda: loop.call(ReadStatistics())):
        with pytest.raises(Unavailable, match="loading"):
            refused()
    loop.begin()
    loop.stop()
    loop.stop()
    assert loop.status == "stopped"
    for refused in (
        lambda: loop.submit(ask("r")),
        lambda: loop.call(ReadStatistics()),
        lambda: loop.call(LoadAdapter("a", folder / "a.safetensors")),
    ):
        with pytest.raises(Unavailable, match="stopped"):
            refused()
    loop.abort("r")


def test_an_aborted_request_gives_everything_back(loop):
    reached, go_on = loop.pause_after_a_step()
    loop.submit(ask("gone", tokens=200))
    assert reached.wait(PATIENCE)
    loop.submit(ask("stays"))
    loop.abort("gone")
    loop.abort("nobody")
    go_on.set()
    got = loop.outputs("stays")
    assert got["gone"][-1].finish_reason is None
    assert sum(len(output.tokens) for output in got["gone"]) == 2, "one a step"
    assert [t.id for output in got["stays"] for t in output.tokens] == expected()
    assert loop.answer(ask("after")) == (expected(), "length")
    loop.views()
    assert loop.core.scheduler.pool.used == 0


def test_a_step_runs_between_messages_that_take_long(loop, monkeypatch):
    monkeypatch.setattr(module, "_TAKE_SECONDS", 0.0)
    reached, go_on = loop.pause_after_a_step()
    loop.submit(ask("first", tokens=4))
    assert reached.wait(PATIENCE)
    for name in ("a", "b", "c"):
        loop.submit(ask(name, tokens=1))
    go_on.set()
    left, requests = {"first", "a", "b", "c"}, []
    while left:
        events = loop.delivered.get(timeout=PATIENCE)
        requests += [] if events.report is None else [events.report.requests]
        left -= {output.request_id for output in events.outputs if output.finish_reason == "length"}
    assert requests == [1, 1, 2, 2, 1], "one message a step"


def test_refusals_reach_the_client(make):
    loop = make(max_waiting=1, max_model_len=64)
    loop.hold.clear()
    loop.begin()
    asked = {
        "long": (ask("long", tokens=65 - len(PROMPT)), BadRequest),
        "empty": (ask("empty", prompt=()), BadRequest),
        "unknown": (ask("unknown", ("a",)), NotFound),
        "fits": (ask("fits", tokens=64 - len(PROMPT)), None),
        "full": (ask("full"), QueueFull),
    }
    for request, _ in asked.values():
        loop.submit(request)
    loop.hold.set()
    got = loop.outputs(*asked)
    for name, (_, kind) in asked.items():
        last = got[name][-1]
        assert (last.finish_reason, type(last.error)) == (
            ("length", type(None)) if kind is None else ("error", kind)
        )


def test_adapters_are_loaded_changed_read_and_unloaded(loop, files):
    place, made = files
    view = result(loop.call(LoadAdapter("hu", place / "a.safetensors", threshold=0.1)))
    assert (view.name, view.state, view.threshold, view.domain) == ("hu", "attached", 0.1, "test-0")
    assert result(loop.call(PatchAdapter("hu", pinned=True, threshold=0.0))).pinned
    assert loop.answer(ask("r", ("hu",))) == (expected(made["a"]), "length")
    assert isinstance(error_of(loop.call(LoadAdapter("hu", place / "b.safetensors"))), Conflict)
    assert result(loop.call(LoadAdapter("hu", place / "b.safetensors", replace=True))).domain == "test-1"
    assert loop.answer(ask("s", ("hu",))) == (expected(made["b"]), "length")
    assert result(loop.call(ReadStatistics())).adapters["hu"].gates.mass > 0
    assert [v.name for v in loop.views()] == ["hu"]
    assert result(loop.call(UnloadAdapter("hu"))).name == "hu"
    assert isinstance(error_of(loop.call(UnloadAdapter("hu"))), NotFound)
    assert isinstance(error_of(loop.call(PatchAdapter("hu", pinned=True))), NotFound)
    assert loop.views() == ()


def test_a_file_that_is_refused_changes_nothing(make, files, tmp_path):
    place, made = files
    loop = make(max_adapter_gib=1e-4).begin()  # about 100 kB
    result(loop.call(LoadAdapter("a", place / "a.safetensors")))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((place / "b.safetensors").read_bytes()[:-1])
    big = tmp_path / "big.safetensors"
    big.write_bytes(bytes(200_000))
    for path, kind in ((bad, BadAdapterFile), (big, TooLarge), (tmp_path / "none", BadAdapterFile)):
        assert isinstance(error_of(loop.call(LoadAdapter("a", path, replace=True))), kind)
    assert loop.answer(ask("r", ("a",))) == (expected(made["a"]), "length")


def test_nothing_of_a_file_that_is_refused_is_kept(loop, files, tmp_path, monkeypatch):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((files[0] / "a.safetensors").read_bytes()[:-4] + b"\xff\xff\xff\xff")  # NaN
    read, whole = [], format_module._data

    def watched(*args):
        data = whole(*args)
        read.append(weakref.ref(data.base))
        return data

    monkeypatch.setattr(format_module, "_data", watched)
    gc.disable()
    try:
        assert isinstance(error_of(loop.call(LoadAdapter("a", bad))), BadAdapterFile)
        result(loop.call(ReadStatistics()))  # the reader's thread has gone on to wait
        deadline = time.monotonic() + PATIENCE
        while read[0]() is not None and time.monotonic() < deadline:
            pass
        assert read[0]() is None
    finally:
        gc.enable()


def test_adapters_of_the_settings_are_attached_before_it_is_ready(make, files):
    place, made = files
    entries = [str(place / "a.safetensors"), f"hu={place / 'b.safetensors'}"]
    loop = make(adapter=entries).begin()
    views = loop.views()
    assert [(v.name, v.state) for v in views] == [("a", "attached"), ("hu", "attached")]
    assert all(view.neutrality for view in views), "measured, too"
    assert loop.answer(ask("r", None)) == (expected(made["a"], made["b"]), "length")


def test_an_adapter_of_the_settings_that_no_slot_holds_is_named(make, files):
    place, made = files
    loop = make(adapter=[f"hu={place / 'a.safetensors'}"], slot_width=made["a"].h - 1)
    loop.start()
    loop._thread.join(PATIENCE)
    assert loop.status == "failed"
    assert loop.failure.startswith(f"{place / 'a.safetensors'}: its blocks are ")


def test_an_adapter_is_measured_on_the_probe_texts_and_refused_above_the_limit(make, files, tmp_path):
    place, _ = files
    (tmp_path / "law.txt").write_text("The court found for the plaintiff.")
    law = tuple(b"The court found for the plaintiff.")
    loop = make(max_leak=0.0, probe_text=[tmp_path / "law.txt"]).begin()
    view = result(loop.call(LoadAdapter("a", place / "a.safetensors", threshold=1e6)))
    assert {name: (leak.rate, leak.tokens) for name, leak in view.neutrality.items()} == {"law": (0, len(law))}
    loop.submit(ask("r", ("a",), tokens=100))
    error = error_of(loop.call(LoadAdapter("a", place / "b.safetensors", replace=True)))
    assert isinstance(error, BadRequest)
    assert "'law'" in error.message
    assert isinstance(error_of(loop.call(PatchAdapter("a", threshold=0.0))), BadRequest)
    assert loop.views()[0].threshold == 1e6
    assert [t.id for o in loop.outputs("r")["r"] for t in o.tokens] == expected(tokens=100), "every gate is shut"


@pytest.mark.parametrize(
    ("running", "computed", "pauses"), [(True, 0.0001, 9), (True, 0.002, 50), (False, 0.002, 0)]
)
def test_reading_a_file_pauses_now_and_then_beside_requests(folder, monkeypatch, running, computed, pauses):
    """`computed`: seconds between two calls, of which there are 50."""
    loop = EngineLoop(ServeConfig(), folder, tiny.tokenizer(), lambda _: None)
    loop._running, now, slept = running, [10.0], []
    monkeypatch.setattr(module.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", slept.append)
    loop._let_steps_run()
    slept.clear()
    for _ in range(50):
        now[0] += computed
        loop._let_steps_run()
    assert abs(len(slept) - pauses) <= 1


@pytest.mark.parametrize("reading", [True, False])
def test_a_step_carries_a_file_that_is_read_or_a_measurement_but_not_both(loop, files, monkeypatch, reading):
    place, _ = files
    result(loop.call(LoadAdapter("a", place / "a.safetensors")))
    measured(loop)
    begun, read = threading.Event(), threading.Event()
    read_file = loop._read_file

    def held(*how):
        begun.set()
        assert read.wait(PATIENCE)
        return read_file(*how)

    monkeypatch.setattr(loop, "_read_file", held)
    if reading:
        answer = loop.call(LoadAdapter("b", place / "b.safetensors"))
        assert begun.wait(PATIENCE)
    steps, run = [], loop.core._runner.run

    def watched(pieces, labels):
        steps.append([piece.trial is not None for piece in pieces])
        return run(pieces, labels)

    monkeypatch.setattr(loop.core._runner, "run", watched)
    reached, go_on = loop.pause_after_a_step()
    loop.submit(ask("r", (), tokens=20))
    assert reached.wait(PATIENCE)
    turned = loop.call(PatchAdapter("a", threshold=0.25))  # its leak is measured anew
    go_on.set()
    loop.outputs("r")
    assert any(trial for trial in steps if len(trial) > 1) == (not reading)
    read.set()
    result(turned)
    assert not reading or result(answer).name == "b"


def test_a_built_in_text_is_no_longer_than_the_server_takes(loop, files):
    place, _ = files
    result(loop.call(LoadAdapter("a", place / "a.safetensors")))
    neutrality = measured(loop)
    assert {leak.tokens for leak in neutrality.values()} == {loop.info.max_model_len}
    assert 0 < min(leak.rate for leak in neutrality.values()) < 1
    result(loop.call(PatchAdapter("a", threshold=1e6)))
    assert measured(loop)["prose"].rate == 0


def measured(loop):
    """What is reported of the one adapter, once nothing is measured any more."""
    while True:
        (view,) = loop.views()
        if not view.measuring:
            return view.neutrality


def test_a_request_waits_for_its_adapter_to_be_copied(make, files):
    place, made = files
    entries = [str(place / "a.safetensors"), str(place / "b.safetensors")]
    loop = make(adapter=entries, slots=1).begin()
    (waiting,) = [v.name for v in loop.views() if v.state == "registered"]
    assert loop.answer(ask("r", (waiting,))) == (expected(made[waiting]), "length")
    assert [v.name for v in loop.views() if v.state == "attached"] == [waiting]


@pytest.mark.parametrize("fault", ["no base", "no adapter", "name twice", "no probe text", "leak"])
def test_a_start_that_fails_says_why_and_refuses(make, folder, files, tmp_path, fault):
    place, _ = files
    file = str(place / "a.safetensors")
    more = {
        "no adapter": {"adapter": [str(tmp_path / "none.safetensors")]},
        "name twice": {"adapter": [file, file]},
        "no probe text": {"probe_text": [tmp_path / "law.txt"]},
        "leak": {"adapter": [file], "max_leak": 0.0},
    }.get(fault, {})
    loop = make(tmp_path / "nowhere" if fault == "no base" else folder, **more)
    loop.start()
    loop._thread.join(PATIENCE)
    assert loop.status == "failed"
    reasons = {"no base": "nowhere", "no adapter": "none.safetensors", "name twice": "'a'"}
    assert (reasons | {"no probe text": "law.txt", "leak": "--max-leak"})[fault] in loop.failure
    with pytest.raises(Unavailable) as refusal:
        loop.submit(ask("r"))
    assert refusal.value.message == loop.failure


def test_a_step_that_raises_fails_its_requests_alone_and_the_next_one_works(make, files):
    place, made = files
    loop = make(max_running=2)
    loop.hold.clear()
    loop.begin()
    run, steps = loop.core._runner.run, []

    def fails_once(pieces, labels):
        steps.append([piece.request.id for piece in pieces])
        if len(steps) == 3:
            raise RuntimeError("out of memory")
        return run(pieces, labels)

    loop.hold.set()
    result(loop.call(LoadAdapter("a", place / "a.safetensors")))
    measured(loop)
    loop.core._runner.run = fails_once
    for name in ("one", "two", "three"):
        loop.submit(ask(name, ("a",)))
    got = loop.outputs("one", "two", "three")
    failed = {name for name, outputs in got.items() if outputs[-1].error is not None}
    assert failed == set(steps[2])
    assert "three" not in failed
    for name in failed:
        assert got[name][-1].finish_reason == "error"
        assert "out of memory" not in got[name][-1].error.message, "a client is told nothing of the inside"
    assert [t.id for output in got["three"] for t in output.tokens] == expected(made["a"])
    assert loop.status == "ready"
    assert loop.views()[0].requests == 0
    assert loop.core.scheduler.pool.used == 0


def test_stopping_answers_everybody(make, files, monkeypatch):
    """Running, waiting and refused requests, a load under way, and what was asked just before and after."""
    place, _ = files
    copying = threading.Event()

    def endless(self, slot, adapter, threshold):
        copying.set()
        while True:
            yield

    monkeypatch.setattr(Bank, "attach", endless)
    loop = make(max_running=1).begin()
    load = loop.call(LoadAdapter("a", place / "a.safetensors"))
    assert copying.wait(PATIENCE)
    reached, go_on = loop.pause_after_a_step()
    loop.submit(ask("running", tokens=200))
    assert reached.wait(PATIENCE)
    loop.submit(ask("waiting"))
    loop.submit(ask("refused", prompt=()))
    listed = loop.call(ReadStatistics())
    join, late = loop._thread.join, []

    def join_after_more():
        """Called once the engine was told to stop; it goes on only when these are behind that in its queue."""
        loop._thread.join = join
        late.append(loop.call(ReadStatistics()))
        loop.submit(ask("late"))
        go_on.set()
        join()

    loop._thread.join = join_after_more
    loop.stop()
    got = loop.outputs("running", "waiting", "refused", "late")
    assert isinstance(got["late"][-1].error, Unavailable)
    assert isinstance(error_of(late[0]), Unavailable)
    assert isinstance(got["running"][-1].error, Unavailable)
    assert isinstance(got["waiting"][-1].error, Unavailable)
    assert isinstance(got["refused"][-1].error, BadRequest)
    assert isinstance(error_of(load), Unavailable)
    assert listed.done()
    assert not loop._thread.is_alive()


@pytest.mark.parametrize("where", ["integrity", "command"])
def test_an_engine_that_breaks_down_answers_everybody_and_refuses_from_then_on(make, where):
    loop = make()
    loop.hold.clear()
    loop.begin()

    def breaks(*_):
        raise RuntimeError("pages are lost")

    if where == "integrity":
        loop.core.check = breaks
        loop.submit(ask("r"))
    else:
        loop.adapters.views = breaks
        listed = loop.call(ReadStatistics())
        loop.submit(ask("r"))
    loop.hold.set()
    last = loop.outputs("r")["r"][-1]
    loop._thread.join(PATIENCE)
    assert last.error.status == 500
    assert "pages are lost" not in last.error.message + loop.failure, "a client is told nothing of the inside"
    if where == "command":
        assert error_of(listed).status == 500
        assert "pages are lost" not in error_of(listed).message
    assert loop.status == "failed"
    with pytest.raises(Unavailable, match="RuntimeError"):
        loop.submit(ask("s"))


def test_whoever_waits_is_answered_before_the_status_turns(make):
    loop = make()
    loop.hold.clear()
    loop.begin()
    deliver, seen = loop._deliver, []

    def breaks(**how):
        raise RuntimeError("pages are lost")

    def watched(events):
        seen.append(loop.status)
        deliver(events)

    loop.core.launch, loop._deliver = breaks, watched
    loop.submit(ask("r"))
    loop.hold.set()
    loop._thread.join(PATIENCE)
    assert (seen, loop.status) == (["ready"], "failed")


def test_an_adapter_that_is_found_wild_while_the_server_starts_stops_it(make, folder, files, monkeypatch):
    add, seen = Canary.add, []

    def late(self, probe, result):
        seen.append(probe)
        wild = BadAdapterFile("it is not finite")
        return add(self, probe, result if len(seen) == 1 else replace(result, error=wild))

    monkeypatch.setattr(Canary, "add", late)
    loop = make(folder, adapter=[str(files[0] / "a.safetensors")])
    loop.start()
    loop._thread.join(PATIENCE)
    assert len(seen) > 1
    assert loop.status == "failed"
    assert "a.safetensors: on the probe texts it was not finite" in loop.failure


@pytest.mark.parametrize("where", ["load", "publish"])
def test_a_load_is_answered_when_the_engine_breaks_over_it(loop, files, where):
    def breaks(*_):
        raise RuntimeError("the device is gone")

    if where == "load":
        loop.adapters.registry.place = breaks
    else:
        loop.adapters._changes.publish = breaks
    answer = loop.call(LoadAdapter("a", files[0] / "a.safetensors"))
    error = answer.exception(timeout=PATIENCE)
    assert isinstance(error, NrError)
    assert "device" not in error.message
    loop._thread.join(PATIENCE)
    assert loop.status == "failed"


def test_the_loop_hands_over_while_the_device_computes(loop):
    """A device that goes on only once the output of the step before was handed over."""
    device, handed_over = Device(loop.core._runner), threading.Semaphore(1)
    launch, deliver = device.launch, loop._deliver

    def launched(pieces, labels):
        wait = launch(pieces, labels)

        def results():
            assert handed_over.acquire(timeout=PATIENCE)
            return wait()

        return results

    def delivered(events):
        deliver(events)
        if events.outputs:
            handed_over.release()

    device.launch, loop._deliver, loop.core._runner = launched, delivered, device
    tokens, reason = loop.answer(ask("r"))
    assert (tokens, reason) == (expected(), "length")
