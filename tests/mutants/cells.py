"""Table cells of the vendors' state machines, each changed by itself, mechanically.

A cell that KVM never comes to (migration, FF-A, states of a running export) is `below_kvm`: only the vendor's own tests
of its hardware can tell.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import attrs

RMP_TESTS = ("plugins/sev/tests/test_rmp.py",)
SEPT_TESTS = tuple(f"plugins/tdx/tests/test_{name}.py" for name in ("sept_cells", "guest", "error_order"))
EL2_TESTS = ("plugins/pkvm/tests/test_hw_transitions.py",)


@attrs.frozen
class Cell:
    """One cell: `table` of a module, at `path`, is changed as `change` says."""

    name: str
    backend: str
    module: str
    table: str
    path: tuple[Any, ...]
    change: str
    tests: tuple[str, ...]
    below_kvm: bool = False


def _rmp() -> Iterator[Cell]:
    """Each check of each RMP instruction lets pass what it should stop."""
    hw = importlib.import_module("cvmcore_sev.hw")
    for table in (f"{name}_CHECKS" for name in ("RMPUPDATE", "PSMASH", "PVALIDATE", "ACCESS", "RMPADJUST", "VMRUN")):
        for i, (fact, _) in enumerate(getattr(hw, table)):
            name = f"rmp {table.removesuffix('_CHECKS').lower()}: lets pass '{fact}'"
            yield Cell(name, "snp", "cvmcore_sev.hw", table, (i,), "pass", RMP_TESTS, True)


def _sept() -> Iterator[Cell]:
    """Each allowed state of each leaf refused."""
    hw = importlib.import_module("cvmcore_tdx.hw")
    usual = {
        "PAGE_ADD": ("FREE",), "SEPT_ADD": ("FREE",), "PAGE_AUG": ("FREE",), "RANGE_BLOCK": ("MAPPED", "PENDING"),
        "PAGE_REMOVE": ("BLOCKED", "PENDING_BLOCKED"),
    }  # fmt: skip
    for table in ("PAGE_ADD", "SEPT_ADD", "PAGE_AUG", "RANGE_BLOCK", "RANGE_UNBLOCK", "PAGE_RELOCATE", "PAGE_DEMOTE",
                  "PAGE_PROMOTE", "PAGE_REMOVE", "SEPT_REMOVE"):  # fmt: skip
        for state in getattr(hw, table).next:
            common = state.name in usual.get(table, ())
            name = f"sept {table.lower()}: not from {state.name}"
            yield Cell(name, "tdx", "cvmcore_tdx.hw", table, (state.name,), "refuse", SEPT_TESTS, not common)


def _el2() -> Iterator[Cell]:
    """The host's state after each transition is another one."""
    hw = importlib.import_module("cvmcore_pkvm.hw")
    for table in hw.TRANSITIONS:
        for side in (0, 1, 2):
            if hw.TRANSITIONS[table].after[side] is not None:
                who = ("host", "hyp", "guest")[side]
                name = f"el2 {table}: wrong {who} state after"
                yield Cell(name, "pkvm", "cvmcore_pkvm.hw", "TRANSITIONS", (table, side), "after", EL2_TESTS, True)


def load() -> tuple[Cell, ...]:
    """All cells. Imports the vendors' modules: not in a process that is to run bugs."""
    return (*_rmp(), *_sept(), *_el2())


def apply(cell: Cell) -> None:
    """Change the cell, in this process."""
    hw = importlib.import_module(cell.module)
    table = getattr(hw, cell.table)
    if cell.change == "pass":
        rows = tuple((fact, code if i != cell.path[0] else type(code)(0)) for i, (fact, code) in enumerate(table))
        setattr(hw, cell.table, rows)
    elif cell.change == "refuse":
        state = next(s for s in table.next if s.name == cell.path[0])
        wrong = attrs.evolve(table, next={s: n for s, n in table.next.items() if s is not state})
        for field in ("nexts", "deltas", "statuses", "allowed"):
            object.__setattr__(table, field, getattr(wrong, field))
    else:
        name, side = cell.path
        old = table[name]
        states = list(hw.PageState)
        after = list(old.after)
        after[side] = states[(states.index(after[side]) + 1) % 4]
        table[name] = attrs.evolve(old, after=tuple(after))
