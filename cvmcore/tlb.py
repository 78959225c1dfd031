"""A vCPU's TLB: the last few translations it used. Stale entries are really used, so a missing flush shows."""

from __future__ import annotations

from collections.abc import Iterable

from cvmcore.pages import Sel, count, each, first, last, part

ENTRIES = 16


class Tlb:
    """Translations by (gfn, private): (pfn, writable), least recently used first."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, bool], tuple[int, bool]] = {}

    def hits(self, gfns: Sel, write: bool, private: bool) -> list[tuple[int, int]]:
        """(position in the batch, pfn) of the gfns that the TLB translates, in order."""
        entries = self.entries
        if not entries:
            return []
        places: Iterable[tuple[int, int]]
        if count(gfns) <= ENTRIES:
            places = enumerate(each(gfns))
        else:
            low, high = first(gfns), last(gfns)
            known = sorted(gfn for gfn, kind in entries if kind == private and low <= gfn <= high)
            if isinstance(gfns, slice):
                places = [(gfn - low, gfn) for gfn in known]
            else:
                places = zip(gfns.searchsorted(known).tolist(), known, strict=True)
                places = [(at, gfn) for at, gfn in places if gfns[at] == gfn]
        found = []
        for at, gfn in places:
            entry = entries.get((gfn, private))
            if entry is not None and (entry[1] or not write):
                found.append((at, entry[0]))
        return found

    def fill(self, gfns: Sel, pfns: Sel, write: bool, private: bool) -> None:
        """The batch was translated: its last pages stay. write: the entries allow writing."""
        n = count(gfns)
        if n > ENTRIES:
            gfns, pfns = part(gfns, n - ENTRIES, n), part(pfns, n - ENTRIES, n)
        entries = self.entries
        for gfn, pfn in zip(each(gfns), each(pfns), strict=True):
            entries.pop((gfn, private), None)
            entries[gfn, private] = pfn, write
        while len(entries) > ENTRIES:
            del entries[next(iter(entries))]

    def flush(self, start: int, end: int) -> None:
        """Drop translations of gfns [start, end)."""
        if self.entries:
            for key in [key for key in self.entries if start <= key[0] < end]:
                del self.entries[key]

    def drop_frames(self, pfns: Sel) -> None:
        """Drop translations to these frames."""
        gone = set(each(pfns))
        for key in [key for key, (pfn, _) in self.entries.items() if pfn in gone]:
            del self.entries[key]

    def drop(self, gfns: Sel) -> None:
        """Drop translations of these gfns."""
        for private in (False, True):
            for at, _ in self.hits(gfns, False, private):
                self.entries.pop((first(part(gfns, at, at + 1)), private), None)
