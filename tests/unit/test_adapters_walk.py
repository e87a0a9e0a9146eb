"""The engine's adapters on a bank without tensors: random walks, held against names in a dict."""

import gc
import random
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from nr_serve.engine.adapters import changes
from nr_serve.engine.adapters.adapters import Adapters
from nr_serve.engine.adapters.canary import Canary
from nr_serve.engine.messages import LoadAdapter, PatchAdapter
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Result
from nr_serve.errors import BadAdapterFile, BadRequest, Conflict, NotFound, Unavailable
from tests.unit.fake_bank import FakeAdapter, FakeBank, ran, request, texts

NAMES = "abcd"
LIMIT = 0.5


@dataclass
class Name:
    """What a name means, as its user knows it, and all that it meant since it was loaded or put back, oldest first.

    A meaning is (load, adapter, threshold).
    """

    meanings: list[tuple[int, FakeAdapter, float]]
    pins: dict[int, bool]
    """By load: one that is undone takes its pin along; a patch is of whatever comes back, too."""
    known: list[bool] = field(default_factory=list)
    """Whether the leak of each meaning but the last was known when the next came."""

    @property
    def now(self) -> tuple[FakeAdapter, float]:
        return self.meanings[-1][1:]

    @property
    def pinned(self) -> bool:
        return self.pins[self.meanings[-1][0]]


@dataclass
class Walk:
    """Users who load, patch, unload and ask at random, and the model: what they were told, by name."""

    seed: int
    slots: int
    limit: float | None

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.bank = FakeBank(self.slots)
        self.adapters = Adapters(self.bank, Canary(texts(), self.limit))
        self.names: dict[str, Name] = {}
        self.asked: list[tuple[Future, object, FakeAdapter | None]] = []
        self.waiting: Request | None = None
        self.running: list[tuple[Request, list]] = []
        self.seen: dict[str, int] = {}
        self.read: set[tuple[FakeAdapter, float]] = set()  # past all texts
        self.attachments: dict[int, tuple[FakeAdapter, float]] = {}
        self.loads = 0
        self.last: tuple | None = None
        self.told = dict.fromkeys(["loaded", "patched", "refused", "found wild", "answered"], 0)

    # Moves

    def load(self) -> None:
        wild = self.rng.choice([None, None, None, None, 0, 1, 3])
        file = (self.rng.randrange(9), wild, self.rng.choice([0.2, 0.6]))
        adapter = FakeAdapter(str(file), *file[1:])
        message = LoadAdapter(
            self.rng.choice(NAMES),
            path=None,
            replace=self.rng.random() < 0.7,
            pinned=self.rng.choice([None, None, None, None, True, False]),
            threshold=self.rng.choice([None, 0.4, 0.9]),
        )
        answer: Future = Future()
        self.asked.append((answer, message, adapter))
        self.adapters.load(message, adapter, answer, 0.0)

    def patch(self) -> None:
        choices = {"pinned": [None, False, True], "threshold": [None, 0.2, 0.4, 0.6, 0.9]}
        dials = {dial: self.rng.choice(values) for dial, values in choices.items()}
        answer: Future = Future()
        message = PatchAdapter(self.rng.choice(NAMES), **dials)
        self.asked.append((answer, message, None))
        self.adapters.patch(message, answer)

    def unload(self) -> None:
        name = self.rng.choice(NAMES)
        if name in self.names:
            assert self.adapters.unload(name).version == self.names.pop(name).now[0].version
            self.seen.pop(name, None)
        else:
            with pytest.raises(NotFound):
                self.adapters.unload(name)

    def ask(self) -> None:
        if self.waiting is None:
            picked = self.rng.sample(NAMES, self.rng.randint(0, self.slots + 1))
            names = self.rng.choice([None, (*picked, *picked[:1])])  # whoever names one twice means it once
            if not self.can_be_served(names):
                return
            self.waiting = request("r", names, selected="+".join(picked) if names else "base")
        self.admit(self.waiting)

    def can_be_served(self, names: tuple[str, ...] | None) -> bool:
        wanted = set(names or ())
        if not wanted <= self.names.keys() or len(wanted) > self.slots:
            with pytest.raises(BadRequest if wanted <= self.names.keys() else NotFound):
                self.adapters.check_selection(names)
            return False
        self.adapters.check_selection(names)
        return True

    def admit(self, asked: Request) -> None:
        names = asked.submit.adapters
        try:
            admitted = self.adapters.admit(asked, may_copy=True)
        except NotFound:
            assert not set(names) <= self.names.keys()
            self.waiting = None
        except Unavailable:
            pinned = sum(name.pinned for each, name in self.names.items() if each not in names)
            assert len(set(names)) + pinned > self.slots
            self.waiting = None
        else:
            if not admitted:
                return
            self.waiting = None
            self.told["answered"] += 1
            got = {version.name: (version.payload, version.threshold) for version in asked.selection}
            wanted = got if names is None else names
            assert got == {name: self.names[name].now for name in wanted}
            self.running.append((asked, [(version, version.payload) for version in asked.selection]))

    def end_request(self) -> None:
        if self.running:
            self.adapters.release(self.running.pop(self.rng.randrange(len(self.running)))[0])

    def copy(self) -> None:
        self.adapters.copy_some(seconds=0)

    def step(self) -> None:
        probe = self.adapters.next_probe(self.rng.randint(1, 5))
        for asked, _ in self.running:
            slots, tokens = [version.slot for version in asked.selection], self.rng.randint(1, 3)
            self.bank.count(slots, self.adapters.labels([asked])[0], tokens)
            for version in asked.selection:
                if version.name in self.names:
                    self.seen[version.name] = self.seen.get(version.name, 0) + tokens
        if probe is not None:
            self.try_out(probe)

    def try_out(self, probe) -> None:
        measured, result, piece = probe.measurement, ran(probe, self.slots), probe.piece
        assert piece.start == 0 or self.last == (measured, piece.request, piece.start), "its row was another's"
        self.last = (measured, piece.request, piece.start + piece.count)
        version = measured.version
        acts = measured.acts  # then names are as they were told
        self.adapters.take_result(probe, result)
        if len(measured.leaks) == 2 and not (
            self.limit is not None and version.payload.worst(measured.threshold) > LIMIT
        ):
            self.read.add((version.payload, measured.threshold))
        if acts and result.error is not None:
            changed, _ = self.adapters.take_rejected()
            assert changed
            self.found_wild(version.name)

    # The model

    def found_wild(self, name: str) -> None:
        """It goes back to the newest meaning whose leak was known, else to the first file, if that is another."""
        self.told["found wild"] += 1
        *before, last = self.names[name].meanings
        known = [each for each, known in zip(before, self.names[name].known, strict=True) if known]
        others = [each for each in before if each[0] != last[0]]
        if known or others:
            first = [each for each in others if each[0] == others[0][0]] if others else []
            self.names[name] = Name([(known or first)[-1]], self.names[name].pins)
        else:
            del self.names[name]
            self.seen.pop(name, None)

    def hear(self) -> None:
        """Take the answers that have come, in the order in which they were asked for."""
        for each in [each for each in self.asked if each[0].done()]:
            self.asked.remove(each)
            answer, message, adapter = each
            error = answer.exception(timeout=0)
            if error is not None:
                self.told["refused"] += 1
                self.check_refusal(error, message, adapter)
            elif adapter is not None:
                self.loaded(message, adapter)
            else:
                self.patched(message)
            if error is None:
                view, name = answer.result(timeout=0), self.names[message.name]
                assert (view.version, view.threshold) == (name.now[0].version, name.now[1])
                assert view.pinned == name.pinned

    def loaded(self, message: LoadAdapter, adapter: FakeAdapter) -> None:
        self.told["loaded"] += 1
        assert message.name not in self.names or message.replace
        old = self.names.get(message.name)
        pinned = message.pinned if message.pinned is not None else old is not None and old.pinned
        self.loads += 1
        meaning = (self.loads, adapter, adapter.threshold if message.threshold is None else message.threshold)
        name = self.names.setdefault(message.name, Name([], {}))
        name.pins[self.loads] = pinned
        self.means(name, meaning)

    def patched(self, message: PatchAdapter) -> None:
        self.told["patched"] += 1
        name = self.names[message.name]
        if message.pinned is not None:
            name.pins = dict.fromkeys(name.pins, message.pinned)
        if message.threshold is not None:
            load, adapter, _ = name.meanings[-1]
            self.means(name, (load, adapter, message.threshold))

    def means(self, name: Name, meaning: tuple[int, FakeAdapter, float]) -> None:
        name.known += [name.now in self.read] if name.meanings else []
        name.meanings.append(meaning)

    def check_refusal(self, error: Exception, message, adapter: FakeAdapter | None) -> None:
        match error:
            case Conflict() if adapter is not None:
                assert message.name in self.names
                assert not message.replace
            case Conflict() | Unavailable():
                assert self.limit is not None
            case NotFound():
                assert adapter is None
                assert message.name not in self.names
            case BadAdapterFile():
                assert adapter is None or adapter.wild_from is not None
            case BadRequest():
                assert self.limit is not None
                if adapter is not None:
                    threshold = adapter.threshold if message.threshold is None else message.threshold
                    assert adapter.worst(threshold) > LIMIT
            case _:
                raise error

    def check(self) -> None:
        registry = self.adapters.registry
        assert {v.name: (v.payload, v.threshold) for v in registry} == {n: m.now for n, m in self.names.items()}
        assert {v.name: v.pinned for v in registry} == {n: m.pinned for n, m in self.names.items()}
        for _, selection in self.running:
            for version, adapter in selection:
                assert self.bank.acts(version.slot) == (adapter, version.threshold), "a request lost its adapter"
        open_in = {slot: acts for slot in range(self.slots) if (acts := self.bank.acts(slot)) is not None}
        there = {s: v for s in range(self.slots) if (v := registry.in_slot(s)) is not None and v.attached}
        assert registry.slots_used == self.slots or all(v.slot is not None for v in registry), (
            "a slot is left empty"
        )
        assert open_in == {slot: (version.payload, version.threshold) for slot, version in there.items()}
        now = {registry.attachments[slot]: acts for slot, acts in open_in.items()}
        assert now.keys() == registry.attachments.all
        assert all(self.attachments.setdefault(number, acts) == acts for number, acts in now.items())
        if self.limit is not None:
            assert set(open_in.values()) <= self.read, "it acts before its leak is known"
        views = {view.name: view for view in self.adapters.views()}
        for name, view in views.items():
            adapter, threshold = self.names[name].now
            assert view.neutrality in (None, adapter.leaks(threshold))
            assert (view.neutrality is None) <= ((adapter, threshold) not in self.read)
            assert view.gates.seen == tuple(n * self.seen.get(name, 0) for n in (2, 2, 1))
            assert view.gates.mass == self.seen.get(name, 0)
            selected = [each for joined in view.gates.fired_by_selected for each in joined.split("+")]
            assert {*selected} <= {*self.names, "base", "other"}, "a name came back as a time series"


def finish(walk: Walk) -> None:
    walk.waiting = None
    while walk.running or walk.adapters.busy:
        walk.end_request()
        walk.copy()
        walk.step()
        walk.hear()
        walk.check()


@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize("seed", range(6))
def test_a_random_walk_gives_everybody_what_they_were_told(seed, limit):
    walk = Walk(seed, slots=seed % 3 + 1, limit=limit)
    moves = {
        walk.load: 3,
        walk.patch: 3,
        walk.unload: 1,
        walk.ask: 8,
        walk.end_request: 4,
        walk.copy: 20,
        walk.step: 15,
    }
    for _ in range(1500):
        walk.rng.choices(list(moves), list(moves.values()))[0]()
        walk.hear()
        walk.check()
    finish(walk)
    assert not walk.asked, "somebody waits for ever"
    walk.adapters.registry.check()
    registered = list(walk.adapters.registry)
    assert walk.adapters.registry.slots_used == min(len(registered), walk.slots), "a slot is left empty"
    attached = [walk.adapters.view(version) for version in registered if version.attached]
    assert all(view.neutrality is not None and not view.measuring for view in attached)
    kinds = ["loaded", "patched", "refused", "answered", *(["found wild"] if limit is None else [])]
    assert all(walk.told[kind] for kind in kinds), walk.told


def acting(adapters: Adapters, name: str, adapter: FakeAdapter, **more) -> Future:
    """Load, until it is answered."""
    answer: Future = Future()
    adapters.load(LoadAdapter(name, path=None, replace=True, **more), adapter, answer, 0.0)
    while not answer.done():
        adapters.copy_some(seconds=0)
        if (probe := adapters.next_probe(3)) is not None:
            adapters.take_result(probe, ran(probe, 2))
    return answer


@pytest.mark.parametrize("change", ["patch", "unload"])
def test_what_a_change_answers_tells_all_that_was_counted_until_then(change):
    bank = FakeBank(2)
    adapters = Adapters(bank)
    acting(adapters, "a", FakeAdapter("x"))
    bank.count([0], 0, tokens=3)
    answer: Future = Future()
    if change == "patch":
        adapters.patch(PatchAdapter("a", pinned=True), answer)
    else:
        answer.set_result(adapters.unload("a"))
    view = answer.result(timeout=0)
    assert view.gates.seen == (6, 6, 3)
    assert (view.state, view.slot) == (("attached", 0) if change == "patch" else ("unloaded", None))


def test_with_a_name_goes_what_would_have_come_back():
    bank = FakeBank(2)
    adapters = Adapters(bank, Canary(texts()))
    first = FakeAdapter("x")
    gone = weakref.ref(first)
    acting(adapters, "a", first)
    acting(adapters, "a", FakeAdapter("y"))
    del first
    gc.collect()
    assert gone() is not None, "it would come back"
    adapters.unload("a")
    assert adapters.next_probe(1) is None
    bank.within.clear()  # of the fake alone: a bank has copies
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("measured", ["", "to its end", "in part", "as wild"])
def test_nothing_keeps_the_weights_of_what_was_unloaded(measured):
    bank = FakeBank(2)
    adapters = Adapters(bank, Canary(texts()))
    adapter = FakeAdapter("x", wild_from=0 if measured == "as wild" else None)
    gone = weakref.ref(adapter)
    acting(adapters, "a", adapter)
    while measured and (probe := adapters.next_probe(1)) is not None:
        error = BadAdapterFile("not finite") if measured == "as wild" else None
        adapters.take_result(probe, Result(None, error=error) if error else ran(probe, 1))
        if measured == "in part":
            break
    adapter = probe = error = None  # whose traceback knows all
    if measured != "as wild":  # which was unloaded already
        adapters.unload("a")
    while adapters.busy:  # then the engine steps on, and asks
        assert adapters.next_probe(1) is None
    bank.within.clear()  # of the fake alone: a bank has copies
    gc.collect()
    assert gone() is None


def test_a_refused_loads_slot_goes_back_to_nobody_who_was_unloaded_meanwhile():
    adapters = Adapters(FakeBank(1), Canary(texts(), max_leak=1.0))
    acting(adapters, "a", FakeAdapter("x"))
    answer: Future = Future()
    adapters.load(LoadAdapter("b", path=None), FakeAdapter("y", wild_from=0), answer, 0.0)
    adapters.unload("a")
    adapters.copy_some(seconds=60)
    while not answer.done():
        probe = adapters.next_probe(9)
        adapters.take_result(probe, ran(probe, 1))
    assert isinstance(answer.exception(), BadAdapterFile)
    assert (adapters.busy, adapters.registry.slots_used) == (False, 0)


def test_a_slot_whose_adapter_was_unloaded_on_its_way_and_found_wild_goes_to_one_that_waits():
    adapters = Adapters(FakeBank(1), Canary(texts()))
    acting(adapters, "a", FakeAdapter("x"), pinned=True)
    acting(adapters, "b", FakeAdapter("y"))  # every slot is in use: it waits for one
    adapters.patch(PatchAdapter("a", pinned=False), Future())
    assert not adapters.admit(request("r", ("b",)), may_copy=True)
    adapters.copy_some(seconds=60)
    probe = adapters.next_probe(1)
    adapters.unload("b")
    adapters.take_result(probe, Result(None, error=BadAdapterFile("not finite")))
    assert adapters.registry.get("a").slot == 0


def test_a_view_tells_how_long_its_load_took(monkeypatch):
    monkeypatch.setattr(changes, "time", SimpleNamespace(perf_counter=lambda: 107.5))
    adapters, answer = Adapters(FakeBank(1)), Future()
    adapters.load(LoadAdapter("a", path=None), FakeAdapter("x"), answer, started=100.0)
    adapters.copy_some(seconds=60)
    assert answer.result(timeout=0).load_seconds == 7.5
