"""A vCPU's TLB: the last few translations it used. Stale entries are really used, so a missing flush shows."""

from __future__ import annotations

from cvmcore.pages import Sel, array_of, count, part

ENTRIES = 16


class Tlb:
    """Translations by (gfn, private): (pfn, writable), least recently used first."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, bool], tuple[int, bool]] = {}

    def hits(self, gfns: Sel, write: bool, private: bool) -> list[tuple[int, int]]:
        """(position in the batch, pfn) of the gfns that the TLB translates, in order."""
        if not self.entries:
            return []
        found = []
        n = count(gfns)
        if isinstance(gfns, slice):
            for (gfn, kind), (pfn, writable) in self.entries.items():
                if kind == private and gfns.start <= gfn < gfns.stop and (writable or not write):
                    found.append((gfn - gfns.start, pfn))
        else:
            for (gfn, kind), (pfn, writable) in self.entries.items():
                if kind == private and (writable or not write):
                    at = int(gfns.searchsorted(gfn))
                    if at < n and gfns[at] == gfn:
                        found.append((at, pfn))
        return sorted(found)

    def fill(self, gfns: Sel, pfns: Sel, write: bool, private: bool) -> None:
        """The batch was translated: its last pages stay. write: the entries allow writing."""
        n = count(gfns)
        low = max(0, n - ENTRIES)
        entries = self.entries
        for gfn, pfn in zip(
            array_of(part(gfns, low, n)).tolist(), array_of(part(pfns, low, n)).tolist(), strict=True
        ):
            entries.pop((gfn, private), None)
            entries[gfn, private] = (pfn, write)
        while len(entries) > ENTRIES:
            del entries[next(iter(entries))]

    def flush(self, start: int, end: int) -> None:
        """Drop translations of gfns [start, end)."""
        if self.entries:
            for key in [key for key in self.entries if start <= key[0] < end]:
                del self.entries[key]

    def drop_frames(self, pfns: Sel) -> None:
        """Drop translations to these frames."""
        gone = set(array_of(pfns).tolist())
        for key in [key for key, (pfn, _) in self.entries.items() if pfn in gone]:
            del self.entries[key]

    def drop(self, gfns: Sel) -> None:
        """Drop translations of these gfns."""
        for private in (False, True):
            for at, _ in self.hits(gfns, False, private):
                gfn = int(array_of(part(gfns, at, at + 1))[0])
                self.entries.pop((gfn, private), None)
