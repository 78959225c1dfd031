"""Memory traces of real programs, read as a stream: who touched which page, in order.

Two formats are read, told apart by their first lines; either may be gzipped, and `-` is standard input:

* what `valgrind --tool=lackey --trace-mem=yes --log-file=FILE PROGRAM` writes: one access a line, `I  ADDRESS,SIZE`
  (instruction), ` L` (load), ` S` (store) or ` M` (both), the address in hex; lines that begin with `==`, `--` or
  `**` are valgrind's own and are skipped;
* cvmcore's own JSONL. Line 1 is a header, an object with `"cvmcore_trace": 1`, optionally `"page_bytes"` (4096, the
  only size there is) and `"records"` (how many follow, so that a cut file is noticed); other fields describe the
  recording and are kept in `TraceReader.header`. Each further line is one record: `{"page": 16386, "op": "w", "n": 3}`
  where `page` is a page number (or hex in a string, "0x4002"), `op` is r (read), w (write) or x (instruction fetch)
  and `n` is how many accesses the record stands for (1 if absent, below 10**12). Fastest to read is the form that
  `reduce_trace` writes: the three fields in this order, no spaces.

Memory in use does not grow with the file: a block of text and a chunk of rows are all there is at a time.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, TypeAlias, cast

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.errors import InputError

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT
CHUNK_ROWS = 1 << 17
BLOCK_BYTES = 1 << 18
"""Text is read in blocks of this size: large enough for array code, small enough for the cache. No line is longer."""

Pages: TypeAlias = npt.NDArray[np.uint64]
Counts: TypeAlias = npt.NDArray[np.int64]
Progress: TypeAlias = Callable[[int, int | None], None]
"""Told (bytes of the file read so far, bytes in all or None where nobody knows)."""


@attrs.frozen(eq=False)
class Chunk:
    """A piece of a trace, at most CHUNK_ROWS rows, in order.

    pages: page numbers (uint64). is_write: whether any of the row's accesses writes (bool). counts: how many accesses
    the row stands for (int64, at least 1): accesses that follow each other on one page are one row, and an access
    that crosses a page boundary counts for both pages.
    """

    pages: Pages
    is_write: npt.NDArray[np.bool_]
    counts: Counts

    def __len__(self) -> int:
        return len(self.pages)

    @property
    def accesses(self) -> int:
        """Accesses that the chunk stands for."""
        return int(self.counts.sum())

    def part(self, start: int, stop: int | None = None) -> Chunk:
        """Rows [start, stop)."""
        rows = slice(start, stop)
        return Chunk(self.pages[rows], self.is_write[rows], self.counts[rows])


def _joined(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        np.concatenate([chunk.pages for chunk in chunks]),
        np.concatenate([chunk.is_write for chunk in chunks]),
        np.concatenate([chunk.counts for chunk in chunks]),
    )


class _BadLine(Exception):
    """The line at `index` of a block is not what it must be."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(what)
        self.index = index


# ---- lackey ---------------------------------------------------------------------------------------------------

_NEWLINE, _COMMA = ord("\n"), ord(",")
_KIND = {text: int.from_bytes(text, "little") for text in (b"I  ", b" L ", b" S ", b" M ")}
_CHATTER = (b"==", b"--", b"**")
_HEX = bytes(int(chr(code), 16) if chr(code) in "0123456789abcdefABCDEF" else 0xFF for code in range(256))
_LOW_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
_PAD = 16
_LONGEST_SIZE = 4


def _packed(nibbles: Pages) -> Pages:
    """Eight hex digits, one in each byte, as the number they spell."""
    nibbles = (nibbles | nibbles >> np.uint64(4)) & np.uint64(0x00FF_00FF_00FF_00FF)
    nibbles = (nibbles | nibbles >> np.uint64(8)) & np.uint64(0x0000_FFFF_0000_FFFF)
    return (nibbles | nibbles >> np.uint64(16)) & np.uint64(0xFFFF_FFFF)


def _parse_lackey(lines: bytes) -> Chunk:
    """The accesses in whole lines of lackey output. Raises _BadLine for the first line that is none.

    All lines at once: the three bytes of the kind are compared as one number, the up to sixteen hex digits before
    the comma are two unaligned loads, masked to the address's length.
    """
    text = b"".join((bytes(_PAD), lines, bytes(_PAD)))
    chars = np.frombuffer(text, np.uint8)
    digits = text.translate(_HEX)
    digit = np.frombuffer(digits, np.uint8)
    eight_digits: npt.NDArray[Any] = np.ndarray((len(digits) - 7,), ">u8", digits, strides=(1,))
    four_chars: npt.NDArray[Any] = np.ndarray((len(text) - 3,), "<u4", text, strides=(1,))

    ends = np.flatnonzero(chars == _NEWLINE)
    starts = np.empty_like(ends)
    starts[0] = _PAD
    starts[1:] = ends[:-1] + 1

    kind = four_chars[starts] & np.uint32(0xFF_FFFF)
    is_write = (kind == _KIND[b" S "]) | (kind == _KIND[b" M "])
    good = is_write | (kind == _KIND[b"I  "]) | (kind == _KIND[b" L "])

    comma = ends - 2
    unknown = np.flatnonzero(chars.take(comma) != _COMMA)
    for nr_digits in range(2, _LONGEST_SIZE + 1):
        if len(unknown) == 0:
            break
        here = ends[unknown] - (nr_digits + 1)
        found = chars.take(here) == _COMMA
        comma[unknown[found]] = here[found]
        unknown = unknown[~found]
    good[unknown] = False

    size = digit.take(ends - 1).astype(np.int64)
    good &= size < 10
    for nr_digits in range(2, _LONGEST_SIZE + 1):
        longer = np.flatnonzero(ends - comma > nr_digits)
        if len(longer) == 0:
            break
        next_digit = digit.take(ends[longer] - nr_digits).astype(np.int64)
        good[longer] &= next_digit < 10
        size[longer] += next_digit * 10 ** (nr_digits - 1)
    good &= (size > 0) & (size <= PAGE_BYTES)

    length = comma - starts - 3
    good &= (length > 0) & (length <= 16)
    length = np.clip(length, 0, 16)
    nibbles = eight_digits[comma - 8].astype(np.uint64) & _LOW_BYTES.take(np.minimum(length, 8))
    strange = nibbles
    address = _packed(nibbles)
    if np.count_nonzero(length > 8):
        nibbles = eight_digits[comma - 16].astype(np.uint64) & _LOW_BYTES.take(np.maximum(length - 8, 0))
        strange = strange | nibbles
        address |= _packed(nibbles) << np.uint64(32)
    good &= (strange & np.uint64(0xF0F0_F0F0_F0F0_F0F0)) == 0

    if np.count_nonzero(good) < len(good):
        for index in np.flatnonzero(~good).tolist():
            line = text[starts[index] : ends[index]]
            if line and not line.startswith(_CHATTER):
                raise _BadLine(index, "is not an access as valgrind's lackey writes it")
        is_write, address, size = is_write[good], address[good], size[good]

    pages = address >> np.uint64(PAGE_SHIFT)
    crosses = (address & np.uint64(PAGE_BYTES - 1)).astype(np.int64) + size > PAGE_BYTES
    if np.count_nonzero(crosses):
        twice = crosses + 1
        pages, is_write = pages.repeat(twice), is_write.repeat(twice)
        second = np.cumsum(twice)[crosses] - 1
        pages[second] += np.uint64(1)
    return _merge_runs(pages, is_write)


def _merge_runs(pages: Pages, is_write: npt.NDArray[np.bool_]) -> Chunk:
    """Single accesses as rows: neighbours on one page become one row."""
    if len(pages) == 0:
        return Chunk(pages, is_write, np.zeros(0, np.int64))
    heads = np.flatnonzero(np.concatenate(([True], pages[1:] != pages[:-1])))
    counts = np.diff(heads, append=len(pages))
    return Chunk(pages[heads], np.logical_or.reduceat(is_write, heads), counts)


# ---- cvmcore JSONL --------------------------------------------------------------------------------------------

_OPS = {"r": False, "w": True, "x": False}
_MAX_N = 10**12
_CANONICAL = re.compile(rb'(?:\{"page":(?:0|[1-9]\d{0,18}),"op":"[rwx]","n":[1-9]\d{0,11}\}\n)*+')
_TO_NUMBERS = bytes.maketrans(b",rwx", b" 010")
_NO_NUMBERS = b'{}":pageon'
_HEX_PAGE = re.compile(r"0[xX][0-9a-fA-F]{1,16}")


def _parse_record(line: bytes) -> tuple[int, bool, int]:
    """Page, is_write and count of one line. Raises ValueError that says what is wrong with it."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        raise ValueError("is not a JSON object") from None
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    unknown = sorted(record.keys() - {"page", "op", "n"})
    if unknown:
        raise ValueError(f"has a field '{unknown[0][:40]}', and a record has only page, op and n")
    page, op, n = record.get("page"), record.get("op"), record.get("n", 1)
    if isinstance(page, str) and _HEX_PAGE.fullmatch(page):
        page = int(page, 16)
    if type(page) is not int or not 0 <= page < 1 << 64:
        raise ValueError("has no page number of 64 bits in 'page'")
    if not isinstance(op, str) or op not in _OPS:
        raise ValueError("has none of r, w and x in 'op'")
    if type(n) is not int or not 0 < n < _MAX_N:
        raise ValueError("has no count from 1 to 10**12 - 1 in 'n'")
    return page, _OPS[op], n


def _parse_jsonl(lines: bytes) -> Chunk:
    """The records in whole lines. Raises _BadLine for the first line that is none."""
    if _CANONICAL.fullmatch(lines):
        table = np.fromstring(lines.translate(_TO_NUMBERS, _NO_NUMBERS).decode(), np.uint64, sep=" ").reshape(-1, 3)
        return Chunk(table[:, 0].copy(), table[:, 1] != 0, table[:, 2].astype(np.int64))
    rows: list[tuple[int, bool, int]] = []
    for index, line in enumerate(lines.split(b"\n")):
        if not line.strip():
            continue
        try:
            rows.append(_parse_record(line))
        except ValueError as error:
            raise _BadLine(index, str(error)) from None
    pages, is_write, counts = zip(*rows, strict=True) if rows else ((), (), ())
    return Chunk(np.array(pages, np.uint64), np.array(is_write, np.bool_), np.array(counts, np.int64))


# ---- the reader -----------------------------------------------------------------------------------------------


def _shown(line: bytes) -> str:
    """A line as an error message can show it: printable, and not long."""
    text = line[:60].decode("utf-8", "replace")
    return "'" + "".join(char if char.isprintable() else "?" for char in text) + ("...'" if len(line) > 60 else "'")


class _Counted:
    """A binary stream that knows how much was read from it, and that can be looked into before it is read."""

    def __init__(self, stream: BinaryIO) -> None:
        self.bytes_read = 0
        self._stream = stream
        self._ahead = b""

    def peek(self, n: int) -> bytes:
        self._ahead += self._stream.read(n - len(self._ahead))
        return self._ahead[:n]

    def read(self, n: int = -1) -> bytes:
        ahead, self._ahead = (self._ahead[:n], self._ahead[n:]) if n >= 0 else (self._ahead, b"")
        data = ahead + self._stream.read(n - len(ahead) if n >= 0 else -1)
        self.bytes_read += len(data)
        return data


class TraceReader:
    """An open trace: iterate over it, once, for its chunks. `file` None is standard input.

    name: the file as messages name it. format: `lackey` or `cvmcore`. header: the first line of a cvmcore trace,
    else empty. lines, rows, accesses: what was read so far.
    Iterating raises InputError, in one sentence with file and line, where the trace is not what it must be.
    """

    def __init__(self, file: BinaryIO | None, name: str, bytes_total: int | None, on_progress: Progress | None) -> None:
        if file is None and sys.stdin is None:
            raise InputError(f"{name}: is closed")
        self.name = name
        self.header: dict[str, Any] = {}
        self.lines = self.rows = self.accesses = 0
        self._file = file
        self._counted = _Counted(file or sys.stdin.buffer)
        self._bytes_total = bytes_total
        self._on_progress = on_progress
        gzipped = self._guarded(lambda: self._counted.peek(2)) == b"\x1f\x8b"
        self._text: Any = gzip.GzipFile(fileobj=self._counted) if gzipped else self._counted  # type: ignore[call-overload]
        self._blocks = self._whole_lines()
        self._first_block = next(self._blocks, b"")
        self.format = self._sniff()

    def __enter__(self) -> TraceReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self._file is not None:
            self._file.close()

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks of CHUNK_ROWS rows, the last one shorter."""
        waiting: list[Chunk] = []
        nr_waiting = 0
        for piece in self._pieces():
            self.rows += len(piece)
            self.accesses += piece.accesses
            waiting.append(piece)
            nr_waiting += len(piece)
            if nr_waiting >= CHUNK_ROWS:
                chunk = _joined(waiting)
                full = nr_waiting - nr_waiting % CHUNK_ROWS
                for start in range(0, full, CHUNK_ROWS):
                    yield chunk.part(start, start + CHUNK_ROWS)
                waiting, nr_waiting = [chunk.part(full)], nr_waiting - full
        if nr_waiting:
            yield _joined(waiting)
        self._check_end()

    def _pieces(self) -> Iterator[Chunk]:
        block, self._first_block = self._first_block, b""
        while block:
            yield self._parse(block)
            if self._on_progress is not None:
                self._on_progress(self._counted.bytes_read, self._bytes_total)
            block = next(self._blocks, b"")

    def _parse(self, block: bytes) -> Chunk:
        nr_lines = block.count(b"\n")
        if self.format == "lackey" and not block.endswith(b"\n"):
            raise InputError(f"{self.name}: line {self.lines + nr_lines + 1} has no end: the trace is truncated")
        try:
            chunk = _parse_lackey(block) if self.format == "lackey" else _parse_jsonl(block)
        except _BadLine as bad:
            text = _shown(block.split(b"\n")[bad.index])
            raise InputError(f"{self.name}: line {self.lines + bad.index + 1} {bad}: {text}") from None
        self.lines += nr_lines
        return chunk

    def _check_end(self) -> None:
        if self.rows == 0:
            hint = " (was valgrind run with --trace-mem=yes?)" if self.format == "lackey" else ""
            raise InputError(f"{self.name}: there is no memory access in it{hint}")
        records = self.header.get("records", self.rows)
        if records != self.rows:
            raise InputError(f"{self.name}: the header announces {records} records and {self.rows} are there")

    def _whole_lines(self) -> Iterator[bytes]:
        """The text in blocks that end where a line ends (the last one where the file does)."""
        rest = b""
        while data := self._guarded(lambda: self._text.read(BLOCK_BYTES)):
            block = rest + data
            cut = block.rfind(b"\n") + 1
            rest = block[cut:]
            if len(rest) > BLOCK_BYTES:
                line = self.lines + block[:cut].count(b"\n") + 1
                raise InputError(f"{self.name}: line {line} is longer than {BLOCK_BYTES} bytes: this is no trace")
            if cut:
                yield block[:cut]
        if rest:
            yield rest

    def _guarded(self, read: Callable[[], bytes]) -> bytes:
        """What is read, with the errors of files and compression as one sentence."""
        try:
            return read()
        except EOFError:
            raise InputError(f"{self.name}: the gzip data ends too early: the file is truncated") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{self.name}: the gzip data is damaged ({error})") from None
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {error.strerror or error}") from None

    def _sniff(self) -> str:
        """The format, from the first line that is not blank; a cvmcore header is taken off the first block."""
        block = self._first_block
        if not block:
            raise InputError(f"{self.name}: the file is empty")
        body = block.lstrip(b"\n")
        line, _, after = body.partition(b"\n")
        if line.lstrip().startswith(b"{"):
            self.header = self._parse_header(line)
            self.lines = block.count(b"\n") - after.count(b"\n")
            self._first_block = after or next(self._blocks, b"")
            return "cvmcore"
        if line.startswith(_CHATTER) or (line + b" ")[:3] in _KIND:
            return "lackey"
        raise InputError(
            f"{self.name}: neither output of valgrind's lackey nor a cvmcore trace; it begins with {_shown(line)}"
        )

    def _parse_header(self, line: bytes) -> dict[str, Any]:
        try:
            header = json.loads(line.decode())
        except (ValueError, RecursionError):
            raise InputError(f"{self.name}: the first line begins like JSON and is none: {_shown(line)}") from None
        version = header.get("cvmcore_trace")
        if version is None:
            raise InputError(f'{self.name}: no cvmcore trace: the first line has no "cvmcore_trace": {_shown(line)}')
        if type(version) is not int or version != 1:
            raise InputError(f"{self.name}: a cvmcore trace of version {json.dumps(version)[:40]}; only 1 can be read")
        if header.get("page_bytes", PAGE_BYTES) != PAGE_BYTES:
            raise InputError(f"{self.name}: page_bytes in the header is not {PAGE_BYTES}")
        records = header.get("records")
        if records is not None and (type(records) is not int or records < 0):
            raise InputError(f"{self.name}: records in the header is not a number of records")
        return dict(header)


def open_trace(path: str | Path, on_progress: Progress | None = None) -> TraceReader:
    """Open a trace, in either format, plain or gzipped; `-` is standard input.

    Raises InputError where the file cannot be read or is no trace.
    """
    if str(path) == "-":
        return TraceReader(None, "standard input", None, on_progress)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the reader
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        total = os.fstat(file.fileno()).st_size
        return TraceReader(file, str(path), total or None, on_progress)
    except BaseException:
        file.close()
        raise


# ---- addresses to gfns ----------------------------------------------------------------------------------------


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


# ---- reduction ------------------------------------------------------------------------------------------------


@attrs.frozen
class Reduction:
    """What `reduce_trace` wrote."""

    accesses: int
    records: int
    pages: int
    """Distinct pages."""


def _collapse(rows: Chunk, group: Counts) -> tuple[Chunk, int]:
    """One row for each page of each group (numbered upwards), in order of first touch; rows before the last group."""
    order = np.lexsort((rows.pages, group))
    pages, group = rows.pages[order], group[order]
    heads = np.flatnonzero(np.concatenate(([True], (pages[1:] != pages[:-1]) | (group[1:] != group[:-1]))))
    back = np.argsort(order[heads])
    collapsed = Chunk(
        pages[heads][back],
        np.logical_or.reduceat(rows.is_write[order], heads)[back],
        np.add.reduceat(rows.counts[order], heads)[back],
    )
    return collapsed, int(np.count_nonzero(group[heads] != group[-1]))


def _reduced(reader: TraceReader, window: int) -> Iterator[Chunk]:
    """The rows of a trace collapsed window by window; how it was cut into chunks makes no difference."""
    held: list[Chunk] = []  # the last window, not finished yet
    held_window = position = 0
    for chunk in reader:
        rows = _joined([*held, chunk])
        if window == 1:
            group = np.cumsum(np.concatenate(([False], rows.pages[1:] != rows.pages[:-1])))
        else:
            starts = np.cumsum(chunk.counts) - chunk.counts + (position - held_window * window)
            group = np.concatenate((np.zeros(len(rows) - len(chunk), np.int64), starts // window))
        collapsed, nr_finished = _collapse(rows, group)
        held = [collapsed.part(nr_finished)]
        held_window += int(group[-1])
        position += chunk.accesses
        if nr_finished:
            yield collapsed.part(0, nr_finished)
    yield from held


def _text(rows: Chunk) -> bytes:
    """Rows as records, in the form that is fastest to read."""
    fields = zip(rows.pages.tolist(), rows.is_write.tolist(), rows.counts.tolist(), strict=True)
    return "".join(f'{{"page":{page},"op":"{"rw"[write]}","n":{n}}}\n' for page, write, n in fields).encode()


@contextmanager
def _append(path: Path, gzipped: bool) -> Iterator[IO[bytes]]:
    """A file to append to; gzip without name and time, so that equal content gives equal files."""
    with open(path, "ab") as plain:
        if gzipped:
            with gzip.GzipFile("", "wb", 9, plain, mtime=0) as zipped:
                yield cast(IO[bytes], zipped)
        else:
            yield plain


def reduce_trace(
    source: str | Path,
    target: str | Path,
    *,
    window: int = 1,
    about: dict[str, str] | None = None,
    on_progress: Progress | None = None,
) -> Reduction:
    """Write a trace as collapsed cvmcore JSONL, gzipped where target ends in `.gz`.

    Accesses that follow each other on one page become one record. With a `window` above 1, all accesses to one page
    within each window of so many accesses become one record, at the place of the first: order of first touch,
    pages, number of accesses and which pages are written stay exact, what is lost is the to and fro inside a window.
    `about` goes into the header. Raises InputError; the target is there whole or not at all.
    """
    if window < 1:
        raise ValueError(f"a window has at least one access, not {window}")
    target = Path(target)
    gzipped = target.suffix == ".gz"
    dense = DenseGfns()
    accesses = records = 0
    with open_trace(source, on_progress) as reader:
        try:
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as directory:
                body, whole = Path(directory, "body"), Path(directory, "whole")
                with _append(body, gzipped) as out:
                    for chunk in _reduced(reader, window):
                        if chunk.counts.max() >= _MAX_N:
                            raise InputError(f"{reader.name}: more than 10**12 accesses to a page fall into one record")
                        dense.map(chunk.pages)
                        accesses += chunk.accesses
                        records += len(chunk)
                        out.write(_text(chunk))
                header = {
                    "cvmcore_trace": 1,
                    "page_bytes": PAGE_BYTES,
                    "records": records,
                    "accesses": accesses,
                    "pages": dense.nr_gfns,
                    "window": window,
                    **(about or {}),
                }
                # The header's numbers are known last: two gzip files, one behind the other, are a gzip file.
                with _append(whole, gzipped) as out:
                    out.write(json.dumps(header).encode() + b"\n")
                with open(whole, "ab") as joined, open(body, "rb") as rest:
                    shutil.copyfileobj(rest, joined)
                os.replace(whole, target)
        except OSError as error:
            raise InputError(f"{target}: cannot be written: {error.strerror or error}") from None
    return Reduction(accesses, records, dense.nr_gfns)
