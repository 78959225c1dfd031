"""What one leaf finds while another is half way: the module's locks are only tried, never waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cvmcore.effects import BUSY, Effect, Lock, drain
from cvmcore.pages import run
from cvmcore_tdx.errors import describe
from cvmcore_tdx.hw import LEAF, Accept, Accepted, SeptState


class Table:
    """Who holds which lock."""

    def __init__(self) -> None:
        self.readers: dict[Lock, int] = {}
        self.writers: set[Lock] = set()

    def answer(self, effect: Effect) -> object:
        lock = effect.lock
        if lock is None:
            return None
        if effect.kind == "release":
            if lock in self.writers:
                self.writers.remove(lock)
            else:
                self.readers[lock] -= 1
            return None
        write = effect.kind == "try_write"
        if lock in self.writers or (write and self.readers.get(lock)):
            return BUSY
        if write:
            self.writers.add(lock)
        else:
            self.readers[lock] = self.readers.get(lock, 0) + 1
        return None

    def run(self, steps: Any, until: Effect | None = None, answer: object = None) -> Any:
        """Run an operation to its end, or to an effect."""
        try:
            while True:
                effect = steps.send(answer)
                if effect is until:
                    return None
                answer = self.answer(effect)
        except StopIteration as stop:
            return stop.value


Op = Callable[[Any], Any]
OPS: dict[str, Op] = {
    "accept 5": lambda w: w.module.tdg_mem_page_accept.steps(w.tdr, 0, run(5, 1)),
    "accept 4, 5": lambda w: w.module.tdg_mem_page_accept.steps(w.tdr, 0, run(4, 2)),
    "block 5": lambda w: w.module.tdh_mem_range_block.steps(w.tdr, 0, run(5, 1)),
    "remove 5": lambda w: w.module.tdh_mem_page_remove.steps(w.tdr, 0, run(5, 1)),
    "read 4, 5": lambda w: w.module.tdh_mem_sept_rd.steps(w.tdr, 0, run(4, 2)),
    "aug 9": lambda w: w.module.tdh_mem_page_aug.steps(w.tdr, 0, run(9, 1), run(90, 1)),
    "aug 10": lambda w: w.module.tdh_mem_page_aug.steps(w.tdr, 0, run(10, 1), run(91, 1)),
    "track": lambda w: w.module.tdh_mem_track.steps(w.tdr),
    "enter": lambda w: w.module.tdh_vp_enter.steps(w.tdvprs[0]),
    "vpflushdone": lambda w: w.module.tdh_mng_vpflushdone.steps(w.tdr),
    "create": lambda w: w.module.tdh_mng_create.steps(700, 70),
}


def said(result: Any) -> str:
    if isinstance(result, Accepted):
        return Accept(result.outcome).name if isinstance(result.outcome, int) else str(result.outcome.tolist())
    if isinstance(result, int):
        return describe(result)
    return f"{result.done} {describe(result.status)}"


@pytest.mark.parametrize(
    ("half_way", "then", "expected"),
    [
        ("accept 5", "block 5", "0 TDX_OPERAND_BUSY|SEPT_TREE"),
        ("accept 5", "remove 5", "0 TDX_OPERAND_BUSY|RCX"),
        ("accept 5", "read 4, 5", "1 TDX_OPERAND_BUSY|RCX"),
        ("accept 5", "accept 5", "BUSY"),
        ("accept 5", "accept 4, 5", str([Accept.ACCEPTED.value, Accept.BUSY.value])),
        ("accept 5", "aug 9", "1 TDX_SUCCESS"),
        ("accept 5", "track", "1 TDX_SUCCESS"),
        ("aug 9", "aug 10", "1 TDX_SUCCESS"),
        ("aug 9", "aug 9", "0 TDX_OPERAND_BUSY|RCX"),
        ("aug 9", "block 5", "0 TDX_OPERAND_BUSY|SEPT_TREE"),
        ("aug 9", "vpflushdone", "TDX_OPERAND_BUSY|RCX"),
        ("block 5", "accept 5", "BUSY"),
        ("block 5", "aug 9", "0 TDX_OPERAND_BUSY|SEPT_TREE"),
        ("block 5", "enter", "TDX_SUCCESS"),
        ("track", "enter", "TDX_OPERAND_BUSY|TD_EPOCH"),
        ("enter", "track", "0 TDX_OPERAND_BUSY|TD_EPOCH"),
        ("vpflushdone", "aug 9", "0 TDX_OPERAND_BUSY|RDX"),
        ("vpflushdone", "create", "TDX_OPERAND_BUSY|KOT"),
        ("create", "vpflushdone", "TDX_OPERAND_BUSY|KOT"),
    ],
)
def test_two_at_a_time(world: Any, half_way: str, then: str, expected: str) -> None:
    """The second is refused or not by the locks of the first; the first then ends as if alone."""
    world.run()
    world.aug(run(4, 2), run(60, 2))
    if "vpflushdone" in (half_way, then):
        world.ok(world.module.tdh_vp_flush(world.tdvprs[0]))
    table = Table()
    first = OPS[half_way](world)
    assert table.run(first, until=LEAF) is None

    second = table.run(OPS[then](world))
    result = table.run(first)

    assert said(second) == expected
    assert said(result) in ("ACCEPTED", "1 TDX_SUCCESS", "TDX_SUCCESS")
    assert not table.writers
    assert not any(table.readers.values())
    assert not world.td.held


def test_a_single_page_that_is_not_pending_does_no_work(world: Any) -> None:
    """It does not come to LEAF, so nobody is charged for zeroing it."""
    world.run()
    world.map(run(5, 1), run(60, 1))

    for gfn, outcome in ((5, Accept.ALREADY_ACCEPTED), (6, Accept.EPT_VIOLATION)):
        steps = world.module.tdg_mem_page_accept.steps(world.tdr, 0, run(gfn, 1))
        seen = []

        def watched(steps: Any = steps, seen: list[Effect] = seen) -> Any:
            result = None
            try:
                while True:
                    effect = next(steps)
                    seen.append(effect)
                    yield effect
            except StopIteration as stop:
                result = stop.value
            return result

        assert drain(watched()).outcome == outcome
        assert LEAF not in seen


def test_scattered_pages_find_a_locked_entry(world: Any) -> None:
    """Also among scattered pages the locked one is found."""
    world.run()
    world.aug(run(0, 10), run(60, 10))
    table = Table()
    first = OPS["accept 5"](world)
    table.run(first, until=LEAF)

    read = table.run(world.module.tdh_mem_sept_rd.steps(world.tdr, 0, np.array([1, 3, 5, 8])))
    other = table.run(world.module.tdh_mem_sept_rd.steps(world.tdr, 0, np.array([1, 4, 6, 8])))
    table.run(first)

    assert said(read) == "2 TDX_OPERAND_BUSY|RCX"
    assert said(other) == "4 TDX_SUCCESS"
    assert other.words.tolist() == [pfn << 5 | SeptState.PENDING for pfn in (61, 64, 66, 68)]
