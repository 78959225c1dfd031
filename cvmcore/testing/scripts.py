"""Hypothesis strategies for UAPI scripts: valid and invalid calls on one small VM, in any order.

`scripts()` draws a list of lines (dicts, as `cvmcore.uapiscript` takes them). A line that uses a name which no line
before it gives is left out, so that any part of a script is a script, and shrinking works by leaving out lines.

Sizes are small: a file has at most 64 pages. A guest_memfd slot that can be mapped has, as its `hva`, a mapping of the
same range of the file, or none: with other memory there 6.18 may serve a guest from it (docs/live.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, TypeAlias

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Line: TypeAlias = dict[str, Any]
Unit: TypeAlias = list[Line]
"""Lines that belong together."""

PAGE = 4096
FILES = ("f0", "f1", "f2")
MAPS = ("m0", "m1", "m2")
"""Mappings that slots use; "p0" is only looked through, "a0" and "a1" are the VMM's own memory."""
PLAIN = ("a0", "a1")
VCPUS = ("vcpu", "v1")

_names = {"vm", "fd", "vcpu"}
_addresses = {"hva", "addr"}

PAGE_COUNTS = [1, 1, 2, 3, 4, 8, 16, 33, 64]
INDEXES = [0, 0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64]
LOOKED_AT = [*MAPS, "p0", *PLAIN]


def mostly(good: Sequence[Any], bad: Sequence[Any], n: int = 8) -> SearchStrategy[Any]:
    """Of the good ones; in one of n draws of the bad ones."""
    return st.sampled_from([*good] * max(1, (n - 1) * len(bad) // len(good)) + [*bad])


def bytes_of(pages: Iterable[int]) -> list[int]:
    """So many pages in bytes."""
    return [n * PAGE for n in pages]


def spots(skews: Sequence[int] = (0,)) -> SearchStrategy[str]:
    """Addresses in the mappings."""
    offsets = [index * PAGE + skew for index in INDEXES for skew in skews]
    return st.sampled_from([f"{name}+{hex(offset)}" for name in LOOKED_AT for offset in offsets])


page_counts = st.sampled_from(PAGE_COUNTS)
indexes = st.sampled_from(INDEXES)
gfns = st.sampled_from([0, 0, 1, 2, 3, 4, 8, 15, 16, 17, 32, 63, 64, 65, 80, 128, 0x100, 0x1FF, 0x200])
gpas = gfns.map(lambda n: n * PAGE)
odd_gpas = st.one_of(gpas, gpas, gpas, st.sampled_from([-4096, -8192, 1, 1 << 62]))
bases = st.sampled_from(bytes_of([0, 0, 0, 16, 16, 64, 64, 128, 0x1F0, 0x200]))
slots = st.sampled_from([0, 0, 1, 1, 2, 3, 32764, 0x10000, 0x20001, -65536])
stamps = st.integers(1, 0xFFFF)
files = st.sampled_from(FILES)
vcpus = st.sampled_from([*VCPUS, "vcpu", "vcpu"])
bytes_of_pages = st.sampled_from(bytes_of(PAGE_COUNTS))
sizes = mostly(bytes_of(PAGE_COUNTS), [0, 1, 100, -1, -4096, PAGE + 1, 1 << 62])
lengths = mostly(bytes_of(PAGE_COUNTS), [0, 1, 100, -1, -4096, PAGE + 1, 2000 * PAGE])
file_sizes = mostly(bytes_of([1, 4, 16, 64, 64, 64]), [0, 1, -4096, 1 << 63])
offsets = mostly(bytes_of(INDEXES), [1, -1, -4096, 100, 1 << 40, (1 << 63) - 4096])
file_flags = st.sampled_from([3, 3, 3, 3, 3, 0, 1, 2, 4, 7])
fds = mostly(FILES, [-1, 999], 24)
region_fds = mostly(FILES, [-1, 999, "vm", "vcpu"], 24)
places = spots((0, 0, 0, 0, 0, 0, 0, 1))
page_places = spots()


def line(op: str, **arguments: SearchStrategy[Any]) -> SearchStrategy[Unit]:
    """One call, each argument drawn."""
    return st.fixed_dictionaries({"op": st.just(op), **arguments}).map(lambda one: [one])


@st.composite
def gmem_slots(draw: st.DrawFn) -> Unit:
    """A guest_memfd slot, with the file's own mapping behind it; or with anything, where the file cannot be mapped."""
    fd, name, offset, size = draw(region_fds), draw(st.sampled_from(MAPS)), draw(indexes) * PAGE, draw(sizes)
    region = {
        "op": "set_user_memory_region2", "slot": draw(slots), "flags": draw(mostly([4], [5, 6, 7, 8], 16)),
        "gpa": draw(bases), "size": size, "fd": fd, "offset": offset,
    }  # fmt: skip
    if fd not in FILES or draw(st.sampled_from([True, False, False, False])):
        return [region]
    mapping = {"op": "mmap", "name": name, "size": size, "fd": fd, "offset": offset}
    return [mapping, region | {"hva": name}]


@st.composite
def unmappable_slots(draw: st.DrawFn) -> Unit:
    """A slot with a guest_memfd that is never used, because it cannot be mapped: the guest has the VMM's memory."""
    fd, pages = draw(files), draw(page_counts)
    return [
        {"op": "create_guest_memfd", "name": fd, "size": 64 * PAGE, "flags": 0},
        {"op": "set_user_memory_region2", "slot": draw(slots), "flags": 4, "gpa": draw(bases),
         "size": pages * PAGE, "hva": draw(page_places), "fd": fd, "offset": draw(indexes) * PAGE},
    ]  # fmt: skip


@st.composite
def orphaned_slots(draw: st.DrawFn) -> Unit:
    """A slot whose guest_memfd is closed, with or without a mapping that holds it, and a guest that goes on."""
    fd, name, base, pages = draw(files), draw(st.sampled_from(MAPS)), draw(bases), draw(page_counts)
    size = pages * PAGE
    lines: Unit = [
        {"op": "create_guest_memfd", "name": fd, "size": size, "flags": draw(st.sampled_from([1, 3]))},
        {"op": "set_user_memory_region2", "slot": draw(slots), "flags": 4, "gpa": base, "size": size, "fd": fd},
        {"op": "guest_write", "gpa": base, "pages": pages, "stamp": draw(stamps)},
        {"op": "mmap", "name": name, "size": size, "fd": fd},
        {"op": "close", "fd": fd},
        {"op": "host_read", "addr": name, "pages": pages},
        {"op": "guest_read", "gpa": base, "pages": pages},
        {"op": "munmap", "addr": name, "size": size},
        {"op": "guest_write", "gpa": base, "pages": pages, "stamp": draw(stamps)},
    ]
    kept = draw(st.sets(st.integers(0, len(lines) - 1), max_size=4))
    return [one for i, one in enumerate(lines) if i not in kept]


@st.composite
def watched_slots(draw: st.DrawFn) -> Unit:
    """A slot of the VMM's memory that is logged or read-only: flags come and go while the guest writes."""
    slot, base, size, name = draw(slots), draw(bases), draw(bytes_of_pages), draw(st.sampled_from(PLAIN))
    region = {"op": "set_user_memory_region2", "slot": slot, "gpa": base, "size": size, "hva": name}
    write = {"op": "guest_write", "gpa": base, "pages": size // PAGE, "stamp": draw(stamps)}
    lines: Unit = [
        {"op": "mmap", "name": name, "size": size},
        {"op": "set_user_memory_region2", "slot": slot, "gpa": base, "size": 0},
        region | {"flags": draw(st.sampled_from([1, 1, 2, 3]))}, write, {"op": "get_dirty_log", "slot": slot},
        {"op": "get_dirty_log", "slot": slot}, region | {"flags": draw(st.sampled_from([0, 1, 2]))}, write,
        region | {"flags": 1}, {"op": "guest_read", "gpa": base, "pages": size // PAGE},
        write | {"pages": 1}, {"op": "get_dirty_log", "slot": slot},
        region | {"flags": 1, "gpa": draw(bases)}, write, {"op": "get_dirty_log", "slot": slot},
    ]  # fmt: skip
    kept = draw(st.sets(st.integers(0, len(lines) - 1), max_size=6))
    return [one for i, one in enumerate(lines) if i not in kept]


@st.composite
def other_vms(draw: st.DrawFn) -> Unit:
    """Another VM, whose descriptors come and go: files of one in memslots of the other, and memory behind both."""
    base, pages = draw(bases), draw(page_counts)
    region = {"op": "set_user_memory_region2", "slot": draw(slots), "gpa": base, "size": pages * PAGE}
    read = {"op": "guest_read", "gpa": base, "pages": pages}
    lines: Unit = [
        {"op": "create_vm", "name": "w"},
        {"op": "create_vcpu", "vm": "w", "name": "wc", "id": draw(st.sampled_from([0, 3]))},
        {"op": "create_guest_memfd", "vm": "w", "name": "wf", "size": 64 * PAGE, "flags": 3},
        region | {"flags": 4, "fd": "wf"},
        region | {"vm": "w", "flags": 4, "fd": draw(st.sampled_from(["wf", "wf", "f0"]))},
        region | {"vm": "w", "slot": 7, "gpa": base + (64 << 20), "hva": draw(page_places)},
        {"op": "guest_write", "vcpu": "wc", "gpa": base, "pages": pages, "stamp": draw(stamps)},
        {"op": "guest_write", "vcpu": "wc", "gpa": base + (64 << 20), "pages": pages, "stamp": draw(stamps)},
        {"op": "dup", "fd": "w", "name": "w1"}, {"op": "dup", "fd": "wc", "name": "wc1"},
        {"op": "close", "fd": "w"}, {"op": "close", "fd": "wc"}, read | {"vcpu": "wc1"}, read,
        {"op": "create_vcpu", "vm": "w1", "name": "wc", "id": 5}, {"op": "close", "fd": "w1"},
        read | {"vcpu": "wc"}, {"op": "fallocate", "fd": "wf", "mode": 3, "offset": 0, "size": pages * PAGE},
        {"op": "close", "fd": "wf"}, read | {"vcpu": "wc"}, {"op": "close", "fd": "wc"}, read | {"vcpu": "wc1"},
    ]
    kept = draw(st.sets(st.integers(0, len(lines) - 1), max_size=6))
    return [one for i, one in enumerate(lines) if i not in kept]


plain_slots = line(
    "set_user_memory_region2", slot=slots, flags=st.sampled_from([0, 0, 1, 1, 2, 3, 8]),
    gpa=mostly(bytes_of([0, 0, 16, 64, 128, 0x1F0, 0x200]), [1, -4096, 1 << 52], 16), size=sizes, hva=places,
)  # fmt: skip
old_slots = line(
    "set_user_memory_region", slot=slots, flags=st.sampled_from([0, 1, 2, 3, 4]), gpa=bases,
    size=sizes, hva=page_places,
)  # fmt: skip
deletions = line("set_user_memory_region2", slot=slots, gpa=bases, size=st.just(0))

units: SearchStrategy[Unit] = st.one_of(
    line("create_guest_memfd", name=files, size=file_sizes, flags=file_flags),
    gmem_slots(), gmem_slots(), gmem_slots(),
    unmappable_slots(), orphaned_slots(), watched_slots(), other_vms(),
    plain_slots, plain_slots, old_slots,
    deletions, deletions,
    line("guest_write", gpa=gpas, pages=page_counts, stamp=stamps, vcpu=vcpus),
    line("guest_write", gpa=gpas, pages=page_counts, stamp=stamps, vcpu=vcpus),
    line("guest_write", gfns=st.lists(gfns, min_size=1, max_size=6, unique=True).map(sorted), stamp=stamps),
    line("guest_read", gpa=gpas, pages=page_counts, vcpu=vcpus),
    line("guest_read", gpa=gpas, pages=page_counts, vcpu=vcpus),
    line("fallocate", fd=fds, mode=st.sampled_from([1, 1, 3, 3, 3, 3, 0, 2, 9, 0x40]), offset=offsets, size=sizes),
    line("fallocate", fd=files, mode=st.just(3), offset=st.sampled_from(bytes_of(INDEXES)), size=bytes_of_pages),
    line("mmap", name=st.just("p0"), size=sizes, fd=fds, offset=offsets, shared=mostly([True], [False])),
    line("mmap", name=st.sampled_from(PLAIN), size=sizes),
    line("munmap", addr=places, size=lengths),
    line("madvise", addr=places, size=lengths),
    line("mlock", addr=places, size=bytes_of_pages),
    line("host_write", addr=page_places, pages=page_counts, stamp=stamps),
    line("host_write", addr=page_places, pages=page_counts, stamp=stamps),
    line("host_read", addr=page_places, pages=page_counts),
    line("get_dirty_log", slot=slots),
    line("get_dirty_log", slot=slots, vm=st.sampled_from(["vm", "vcpu", "f0"])),
    line("guest_read", vcpu=st.sampled_from(["vm", "f0"])),
    line("set_memory_attributes", gpa=odd_gpas, size=sizes, attributes=st.sampled_from([0, 8, 4])),
    line("pre_fault_memory", gpa=odd_gpas, size=sizes),
    line("create_vcpu", name=st.sampled_from(VCPUS), id=st.sampled_from([0, 1, 4095, 4096, -1])),
    line("fstat", fd=fds),
    line("ftruncate", fd=files, size=sizes),
    line("lseek", fd=files, offset=offsets, whence=st.integers(0, 5)),
    line("read", fd=files, size=st.sampled_from([0, 1, PAGE])),
    line("write", fd=files, size=st.sampled_from([0, 1, PAGE])),
    line("cachestat", fd=files),
    line("check_extension", cap=st.sampled_from([10, 81, 231, 232, 233, 234, 236, 244])),
    line("dup", fd=files, name=st.sampled_from([*FILES, "d0"])),
    line("close", fd=st.sampled_from([*FILES, "d0"])),
    line("close", fd=st.sampled_from([*VCPUS, "vm", -1, 999])),
)  # fmt: skip

BEGINNING: Unit = [
    {"op": "create_vm"},
    {"op": "create_vcpu"},
    {"op": "create_guest_memfd", "name": "f0", "size": 64 * PAGE, "flags": 3},
    {"op": "mmap", "name": "a0", "size": 64 * PAGE},
]


def known(lines: Iterable[Line]) -> list[Line]:
    """The lines but for those that use a name which none before them gives."""
    given: set[str] = set()
    kept = []
    for one in lines:
        used = {one[key] for key in _names & one.keys() if isinstance(one[key], str)}
        used |= {one[key].partition("+")[0] for key in _addresses & one.keys() if isinstance(one[key], str)}
        default = {"vm"} if one["op"] in _OF_VM else {"vcpu"} if one["op"] in _OF_VCPU and "vcpu" not in one else set()
        if used | default <= given:
            kept.append(one)
            given |= {one["name"]} if "name" in one else _GIVES.get(one["op"], set())
    return kept


_OF_VM = {
    "create_vcpu", "create_guest_memfd", "set_user_memory_region", "set_user_memory_region2", "get_dirty_log",
    "set_memory_attributes", "check_extension",
}  # fmt: skip
_OF_VCPU = {"guest_write", "guest_read", "pre_fault_memory"}
_GIVES = {"create_vm": {"vm"}, "create_vcpu": {"vcpu"}}


def scripts() -> SearchStrategy[list[Line]]:
    """Scripts of some 30 lines behind a VM with a vCPU, a guest_memfd and memory."""
    # Lists of lists: hypothesis draws short lists, and makes both shorter.
    parts = st.lists(st.lists(units, max_size=12), max_size=12)
    return parts.map(lambda drawn: known(chain(BEGINNING, *(lines for part in drawn for lines in part))))


__all__ = ["known", "scripts", "units"]
