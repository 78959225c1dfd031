"""Page state changes: what an SNP guest asks through the GHCB, and how KVM turns it into exits to user space.

Two forms: one page by the GHCB's MSR (snp_begin_psc_msr), or up to 253 entries in a shared buffer (snp_begin_psc).
Neither touches the RMP: user space answers with KVM_SET_MEMORY_ATTRIBUTES. Sources: GHCB specification 4.1.6 and 2.3.1;
kernel: arch/x86/kvm/svm/sev.c.
"""

from __future__ import annotations

from typing import Final

import attrs
import numpy as np

from cvmcore.pages import Sel, array_of, contiguous
from cvmcore.types import PAGES_2M

PRIVATE, SHARED, PSMASH, UNSMASH = 1, 2, 3, 4
"""Operations of a page state change; KVM passes over the last two."""
MAX_ENTRIES: Final = 253
ERROR_INVALID_HEADER: Final = 1 << 32 | 1
ERROR_INVALID_ENTRY: Final = 1 << 32 | 2
ERROR_GENERIC: Final = 0x100 << 32
"""SW_EXITINFO2 of a request that ended badly; 0: all done."""
MSR_REQUEST, MSR_RESPONSE = 0x014, 0x015


@attrs.define
class Entry:
    """One entry of the buffer. cur_page: 4K pages of it that are done."""

    gfn: int
    operation: int
    large: bool = False
    cur_page: int = 0

    @property
    def npages(self) -> int:
        return PAGES_2M if self.large else 1


@attrs.define
class Buffer:
    """The guest's buffer: entries cur_entry to end_entry, both included, are to be done."""

    entries: list[Entry]
    cur_entry: int = 0
    end_entry: int = 0


@attrs.frozen
class MapRange:
    """An exit to user space, KVM_HC_MAP_GPA_RANGE: so many pages, and which entries they are."""

    gfn: int
    npages: int
    private: bool
    first_entry: int = 0
    nr_entries: int = 0


def begin(buffer: Buffer, exit_enabled: bool = True) -> MapRange | int:
    """The next exit that a buffer takes (snp_begin_psc), or the result that the guest gets: 0, or ERROR_*.

    Fresh entries behind each other, of one operation and size, become one exit; the rest of a 2M entry that is half
    done is handled in 4K. exit_enabled: user space has asked for the hypercall (KVM_CAP_EXIT_HYPERCALL).
    """
    if not exit_enabled:
        return ERROR_GENERIC
    while True:
        if buffer.end_entry >= MAX_ENTRIES:
            return ERROR_INVALID_HEADER
        found = _next(buffer)
        if isinstance(found, int):
            return found
        if found[1] in (PRIVATE, SHARED):
            return found[0]
        complete(buffer, found[0])


def _next(buffer: Buffer) -> tuple[MapRange, int] | int:
    """The next range that is not done, with its operation; a result where there is none."""
    at, stop = buffer.cur_entry, buffer.end_entry + 1
    while at < stop:
        entry = buffer.entries[at]
        if entry.cur_page > entry.npages or entry.gfn % entry.npages:
            return ERROR_INVALID_ENTRY
        if entry.cur_page < entry.npages:
            break
        at = buffer.cur_entry = at + 1
    if at >= stop:
        return 0
    start, large = entry.gfn + entry.cur_page, entry.large and not entry.cur_page
    npages, n = entry.npages - entry.cur_page, 1
    for other in buffer.entries[at + 1 : stop]:
        behind = other.gfn == entry.gfn + npages and other.operation == entry.operation
        if not behind or other.cur_page or other.large != large:
            break
        npages, n = npages + other.npages, n + 1
    return MapRange(start, npages, entry.operation == PRIVATE, at, n), entry.operation


def complete(buffer: Buffer, done: MapRange, ret: int = 0) -> int | None:
    """User space has answered an exit: None, and `begin` goes on; ERROR_GENERIC where it failed (nothing is marked)."""
    if ret:
        return ERROR_GENERIC
    stop = done.first_entry + done.nr_entries
    for entry in buffer.entries[done.first_entry : stop]:
        entry.cur_page = entry.npages
    buffer.cur_entry = stop
    return None


def begin_msr(request: int, exit_enabled: bool = True) -> MapRange | int:
    """The exit that a request by the MSR takes (snp_begin_psc_msr), or at once the response with its error."""
    gfn, operation = request >> 12 & (1 << 40) - 1, request >> 52 & 0xF
    if operation not in (PRIVATE, SHARED) or not exit_enabled:
        return msr_response(1)
    return MapRange(gfn, 1, operation == PRIVATE)


def msr_response(ret: int) -> int:
    """The MSR's value after a request: 0x015, with an error code in bits 63:32."""
    return int(bool(ret)) << 32 | MSR_RESPONSE


def split_2m(gfns: Sel) -> tuple[Sel, Sel]:
    """Heads of the whole 2M blocks in a run, and the 4K pages beside them; scattered pages are all 4K."""
    empty = slice(0, 0, 1)
    if not isinstance(gfns, slice):
        return empty, gfns
    low, high = -(-gfns.start // PAGES_2M) * PAGES_2M, gfns.stop // PAGES_2M * PAGES_2M
    if high <= low:
        return empty, gfns
    rest = np.concatenate([np.arange(gfns.start, low), np.arange(high, gfns.stop)])
    return slice(low, high, PAGES_2M), contiguous(rest)


def fill(gfns: Sel) -> tuple[int, int]:
    """(entries, exits) of the buffers that a guest fills to convert these pages, in order, in pages as large as fit."""
    large, small = split_2m(gfns)
    heads = np.concatenate([array_of(large), array_of(small)])
    size = np.ones(len(heads), np.int64)
    size[: len(array_of(large))] = PAGES_2M
    order = np.argsort(heads, kind="stable")
    heads, size = heads[order], size[order]
    begins = np.ones(len(heads), bool)
    begins[1:] = (heads[1:] != heads[:-1] + size[:-1]) | (size[1:] != size[:-1])
    begins[::MAX_ENTRIES] = True
    return len(heads), int(np.count_nonzero(begins))
