"""The guest: ring-3 long mode, which runs natively and faults through KVM's MMU also where KVM emulates other modes.

One memslot of its own holds page tables, code, an I/O permission bitmap and a list of page numbers. The low 4 GiB are
mapped to themselves. The code goes through the list: it reads each page (its stamp replaces the number in the list) or
writes a stamp to it, then says so with OUT; where an access leaves the guest, RSI says which.
"""

from __future__ import annotations

import struct

from cvmcore.live import layouts

BASE = 0x10_0000_0000
"""Guest physical address of the memslot: 64 GiB."""
SLOT = 32763
PAGES = 32
PAGE = 4096
VIRTUAL = 0x80_0000_0000
"""Where the guest sees it."""
REACH = 1 << 32
"""What the guest can touch: guest physical addresses below 4 GiB."""
LIST_PAGE, LIST_WORDS = 16, 16 * 1024
"""The list of page numbers: 32-bit words, from this page on."""
LIST = VIRTUAL + LIST_PAGE * PAGE

_PML4, _LOW, _LOW_PD, _HIGH, _HIGH_PD, _HIGH_PT, _CODE, _TSS = 0, 1, 2, 6, 7, 8, 9, 10
_TABLE, _LARGE, _SMALL = 0x67, 0xE7, 0x67
"""Entry bits: present, writable, user, accessed, dirty; and page size."""

_NEXT = bytes.fromhex("4883C604 48FFC9 75".replace(" ", ""))  # add rsi, 4; dec rcx; jnz
_PAGE = bytes.fromhex("8B3E 48C1E70C".replace(" ", ""))  # mov edi, [rsi]; shl rdi, 12
_DONE = bytes.fromhex("66BAF803 EE".replace(" ", ""))  # mov dx, 0x3f8; out dx, al


def _loop(access: str) -> bytes:
    body = _PAGE + bytes.fromhex(access) + _NEXT
    return body + struct.pack("b", -len(body) - 1) + _DONE


READ = _loop("8B078906")  # mov eax, [rdi]; mov [rsi], eax
WRITE = _loop("8907")  # mov [rdi], eax
_WRITE_AT = 128


def image() -> bytes:
    """The first pages of the memslot."""
    memory = bytearray(LIST_PAGE * PAGE)

    def entry(page: int, index: int, value: int) -> None:
        struct.pack_into("<Q", memory, page * PAGE + index * 8, value)

    entry(_PML4, 0, BASE + _LOW * PAGE | _TABLE)
    entry(_PML4, VIRTUAL >> 39, BASE + _HIGH * PAGE | _TABLE)
    for gib in range(4):
        entry(_LOW, gib, BASE + (_LOW_PD + gib) * PAGE | _TABLE)
        for block in range(512):
            entry(_LOW_PD + gib, block, (gib << 30 | block << 21) | _LARGE)
    entry(_HIGH, 0, BASE + _HIGH_PD * PAGE | _TABLE)
    entry(_HIGH_PD, 0, BASE + _HIGH_PT * PAGE | _TABLE)
    for page in range(PAGES):
        entry(_HIGH_PT, page, BASE + page * PAGE | _SMALL)
    memory[_CODE * PAGE : _CODE * PAGE + len(READ)] = READ
    memory[_CODE * PAGE + _WRITE_AT : _CODE * PAGE + _WRITE_AT + len(WRITE)] = WRITE
    return bytes(memory)


def special_registers(sregs: bytearray) -> None:
    """Make KVM_GET_SREGS's structure that of ring-3 long mode; an exception ends in a shutdown (no IDT)."""
    for name, at in layouts.SEGMENTS.items():
        base, limit, selector, kind, dpl, long, system = 0, 0xFFFFFFFF, 0x2B, 3, 3, 0, 1
        if name == "cs":
            selector, kind, long = 0x33, 11, 1
        elif name == "tr":
            base, limit, selector, kind, dpl, system = VIRTUAL + _TSS * PAGE, 0x2FFF, 0x40, 11, 0, 0
        elif name == "ldt":
            continue
        struct.pack_into(
            layouts.SEGMENT, sregs, at, base, limit, selector, kind, 1, dpl, int(not long), system, long,
            int(name != "tr"), 0,
        )
        sregs[at + 22] = 0
    for at in layouts.DESCRIPTOR_TABLES.values():
        struct.pack_into("<QH", sregs, at, 0, 0)
    control = {"cr0": 0x80050033, "cr3": BASE + _PML4 * PAGE, "cr4": 0x620, "efer": 0xD01}
    for name, value in control.items():
        struct.pack_into("<Q", sregs, layouts.CONTROL[name], value)


def registers(nr_pages: int, stamp: int | None) -> bytes:
    """KVM_SET_REGS's structure: go through the first pages of the list; stamp None: reading."""
    words = [0] * 18
    words[layouts.RAX] = stamp or 0
    words[layouts.RCX] = nr_pages
    words[layouts.RSI] = LIST
    words[layouts.RIP] = VIRTUAL + _CODE * PAGE + (0 if stamp is None else _WRITE_AT)
    words[layouts.RFLAGS] = 0x3002  # IOPL 3
    return struct.pack(layouts.REGS, *words)
