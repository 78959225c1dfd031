"""cvmcore's own traces: JSONL with a header.

Line 1 is an object with `"cvmcore_trace": 1`, optionally `"page_bytes"` (4096, the only size there is) and `"records"`
(how many follow, so that a cut file is noticed); other fields describe the recording and are kept in
`TraceReader.header`. Each further line is one record: `{"page": 16386, "op": "w", "n": 3}` where `page` is a page
number (or hex in a string, "0x4002"), `op` is r (read), w (write) or x (instruction fetch) and `n` is how many accesses
the record stands for (1 if absent, below 10**12). Fastest to read is the form that `reduce_trace` writes: the three
fields in this order, no spaces.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from cvmcore.traces.chunks import PAGE_BYTES, BadLine, Chunk, Format

MAX_N = 10**12

_OPS = {"r": False, "w": True, "x": False}
_CANONICAL = re.compile(rb'(?:\{"page":(?:0|[1-9]\d{0,18}),"op":"[rwx]","n":[1-9]\d{0,11}\}\n)*+')
_TO_NUMBERS = bytes.maketrans(b",rwx", b" 010")
_NO_NUMBERS = b'{}":pageon'
_HEX_PAGE = re.compile(r"0[xX][0-9a-fA-F]{1,16}")


def parse_header(line: bytes) -> dict[str, Any]:
    """The header. Raises ValueError that says what is wrong with it; it does not show the line."""
    try:
        header = json.loads(line.decode())
    except (ValueError, RecursionError):
        raise ValueError("the first line begins like JSON and is none") from None
    version = header.get("cvmcore_trace")
    if version is None:
        raise ValueError('no cvmcore trace: the first line has no "cvmcore_trace"')
    if type(version) is not int or version != 1:
        raise ValueError(f"a cvmcore trace of version {json.dumps(version)[:40]}; only 1 can be read")
    if header.get("page_bytes", PAGE_BYTES) != PAGE_BYTES:
        raise ValueError(f"page_bytes in the header is not {PAGE_BYTES}")
    records = header.get("records")
    if records is not None and (type(records) is not int or records < 0):
        raise ValueError("records in the header is not a number of records")
    return dict(header)


class Jsonl(Format):
    """The records of a cvmcore trace."""

    name = "cvmcore"

    def __init__(self, header: dict[str, Any], lines: int) -> None:
        super().__init__()
        self.header, self.lines = header, lines

    def parse(self, block: bytes) -> list[Chunk]:
        """The records in whole lines. Raises BadLine for the first line that is none."""
        if _CANONICAL.fullmatch(block):
            table = np.fromstring(block.translate(_TO_NUMBERS, _NO_NUMBERS).decode(), np.uint64, sep=" ").reshape(-1, 3)
            self.lines += len(table)
            return [Chunk(table[:, 0].copy(), table[:, 1] != 0, table[:, 2].astype(np.int64))]
        rows: list[tuple[int, bool, int]] = []
        for index, line in enumerate(block.split(b"\n")):
            if not line.strip():
                continue
            try:
                rows.append(_parse_record(line))
            except ValueError as error:
                raise BadLine(index, str(error)) from None
        self.lines += block.count(b"\n")
        pages, is_write, counts = zip(*rows, strict=True) if rows else ((), (), ())
        return [Chunk(np.array(pages, np.uint64), np.array(is_write, np.bool_), np.array(counts, np.int64))]


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
    if type(n) is not int or not 0 < n < MAX_N:
        raise ValueError("has no count from 1 to 10**12 - 1 in 'n'")
    return page, _OPS[op], n
