"""Traces made small: a window of accesses becomes one record a page."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import attrs
import numpy as np

from cvmcore.errors import InputError
from cvmcore.traces.chunks import PAGE_BYTES, Chunk, Counts, joined
from cvmcore.traces.gfns import DenseGfns
from cvmcore.traces.jsonl import MAX_N
from cvmcore.traces.reader import Progress, TraceReader, open_trace


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
        rows = joined([*held, chunk])
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
                        if chunk.counts.max() >= MAX_N:
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
