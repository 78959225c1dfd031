"""All that objects reach, as a number and put back: what a search of every order rests on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import pytest

from cvmcore.backends.swprot import SWPROT
from cvmcore.pages import run
from cvmcore.testing.reach import Kept, fingerprint
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
