"""The reader: finds out the format, and makes chunks of what its parser finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from cvmcore.errors import InputError
from cvmcore.traces import chunks
from cvmcore.traces.chunks import BadLine, Chunk, Format, joined
from cvmcore.traces.ftrace import Ftrace, is_ftrace
from cvmcore.traces.jsonl import Jsonl, parse_header
from cvmcore.traces.lackey import Lackey, is_lackey
from cvmcore.traces.stream import LineBlocks

Progress: TypeAlias = Callable[[int, int | None], None]
"""Told (bytes of the file read so far, bytes in all or None where nobody knows)."""


def _shown(line: bytes) -> str:
    """A line as an error message can show it: printable, and not long."""
    text = line[:60].decode("utf-8", "replace")
    return "'" + "".join(char if char.isprintable() else "?" for char in text) + ("...'" if len(line) > 60 else "'")


class TraceReader:
    """An open trace: iterate over it, once, for its chunks.

    name: the file as messages name it. format: `lackey`, `cvmcore` or `ftrace`. header: the first line of a cvmcore
    trace, else empty. lines, rows, accesses: what was read so far. figures, notes: what else was counted, and what a
    reader of the result should know, so far.
    Iterating raises InputError, in one sentence with file and line, where the trace is not what it must be.
    """

    def __init__(self, source: LineBlocks, on_progress: Progress | None, keep_unmaps: bool) -> None:
        self.name = source.name
        self.rows = self.accesses = 0
        self._source = source
        self._on_progress = on_progress
        self._blocks = iter(source)
        self._format = Format()
        self._first_block = self._next_block()
        self._format = self._sniff(keep_unmaps)

    @property
    def format(self) -> str:
        return self._format.name

    @property
    def lines(self) -> int:
        return self._format.lines

    @property
    def header(self) -> dict[str, Any]:
        return self._format.header

    @property
    def figures(self) -> dict[str, int]:
        return self._format.figures

    @property
    def notes(self) -> list[str]:
        return self._format.notes

    def __enter__(self) -> TraceReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; standard input stays open."""
        self._source.close()

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks of CHUNK_ROWS rows; those before an unmap, and the last one, are shorter."""
        full = chunks.CHUNK_ROWS
        waiting: list[Chunk] = []
        nr_waiting = 0
        for piece in self._pieces():
            self.rows += len(piece)
            self.accesses += piece.accesses
            waiting.append(piece)
            nr_waiting += len(piece)
            if nr_waiting < full and piece.unmap is None:
                continue
            chunk = joined(waiting)
            while len(chunk) >= full:
                yield chunk.part(0, full)
                chunk = chunk.part(full)
            if piece.unmap is not None:
                yield chunk.before(piece.unmap)
                chunk = chunk.part(len(chunk))
            waiting, nr_waiting = [chunk], len(chunk)
        if nr_waiting:
            yield joined(waiting)
        self._check_end()

    def _pieces(self) -> Iterator[Chunk]:
        block, self._first_block = self._first_block, b""
        while block:
            yield from self._parse(block)
            if self._on_progress is not None:
                self._on_progress(self._source.bytes_read, self._source.bytes_total)
            block = self._next_block()

    def _next_block(self) -> bytes:
        """The next whole lines; nothing at the end."""
        try:
            return next(self._blocks, b"")
        except BadLine as bad:
            raise InputError(f"{self.name}:{self.lines + bad.index + 1}: this line {bad}") from None

    def _parse(self, block: bytes) -> list[Chunk]:
        if self._format.must_end and not block.endswith(b"\n"):
            line = self.lines + block.count(b"\n") + 1
            raise InputError(f"{self.name}:{line}: this line has no end: the trace is truncated")
        try:
            return self._format.parse(block)
        except BadLine as bad:
            text = _shown(block.split(b"\n")[bad.index])
            raise InputError(f"{self.name}:{self.lines + bad.index + 1}: this line {bad}: {text}") from None

    def _check_end(self) -> None:
        if self.rows == 0:
            hint = f" ({self._format.hint})" if self._format.hint else ""
            raise InputError(f"{self.name}: there is no memory access in it{hint}")
        records = self.header.get("records", self.rows)
        if records != self.rows:
            raise InputError(f"{self.name}: the header announces {records} records and {self.rows} are there")

    def _sniff(self, keep_unmaps: bool) -> Format:
        """The format, by how the text begins; a cvmcore header is taken off the first block."""
        block = self._first_block
        if not block:
            raise InputError(f"{self.name}: the file is empty")
        line, _, after = block.lstrip(b"\n").partition(b"\n")
        if line.lstrip().startswith(b"{"):
            try:
                header = parse_header(line)
            except ValueError as error:
                raise InputError(f"{self.name}: {error}: {_shown(line)}") from None
            self._first_block = after or self._next_block()
            return Jsonl(header, block.count(b"\n") - after.count(b"\n"))
        if is_lackey(line):
            return Lackey()
        if is_ftrace(block):
            return Ftrace(keep_unmaps)
        raise InputError(
            f"{self.name}: neither output of valgrind's lackey nor kernel ftrace text nor a cvmcore trace; "
            f"it begins with {_shown(line)}"
        )


def open_trace(path: str | Path, on_progress: Progress | None = None, *, keep_unmaps: bool = False) -> TraceReader:
    """Open a trace in any format, plain, gzip or zstd; `-` is standard input.

    keep_unmaps: cut the chunks where the host took memory away, and say what (`Chunk.unmap`).
    Raises InputError where the file cannot be read or is no trace.
    """
    source = LineBlocks(path)
    try:
        return TraceReader(source, on_progress, keep_unmaps)
    except BaseException:
        source.close()
        raise
