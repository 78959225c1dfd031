"""What every format is read as: chunks of rows. And what the parsers share: errors, and numbers in text."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT
CHUNK_ROWS = 1 << 17

Pages: TypeAlias = npt.NDArray[np.uint64]
Counts: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


@attrs.frozen(eq=False)
class Chunk:
    """A piece of a trace, at most CHUNK_ROWS rows, in order.

    pages: page numbers (uint64). is_write: whether any of the row's accesses writes (bool). counts: how many accesses
    the row stands for (int64, at least 1): accesses that follow each other on one page are one row, and an access
    that crosses a page boundary counts for both pages. vcpus: who made them (int64), where the format tells it; then
    neighbours on one page are one row only if one vCPU made them. unmap: host virtual addresses [start, end) that the
    host took away after these rows, where the reader was asked to `keep_unmaps`.
    """

    pages: Pages
    is_write: Bools
    counts: Counts
    vcpus: Counts | None = None
    unmap: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.pages)

    @property
    def accesses(self) -> int:
        """Accesses that the chunk stands for."""
        return int(self.counts.sum())

    def part(self, start: int, stop: int | None = None) -> Chunk:
        """Rows [start, stop), without what came after them."""
        rows = slice(start, stop)
        vcpus = None if self.vcpus is None else self.vcpus[rows]
        return Chunk(self.pages[rows], self.is_write[rows], self.counts[rows], vcpus)

    def before(self, unmap: tuple[int, int]) -> Chunk:
        """The same rows, and behind them an unmap."""
        return attrs.evolve(self, unmap=unmap)


def joined(chunks: list[Chunk]) -> Chunk:
    """The rows of chunks of one trace as one chunk, without what came after them."""
    if len(chunks) == 1:
        return chunks[0].part(0)
    vcpus = [chunk.vcpus for chunk in chunks if chunk.vcpus is not None]
    return Chunk(
        np.concatenate([chunk.pages for chunk in chunks]),
        np.concatenate([chunk.is_write for chunk in chunks]),
        np.concatenate([chunk.counts for chunk in chunks]),
        np.concatenate(vcpus) if vcpus else None,
    )


def merge_runs(pages: Pages, is_write: Bools, vcpus: Counts | None = None) -> Chunk:
    """Single accesses as rows: neighbours on one page, by one vCPU, become one row."""
    if len(pages) == 0:
        return Chunk(pages, is_write, np.zeros(0, np.int64), vcpus)
    changes = pages[1:] != pages[:-1]
    if vcpus is not None:
        changes |= vcpus[1:] != vcpus[:-1]
    heads = np.flatnonzero(np.concatenate(([True], changes)))
    counts = np.diff(heads, append=len(pages))
    writes = np.logical_or.reduceat(is_write, heads)
    return Chunk(pages[heads], writes, counts, None if vcpus is None else vcpus[heads])


class BadLine(Exception):
    """The line at `index` of a block is not what it must be."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(what)
        self.index = index


class Format:
    """A parser of one format, for one reading of one trace.

    name: as messages say it. must_end: whether a last line without its newline means that the trace is cut.
    hint: what may be wrong where no access is found. header: what the trace says of itself. lines: how many were read.
    """

    name: ClassVar[str]
    must_end: ClassVar[bool] = False
    hint: ClassVar[str] = ""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self.lines = 0

    def parse(self, block: bytes) -> list[Chunk]:
        """What stands in whole lines (the last may lack its newline); counts them. Raises BadLine."""
        raise NotImplementedError

    @property
    def figures(self) -> dict[str, int]:
        """What was counted beside accesses, so far."""
        return {}

    @property
    def notes(self) -> list[str]:
        """What a reader of the result should know, in sentences."""
        return []


# ---- numbers in text ------------------------------------------------------------------------------------------

NEWLINE = ord("\n")
_PAD = 32
_HEX = bytes(int(chr(code), 16) if chr(code) in "0123456789abcdefABCDEF" else 0xFF for code in range(256))
_ONE_PER_BYTE = np.uint64(0x0101_0101_0101_0101)
_GATHER = np.uint64(0x0102_0408_1020_4080)
"""A number that has only the lowest bits of its bytes, times this, has them in its highest byte, in order."""
_LEADING_ZEROS = np.array([8 - number.bit_length() for number in range(256)], np.int64)


class Text:
    """Lines of text for array code: what stands at many places is read at once. Places are indexes of `bytes`, and may
    lie a little before or behind the lines.

    bytes: the text, the last line with its newline, between words that are no numbers. chars: the same as an array.
    line_starts, line_ends: where the lines are, without their newlines.
    """

    def __init__(self, lines: bytes) -> None:
        if not lines.endswith(b"\n"):
            lines += b"\n"
        self.bytes = b"".join((b". " * (_PAD // 2), lines, b" ." * (_PAD // 2)))
        self.chars = np.frombuffer(self.bytes, np.uint8)
        # Eight bytes from any place on: a load that need not be aligned.
        self._eight: npt.NDArray[Any] = np.ndarray((len(self.bytes) - 7,), ">u8", self.bytes, strides=(1,))
        self.line_ends = self._find_lines()
        self.line_starts = np.empty_like(self.line_ends)
        self.line_starts[0] = _PAD
        self.line_starts[1:] = self.line_ends[:-1] + 1

    def _find_lines(self) -> Counts:
        return np.flatnonzero(self.chars == NEWLINE)

    def line(self, index: int) -> bytes:
        """One line, without its newline."""
        return self.bytes[self.line_starts[index] : self.line_ends[index]]

    def stands_at(self, places: Counts, text: bytes) -> Bools:
        """Whether `text` stands at each place."""
        found = self._begins(places, text[:8])
        for offset in range(8, len(text), 8):
            found &= self._begins(places + offset, text[offset : offset + 8])
        return found

    def _begins(self, places: Counts, text: bytes) -> Bools:
        loaded, other_bits = self._eight[places], 64 - 8 * len(text)
        if other_bits:
            loaded >>= np.uint64(other_bits)
        same: Bools = loaded == np.uint64(int.from_bytes(text, "big"))
        return same

    def hexadecimal(self, places: Counts) -> tuple[Pages, Counts]:
        """The numbers (uint64) that up to 16 hex digits from each place on spell, and how many digits there are."""
        values, length = self._eight_digits(places)
        longer = np.flatnonzero(length == 8)
        if len(longer):
            low, more = self._eight_digits(places.take(longer) + 8)
            values[longer] = values.take(longer) << (more * 4).astype(np.uint64) | low
            length[longer] += more
        return values, length

    def decimal(self, places: Counts) -> tuple[Counts, Counts]:
        """The numbers (int64) that up to 8 decimal digits from each place on spell, and how many digits there are: 0
        where a hex digit is among them."""
        digits, length = self._eight_digits(places)
        values = np.zeros(len(places), np.int64)
        for n in range(int(length.max(initial=0))):
            digit = (digits >> np.uint64(4 * n) & np.uint64(15)).astype(np.int64)
            length[digit > 9] = 0
            values += digit * 10**n
        return values, length

    def hexadecimal_length(self, places: Counts) -> Counts:
        """How many hex digits stand from each place on, up to 16."""
        _, length = self._eight_nibbles(places)
        longer = np.flatnonzero(length == 8)
        if len(longer):
            length[longer] += self._eight_nibbles(places.take(longer) + 8)[1]
        return length

    def _eight_nibbles(self, places: Counts) -> tuple[Pages, Counts]:
        """Eight characters from each place on, in each byte what it is as a hex digit, and how many are one."""
        nibbles = np.frombuffer(self._eight[places].tobytes().translate(_HEX), ">u8").astype(np.uint64)
        strange = (nibbles >> np.uint64(7) & _ONE_PER_BYTE) * _GATHER >> np.uint64(56)
        return nibbles, _LEADING_ZEROS.take(strange.astype(np.int64))

    def _eight_digits(self, places: Counts) -> tuple[Pages, Counts]:
        """What up to eight hex digits from each place on spell, and how many they are."""
        nibbles, length = self._eight_nibbles(places)
        nibbles >>= (64 - 8 * length).astype(np.uint64)
        nibbles = (nibbles | nibbles >> np.uint64(4)) & np.uint64(0x00FF_00FF_00FF_00FF)
        nibbles = (nibbles | nibbles >> np.uint64(8)) & np.uint64(0x0000_FFFF_0000_FFFF)
        return (nibbles | nibbles >> np.uint64(16)) & np.uint64(0xFFFF_FFFF), length
