"""What calls cost on this machine's kernel: each measurement is repeated, in nanoseconds per unit (see `MEASUREMENTS`).

The calls are made from Python; what an empty call costs is measured beside them and taken off.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable
from time import perf_counter_ns

from cvmcore.live import guest, layouts
from cvmcore.live.driver import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PAGE,
    Driver,
    Vcpu,
    _fallocate,
    _madvise,
    _munmap,
    mapped,
)

PAGES = 8192
"""Of a measurement that goes page by page: 32 MiB."""
BLOCK = 512

ALLOCATE, PUNCH = 1, 3


class Bench:
    """A VM with one guest_memfd slot of PAGES pages at gpa 0."""

    def __init__(self) -> None:
        self.driver = driver = Driver()
        self.vm = int(driver.do_create_vm(0)["fd"])
        self.file = int(driver.do_create_guest_memfd(self.vm, PAGES * PAGE, 3)["fd"])
        driver.do_set_user_memory_region2(self.vm, 0, 4, 0, PAGES * PAGE, 0, self.file, 0)
        self.vcpu_fd = int(driver.do_create_vcpu(self.vm, 0)["fd"])
        vcpu = driver.open[self.vcpu_fd]
        assert isinstance(vcpu, Vcpu)
        self.vcpu = vcpu
        self.empty_ns = self._empty()

    def _empty(self) -> float:
        start = perf_counter_ns()
        for _ in range(1000):
            _fallocate(-1, ALLOCATE, 0, PAGE)
        return (perf_counter_ns() - start) / 1000

    def _allocated(self) -> None:
        _fallocate(self.file, ALLOCATE, 0, PAGES * PAGE)

    def _emptied(self) -> None:
        _fallocate(self.file, PUNCH, 0, PAGES * PAGE)

    def _timed(self, n: int, work: Callable[[], object], calls: int = 1) -> float:
        start = perf_counter_ns()
        work()
        return max(0.0, perf_counter_ns() - start - calls * self.empty_ns) / n

    def _touch(self, at: int) -> None:
        """One byte of each page, in one go."""
        memory = memoryview((ctypes.c_char * (PAGES * PAGE)).from_address(at)).cast("B")
        memory[::PAGE] = bytes(PAGES)

    def allocate(self) -> float:
        """A page of one large fallocate."""
        self._emptied()
        return self._timed(PAGES, self._allocated)

    def host_touch(self) -> float:
        """The host's first touch of a page that is allocated and not yet cleared."""
        self._emptied()
        self._allocated()
        return self._touched(clear=False)

    def host_refault(self) -> float:
        """The host's touch of a page that is there, but no longer mapped."""
        return self._touched(clear=True)

    def _touched(self, clear: bool) -> float:
        at = mapped(PAGES * PAGE, self.file)
        try:
            if clear:
                self._touch(at)
                _madvise(at, PAGES * PAGE, 4)
            return self._timed(PAGES, lambda: self._touch(at))
        finally:
            _munmap(at, PAGES * PAGE)

    def punch_page(self) -> float:
        """A punch of one page that nobody maps."""
        self._allocated()

        def punch() -> None:
            for i in range(BLOCK):
                _fallocate(self.file, PUNCH, i * PAGE, PAGE)

        return self._timed(BLOCK, punch, BLOCK)

    def punch_block(self) -> float:
        """A punch of 512 pages that nobody maps."""
        self._emptied()
        self._allocated()

        def punch() -> None:
            for i in range(0, PAGES, BLOCK):
                _fallocate(self.file, PUNCH, i * PAGE, BLOCK * PAGE)

        return self._timed(PAGES // BLOCK, punch, PAGES // BLOCK)

    def memslot(self) -> float:
        """A memslot of 512 pages of ordinary memory made and deleted again: half of both."""
        at = mapped(BLOCK * PAGE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
        regions = [
            struct.pack(layouts.REGION2, 1, 0, 1 << 30, size, at, 0, 0, *[0] * 15)[: layouts.REGION_BYTES]
            for size in (BLOCK * PAGE, 0)
        ]  # fmt: skip

        def both() -> None:
            for region in regions:
                fcntl.ioctl(self.vm, layouts.KVM_SET_USER_MEMORY_REGION, region)

        try:
            return self._timed(2, both, 2)
        finally:
            _munmap(at, BLOCK * PAGE)

    def round_trip(self) -> float:
        """KVM_RUN to an MMIO exit and back (a read where no memslot is), its completion and registers left out."""
        total = 0.0
        times = 50
        for _ in range(times):
            self._list([REACH_NOTHING])
            total += self._timed(1, lambda: fcntl.ioctl(self.vcpu_fd, layouts.KVM_RUN, 0))
            self.vcpu.finish(self.vcpu_fd)
        return total / times

    def _list(self, gfns: list[int]) -> None:
        at = self.vcpu.vm.harness + guest.LIST_PAGE * PAGE
        words = struct.pack(f"<{len(gfns)}I", *gfns)
        ctypes.memmove(at, words, len(words))
        fcntl.ioctl(self.vcpu_fd, layouts.KVM_SET_REGS, guest.registers(len(gfns), None))

    def guest_touch(self) -> float:
        """The guest's first touch of a page that is allocated and cleared, and that the host does not map."""
        self._emptied()
        self._touched(clear=False)
        total = self._timed(PAGES, lambda: self.driver._run(self.vcpu_fd, list(range(PAGES)), None))
        again = self._timed(PAGES, lambda: self.driver._run(self.vcpu_fd, list(range(PAGES)), None))
        return max(0.0, total - again)


REACH_NOTHING = (1 << 20) - 1
"""A gfn without a memslot, the last that the guest reaches."""

MEASUREMENTS = (
    "allocate", "host_refault", "host_touch", "punch_page", "punch_block", "memslot", "round_trip", "guest_touch",
)  # fmt: skip


def measured(times: int) -> dict[str, list[float]]:
    """Each measurement so many times, sorted."""
    bench = Bench()
    try:
        return {name: sorted(getattr(bench, name)() for _ in range(times)) for name in MEASUREMENTS}
    finally:
        os.close(bench.file)
