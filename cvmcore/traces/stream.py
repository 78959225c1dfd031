"""Files as blocks of whole lines: plain, gzip or zstd, told apart by their first bytes; `-` is standard input."""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, cast

import zstandard

from cvmcore.errors import InputError
from cvmcore.traces.chunks import BadLine

BLOCK_BYTES = 1 << 19
"""Text is read in blocks of this size: large enough for array code, small enough for the cache. No line is longer."""

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
"""Bytes 1 to 3 of a zstd frame without content, as parallel compressors put in front."""

T = TypeVar("T")


class _Readable(Protocol):
    def read(self, n: int, /) -> bytes: ...


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


class _Zstd:
    """The content of zstd frames, one behind the other. Raises EOFError where the last one is cut.

    A frame is fed in small bites, since what a bite becomes (at most 32 MiB) is held in memory.
    """

    _BITE = 1 << 10

    def __init__(self, stream: _Counted) -> None:
        self._stream = stream
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._begun = False
        self._ready: list[bytes] = []

    def read(self, n: int, /) -> bytes:
        """n bytes, or what is left."""
        nr_ready = sum(map(len, self._ready))
        while nr_ready < n and (bite := self._next_bite()):
            self._begun = True
            self._ready.append(self._frame.decompress(bite))
            nr_ready += len(self._ready[-1])
        ready = b"".join(self._ready)
        self._ready = [ready[n:]]
        return ready[:n]

    def _next_bite(self) -> bytes:
        """Some of the frame's data, or of the next frame's; nothing behind the last one."""
        left = b""
        if self._frame.eof:
            left, self._begun = self._frame.unused_data, False
            self._frame = self._decompressor.decompressobj()
        bite = left or self._stream.read(self._BITE)
        if not bite and self._begun:
            raise EOFError
        return bite


class LineBlocks:
    """Iterate, once, over blocks that end where a line ends (the last one where the file does).

    name: the file as messages name it. bytes_total: its size, None where nobody knows. Iterating raises InputError
    where the file cannot be read, is cut or damaged, and BadLine, counted from the last block, where a line never ends.
    """

    def __init__(self, path: str | Path) -> None:
        self._file: BinaryIO | None = None
        self.bytes_total: int | None = None
        if str(path) == "-":
            self.name = "standard input"
            if sys.stdin is None:
                raise InputError(f"{self.name}: is closed")
            self._counted = _Counted(sys.stdin.buffer)
        else:
            self.name = str(path)
            try:
                self._file = open(path, "rb")  # noqa: SIM115 - `close` does
                self.bytes_total = os.fstat(self._file.fileno()).st_size or None
            except (OSError, ValueError) as error:
                raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
            self._counted = _Counted(self._file)
        self._compression = "no"

    @property
    def bytes_read(self) -> int:
        """Bytes of the file (compressed as it is) read so far."""
        return self._counted.bytes_read

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self._file is not None:
            self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        text = self._guarded(self._decompressed)
        rest = b""
        while data := self._guarded(lambda: text.read(BLOCK_BYTES)):
            block = rest + data
            cut = block.rfind(b"\n") + 1
            rest = block[cut:]
            if len(rest) > BLOCK_BYTES:
                raise BadLine(block.count(b"\n"), f"is longer than {BLOCK_BYTES} bytes: this is no trace")
            if cut:
                yield block[:cut]
        if rest:
            yield rest

    def _decompressed(self) -> _Readable:
        magic = self._counted.peek(4)
        if magic.startswith(_GZIP):
            self._compression = "gzip"
            return cast(_Readable, gzip.GzipFile(fileobj=self._counted))  # type: ignore[call-overload]
        if magic == _ZSTD or (magic[1:] == _ZSTD_SKIPPABLE and magic[0] & 0xF0 == 0x50):
            self._compression = "zstd"
            return _Zstd(self._counted)
        return self._counted

    def _guarded(self, read: Callable[[], T]) -> T:
        """What is read, with the errors of files and compression as one sentence."""
        try:
            return read()
        except EOFError:
            what = f"the {self._compression} data ends too early"
            raise InputError(f"{self.name}: {what}: the file is truncated") from None
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise InputError(f"{self.name}: the {self._compression} data is damaged ({error})") from None
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {error.strerror or error}") from None
