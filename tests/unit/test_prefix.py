"""The prefix cache alone: which pages it gives to whom, and when it lets them go."""

import random
from dataclasses import dataclass, field
from itertools import chain as joined
from itertools import product

import pytest

from nr_serve.engine.adapters.registry import Version
from nr_serve.engine.cache.neutrality import NONE, NOTHING, Attachments, Footprint, Opened
from nr_serve.engine.cache.pages import PagePool
from nr_serve.engine.cache.prefix_cache import PrefixCache
from nr_serve.engine.messages import PrefixTokens, Sampling, Submit
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Scheduler

PAGE = 4


def sets(*members: int) -> frozenset[int]:
    return frozenset(members)


def request(name, tokens, selection=(), *, answer=1, salt=None, **submit) -> Request:
    sampling = Sampling(max_tokens=answer, prompt_logprobs=submit.pop("prompt_logprobs", None))
    asked = Submit(str(name), tuple(tokens), sampling, cache_salt=salt, **submit)
    made = Request(submit=asked, eos_ids=frozenset(), seed=0, text=None, arrival=int(name))
    made.selection = tuple(selection)
    return made


def version(slot: int) -> Version:
    return Version(f"v{slot}", "", None, 0.0, slot=slot, attached=True)


class Engine:
    """A scheduler whose steps compute nothing; what opens in them is given."""

    def __init__(self, pages: int = 40, slots: int = 3) -> None:
        self.attachments = Attachments()
        for slot in range(slots):
            self.attachments.put(slot)
        self.pool = PagePool(pages, PAGE)
        self.prefix_cache = PrefixCache(self.pool, self.attachments)
        self.scheduler = Scheduler(
            self.pool,
            max_running=8,
            max_batch_tokens=64,
            admit=lambda *_, **__: True,
            prefix_cache=self.prefix_cache,
        )

    def answer(self, *requests: Request, opened: Opened = NOTHING) -> list[int]:
        """Run the requests to their end side by side; the tokens of each that were found in the cache."""
        for each in requests:
            self.scheduler.add(each)
        while self.scheduler.running or self.scheduler.waiting:
            for piece in self.scheduler.schedule().pieces:
                samples, pages = piece.samples, self.pool.needed(piece.start + piece.count) - piece.start // PAGE
                self.scheduler.advance(piece, (opened,) * pages)
                if samples:
                    piece.request.tokens.append(7)
                    if piece.request.generated == piece.request.sampling.max_tokens:
                        self.scheduler.drop(piece.request)
        self.scheduler.check()
        return [each.cached_tokens for each in requests]


# What is found


def test_whole_pages_that_begin_alike_are_found_and_one_token_is_left_to_compute():
    engine = Engine()
    first = list(range(20))
    assert engine.answer(request(1, first)) == [0]
    assert engine.answer(request(2, first)) == [16], "the last token must be fed, and so its page"
    assert engine.answer(request(3, [*first, 50])) == [20]
    assert engine.answer(request(4, [*first[:11], 99, *first[12:]])) == [8]
    assert engine.answer(request(5, first[:4])) == [0]
    assert engine.answer(request(6, [99, *first])) == [0]
    # The same page after other pages is another page.
    assert engine.answer(request(7, [9, 9, 9, 9, *first[4:]])) == [0]
    assert engine.prefix_cache.take_counts() == PrefixTokens(
        asked=20 + 20 + 21 + 20 + 4 + 21 + 20, found=16 + 20 + 8
    )
    assert engine.prefix_cache.take_counts() == PrefixTokens()


def test_answers_are_found_as_prompts_are():
    engine = Engine()
    engine.answer(request(1, range(6), answer=9))
    # The last token of an answer is never fed, so 14 tokens were.
    assert engine.answer(request(2, [*range(6), *[7] * 9])) == [12]


def test_requests_of_another_salt_find_nothing():
    engine = Engine()
    prompt = list(range(20))
    assert engine.answer(request(1, prompt, salt="a")) == [0]
    assert engine.answer(request(2, prompt)) == engine.answer(request(3, prompt, salt="b")) == [0]
    assert engine.answer(request(4, prompt, salt="a")) == engine.answer(request(5, prompt, salt="b")) == [16]


def test_a_prompt_that_is_part_of_the_answer_is_computed_whole_and_found_by_others():
    engine = Engine()
    prompt = list(range(20))
    engine.answer(request(1, prompt))
    assert engine.answer(request(2, prompt, gates=True), request(3, prompt, prompt_logprobs=0)) == [0, 0]
    assert engine.prefix_cache.take_counts() == PrefixTokens(asked=20)
    other = list(range(30, 50))
    engine.answer(request(4, other, gates=True))
    assert engine.answer(request(5, other)) == [16]


def test_the_same_page_computed_side_by_side_is_kept_once():
    engine = Engine()
    prompt = list(range(21))
    assert engine.answer(*(request(i, prompt) for i in range(1, 4))) == [0, 0, 0]
    assert engine.pool.kept == 5


def test_a_preempted_request_finds_its_own_pages_and_tells_what_it_found_at_first():
    engine = Engine(pages=6)
    first, second = request(1, range(8), answer=8), request(2, range(50, 58), answer=8)
    assert engine.answer(first, second) == [0, 0]
    assert (engine.scheduler.preemptions, first.reused, second.reused) == (1, 0, 8)


def test_requests_that_share_a_prompt_fit_into_fewer_pages():
    engine = Engine(pages=8)
    prompt = list(range(24))
    engine.answer(request(1, prompt))
    for i in (2, 3):
        engine.scheduler.add(request(i, prompt))
    assert len(engine.scheduler.schedule().pieces) == 2
    assert engine.pool.used == 5 + 1 + 1


# Under which selection

SETS = [sets(*(i for i in range(3) if bits >> i & 1)) for bits in range(8)]


def test_the_rule_for_every_selection():
    """Brute force: a selection gives the computed stream if, of its attachments, exactly those act that did."""
    for attached, opened, computed_under, asked in product(SETS, repeat=4):
        if not computed_under <= attached or not opened <= attached:
            continue
        footprint = Footprint(attached, opened & computed_under, opened - computed_under)
        exact = asked <= attached and opened & asked == opened & computed_under
        assert footprint.serves(asked) == exact
        assert footprint.serves(computed_under)


def test_a_longer_footprint_serves_no_more_than_a_shorter_one():
    before = Footprint(sets(1, 2), sets(1), sets(5))
    after = before.then(sets(2, 3), sets(2), sets(6))
    assert after == Footprint(sets(2), sets(1, 2), sets(5, 6))
    assert before.then(sets(1, 2, 3), NONE, sets(5)) is before
    assert not after.serves_some


def test_what_opened_no_gate_serves_every_selection_and_counts_as_neutral():
    engine, v = Engine(), [version(slot) for slot in range(3)]
    prompt = list(range(20))
    engine.answer(request(1, prompt, v[:1]))
    engine.prefix_cache.take_counts()
    for i, selection in enumerate(([], v[1:2], v)):
        assert engine.answer(request(i + 2, prompt, selection)) == [16]
    assert engine.answer(request(9, prompt, v[:1])) == [16]
    assert engine.prefix_cache.take_counts() == PrefixTokens(asked=80, found=64, neutral=48)


@pytest.mark.parametrize(
    ("opened", "serves"),
    [
        (Opened(acted=sets(0)), [(0,), (0, 1), (0, 2), (0, 1, 2)]),
        (Opened(would_act=sets(1)), [(), (0,), (2,), (0, 2)]),
        (Opened(sets(0), sets(1)), [(0,), (0, 2)]),
    ],
)
def test_where_gates_opened_only_selections_that_give_the_same_residues_are_served(opened, serves):
    v = [version(slot) for slot in range(3)]
    for asked in [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        engine = Engine()
        engine.answer(request(1, range(20), v[:1]), opened=opened)
        found = engine.answer(request(2, range(20), [v[i] for i in asked]))
        assert found == [16 if asked in serves else 0], asked


def test_of_pages_that_serve_alike_those_are_gone_on_from_that_serve_more_selections():
    engine = Engine(slots=1)
    tokens = list(range(12))
    engine.answer(request(1, tokens[:5]))
    engine.attachments.put(1)
    assert engine.answer(request(2, tokens[:5], [version(1)])) == [0], "its gates were not evaluated"
    assert engine.answer(request(3, tokens)) == [4]
    assert engine.answer(request(4, [*tokens, 50], [version(1)])) == [12]


def test_an_adapter_put_into_a_slot_or_turned_does_not_act_in_what_was_computed_before():
    engine, a = Engine(slots=1), version(0)
    prompt = list(range(20))
    engine.answer(request(1, prompt, [a]), opened=Opened(acted=sets(0)))
    engine.attachments.put(0)
    assert engine.answer(request(2, prompt, [a]), opened=Opened(acted=sets(0))) == [0]
    assert engine.answer(request(3, prompt, [a])) == [16]
    engine.attachments.remove(0)
    assert engine.answer(request(4, prompt)) == [0]
    engine.attachments.put(0)
    assert engine.answer(request(5, prompt)) == [16]
    assert engine.answer(request(6, prompt, [a])) == [0]


def test_a_chain_beside_which_an_acting_adapter_was_turned_is_kept_only_so_far():
    engine, a = Engine(), version(0)
    turned = request(1, range(8), [a], answer=20)
    engine.scheduler.add(turned)
    for step in range(12):
        (piece,) = engine.scheduler.schedule().pieces
        engine.scheduler.advance(piece, (Opened(acted=sets(0)),) * (2 if step == 0 else 1))
        turned.tokens.append(7)
        if step == 6:
            engine.attachments.put(0)
    engine.scheduler.drop(turned)
    assert (turned.chain, engine.pool.kept) == (None, 3)
    engine.scheduler.check()


# What is let go


def test_the_least_recently_held_goes_first_and_never_before_what_follows_it():
    engine = Engine(pages=12)
    old, new = list(range(20)), list(range(50, 70))
    engine.answer(request(1, old))
    engine.answer(request(2, new))
    engine.answer(request(3, old))
    assert engine.pool.kept == 10
    engine.answer(request(4, range(90, 104)))  # takes two empty pages and two that are kept
    assert engine.answer(request(5, [*new, 1])) == [12]
    assert engine.answer(request(6, [*old, 1])) == [12], "the fifth took the ends of old, and no more"


def test_pages_that_somebody_holds_are_not_let_go():
    engine = Engine(pages=6)
    prompt = list(range(16))
    engine.answer(request(1, prompt))
    holder = request(2, [*prompt, 1, 2, 3])
    engine.scheduler.add(holder)
    engine.scheduler.schedule()
    assert holder.reused == 16
    assert engine.pool.take(2) is None
    assert engine.pool.take(1) is not None


def test_contents_and_holders_that_are_lost_are_noticed():
    pool = PagePool(4, PAGE)
    taken = pool.take(2)
    pool.give_back(taken)
    pool.check()
    pool.share([1])
    with pytest.raises(RuntimeError, match="nobody held"):
        pool.check()
    pool = PagePool(4, PAGE)
    pool.keep(0, object())
    with pytest.raises(RuntimeError, match="contents"):
        pool.check()


# All of it, over random traffic


def mix(*numbers) -> int:
    return hash(numbers) & 0xFFFFFF


@dataclass
class World:
    """A stand-in for the model: the stream is a number that hashes all that came before and every residue added."""

    seed: int
    rng: random.Random = field(init=False)
    weights: dict[int, int] = field(default_factory=dict)
    """By slot: what its gate and its block do."""
    cells: dict[tuple[int, int], int] = field(default_factory=dict)
    """By page and place: the stream after that token, as keys and values are."""
    rows: dict[tuple[int, int], int] = field(default_factory=dict)
    """By row and slot: carried state."""
    page_ends: dict[tuple[int, int], int] = field(default_factory=dict)
    """By page and slot: carried state at its end."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def attach(self, slot: int) -> None:
        self.weights[slot] = self.rng.getrandbits(30)
        for states in (self.rows, self.page_ends):
            for key in [key for key in states if key[1] == slot]:
                del states[key]

    def token(self, token: int, before: int, states: dict[int, int], selected: set[int]) -> tuple[int, set[int]]:
        """The stream after a token, and the slots that opened; moves the carried states on."""
        stream, opened = mix(before, token), set()
        for slot, weights in sorted(self.weights.items()):
            states[slot] = mix(states.get(slot, -1), stream, weights)
            if states[slot] % 12 == 0:
                opened.add(slot)
                if slot in selected:
                    stream = mix(stream, weights)
        return stream, opened

    def naive(self, tokens, selected: set[int]) -> list[int]:
        stream, states, out = 0, {}, []
        for token in tokens:
            stream, _ = self.token(token, stream, states, selected)
            out.append(stream)
        return out

    def run(self, piece) -> tuple[Opened, ...]:
        made, selected = piece.request, {v.slot for v in piece.request.selection}
        if piece.start == made.reused:
            source, key = (self.page_ends, made.pages[piece.start // PAGE - 1]) if piece.start else ({}, -1)
            for slot in self.weights:
                self.rows.pop((made.row, slot), None)
                if (key, slot) in source:
                    self.rows[made.row, slot] = source[key, slot]
        states = {slot: self.rows[made.row, slot] for slot in self.weights if (made.row, slot) in self.rows}
        by_page: dict[int, set[int]] = {}
        for at in range(piece.start, piece.start + piece.count):
            page, place = made.pages[at // PAGE], at % PAGE
            before = self.cells[made.pages[(at - 1) // PAGE], (at - 1) % PAGE] if at else 0
            self.cells[page, place], opened = self.token(made.tokens[at], before, states, selected)
            by_page.setdefault(at // PAGE, set()).update(opened)
            if place == PAGE - 1:
                self.page_ends |= {(page, slot): state for slot, state in states.items()}
        self.rows |= {(made.row, slot): state for slot, state in states.items()}
        if not any(by_page.values()):
            return ()
        return tuple(Opened(frozenset(o & selected), frozenset(o - selected)) for o in by_page.values())


class Traffic:
    """Random requests of a few beginnings, while what sits in the slots changes."""

    def __init__(self, seed: int) -> None:
        self.world, self.rng = World(seed), random.Random(seed + 1)
        self.pool = PagePool(self.rng.choice([12, 20, 60]), PAGE)
        self.attachments = Attachments()
        self.prefix_cache = PrefixCache(self.pool, self.attachments)
        self.scheduler = Scheduler(
            self.pool,
            max_running=5,
            max_batch_tokens=self.rng.choice([6, 17, 50]),
            admit=self.admit,
            prefix_cache=self.prefix_cache,
        )
        self.spoilt: set[str] = set()
        self.checked = self.ended = 0
        self.in_slot = [version(slot) for slot in range(4)]
        for slot in range(4):
            self.change(slot)
        self.beginnings = [[self.rng.randrange(5) for _ in range(24)] for _ in range(2)]

    def admit(self, request: Request, *, may_copy: bool) -> bool:
        if request.selection is None:
            request.selection = tuple(self.rng.sample(self.in_slot, self.rng.choice([0, 0, 1, 2, 4])))
        return True

    def change(self, slot: int) -> None:
        """Another adapter in the slot; requests that use the one before are not checked any more."""
        alive = [*self.scheduler.running, *self.scheduler.waiting]
        self.spoilt |= {r.id for r in alive if self.in_slot[slot] in (r.selection or ())}
        self.world.attach(slot)
        self.attachments.put(slot)

    def step(self, arrivals: int) -> None:
        rng = self.rng
        if rng.random() < 0.03:
            self.change(rng.randrange(4))
        if rng.random() < 0.5 and len(self.scheduler.waiting) < 5:
            tokens = rng.choice(self.beginnings)[: rng.choice([7, 12, 24])] + [rng.randrange(5)] * rng.randint(0, 3)
            new = request(arrivals, tokens, answer=rng.randint(1, 14), salt=rng.choice([None, None, "x"]))
            new.selection = None
            self.scheduler.add(new)
        pieces = self.scheduler.schedule().pieces
        opened = [self.world.run(piece) for piece in pieces]
        for piece, gates in zip(pieces, opened, strict=True):
            self.scheduler.advance(piece, gates)
        for piece in pieces:
            self.check(piece.request)
            if piece.start + piece.count == len(piece.request.tokens):
                piece.request.tokens.append(rng.randrange(5))
                if piece.request.generated == piece.request.sampling.max_tokens:
                    self.scheduler.drop(piece.request)
                    self.ended += 1
        self.check_pages()

    def check(self, request: Request) -> None:
        if request.id in self.spoilt:
            return
        self.checked += 1
        tokens = request.tokens[: request.computed]
        cells = [self.world.cells[request.pages[at // PAGE], at % PAGE] for at in range(len(tokens))]
        assert cells == self.world.naive(tokens, {v.slot for v in request.selection})

    def check_pages(self) -> None:
        held = list(joined.from_iterable(r.pages for r in self.scheduler.running))
        assert len(set(held)) == self.pool.used
        records = list(self.prefix_cache.tree.records())
        pages = [record.page for record in records]
        assert len(pages) == len(set(pages)) == self.pool.kept
        for record in records:
            assert record.parent.page == -1 or record.parent.page in pages
            if record.page in held and record.parent.page != -1:
                assert record.parent.page in held


@pytest.mark.parametrize("seed", range(16))
def test_whatever_changes_between_steps_every_page_holds_what_its_request_would_have_computed(seed):
    traffic = Traffic(seed)
    for i in range(1, 500):
        traffic.step(i)
    counts = traffic.prefix_cache.take_counts()
    assert traffic.ended > 50
    assert traffic.checked > 300
    assert counts.found > counts.asked / 20
    assert counts.neutral
