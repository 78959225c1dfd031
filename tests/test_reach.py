"""All that objects reach, as a number and put back: what a search of every order rests on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import pytest

from cvmcore.backends.swprot import SWPROT
from cvmcore.pages import run
from cvmcore.testing.reach import Baseline, Kept, fingerprint
from cvmcore.testing.world import World


class Thing:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@attrs.define
class Slotted:
    one: Any = 1
    two: Any = 2


def steps(n: int) -> Iterator[int]:
    """Keeps its sum on its stack, and its place in an iterator."""
    yield sum(one for one in [(yield n), (yield n + 1)] if one) + (yield 0)
    for one in [7, 7, 7]:
        yield one - one


def at(n: int, start: int = 0, send: int = 0) -> Iterator[int]:
    made = steps(start)
    next(made)
    for _ in range(n):
        made.send(send)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Thing(a=1), Thing(a=2)), (Thing(a=1), Thing(b=Thing(a=1))), (Slotted(1), Slotted(2)), ([1, 2], [2, 1]),
        ({1: 2}, {1: 3}), ({1: 2}, {2: 2}), ({1}, {2}), (np.array([1, 2]), np.array([1, 3])),
        (iter([1, 2]), iter([2, 2])), (slice(1, 2), slice(1, 3)), (at(0), at(1)), (at(1), at(2)), (at(0), at(0, 1)),
        (at(3), at(4)), (at(4), at(5)), (at(1, send=1), at(1, send=2)), ((lambda: 1), (lambda: 2)),
        (ValueError(1), ValueError(2)),
    ],
)  # fmt: skip
def test_what_differs_has_another_number(one: object, other: object) -> None:
    same = fingerprint(one)

    assert same != fingerprint(other)
    assert same == fingerprint(one)


def test_sharing_is_seen() -> None:
    shared: list[int] = []

    assert fingerprint([shared, shared]) != fingerprint([[], []])


def test_room_and_counters_are_not_seen() -> None:
    assert fingerprint(np.array([1, 0, 0])) == fingerprint(np.array([1, 0]))
    assert fingerprint(Thing(calls=1, a=2)) == fingerprint(Thing(calls=5, a=2))


def test_what_cannot_be_seen_is_never_the_same() -> None:
    """A search may not take two situations for one because it could not look."""
    hidden = memoryview(b"1")

    assert fingerprint(hidden) != fingerprint(hidden)


# ---- by what it differs from a start ------------------------------------------------------------------------------


def thing() -> Thing:
    return Thing(words=np.arange(8), names={"a": [1]}, slot=Slotted([2]), pair=(1, [3]), calls=0, big=10**6)


CHANGES: dict[str, Any] = {
    "array": lambda it: it.words.__setitem__(3, 0), "list": lambda it: it.names["a"].append(2),
    "dict": lambda it: it.names.update(b=1), "slot": lambda it: setattr(it.slot, "two", 3),
    "below a tuple": lambda it: it.pair[1].clear(), "attribute": lambda it: setattr(it, "new", None),
    "one array for another": lambda it: setattr(it, "words", it.words[::-1].copy()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_baseline_sees_each_change(change: Any) -> None:
    it, others = thing(), thing()
    baseline, same = Baseline(it), Baseline(others)
    start = baseline.now()
    change(it)
    change(others)

    assert baseline.now() != start
    assert baseline.now() == same.now()


def test_what_is_put_back_is_no_change() -> None:
    it = thing()
    baseline = Baseline(it)
    start = baseline.now()
    it.words[3], it.calls, it.big = 0, 7, int("1000000")
    it.words[3] = 3

    assert baseline.now() == start


def test_what_is_an_owners_own() -> None:
    """An owner's number does not depend on what it shares with the world; of what is new there it is told."""
    it = thing()
    baseline = Baseline(it)
    _, before, tied, apart = baseline.now([it.words[2:4], it.slot, [1]], [it.names])
    it.words[2] = 9
    it.slot.two = 7
    assert not tied and apart
    assert baseline.now([it.words[2:4], it.slot, [1]], [it.names])[1] == before
    assert baseline.now([it.words[3:5], it.slot, [1]], [it.names])[1] != before
    assert baseline.now([it.words[2:4], it.slot, [2]], [it.names])[1] != before

    it.new = np.arange(4)
    assert baseline.now([it.names], [it.new])[2] == {1}
    assert baseline.now([it.new[1:]], [it.names])[2] == {0}
    assert baseline.now([iter(it.names)], [iter(it.names["a"])])[2] == {0}


def test_two_owners_of_one_thing_are_not_apart() -> None:
    it, theirs = thing(), [1]
    baseline = Baseline(it)

    assert baseline.now([it.slot, (1, 2)], [it.slot, (1, 2)])[3]
    _, own, _, apart = baseline.now([theirs], [(theirs,)])
    assert not apart and len(own) == 1
    assert own != baseline.now([theirs], [([1],)])[1]


def test_a_world_is_put_back() -> None:
    """The same objects as they were: whatever happens in it afterwards happens as it did."""
    world = World(SWPROT)
    kept = Kept(world)
    before = fingerprint(world)

    def story() -> tuple[int, int]:
        world.machine.guest.write(run(3, 4))
        world.machine.punch(run(4, 1))
        half = fingerprint(world)
        world.machine.vm.set_user_memory_region2(0, 0, 0, 0)
        return half, fingerprint(world)

    ends = story()
    assert before not in ends
    kept.restore()
    assert fingerprint(world) == before
    assert story() == ends


def test_only_what_rests_is_kept() -> None:
    Kept([{1: Slotted()}, {2}])
    with pytest.raises(ValueError, match="under way"):
        Kept(Thing(a=at(1)))
