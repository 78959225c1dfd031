"""Addresses to gfns: dense, in order of first touch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cvmcore.traces.chunks import Counts, Pages

_PIECE = 1 << 12
"""Groups of pages that are looked through at once."""


class DenseGfns:
    """Gives pages their gfns: 0, 1, 2, ... in the order of first touch.

    A page table of one level: sorted numbers of 64-page groups, and for each group a row of a table with gfn + 1
    (0: not seen yet). Memory: 256 bytes for each group in which a page was touched.
    """

    _ORDER = 6

    def __init__(self) -> None:
        self.nr_gfns = 0
        self._groups: Pages = np.zeros(0, np.uint64)
        self._rows: Counts = np.zeros(0, np.int64)
        self._table: npt.NDArray[np.uint32] = np.zeros(0, np.uint32)

    def map(self, pages: Pages) -> Counts:
        """The gfns (int64) of pages (uint64, any order, with repetitions). New pages get the next gfns."""
        if len(pages) == 0:
            return np.zeros(0, np.int64)
        groups = pages >> np.uint64(self._ORDER)
        places = np.searchsorted(self._groups, groups)
        if len(self._groups) == 0 or np.count_nonzero(
            unknown := self._groups.take(places, mode="clip") != groups
        ):
            self._add_groups(np.unique(groups if len(self._groups) == 0 else groups[unknown]))
            places = np.searchsorted(self._groups, groups)
        cells = (self._rows.take(places) << self._ORDER) + (pages & np.uint64((1 << self._ORDER) - 1)).astype(np.int64)
        gfns = self._table.take(cells)
        new = np.flatnonzero(gfns == 0)
        if len(new):
            new_cells, first_touch = np.unique(cells[new], return_index=True)
            in_order = np.argsort(first_touch)
            numbers = np.arange(self.nr_gfns + 1, self.nr_gfns + 1 + len(new_cells), dtype=np.uint32)
            self._table[new_cells[in_order]] = numbers
            self.nr_gfns += len(new_cells)
            gfns[new] = self._table.take(cells[new])
        return gfns.astype(np.int64) - 1

    def known(self, start: int, stop: int) -> Iterator[Counts]:
        """The gfns (int64, sorted) of those of the pages [start, stop) that were mapped, in pieces."""
        in_group = np.arange(1 << self._ORDER, dtype=np.uint64)
        ends = np.array([start >> self._ORDER, stop >> self._ORDER], np.uint64)
        first, last = np.searchsorted(self._groups, ends).tolist()
        last = min(last + 1, len(self._groups))
        for low in range(first, last, _PIECE):
            some = slice(low, min(low + _PIECE, last))
            pages = (self._groups[some, None] << np.uint64(self._ORDER)) + in_group
            gfns = self._table.reshape(-1, 1 << self._ORDER)[self._rows[some]]
            inside = (pages >= np.uint64(start)) & (pages < np.uint64(stop)) & (gfns != 0)
            yield np.sort(gfns[inside].astype(np.int64) - 1)

    def _add_groups(self, groups: Pages) -> None:
        nr_rows = len(self._rows)
        places = np.searchsorted(self._groups, groups)
        self._groups = np.insert(self._groups, places, groups)
        self._rows = np.insert(self._rows, places, np.arange(nr_rows, nr_rows + len(groups)))
        needed = (nr_rows + len(groups)) << self._ORDER
        if needed > len(self._table):
            table = np.zeros(max(needed, 2 * len(self._table)), np.uint32)
            table[: len(self._table)] = self._table
            self._table = table
