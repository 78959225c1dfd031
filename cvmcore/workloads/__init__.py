"""What a workload is: a small function on the UAPI front plus guest actions.

An entry point of the group `cvmcore.workloads` names a `Workload`. Its `run` gets a `Context`: a machine that is set
up but not launched, its options, a seeded random generator, and ways to say what a person should know. What every
workload needs at its end (content check, private memory unreadable, teardown, nothing left behind) the runner does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import attrs
import numpy as np

from cvmcore.backend import Option
from cvmcore.errors import InputError
from cvmcore.guest import Guest, Machine, Progress, silent
from cvmcore.types import PG_LEVEL_4K, Capabilities

GROUP = "cvmcore.workloads"
MIB, GIB = 1 << 20, 1 << 30
PAGES_PER_MIB = 256

SLICE = 1 << 18
"""Pages that a workload hands over at once when it walks memory in order: often enough to show progress."""
BATCH = 1 << 17
"""Scattered pages that a workload hands over at once."""


def mapped_pages(machine: Machine) -> tuple[int, int]:
    """4K pages that the VM's page tables map: all of them, and those under leaves of 2M and more."""
    roots = machine.vm.vm.tdp.roots()
    mapped = sum(root.pages_mapped for root in roots)
    return mapped, mapped - sum(root.leaves[PG_LEVEL_4K] for root in roots)


class Skip(Exception):
    """The VM type lacks what the workload needs; raised by `Context.skip`, caught by the runner."""


@attrs.frozen
class Whole(Option):
    """An option that is a whole number from `low` to `high`."""

    low: int = attrs.field(default=0, kw_only=True)
    high: int = attrs.field(default=1 << 40, kw_only=True)

    def parse(self, text: str | int) -> int:
        """The number. Raises InputError where it is none, or out of range."""
        value = int(super().parse(text))
        if not self.low <= value <= self.high:
            raise InputError(f"option {self.name}: {value} is not from {self.low} to {self.high}")
        return value


@attrs.define(eq=False)
class Context:
    """What a workload works with.

    machine: one VM, set up and not yet launched. options: the declared ones, parsed. file: the FILE argument. rng:
    seeded. progress: tell it what is done. notes, figures and wrong end up in the report.
    """

    machine: Machine
    options: dict[str, Any]
    rng: np.random.Generator
    file: str | None = None
    progress: Progress = silent
    notes: list[str] = attrs.field(factory=list)
    figures: dict[str, int | float] = attrs.field(factory=dict)
    wrong: list[str] = attrs.field(factory=list)
    _turn: int = 0

    @property
    def guest(self) -> Guest:
        """What runs in the VM."""
        return self.machine.guest

    @property
    def caps(self) -> Capabilities:
        """What the VM type can and must do: the only thing to decide by."""
        return self.machine.vm.vm.caps

    @property
    def end_gfn(self) -> int:
        """The first gfn behind the guest's memory, which begins at 0."""
        return self.machine.end_gfn

    # ---- saying things ----------------------------------------------------------------------------------------

    def skip(self, reason: str) -> NoReturn:
        """End here: the VM type lacks a capability. The reason is shown in place of figures."""
        raise Skip(reason)

    def note(self, text: str) -> None:
        """Something that a reader of the figures should know."""
        self.notes.append(text)

    def fail(self, text: str) -> None:
        """Something is wrong: it is reported, and the exit code becomes 1."""
        self.wrong.append(text)

    def large_percent(self) -> float:
        """Percent of the mapped memory that pages of 2M and more map, now."""
        mapped, large = mapped_pages(self.machine)
        return round(100 * large / mapped, 1) if mapped else 0.0

    # ---- common steps -----------------------------------------------------------------------------------------

    @property
    def is_confidential(self) -> bool:
        """Whether the VM type tells private from shared memory at all."""
        return self.caps.private_by_attribute or self.caps.encrypts or self.caps.mediated_root

    def vcpu(self) -> int:
        """The vCPU whose turn it is: batches go round."""
        self._turn += 1
        return (self._turn - 1) % len(self.machine.vcpus)

    def portion(self, percent: int) -> int:
        """So many percent of the guest's pages, at least one."""
        return max(1, self.end_gfn * percent // 100)

    def need_pages(self, nr_pages: int, what: str) -> None:
        """InputError where the guest has less memory."""
        if nr_pages > self.end_gfn:
            raise InputError(
                f"{what} takes {-(-nr_pages // PAGES_PER_MIB)} MiB of guest memory, and --mem gives "
                f"{self.end_gfn // PAGES_PER_MIB} MiB"
            )

    def in_order(self, start: int, stop: int, text: str) -> Iterator[slice]:
        """gfns [start, stop) as slices, with progress."""
        for low in range(start, stop, SLICE):
            yield slice(low, min(low + SLICE, stop), 1)
            self.progress(min(low + SLICE, stop) - start, stop - start, text)

    def recover(self) -> None:
        """A pass of the recovery thread, where the policy `merge` has one."""
        vm = self.machine.vm.vm
        if vm.merge.has_thread:
            vm.recover_huge_pages()

    def populate(self, start: int, stop: int, private: bool = True) -> None:
        """The guest writes gfns [start, stop) in order."""
        for gfns in self.in_order(start, stop, "populate"):
            self.guest.write(gfns, self.vcpu(), private)

    def scattered(self, nr_pages: int, nr_chosen: int, order: int = 0) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """`nr_chosen` of the blocks of 2**order pages below `nr_pages`, by chance: block numbers, sorted, unique."""
        nr_blocks = nr_pages >> order
        return np.sort(self.rng.choice(nr_blocks, min(nr_chosen, nr_blocks), replace=False, shuffle=False))


@attrs.frozen
class Workload:
    """A workload, as an entry point names it.

    needs: names of `Capabilities` without which it is skipped. default_mem: guest memory in bytes where `--mem` is
    not given, or a function of FILE that says so. reads_file: whether it takes a FILE.
    """

    name: str
    summary: str
    run: Callable[[Context], None]
    options: tuple[Option, ...] = ()
    needs: tuple[str, ...] = ()
    default_mem: int | Callable[[str | None], int] = GIB
    reads_file: bool = False

    def mem_bytes(self, file: str | None) -> int:
        """Guest memory where the user names none."""
        return self.default_mem(file) if callable(self.default_mem) else self.default_mem
