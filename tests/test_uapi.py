"""The UAPI errors of kvm-core.md section 7, row by row, and the order in which they are looked for.

Not here, because the front has no such thing: bad user pointers, a foreign mm, descriptors that are no guest_memfd, and
read, write or ftruncate of a guest_memfd.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from fakes import M2, MEDIATED, PAGE, PUNCH, Box, mirror

from cvmcore.backend import Backend
from cvmcore.backends.default import DEFAULT
from cvmcore.backends.swprot import SWPROT
from cvmcore.errors import UapiError
from cvmcore.mem.attributes import Attributes
from cvmcore.types import MemoryFault, Mmio, Shutdown

KERNELS = ("6.18", "7.x")
LOG_DIRTY, READONLY, GUEST_MEMFD = 1, 2, 4
MMAP, INIT_SHARED = 1, 2
PRIVATE = 8
KEEP_SIZE = 1
TOP_GPA = 1 << 48
EHWPOISON = 133
ALIASED = mirror(shared_gfn_bit=1 << 35)
SEALED = mirror(prefault=True)
NO_PREFAULT = mirror(prefault=False)
Call = Callable[[Box], object]


def fails(box: Box, call: Call) -> int:
    """The errno that a call ends with, 0 where it succeeds."""
    try:
        call(box)
    except UapiError as error:
        return error.errno
    return 0


def bugged(call: Call) -> Call:
    """The call, on a VM that is dead."""

    def dead(box: Box) -> object:
        box.vm.bug("for the test")
        return call(box)

    return dead


def slot(
    number: int = 1, flags: int = 0, gpa: int = 1 << 30, size: int = M2, hva: int = 0, fd: int = -1, offset: int = 0
) -> Call:
    return lambda box: box.fd.set_user_memory_region2(number, flags, gpa, size, hva, fd, offset)


def gmem_slot(number: int = 1, gpa: int = 1 << 30, size: int = M2, offset: int = 0, flags: int = GUEST_MEMFD) -> Call:
    """A slot on a guest_memfd of 2 MiB made for it."""
    return lambda box: box.fd.set_user_memory_region2(
        number, flags, gpa, size, 0, box.fd.create_guest_memfd(M2), offset
    )


def after(*calls: Call) -> Call:
    """The calls in order; only the last may fail."""

    def run(box: Box) -> object:
        for call in calls[:-1]:
            call(box)
        return calls[-1](box)

    return run


def rows(*cases: tuple[str, int, Call]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("error", "call"), [pytest.param(e, c, id=name) for name, e, c in cases])


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# ---- KVM_CREATE_GUEST_MEMFD -----------------------------------------------------------------------------------------


@rows(
    ("unknown flag", errno.EINVAL, lambda box: box.fd.create_guest_memfd(PAGE, 4)),
    ("unknown flag beside a known one", errno.EINVAL, lambda box: box.fd.create_guest_memfd(PAGE, MMAP | 1 << 40)),
    ("INIT_SHARED of a VM with private memory", errno.EINVAL, lambda box: box.fd.create_guest_memfd(PAGE, INIT_SHARED)),
    ("size 0", errno.EINVAL, lambda box: box.fd.create_guest_memfd(0)),
    ("size 2^63", errno.EINVAL, lambda box: box.fd.create_guest_memfd(1 << 63)),
    ("size is no page multiple", errno.EINVAL, lambda box: box.fd.create_guest_memfd(PAGE + 1)),
    ("dead VM", errno.EIO, bugged(lambda box: box.fd.create_guest_memfd(0))),
    ("no flags", 0, lambda box: box.fd.create_guest_memfd(PAGE)),
    ("MMAP", 0, lambda box: box.fd.create_guest_memfd(PAGE, MMAP)),
)
def test_create_guest_memfd(kernel: str, error: int, call: Call) -> None:
    assert fails(Box(SWPROT, kernel=kernel), call) == error


@pytest.mark.assumes(gmem_init_shared=True)
def test_init_shared_needs_a_vm_without_private_memory() -> None:
    assert fails(Box(DEFAULT), lambda box: box.fd.create_guest_memfd(PAGE, MMAP | INIT_SHARED)) == 0


@pytest.mark.assumes(gmem_init_shared=True)
def test_supported_flags_are_told() -> None:
    """KVM_CAP_GUEST_MEMFD_FLAGS (244): MMAP = 1 everywhere, INIT_SHARED = 2 without private memory."""
    assert Box(DEFAULT).fd.check_extension(244) == MMAP | INIT_SHARED
    assert Box(SWPROT).fd.check_extension(244) == MMAP


def test_extensions() -> None:
    """NR_MEMSLOTS is 32764 on x86; MEMORY_ATTRIBUTES tells the attributes of this VM type."""
    assert Box(SWPROT).fd.check_extension(10) == 32764
    assert (Box(SWPROT).fd.check_extension(233), Box(DEFAULT).fd.check_extension(233)) == (PRIVATE, 0)
    assert (Box(SWPROT).fd.check_extension(234), Box(MEDIATED).fd.check_extension(234)) == (1, 0)
    assert (Box(SWPROT).fd.check_extension(236), Box(NO_PREFAULT).fd.check_extension(236)) == (1, 0)


def test_size_of_a_guest_memfd_is_fixed_for_life() -> None:
    box = Box(SWPROT)
    fd = box.fd.create_guest_memfd(4 * PAGE)

    box.process.fallocate(fd, KEEP_SIZE, 0, 4 * PAGE)
    box.process.fallocate(fd, PUNCH, 0, 8 * PAGE)

    assert box.process.files[fd].inode.npages == 4


# ---- KVM_SET_USER_MEMORY_REGION2 ------------------------------------------------------------------------------------


@rows(
    # the slot's number
    ("slot id 32764", errno.EINVAL, slot(32764)),
    ("slot id 32763", 0, slot(32763)),
    # flags
    ("v1 with GUEST_MEMFD", errno.EINVAL, lambda box: box.fd.set_user_memory_region(1, GUEST_MEMFD, 1 << 30, M2, 0)),
    ("v1 with LOG_DIRTY", 0, lambda box: box.fd.set_user_memory_region(1, LOG_DIRTY, 1 << 30, M2, 0)),
    ("v2 unknown flag", errno.EINVAL, slot(flags=8)),
    ("GUEST_MEMFD with LOG_DIRTY", errno.EINVAL, gmem_slot(flags=GUEST_MEMFD | LOG_DIRTY)),
    ("GUEST_MEMFD with READONLY", errno.EINVAL, gmem_slot(flags=GUEST_MEMFD | READONLY)),
    # geometry
    ("size is no page multiple", errno.EINVAL, slot(size=M2 + 1)),
    ("gpa is not page aligned", errno.EINVAL, slot(gpa=(1 << 30) + 8)),
    ("hva is not page aligned", errno.EINVAL, slot(hva=12)),
    ("hva is not a user range", errno.EINVAL, slot(hva=(1 << 47) - PAGE)),
    ("gmem offset is not page aligned", errno.EINVAL, gmem_slot(size=PAGE, offset=12)),
    ("gmem offset + size wraps", errno.EINVAL, gmem_slot(size=PAGE, offset=(1 << 64) - PAGE)),
    ("bad as_id", errno.EINVAL, slot(2 << 16)),
    ("gpa + size wraps", errno.EINVAL, slot(gpa=(1 << 64) - M2, size=2 * M2)),
    ("2^31 pages", errno.EINVAL, slot(size=PAGE << 31)),
    # size 0
    ("delete of no slot", errno.EINVAL, slot(7, size=0)),
    ("delete", 0, slot(0, size=0)),
    ("delete of a guest_memfd slot: the fd is ignored", 0, slot(0, GUEST_MEMFD, 0, 0, fd=999)),
    ("deleted twice", errno.EINVAL, after(slot(0, size=0), slot(0, size=0))),
    # the slot exists
    ("GUEST_MEMFD requested for a slot that has none", errno.EINVAL, after(slot(), gmem_slot())),
    ("guest_memfd slot, identical", errno.EINVAL,
     lambda box: box.fd.set_user_memory_region2(0, GUEST_MEMFD, 0, 1024 * PAGE, box.hva, box.gmem, 0)),
    ("guest_memfd slot without the flag", errno.EINVAL,
     lambda box: box.fd.set_user_memory_region2(0, 0, 0, 1024 * PAGE, box.hva)),
    ("guest_memfd slot moved", errno.EINVAL,
     lambda box: box.fd.set_user_memory_region2(0, GUEST_MEMFD, M2 * 8, 1024 * PAGE, box.hva, box.gmem, 0)),
    ("hva differs", errno.EINVAL, after(slot(), slot(hva=M2))),
    ("size differs", errno.EINVAL, after(slot(), slot(size=2 * M2))),
    ("READONLY differs", errno.EINVAL, after(slot(), slot(flags=READONLY))),
    ("nothing differs", 0, after(slot(), slot())),
    ("LOG_DIRTY differs", 0, after(slot(), slot(flags=LOG_DIRTY), slot())),
    ("gpa differs: move", 0, after(slot(), slot(gpa=1 << 31))),
    # other slots
    ("create on another slot's gfns", errno.EEXIST, slot(gpa=M2)),
    ("create next to another slot", 0, slot(gpa=1024 * PAGE)),
    ("move onto another slot's gfns", errno.EEXIST, after(slot(), slot(gpa=M2))),
    ("move onto its own gfns", 0, after(slot(), slot(gpa=(1 << 30) + PAGE))),
    # guest_memfd
    ("gmem fd is not open", errno.EBADF, slot(flags=GUEST_MEMFD, fd=999)),
    ("range beyond the file", errno.EINVAL, gmem_slot(offset=PAGE)),
    ("range ends with the file", 0, gmem_slot(size=PAGE, offset=M2 - PAGE)),
    # the highest gfn
    ("above max gfn", errno.EINVAL, slot(gpa=TOP_GPA - PAGE)),
    # any of it, on a dead VM
    ("dead VM", errno.EIO, bugged(slot())),
    # the listed order
    ("dead VM before slot id", errno.EIO, bugged(slot(32764))),
    ("overlap before the fd", errno.EEXIST, slot(gpa=M2, flags=GUEST_MEMFD, fd=999)),
    ("existing slot before overlap", errno.EINVAL, after(slot(), slot(gpa=M2, hva=M2))),
    ("fd before max gfn", errno.EBADF, slot(gpa=TOP_GPA, flags=GUEST_MEMFD, fd=999)),
)  # fmt: skip
def test_set_user_memory_region2(kernel: str, error: int, call: Call) -> None:
    assert fails(Box(SWPROT, kernel=kernel), call) == error


@pytest.mark.assumes(read_only_slots=True)
def test_the_old_ioctl_makes_read_only_slots(kernel: str) -> None:
    box = Box(SWPROT, kernel=kernel)
    assert fails(box, lambda box: box.fd.set_user_memory_region(1, READONLY, 1 << 30, M2, 0)) == 0


@pytest.mark.assumes(shared_gfn_bit=0)
def test_a_slot_up_to_the_highest_gfn(kernel: str) -> None:
    """Where the kinds are views of one address space told apart by a gfn bit, that bit is the end."""
    assert fails(Box(SWPROT, kernel=kernel), slot(gpa=TOP_GPA - M2)) == 0


@pytest.mark.parametrize(("kernel", "error"), [("6.18", errno.EINVAL), ("7.x", errno.EEXIST)])
def test_gmem_range_already_bound(kernel: str, error: int) -> None:
    """EINVAL in [B], EEXIST in [N]: the one errno of section 7 in which the kernels differ."""
    box = Box(SWPROT, kernel=kernel)
    fd = box.fd.create_guest_memfd(2 * M2)

    def bind(number: int, offset: int) -> Call:
        return slot(number, GUEST_MEMFD, number << 30, M2, fd=fd, offset=offset)

    assert fails(box, bind(1, 0)) == 0
    assert fails(box, bind(2, M2 - PAGE)) == error
    assert fails(box, bind(2, M2)) == 0


@pytest.mark.parametrize("offset", [-PAGE, M2 + PAGE, 2 * M2, (1 << 64) - 2 * M2])
def test_gmem_range_outside_of_the_file(kernel: str, offset: int) -> None:
    """kvm_gmem_bind: a negative offset, or a range that ends behind i_size."""
    box = Box(SWPROT, kernel=kernel)
    fd = box.fd.create_guest_memfd(2 * M2)

    assert fails(box, slot(1, GUEST_MEMFD, 1 << 30, M2, fd=fd, offset=offset)) == errno.EINVAL


def test_gmem_of_another_vm(kernel: str) -> None:
    box = Box(SWPROT, kernel=kernel)
    other = box.process.create_vm()
    fd = other.create_guest_memfd(M2)

    assert fails(box, slot(flags=GUEST_MEMFD, fd=fd)) == errno.EINVAL


def test_alias_bit_in_a_gfn(kernel: str) -> None:
    assert fails(Box(ALIASED, kernel=kernel), slot(gpa=(1 << 47) - PAGE)) == errno.EINVAL
    assert fails(Box(ALIASED, kernel=kernel), slot(gpa=(1 << 47) - M2)) == 0


def test_binding_is_undone_above_max_gfn(kernel: str) -> None:
    """EINVAL comes after the bind; the range can be bound elsewhere afterwards."""
    box = Box(SWPROT, kernel=kernel)
    fd = box.fd.create_guest_memfd(M2)

    assert fails(box, slot(gpa=TOP_GPA, flags=GUEST_MEMFD, fd=fd)) == errno.EINVAL
    assert fails(box, slot(flags=GUEST_MEMFD, fd=fd)) == 0


@pytest.mark.parametrize("flags", [READONLY, READONLY | LOG_DIRTY])
def test_read_only_slots_where_the_vm_type_has_none(flags: int) -> None:
    """The flag is unknown then."""
    assert fails(Box(mirror(read_only_slots=False)), slot(flags=flags)) == errno.EINVAL


def test_guest_memfd_where_the_vm_type_has_none() -> None:
    assert fails(Box(MEDIATED), slot(flags=GUEST_MEMFD, fd=999)) == errno.EINVAL


def test_refused_slot_leaves_no_trace() -> None:
    box = Box(SWPROT)
    before = [(s.id, s.base_gfn, s.npages, s.flags, s.invalid) for s in box.vm.slots]
    generation = box.vm.slots.generation

    for call in (slot(gpa=M2), slot(flags=GUEST_MEMFD, fd=999), slot(gpa=TOP_GPA), slot(7, size=0)):
        assert fails(box, call)

    assert [(s.id, s.base_gfn, s.npages, s.flags, s.invalid) for s in box.vm.slots] == before
    assert box.vm.slots.generation == generation


# ---- KVM_SET_MEMORY_ATTRIBUTES --------------------------------------------------------------------------------------


def attributes(gpa: int = 0, size: int = M2, value: int = 0, flags: int = 0) -> Call:
    return lambda box: box.fd.set_memory_attributes(gpa, size, value, flags)


@rows(
    ("flags", errno.EINVAL, attributes(flags=1)),
    ("attribute outside VM support", errno.EINVAL, attributes(value=1)),
    ("PRIVATE beside an unknown attribute", errno.EINVAL, attributes(value=PRIVATE | 4)),
    ("size 0", errno.EINVAL, attributes(size=0)),
    ("gpa + size wraps", errno.EINVAL, attributes(gpa=(1 << 64) - M2, size=2 * M2)),
    ("gpa is not page aligned", errno.EINVAL, attributes(gpa=1)),
    ("size is not page aligned", errno.EINVAL, attributes(size=M2 + 1)),
    ("no memslot in the range", 0, attributes(gpa=1 << 40, value=PRIVATE)),
    ("already set", 0, attributes(value=PRIVATE)),
    ("to shared", 0, attributes()),
    ("dead VM", errno.EIO, bugged(attributes(flags=1))),
)
def test_set_memory_attributes(kernel: str, error: int, call: Call) -> None:
    assert fails(Box(SWPROT, kernel=kernel), call) == error


def test_attributes_allocation_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM, nothing changed."""
    box = Box(SWPROT)
    box.touch(3)
    seq = box.seq

    def full(self: Attributes, end_gfn: int) -> None:
        raise MemoryError

    monkeypatch.setattr(Attributes, "cover", full)

    assert fails(box, attributes()) == errno.ENOMEM
    assert box.vm.attributes.uniform(0, 1024, PRIVATE)
    assert (box.mapped(), box.seq, box.idle) == ([3], seq, True)


def test_attributes_of_a_vm_type_without_any() -> None:
    """A kernel without memory attributes does not know the ioctl."""
    assert fails(Box(DEFAULT), attributes(value=PRIVATE)) == errno.ENOTTY


# ---- KVM_PRE_FAULT_MEMORY -------------------------------------------------------------------------------------------


def prefault(gpa: int = 0, size: int = M2, flags: int = 0) -> Call:
    return lambda box: box.vcpus[0].pre_fault_memory(gpa, size, flags)


def unsealed(call: Call) -> Call:
    """The call, before the vendor has finalized the image."""

    def run(box: Box) -> object:
        box.vm.pre_fault_allowed = False
        return call(box)

    return run


def deleting(call: Call) -> Call:
    """The call, while the slot's INVALID copy stands."""

    def run(box: Box) -> object:
        box.vm.slots.by_id[0].invalid = True
        return call(box)

    return run


@rows(
    ("flags", errno.EINVAL, prefault(flags=1)),
    ("gpa is not page aligned", errno.EINVAL, prefault(gpa=1)),
    ("size is not page aligned", errno.EINVAL, prefault(size=1)),
    ("size 0", errno.EINVAL, prefault(size=0)),
    ("gpa + size wraps", errno.EINVAL, prefault(gpa=(1 << 64) - M2, size=2 * M2)),
    ("gpa is negative", errno.EINVAL, prefault(gpa=-M2, size=M2)),
    ("image not finalized", errno.EOPNOTSUPP, unsealed(prefault())),
    ("shared gpa without slot", errno.ENOENT, prefault(gpa=1 << 40)),
    ("private gpa without slot", errno.EFAULT, after(attributes(1 << 40, M2, PRIVATE), prefault(1 << 40))),
    ("private gpa without gmem", errno.EFAULT, after(slot(), attributes(1 << 30, M2, PRIVATE), prefault(1 << 30))),
    ("slot being deleted", errno.EAGAIN, deleting(prefault())),
    ("dead VM", errno.EIO, bugged(prefault(flags=1))),
    ("arguments before finalized", errno.EINVAL, unsealed(prefault(flags=1))),
    ("finalized before the slot", errno.EOPNOTSUPP, unsealed(prefault(gpa=1 << 40))),
    ("private pages", 0, prefault()),
    ("shared pages", 0, after(attributes(), prefault())),
)
def test_pre_fault_memory(kernel: str, error: int, call: Call) -> None:
    assert fails(Box(SWPROT, kernel=kernel), call) == error


def test_pre_fault_where_the_vm_type_cannot() -> None:
    assert fails(Box(NO_PREFAULT), prefault()) == errno.EOPNOTSUPP


def test_pre_fault_with_the_alias_bit() -> None:
    """EINVAL, and only after the check that the image is finalized."""
    alias = 1 << 35 + 12

    assert fails(Box(ALIASED), prefault(gpa=alias)) == errno.EINVAL
    assert fails(Box(ALIASED), unsealed(prefault(gpa=alias))) == errno.EOPNOTSUPP


@pytest.mark.assumes(prefault=True)
@pytest.mark.parametrize("backend", [DEFAULT, SWPROT, mirror()], ids=lambda backend: backend.name)
def test_pre_fault_maps_and_writes_back(backend: Backend) -> None:
    box = Box(backend, 8)

    left = box.vcpus[0].pre_fault_memory(2 * PAGE, 4 * PAGE)

    assert left == (6 * PAGE, 0)
    assert box.mapped() == [2, 3, 4, 5]


def test_pre_fault_stops_after_at_least_one_page() -> None:
    """0 with gpa and size advanced; the error is told by the next call."""
    box = Box(SWPROT, 8)

    assert box.vcpus[0].pre_fault_memory(6 * PAGE, 4 * PAGE) == (8 * PAGE, 2 * PAGE)
    assert fails(box, prefault(8 * PAGE, 2 * PAGE)) == errno.ENOENT
    assert box.mapped() == [6, 7]


@pytest.mark.assumes(dirty_logging=True)
def test_pre_fault_is_a_read() -> None:
    """KVM_PRE_FAULT_MEMORY makes read faults, so a read-only slot can be pre-faulted."""
    box = Box(DEFAULT, 8)
    box.fd.set_user_memory_region2(1, READONLY, 1 << 30, 4 * PAGE, box.process.mmap(4 * PAGE))

    assert box.vcpus[0].pre_fault_memory(1 << 30, 4 * PAGE) == ((1 << 30) + 4 * PAGE, 0)
    assert [box.writable((1 << 18) + i) for i in range(4)] == [False] * 4


def test_pre_fault_across_attributes() -> None:
    """Shared and private pages of one range, each in its own root."""
    box = Box(mirror(), 8)
    box.set_private(2, 2, False)

    assert box.vcpus[0].pre_fault_memory(0, 8 * PAGE) == (8 * PAGE, 0)
    assert box.mapped(private=True) == [0, 1, 4, 5, 6, 7]
    assert box.mapped(private=False) == [2, 3]


# ---- guest_memfd as a file ------------------------------------------------------------------------------------------


def fallocate(mode: int = KEEP_SIZE, offset: int = 0, size: int = PAGE) -> Call:
    return lambda box: box.process.fallocate(box.gmem, mode, offset, size)


@rows(
    ("offset < 0", errno.EINVAL, fallocate(offset=-PAGE)),
    ("len 0", errno.EINVAL, fallocate(size=0)),
    ("len < 0", errno.EINVAL, fallocate(size=-PAGE)),
    ("no KEEP_SIZE", errno.EOPNOTSUPP, fallocate(mode=0)),
    ("PUNCH_HOLE without KEEP_SIZE", errno.EOPNOTSUPP, fallocate(mode=2)),
    ("other mode bits", errno.EOPNOTSUPP, fallocate(mode=KEEP_SIZE | 0x10)),
    ("offset is not aligned", errno.EINVAL, fallocate(offset=8)),
    ("len is not aligned", errno.EINVAL, fallocate(size=PAGE + 8)),
    ("punch: offset is not aligned", errno.EINVAL, fallocate(mode=PUNCH, offset=8)),
    ("allocate beyond size", errno.EINVAL, fallocate(offset=1023 * PAGE, size=2 * PAGE)),
    ("allocate to the end", 0, fallocate(offset=1023 * PAGE)),
    ("punch beyond size", 0, fallocate(mode=PUNCH, offset=2048 * PAGE, size=2 * PAGE)),
    ("punch across the end", 0, fallocate(mode=PUNCH, offset=1023 * PAGE, size=2 * PAGE)),
    ("not open", errno.EBADF, lambda box: box.process.fallocate(999, KEEP_SIZE, 0, PAGE)),
    ("a file is no ioctl: dead VM", 0, bugged(fallocate())),
    ("len before mode", errno.EINVAL, fallocate(mode=0, size=0)),
    ("mode before alignment", errno.EOPNOTSUPP, fallocate(mode=0, offset=8)),
    ("alignment before size", errno.EINVAL, fallocate(offset=(1 << 40) + 8)),
)
def test_fallocate(kernel: str, error: int, call: Call) -> None:
    assert fails(Box(SWPROT, kernel=kernel), call) == error


@pytest.mark.assumes(confidential=False)
def test_allocation_that_fails_keeps_its_part() -> None:
    """As far as the host's memory went; what is allocated stays (the row of EINTR: partial kept)."""
    box = Box(SWPROT, 256, nr_frames=101)

    assert fails(box, fallocate(size=256 * PAGE)) == errno.ENOMEM
    assert box.inode.allocated == 100
    assert (box.inode.words[:100] != 0).all()


def shared_file(flags: int = MMAP | INIT_SHARED) -> tuple[Box, int]:
    box = Box(DEFAULT, 8)
    return box, box.fd.create_guest_memfd(4 * PAGE, flags)


@pytest.mark.assumes(gmem_backed=True)
def test_mmap_without_flag_mmap() -> None:
    box, fd = shared_file(0)

    assert fails(box, lambda box: box.process.mmap_gmem(fd, 0, PAGE)) == errno.ENODEV
    assert fails(box, lambda box: box.process.mmap_gmem(fd, 0, PAGE, shared=False)) == errno.ENODEV


@pytest.mark.assumes(gmem_backed=True)
def test_mmap_must_be_shared() -> None:
    box, fd = shared_file()

    assert fails(box, lambda box: box.process.mmap_gmem(fd, 0, PAGE, shared=False)) == errno.EINVAL
    assert fails(box, lambda box: box.process.mmap_gmem(fd, 0, PAGE)) == 0


@pytest.mark.assumes(gmem_backed=True)
def test_touch_of_a_mapping_beyond_the_size() -> None:
    """SIGBUS, which a system call sees as EFAULT."""
    box, fd = shared_file()
    hva = box.process.mmap_gmem(fd, 2 * PAGE, 4 * PAGE)

    assert fails(box, lambda box: box.process.write(hva, 7, 2)) == 0
    assert fails(box, lambda box: box.process.write(hva + 2 * PAGE, 7, 1)) == errno.EFAULT
    assert fails(box, lambda box: box.process.read(hva + PAGE, 2)) == errno.EFAULT


@pytest.mark.assumes(gmem_backed=True)
@pytest.mark.parametrize("backend", [DEFAULT, SWPROT], ids=lambda backend: backend.name)
def test_touch_of_a_mapping_that_is_not_shared(backend: Backend) -> None:
    """Without INIT_SHARED the mapping exists and every touch is SIGBUS."""
    box = Box(backend, 8)
    hva = box.process.mmap_gmem(box.fd.create_guest_memfd(4 * PAGE, MMAP), 0, 4 * PAGE)

    assert fails(box, lambda box: box.process.read(hva, 1)) == errno.EFAULT


# ---- KVM_RUN --------------------------------------------------------------------------------------------------------


def test_run_with_a_mismatch() -> None:
    box = Box(SWPROT)

    assert box.touch(3, private=False) == MemoryFault(3 * PAGE, flags=0, size_bytes=PAGE, errno=errno.EFAULT)


def test_run_without_gmem() -> None:
    box = Box(SWPROT)
    after(slot(), attributes(1 << 30, M2, PRIVATE))(box)

    assert box.touch(1 << 18) == MemoryFault(1 << 30, flags=PRIVATE, errno=errno.EFAULT)


def test_run_without_slot() -> None:
    box = Box(SWPROT)
    attributes(1 << 40, M2, PRIVATE)(box)

    assert box.touch(1 << 28) == MemoryFault(1 << 40, flags=PRIVATE, errno=errno.EFAULT)
    assert box.touch(1 << 29, private=False) == Mmio(1 << 41, write=True)


def test_run_on_a_poisoned_page() -> None:
    box = Box(SWPROT)
    box.touch(3)
    box.process.memory_failure(box.gmem, 3 * PAGE)

    assert box.touch(3) == MemoryFault(3 * PAGE, flags=PRIVATE, errno=EHWPOISON)


def test_run_on_a_bad_hva() -> None:
    """EFAULT, no exit record."""
    box = Box(DEFAULT)
    slot()(box)

    leave = box.touch(1 << 18)

    assert isinstance(leave, Shutdown)
    assert leave.errno == errno.EFAULT


def test_run_on_a_dead_vm() -> None:
    assert fails(Box(SWPROT), bugged(lambda box: box.touch(0))) == errno.EIO


# ---- populate -------------------------------------------------------------------------------------------------------


@pytest.mark.assumes(confidential=False)
@rows(
    ("gfn is not private", errno.EINVAL, after(attributes(), lambda box: box.fd.launch_update(0, [b"x"]))),
    ("one gfn of two is not private", errno.EINVAL,
     after(attributes(PAGE, PAGE), lambda box: box.fd.launch_update(0, [b"x", b"y"]))),
    ("slot lacks gmem", errno.EINVAL,
     after(slot(), attributes(1 << 30, M2, PRIVATE), lambda box: box.fd.launch_update(1 << 30, [b"x"]))),
    ("no slot", errno.EINVAL, lambda box: box.fd.launch_update(1 << 40, [b"x"])),
    ("no pages", errno.EINVAL, lambda box: box.fd.launch_update(0, [])),
    ("not a page", errno.EINVAL, lambda box: box.fd.launch_update(1, [b"x"])),
    ("dead VM", errno.EIO, bugged(lambda box: box.fd.launch_update(0, [b"x"]))),
    ("ok", 0, lambda box: box.fd.launch_update(0, [b"x"])),
)  # fmt: skip
def test_populate(kernel: str, error: int, call: Call) -> None:
    assert fails(Box(SWPROT, kernel=kernel), call) == error


@pytest.mark.assumes(confidential=False)
def test_populate_goes_as_far_as_the_host() -> None:
    """Stop; pages done so far, or the error if none."""
    box = Box(SWPROT, 256, nr_frames=101)

    assert box.fd.launch_update(0, [b"image"] * 200) == 100
    assert fails(box, lambda box: box.fd.launch_update(100 * PAGE, [b"image"])) == errno.ENOMEM
    assert box.inode.allocated == 100


@pytest.mark.assumes(confidential=False)
def test_populate_stops_at_a_poisoned_page() -> None:
    box = Box(SWPROT, 8)
    box.process.fallocate(box.gmem, KEEP_SIZE, 0, 4 * PAGE)
    box.process.memory_failure(box.gmem, 2 * PAGE)

    assert box.fd.launch_update(0, [b"image"] * 4) == 2
    assert fails(box, lambda box: box.fd.launch_update(2 * PAGE, [b"image"])) == EHWPOISON


# ---- the rest of the front ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda box: box.fd.create_vcpu(), id="KVM_CREATE_VCPU"),
        pytest.param(lambda box: box.fd.check_extension(10), id="KVM_CHECK_EXTENSION"),
        pytest.param(lambda box: box.fd.get_dirty_log(0), id="KVM_GET_DIRTY_LOG"),
        pytest.param(lambda box: box.fd.memory_encrypt_op("X"), id="KVM_MEMORY_ENCRYPT_OP"),
        pytest.param(lambda box: box.fd.register_region(0, PAGE), id="KVM_MEMORY_ENCRYPT_REG_REGION"),
        pytest.param(lambda box: box.fd.unregister_region(0, PAGE), id="KVM_MEMORY_ENCRYPT_UNREG_REGION"),
        pytest.param(lambda box: box.fd.launch_finish(), id="launch_finish"),
    ],
)
def test_every_ioctl_of_a_dead_vm_fails(call: Call) -> None:
    """VM dead: -EIO, before anything else is looked at."""
    assert fails(Box(SWPROT), bugged(call)) == errno.EIO


@pytest.mark.assumes(confidential=False)
@pytest.mark.parametrize("call", ["memory_encrypt_op", "register_region", "unregister_region"])
def test_vendor_calls_that_nobody_implements(call: str) -> None:
    arguments: tuple[object, ...] = ("X",) if call == "memory_encrypt_op" else (0, PAGE)

    assert fails(Box(SWPROT), lambda box: getattr(box.fd, call)(*arguments)) == errno.ENOTTY


@pytest.mark.assumes(confidential=False)
def test_vcpu_id_in_use() -> None:
    box = Box(SWPROT)

    assert fails(box, lambda box: box.fd.create_vcpu(0)) == errno.EEXIST
    assert fails(box, lambda box: box.fd.create_vcpu(7)) == 0


def test_dirty_log_of_what_is_not_logged() -> None:
    box = Box(DEFAULT)

    assert fails(box, lambda box: box.fd.get_dirty_log(0)) == errno.ENOENT
    assert fails(box, lambda box: box.fd.get_dirty_log(9)) == errno.ENOENT
    assert fails(box, lambda box: box.fd.get_dirty_log(32764)) == errno.EINVAL


def test_descriptor_that_is_not_open() -> None:
    box = Box(SWPROT)
    box.process.close(box.gmem)

    for call in (
        lambda box: box.process.close(box.gmem),
        lambda box: box.process.dup(box.gmem),
        lambda box: box.process.mmap_gmem(box.gmem, 0, PAGE),
    ):
        assert fails(box, call) == errno.EBADF
