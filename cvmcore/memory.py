"""Physical memory: what stands in each 4K frame, and under which encryption key.

A page's content is a 32-bit stamp: `ZERO`, a number that whoever wrote the page chose, or the id of real bytes that
were loaded (`intern`). `key` is the key the page was last written with: 0 is the host's plain view, any other number
a guest's (ASID, HKID). Reading with another key than the page was written with gives `SCRAMBLED`; what a vendor's
hardware does on top of that (refuse, abort, machine check) is the vendor's `hw`.

This is DRAM and its encryption engine, no more: it belongs to nobody and trusts nobody, so the core and every `hw`
may use it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cvmcore.pages import Sel, Words, count, take, zeros

ZERO = 0
SCRAMBLED = 0xFFFF_FFFF
"""What a read through the wrong key returns: neither the content nor zeros."""
INTERNED = 0x8000_0000
"""Stamps from here on (but for SCRAMBLED) name real bytes."""

Keys = npt.NDArray[np.uint16]


class Memory:
    """The machine's frames: stamp (uint32) and key (uint16) by pfn, both zero at power on."""

    def __init__(self, nr_frames: int) -> None:
        self.nr_frames = nr_frames
        self.stamp: Words = zeros(nr_frames, np.uint32)
        self.key: Keys = zeros(nr_frames, np.uint16)
        self._bytes: list[bytes] = []
        self._ids: dict[bytes, int] = {}
        self.watch: Callable[[str, Sel, int, int | None], None] | None = None
        """Told ("write" or "read", frames, key, stamp where it is one for all), where somebody watches the bus."""

    def read(self, pfns: Sel, key: int) -> Words:
        """The stamps of the frames as seen through `key` (uint32; a copy or a view: do not write to it)."""
        if self.watch:
            self.watch("read", pfns, key, None)
        stamps = take(self.stamp, pfns)
        foreign = take(self.key, pfns) != key
        if np.count_nonzero(foreign):
            stamps = np.where(foreign, np.uint32(SCRAMBLED), stamps)
        return stamps

    def write(self, pfns: Sel, stamps: npt.ArrayLike, key: int) -> None:
        """Write whole pages through `key`; `stamps` is one number for all or one for each frame."""
        self.stamp[pfns] = stamps
        self.key[pfns] = key
        if self.watch:
            self.watch("write", pfns, key, stamps if isinstance(stamps, int) else None)

    def clear(self, pfns: Sel, key: int = 0) -> None:
        """Fill the frames with zeros through `key`."""
        self.stamp[pfns] = ZERO
        self.key[pfns] = key
        if self.watch:
            self.watch("write", pfns, key, ZERO)

    def copy_raw(self, source: Sel, target: Sel) -> None:
        """Copy frames as the host does when it migrates pages: plain content arrives, encrypted content does not.

        Encryption is tweaked by the physical address, so ciphertext that was moved decrypts to something else.
        """
        assert count(source) == count(target)
        self.write(target, self.read(source, 0), 0)

    def intern(self, content: bytes) -> int:
        """The stamp that stands for these 4096 bytes (shorter content is padded with zeros): `bytes_of` in reverse."""
        page = content.ljust(4096, b"\0")
        if len(page) != 4096:
            raise ValueError(f"a page has 4096 bytes, not {len(page)}")
        plain = int.from_bytes(page[:4], "little")
        if plain < INTERNED and page == page[:4] * 1024:
            return plain
        if page not in self._ids:
            self._ids[page] = INTERNED + len(self._bytes)
            self._bytes.append(page)
        return self._ids[page]

    def bytes_of(self, stamp: int) -> bytes:
        """The 4096 bytes that a stamp stands for; a plain stamp repeats itself, little endian."""
        if INTERNED <= stamp < SCRAMBLED:
            return self._bytes[stamp - INTERNED]
        return stamp.to_bytes(4, "little") * 1024
