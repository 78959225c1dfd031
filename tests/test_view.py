"""A VM that is looked at again and again: what was found in order is not looked at again before it has changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import MEDIATED, MIRROR, Box

from cvmcore.backend import Backend
from cvmcore.backends.swprot import SWPROT
from cvmcore.errors import InvariantViolation
from cvmcore.testing import machine
from cvmcore.testing.invariants import INVARIANTS, Checker, When, check
from cvmcore.testing.state import _MADE_OF, PARTS, State, View
from cvmcore.types import Use

READ = {
    "roots": ("tables",), "mirror": ("tables",), "external": ("tables",), "mirror_tables": ("tables",),
    "kinds": ("tables",), "direct": ("tables",), "mapped": ("tables",), "reaching": ("tables",),
    "slots": ("slots",), "slot_of": ("slots",), "owners": ("tables", "slots"),
    "is_private": ("attributes",), "backing": ("slots", "backing"), "inodes": ("backing",), "mappings": ("backing",),
    "frames.use": ("use",), "frames.pins": ("pins",), "vm.slots": ("slots",), "vm.gmem_files": ("files",),
    "vm.users": ("files",), "vm.destroyed": ("files",), "vm.vcpus": ("tlbs",), "vm.tdp": ("tables",),
    "vm.arch": ("trusted",), "vm.id": (), "vm.host": (), "caps": (), "host": (), "vm": (), "frames": (), "vm.dead": (),
}  # fmt: skip
"""What a row may ask a state for, and the parts that it then reads. Which leaves are private, an attribute may say. A
VM that is dead stays so, and less is asked of it."""


class Watched:
    """A state, or a part of one, that says what it was asked for."""

    def __init__(self, target: Any, asked: set[str], prefix: str = "") -> None:
        self.__dict__.update(_target=target, _asked=asked, _prefix=prefix)

    def __getattr__(self, name: str) -> Any:
        self._asked.add(self._prefix + name)
        found = getattr(self._target, name)
        return Watched(found, self._asked, f"{name}.") if name in ("vm", "frames") else found


@pytest.mark.parametrize("backend", [SWPROT, MIRROR, MEDIATED], ids=lambda backend: backend.name)
def test_rows_read_the_parts_that_they_name(backend: Backend) -> None:
    """A row that is looked at again only where its parts have changed asks for nothing else."""
    box = Box(backend, 64)
    box.touch(slice(0, 32, 1))
    for row in INVARIANTS:
        if row.when in (When.ANY, When.QUIET) and row.reads is not None and row.needs(box.vm.caps):
            asked: set[str] = set()
            row.check(Watched(State(box.vm), asked))
            assert {part for name in asked for part in READ[name]} <= set(row.reads) <= PARTS.keys(), row.text


def test_a_view_has_what_a_fresh_look_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each call of the state machine: what was kept of looks before equals what is made anew."""
    looked = Checker.check
    kept = 0

    def compare(self: Checker, vm: Any, *, quiet: bool = True) -> State:
        nonlocal kept
        state = looked(self, vm, quiet=quiet)
        fresh = State(vm)
        for name in (name for names in _MADE_OF.values() for name in names if name in state.__dict__):
            kept += 1
            assert plain(getattr(state, name)) == plain(getattr(fresh, name)), name
        check(vm, quiet=quiet)
        return state

    monkeypatch.setattr(Checker, "check", compare)
    for backend in (SWPROT, MIRROR):
        machine.run_machine(backend, backing="2m", examples=6, steps=32, shrink=False)
    assert kept > 1000


def plain(value: Any) -> Any:
    """A value as something that == compares."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if type(value).__name__ == "Leaves":
        return [plain(getattr(value, name)) for name in ("gfn", "pfn", "level", "writable", "private")]
    return value


def test_what_changes_twice_is_looked_at_again() -> None:
    """There and back again between two looks, with another part changed meanwhile."""
    box = Box(SWPROT, 64)
    box.touch(slice(0, 8, 1))
    view, use, pfn = View(box.vm), box.host.frames.use, box.pfn(3)
    check(box.vm, view=view)
    check(box.vm, view=view)

    use[pfn] = Use.FREE
    for _ in range(2):  # what failed is not taken as found in order
        with pytest.raises(InvariantViolation, match=r"invariant (5|16):"):
            check(box.vm, view=view)
    use[pfn] = Use.GMEM
    check(box.vm, view=view)

    use[box.pfn(4)] = Use.FREE
    with pytest.raises(InvariantViolation, match=r"invariant (5|16):"):
        check(box.vm, view=view)
