"""Output of `valgrind --tool=lackey --trace-mem=yes --log-file=FILE PROGRAM`: one access a line.

`I  ADDRESS,SIZE` (instruction), ` L` (load), ` S` (store) or ` M` (both), the address in hex; lines that begin with
`==`, `--` or `**` are valgrind's own and are skipped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cvmcore.traces.chunks import PAGE_BYTES, PAGE_SHIFT, BadLine, Chunk, Format, Text, merge_runs

_COMMA = ord(",")
_KIND = {text: int.from_bytes(text, "little") for text in (b"I  ", b" L ", b" S ", b" M ")}
_CHATTER = (b"==", b"--", b"**")


def is_lackey(line: bytes) -> bool:
    """Whether a trace that begins with this line is lackey's."""
    return line.startswith(_CHATTER) or (line + b" ")[:3] in _KIND


class Lackey(Format):
    """The accesses of a program. All lines of a block at once; the three bytes of a kind are compared as one number."""

    name = "lackey"
    must_end = True
    hint = "was valgrind run with --trace-mem=yes?"

    def parse(self, block: bytes) -> list[Chunk]:
        """The accesses in whole lines. Raises BadLine for the first line that is none."""
        text = Text(block)
        starts, ends = text.line_starts, text.line_ends
        four_chars: npt.NDArray[Any] = np.ndarray((len(text.bytes) - 3,), "<u4", text.bytes, strides=(1,))

        kind = four_chars[starts] & np.uint32(0xFF_FFFF)
        is_write = (kind == _KIND[b" S "]) | (kind == _KIND[b" M "])
        good = is_write | (kind == _KIND[b"I  "]) | (kind == _KIND[b" L "])

        address, nr_digits = text.hexadecimal(starts + 3)
        comma = starts + 3 + nr_digits
        size, nr_size_digits = text.decimal(comma + 1)
        good &= (nr_digits > 0) & (text.chars.take(comma) == _COMMA) & (comma + 1 + nr_size_digits == ends)
        good &= (size > 0) & (size <= PAGE_BYTES)

        if np.count_nonzero(good) < len(good):
            for index in np.flatnonzero(~good).tolist():
                line = text.line(index)
                if line and not line.startswith(_CHATTER):
                    raise BadLine(index, "is not an access as valgrind's lackey writes it")
            is_write, address, size = is_write[good], address[good], size[good]

        pages = address >> np.uint64(PAGE_SHIFT)
        crosses = (address & np.uint64(PAGE_BYTES - 1)).astype(np.int64) + size > PAGE_BYTES
        if np.count_nonzero(crosses):
            twice = crosses + 1
            pages, is_write = pages.repeat(twice), is_write.repeat(twice)
            second = np.cumsum(twice)[crosses] - 1
            pages[second] += np.uint64(1)
        self.lines += len(ends)
        return [merge_runs(pages, is_write)]
