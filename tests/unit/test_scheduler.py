"""What the scheduler promises of every step, over random traffic with a fake admission."""

import random
from dataclasses import dataclass, field

import pytest

from nr_serve.engine.cache.pages import PagePool
from nr_serve.engine.messages import PrefixTokens, Sampling, Submit
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import MAX_OVERTAKEN, Scheduler
from nr_serve.errors import NotFound, NrError


def request(arrival: int, prompt: int, answer: int = 1, *, priority=0, adapters=()) -> Request:
    submit = Submit(str(arrival), (1,) * prompt, Sampling(max_tokens=answer), adapters, priority=priority)
    return Request(submit=submit, eos_ids=frozenset(), seed=0, text=None, arrival=arrival)


def names_any(request: Request) -> bool:
    """As if every adapter's slot were waited for."""
    return bool(request.submit.adapters)


def admit_all(request: Request, *, may_copy: bool = True) -> bool:
    request.selection = ()
    return True


@dataclass
class Slots:
    """A fake admission: an adapter is attached after a few tries, stays while held, and only `slots` fit."""

    rng: random.Random
    slots: int
    attached: list[str] = field(default_factory=list)
    held: dict[str, set[Request]] = field(default_factory=dict)
    tried: list[tuple[Request, bool]] = field(default_factory=list)

    def __call__(self, request: Request, *, may_copy: bool) -> bool:
        admitted = self._admit(request, may_copy)
        self.tried.append((request, admitted))
        return admitted

    def _admit(self, request: Request, may_copy: bool) -> bool:
        names = request.submit.adapters or ()
        if "unknown" in names:
            raise NotFound("no such adapter")
        for name in names:
            if name in self.attached:
                continue
            if not may_copy:
                return False
            if len(self.attached) == self.slots:
                idle = [n for n in self.attached if not self.held.get(n) and n not in names]
                if not idle:
                    return False
                self.attached.remove(idle[0])
            if self.rng.random() < 0.5:
                return False
            self.attached.append(name)
        request.selection = request.selection or ()
        for name in names:
            self.held.setdefault(name, set()).add(request)
        return True

    def release(self, request: Request) -> None:
        for holders in self.held.values():
            holders.discard(request)


class Traffic:
    """Random requests through a scheduler; every promise is checked at every step."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.pool = PagePool(rng.choice([12, 20, 40]), page_size=rng.choice([1, 3, 4]))
        self.max_running = rng.randint(1, 8)
        self.budget = rng.choice([3, 9, 16, 50])
        self.slots = Slots(rng, 2)
        self.scheduler = Scheduler(
            self.pool,
            max_running=self.max_running,
            max_batch_tokens=self.budget,
            admit=self.slots,
            delays=names_any,
        )
        self.arrivals = 0
        self.alive: set[Request] = set()
        self.ended: list[Request] = []
        self.refused: list[Request] = []
        self.resumable: set[Request] = set()
        self.resumed = self.aborted = self.waited_for_slot = 0

    def arrive(self) -> None:
        self.arrivals += 1
        cells = self.pool.total * self.pool.page_size
        prompt = self.rng.randint(1, cells * 2 // 3)
        names = self.rng.choice([(), (), ("a",), ("b",), ("c",), ("a", "d"), ("unknown",)])
        answer = self.rng.randint(1, cells - prompt)
        new = request(self.arrivals, prompt, answer, priority=self.rng.choice([0, 0, 0, 1, -1]), adapters=names)
        self.scheduler.add(new)
        self.alive.add(new)

    def abort(self) -> None:
        if self.alive:
            self._end(self.rng.choice(sorted(self.alive, key=lambda r: r.arrival)))
            self.aborted += 1

    def _end(self, request: Request) -> None:
        self.scheduler.drop(request)
        self.slots.release(request)
        self.alive.remove(request)
        assert (request.pages, request.row) == ([], None)

    def step(self) -> None:
        scheduler = self.scheduler
        before, waited = list(scheduler.running), list(scheduler.waiting)
        decoding = [r for r in before if r.remaining == 1]
        pages_before = {r: len(r.pages) for r in before}
        free = self.pool.free
        self.slots.tried.clear()
        schedule = scheduler.schedule()

        self._check_preempted(before, pages_before, free, schedule)
        self._check_pages_and_rows()
        self._check_pieces(schedule.pieces, [r for r in decoding if r in scheduler.running])
        self._check_admitted(before, waited, schedule, sum(r in scheduler.running for r in decoding))
        for refused, error in schedule.refused:
            assert isinstance(error, NrError)
            self.refused.append(refused)
            self.alive.remove(refused)
        for piece in schedule.pieces:
            samples = piece.samples
            scheduler.advance(piece)
            if samples:
                piece.request.tokens.append(7)
                if piece.request.generated == piece.request.sampling.max_tokens:
                    self._end(piece.request)
                    self.ended.append(piece.request)
        assert {*scheduler.running, *scheduler.waiting} == self.alive

    def _check_preempted(self, before, pages_before, free, schedule) -> None:
        preempted = [r for r in before if r not in self.scheduler.running]
        if not preempted:
            return
        kept = [r for r in before if r in self.scheduler.running]
        assert before == kept + preempted, "somebody was preempted who did not come last"
        assert [r.computed for r in preempted] == [0] * len(preempted)
        assert all(r in self.scheduler.waiting and r.selection is not None for r in preempted)
        growth = sum(self.pool.needed(len(r.tokens)) - n for r, n in pages_before.items())
        assert growth > free, "somebody was preempted though there were pages for all"
        assert not set(self.scheduler.running) - set(before), "somebody new took the pages"
        assert schedule.refused == []

    def _check_pages_and_rows(self) -> None:
        running = self.scheduler.running
        assert running == sorted(running, key=lambda r: r.order)
        assert self.scheduler.waiting == sorted(self.scheduler.waiting, key=lambda r: r.order)
        pages = [page for r in running for page in r.pages]
        assert len(pages) == len(set(pages)) == self.pool.used
        assert set(pages) <= set(range(self.pool.total))
        for each in running:
            assert len(each.pages) * self.pool.page_size >= len(each.tokens)
        rows = [r.row for r in running]
        assert len(rows) == len(set(rows)) <= self.max_running
        assert set(rows) <= set(range(self.max_running))
        assert all((r.pages, r.row, r.computed) == ([], None, 0) for r in self.scheduler.waiting)

    def _check_pieces(self, pieces, decoding) -> None:
        running = self.scheduler.running
        assert len({p.request for p in pieces}) == len(pieces)
        assert {p.request for p in pieces} <= set(running)
        assert sum(p.count for p in pieces) <= self._most(len(decoding))
        for piece in pieces:
            assert piece.start == piece.request.computed
            assert 1 <= piece.count <= piece.request.remaining
            assert piece.samples == (piece.count == piece.request.remaining)
        given = {p.request: p.count for p in pieces}
        assert all(given.get(r) == 1 for r in decoding), "a decode was left out"
        # The rest of the budget goes to prompts one after the other: only the last may be cut short, by its end.
        prompts = [p for p in pieces if p.request.remaining > 1]
        assert all(p.samples for p in prompts[:-1])
        unfinished = [r for r in running if given.get(r, 0) < r.remaining]
        if unfinished:
            assert sum(given.values()) == self._most(len(decoding)), "budget was left over"

    def _most(self, decodes: int) -> int:
        """Tokens that a step may have: of the whole, prompts get 8 parts in as many as there are decodes."""
        whole = max(self.budget, self.max_running)
        return min(whole, decodes + max(whole // 4, 8 * whole // max(decodes, 1)))

    def _check_admitted(self, before, waited, schedule, decodes) -> None:
        admitted = [r for r in self.scheduler.running if r not in before]
        refused = [r for r, _ in schedule.refused]
        assert refused == [
            r for r in waited if "unknown" in (r.submit.adapters or ()) and r not in self.scheduler.waiting
        ]
        turned_away = [r for r, yes in self.slots.tried if not yes]
        for new in admitted:
            for older in self.scheduler.waiting:
                if older.order > new.order or older not in waited:
                    continue
                # Overtaken: only one that waits for a slot, and by those that need none or by a bounded number.
                assert turned_away
                assert turned_away[0].order <= older.order
                needs_none = new.submit.adapters == () or new.generated or new in self.resumable
                assert needs_none or turned_away[0].overtaken <= MAX_OVERTAKEN
        self.resumed += sum(r in self.resumable for r in admitted)
        self.waited_for_slot += bool(turned_away)
        left = self.scheduler.waiting
        spare = self._most(decodes) - sum(p.count for p in schedule.pieces)
        if left and not turned_away and spare and len(self.scheduler.running) < self.max_running:
            preempted = any(r in before for r in left)
            assert preempted or self.pool.needed(len(left[0].tokens)) > self.pool.free, "room was left unused"
        self.resumable |= {r for r in before if r in left}


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_keeps_every_promise_and_ends(seed):
    traffic = Traffic(seed)
    rng = traffic.rng
    for _ in range(400):
        for _ in range(rng.choice([0, 0, 1, 2]) if len(traffic.alive) < 12 else 0):
            traffic.arrive()
        if rng.random() < 0.03:
            traffic.abort()
        traffic.step()
    steps = 0
    while traffic.alive:
        traffic.step()
        steps += 1
        assert steps < 20_000, "somebody waits for ever"
    traffic.scheduler.check()
    assert all(r.generated == r.sampling.max_tokens for r in traffic.ended)
    assert len(traffic.ended) + len(traffic.refused) + traffic.aborted == traffic.arrivals
    assert all("unknown" in r.submit.adapters for r in traffic.refused)
    assert traffic.refused
    assert traffic.waited_for_slot
    if traffic.max_running > 1:
        assert traffic.resumed > 3, "too few preemptions to show a mistake"


def run(scheduler: Scheduler) -> dict[str, int]:
    """One step in which every piece that samples gets a token; what each request was fed."""
    pieces = scheduler.schedule().pieces
    for piece in pieces:
        scheduler.advance(piece)
        if len(piece.request.tokens) == piece.start + piece.count:
            piece.request.tokens.append(7)
    return {piece.request.id: piece.count for piece in pieces}


def test_a_step_is_decodes_then_prompts_oldest_first_then_new_requests():
    scheduler = Scheduler(PagePool(100, 4), max_running=4, max_batch_tokens=10, admit=admit_all)
    scheduler.add(request(1, 4, 99))
    assert run(scheduler) == {"1": 4}
    scheduler.add(request(2, 14, 99))
    scheduler.add(request(3, 6, 99))
    assert run(scheduler) == {"1": 1, "2": 9}
    assert run(scheduler) == {"1": 1, "2": 5, "3": 4}
    scheduler.add(request(4, 3, 99, priority=-1))
    scheduler.add(request(5, 3, 99))
    assert run(scheduler) == {"1": 1, "2": 1, "3": 2, "4": 3}
    assert run(scheduler) == {"1": 1, "2": 1, "3": 1, "4": 1}, "no row is left for the fifth"


@pytest.mark.parametrize(("decodes", "prompt"), [(0, 64), (1, 63), (8, 56), (10, 51), (16, 32), (40, 16), (60, 4)])
def test_the_more_decodes_wait_for_prompts_the_fewer_tokens_of_them_a_step_has(decodes, prompt):
    scheduler = Scheduler(PagePool(500, 4), max_running=61, max_batch_tokens=64, admit=admit_all)
    for i in range(decodes):
        scheduler.add(request(i, 1, 99))
    while sum(r.remaining == 1 for r in scheduler.running) < decodes or scheduler.waiting:
        run(scheduler)
    scheduler.add(request(99, 200))
    assert run(scheduler) == {str(i): 1 for i in range(decodes)} | {"99": prompt}


def test_the_last_by_priority_then_arrival_is_preempted_and_resumes_from_its_first_token():
    scheduler = Scheduler(PagePool(6, 2), max_running=4, max_batch_tokens=20, admit=admit_all)
    first, low, second = request(1, 4, 9), request(2, 4, 9, priority=5), request(3, 4, 9)
    for each in (first, low, second):
        scheduler.add(each)
    assert run(scheduler) == {"1": 4, "2": 4, "3": 4}
    started = low.started
    assert run(scheduler) == {"1": 1, "3": 1}
    assert scheduler.waiting == [low]
    assert (low.computed, low.pages, low.row, low.tokens[-1]) == (0, [], None, 7)
    scheduler.drop(first)
    assert run(scheduler) == {"3": 1, "2": 5}
    assert (low.generated, low.started) == (2, started), "it started when it was first admitted"


def test_without_reuse_nothing_is_looked_up():
    scheduler = Scheduler(PagePool(6, 2), max_running=4, max_batch_tokens=20, admit=admit_all)
    scheduler.add(request(1, 4, 9))
    assert run(scheduler) == {"1": 4}
    assert scheduler.take_prefix_counts() == PrefixTokens()


def test_a_request_alone_grows_to_the_last_page():
    scheduler = Scheduler(PagePool(3, 2), max_running=2, max_batch_tokens=2, admit=admit_all)
    scheduler.add(request(1, 1, 5))
    for _ in range(6):
        assert run(scheduler) == {"1": 1}
    assert scheduler.preemptions == 0


def test_a_request_that_waits_for_a_slot_is_overtaken_so_often_and_then_by_those_alone_that_need_none():
    def admit(request: Request, *, may_copy: bool) -> bool:
        assert may_copy == (request.id == "1" or "1" not in waiting)
        return "a" not in (request.submit.adapters or ()) and admit_all(request)

    waiting = {"1"}
    scheduler = Scheduler(PagePool(500, 2), max_running=200, max_batch_tokens=400, admit=admit, delays=names_any)
    scheduler.add(request(1, 1, adapters=("a",)))
    for i in range(2, MAX_OVERTAKEN + 10):
        scheduler.add(request(i, 1, adapters=("b",)))
    alone = request(900, 1, adapters=())
    scheduler.add(alone)
    started = run(scheduler)
    assert set(started) == {str(i) for i in range(2, MAX_OVERTAKEN + 2)} | {"900"}


def test_whoever_waits_for_a_slot_longest_counts_those_that_go_before_it():
    def admit(request: Request, *, may_copy: bool) -> bool:
        return "a" not in request.submit.adapters and admit_all(request)

    scheduler = Scheduler(PagePool(500, 2), max_running=200, max_batch_tokens=400, admit=admit, delays=names_any)
    first, second = request(1, 1, adapters=("a",)), request(2, 1, adapters=("a",))
    for each in (first, second, *(request(i, 1, adapters=("b",)) for i in range(3, 43))):
        scheduler.add(each)
    assert len(run(scheduler)) == 40
    scheduler.drop(second)
    for i in range(50, 90):
        scheduler.add(request(i, 1, adapters=("b",)))
    assert len(run(scheduler)) == MAX_OVERTAKEN, "those that run already, and as many more as may go first"


def test_preempted_requests_overtake_one_that_waits_for_a_slot():
    blocked = {"2"}

    def admit(request: Request, *, may_copy: bool) -> bool:
        return request.id not in blocked and admit_all(request)

    scheduler = Scheduler(PagePool(5, 2), max_running=4, max_batch_tokens=20, admit=admit, delays=names_any)
    holder, victim = request(1, 5, 9), request(4, 4, 9, adapters=("c",))
    scheduler.add(holder)
    scheduler.add(victim)
    run(scheduler)
    run(scheduler)  # the later one needs a third page, and there are five
    assert scheduler.waiting == [victim]
    late = request(2, 1, adapters=("a",))
    late.overtaken = MAX_OVERTAKEN
    scheduler.add(late)
    scheduler.add(request(3, 1, adapters=("b",)))
    scheduler.drop(holder)
    assert run(scheduler) == {"4": 5}
    blocked.clear()
    assert run(scheduler) == {"4": 1, "2": 1, "3": 1}


def test_a_refused_request_leaves_the_queue_and_those_behind_it_go_on():
    def admit(request: Request, *, may_copy: bool) -> bool:
        if request.id == "1":
            raise NotFound("gone")
        return admit_all(request)

    scheduler = Scheduler(PagePool(4, 2), max_running=4, max_batch_tokens=20, admit=admit)
    first, second = request(1, 3), request(2, 3)
    scheduler.add(first)
    scheduler.add(second)
    schedule = scheduler.schedule()
    assert [(r, str(error)) for r, error in schedule.refused] == [(first, "gone")]
    assert [piece.request for piece in schedule.pieces] == [second]
    assert scheduler.waiting == []


def test_lost_pages_and_rows_are_noticed_when_nothing_runs():
    scheduler = Scheduler(PagePool(4, 2), max_running=2, max_batch_tokens=8, admit=admit_all)
    scheduler.check()
    lost = scheduler.pool.take(1)
    with pytest.raises(RuntimeError, match="1 of 4 pages are lost"):
        scheduler.check()
    scheduler.pool.give_back(lost)
    scheduler.check()
    scheduler.pool.give_back(lost)
    with pytest.raises(RuntimeError):
        scheduler.check()
    scheduler = Scheduler(PagePool(4, 2), max_running=2, max_batch_tokens=8, admit=admit_all)
    stray = request(1, 1)
    scheduler.add(stray)
    run(scheduler)
    scheduler.pool.give_back(stray.pages)
    with pytest.raises(RuntimeError, match="rows"):
        scheduler.check()


def test_pages_are_taken_all_or_none():
    pool = PagePool(3, 16)
    assert [pool.needed(n) for n in (1, 16, 17, 48)] == [1, 1, 2, 3]
    taken = pool.take(2)
    assert taken is not None
    assert pool.take(2) is None
    assert (pool.used, pool.free) == (2, 1)
    assert {*taken, *(pool.take(1) or [])} == {0, 1, 2}
    pool.give_back(taken)
    assert (pool.used, pool.free) == (1, 2)
