"""The host's page allocator: who uses each frame, its long-term pins, and what leaked.

Always the lowest free frame is allocated (tables and the trusted party's structures: the highest, as the kernel keeps
unmovable pages apart). So the order of frees does not matter, a batch gets the same frames as its pages one by one,
sequential guests get contiguous frames, and large pages come by themselves.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cvmcore.errors import InvariantViolation, UapiError
from cvmcore.pages import EMPTY, Sel, array_of, contiguous, count, expand, first, last, take, where, zeros
from cvmcore.types import Use

_WINDOW = 4096


class Frames:
    """All frames of the machine. pfn 0 is never handed out, so that a zero word can mean: no frame."""

    def __init__(self, nr_frames: int) -> None:
        self.nr_frames = nr_frames
        self.use: npt.NDArray[np.uint8] = zeros(nr_frames, np.uint8)
        self.pins: npt.NDArray[np.uint16] = zeros(nr_frames, np.uint16)
        self.use[0] = Use.META
        self.leaks: list[tuple[str, Sel]] = []
        self.failed: set[int] = set()
        """Frames whose memory failed: whoever gives one up, it is not handed out again."""
        self.in_use = 0
        self.peak = 0
        self.top = 1
        """No page of a guest or a process was ever handed out from here on."""
        self.pins_taken = 0
        """Pins taken so far."""
        self.pinned_pages = 0
        """4K pages that they covered."""
        self.pins_held = 0
        """4K pages that are held by pins now, each as often as it is pinned."""
        self.bottom = nr_frames
        """No table or structure was ever handed out below this one (and from `top` on)."""
        self.watch: Callable[[str, Sel, Use | None], None] | None = None
        """Told ("alloc", "free", "orphan", "leak", "pin" or "unpin", frames, their new use), where somebody listens."""
        self._high = nr_frames  # every frame from here on is in use
        self._hint = 1  # every frame below is in use
        self._block_hint = 1  # no block below is wholly free

    @property
    def available(self) -> int:
        """Free frames."""
        return self.nr_frames - 1 - self.in_use

    # ---- allocation -------------------------------------------------------------------------------------------

    def alloc(self, n: int, use: int, align_order: int = 0) -> Sel:
        """The n lowest free frames, ascending. Raises UapiError(ENOMEM) where there are not so many; nothing is taken.

        With align_order 9: the heads of the lowest wholly free blocks of 512 frames, n of them or as many as there are.
        """
        if n == 0:
            return EMPTY
        if align_order:
            pfns = self._alloc_blocks(n, use, align_order)
        elif use in (Use.TABLE, Use.META):
            pfns = self._alloc_high(n, use)
        else:
            pfns = self._alloc_low(n, use)
        if self.watch:
            self.watch("alloc", expand(pfns, align_order), Use(use))
        return pfns

    def _alloc_low(self, n: int, use: int) -> Sel:
        found: list[npt.NDArray[np.int64]] = []
        missing, start = n, self._hint
        while missing:
            if start >= self.nr_frames:
                raise UapiError(errno.ENOMEM, "alloc_pages", f"the host has no {n} free frames")
            stop = min(self.nr_frames, start + (n if start == self._hint else max(missing, _WINDOW)))
            window = self.use[start:stop]
            if start == self._hint and stop - start == n and not np.count_nonzero(window):
                window[:] = use
                self._hint = stop
                self._taken(n, stop)
                return slice(start, stop, 1)
            free = np.flatnonzero(window == 0)[:missing]
            if len(free):
                found.append(free + start)
                missing -= len(free)
            start = stop
        pfns = contiguous(np.concatenate(found))
        self.use[pfns] = use
        self._hint = last(pfns) + 1
        self._taken(n, last(pfns) + 1)
        return pfns

    def _alloc_high(self, n: int, use: int) -> Sel:
        found: list[npt.NDArray[np.int64]] = []
        missing, stop = n, self._high
        while missing:
            if stop <= 1:
                raise UapiError(errno.ENOMEM, "alloc_pages", f"the host has no {n} free frames")
            start = max(1, stop - max(missing, 64))
            free = np.flatnonzero(self.use[start:stop] == 0)[-missing:]
            if len(free):
                found.insert(0, free + start)
                missing -= len(free)
            stop = start
        pfns = contiguous(np.concatenate(found))
        self.use[pfns] = use
        self._high = first(pfns)
        self.bottom = min(self.bottom, first(pfns))
        self._taken(n, 0)
        return pfns

    def _taken(self, n: int, top: int) -> None:
        self.in_use += n
        self.peak = max(self.peak, self.in_use)
        self.top = max(self.top, top)

    def _alloc_blocks(self, n: int, use: int, order: int) -> Sel:
        size = 1 << order
        heads: list[int] = []
        block = self._block_hint
        while len(heads) < n:
            head = block << order
            if head + size > self.nr_frames:
                break
            if not np.count_nonzero(self.use[head : head + size]):
                self.use[head : head + size] = use
                heads.append(head)
            block += 1
        self._block_hint = block
        self._taken(len(heads) << order, block << order)
        return contiguous(np.array(heads, np.int64), size)

    def free(self, pfns: Sel) -> None:
        """Give frames back to the host. A frame with pins stays, ownerless, until the last pin is dropped; one that was
        leaked stays so."""
        if not count(pfns):
            return
        used = take(self.use, pfns)
        if self.leaks and np.count_nonzero(used == Use.LEAKED):
            pfns = where(pfns, used != Use.LEAKED)
            used = take(self.use, pfns)
        if np.count_nonzero((used == Use.FREE) | (used >= Use.ORPHAN)):
            bad = where(pfns, (used == Use.FREE) | (used >= Use.ORPHAN))
            raise InvariantViolation(
                "a frame is freed that is not in use", pfn=first(bad), states={"use": Use(int(self.use[first(bad)]))}
            )
        if not count(pfns):
            return
        pinned = take(self.pins, pfns) != 0
        if np.count_nonzero(pinned):
            self.use[where(pfns, pinned)] = Use.ORPHAN
            if self.watch:
                self.watch("orphan", where(pfns, pinned), Use.ORPHAN)
            pfns = where(pfns, ~pinned)
            if not count(pfns):
                return
        self._release(pfns)

    def _release(self, pfns: Sel) -> None:
        if self.failed:
            failed = np.isin(array_of(pfns), list(self.failed))
            if np.count_nonzero(failed):
                self.leak(where(pfns, failed), "its memory failed")
                pfns = where(pfns, ~failed)
                if not count(pfns):
                    return
        self.use[pfns] = Use.FREE
        if self.watch:
            self.watch("free", pfns, Use.FREE)
        self.in_use -= count(pfns)
        low = first(pfns) if isinstance(pfns, slice) else int(pfns.min())
        high = last(pfns) if isinstance(pfns, slice) else int(pfns.max())
        self._high = max(self._high, high + 1) if high >= self.bottom else self._high
        self._hint = min(self._hint, low)
        self._block_hint = max(1, min(self._block_hint, low >> 9))

    def fail(self, pfn: int) -> None:
        """The memory of a frame fails (SetPageHWPoison): its user keeps it, and nobody gets it afterwards."""
        self.failed.add(pfn)

    def leak(self, pfns: Sel, why: str) -> None:
        """Take frames out of circulation for good, and list them."""
        if count(pfns):
            self.use[pfns] = Use.LEAKED
            self.leaks.append((why, pfns if isinstance(pfns, slice) else pfns.copy()))
            if self.watch:
                self.watch("leak", pfns, Use.LEAKED)

    # ---- pins -------------------------------------------------------------------------------------------------

    def pin(self, pfns: Sel, order: int = 0) -> None:
        """One long-term pin (FOLL_LONGTERM) on each page of 2**order frames; pfns are their first frames.

        A pin of a large page holds all of its frames.
        """
        pages = expand(pfns, order)
        self.pins[pages] += np.uint16(1)
        self.pins_taken += count(pfns)
        self.pinned_pages += count(pages)
        self.pins_held += count(pages)
        if self.watch:
            self.watch("pin", pages, None)

    def unpin(self, pfns: Sel, order: int = 0) -> None:
        """Drop one pin of each page; a frame that only pins kept alive is freed. InvariantViolation without a pin."""
        pfns = expand(pfns, order)
        if not count(pfns):
            return
        pins = take(self.pins, pfns)
        if np.count_nonzero(pins) != len(pins):
            raise InvariantViolation("a frame is unpinned that is not pinned", pfn=first(where(pfns, pins == 0)))
        self.pins[pfns] -= np.uint16(1)
        self.pins_held -= count(pfns)
        if self.watch:
            self.watch("unpin", pfns, None)
        orphans = take(self.use, pfns) == Use.ORPHAN
        if np.count_nonzero(orphans):
            ownerless = where(pfns, orphans)
            gone = take(self.pins, ownerless) == 0
            if np.count_nonzero(gone):
                self._release(where(ownerless, gone))

    # ---- what is left -----------------------------------------------------------------------------------------

    def leaked(self) -> int:
        """Frames that leaked."""
        return sum(count(pfns) for _, pfns in self.leaks)

    def pins_leaked(self) -> int:
        """Pins of frames that leaked, as `pins_held` counts them."""
        if not self.leaks:
            return 0
        pages = np.unique(np.concatenate([array_of(pfns) for _, pfns in self.leaks]))
        return int(self.pins[pages].sum())

    def outstanding(self) -> dict[Use, int]:
        """Frames in use by what for; not leaked ones, nor pfn 0. Looks only where frames were handed out."""
        counts: dict[Use, int] = {}
        for low, high in ((1, self.top), (max(self.bottom, self.top), self.nr_frames)):
            for start in range(low, high, 1 << 22):
                part = self.use[start : min(start + (1 << 22), high)]
                for use, n in enumerate(np.bincount(part, minlength=7).tolist()):
                    if n and use not in (Use.FREE, Use.LEAKED):
                        counts[Use(use)] = counts.get(Use(use), 0) + n
        return counts
