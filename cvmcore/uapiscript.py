"""UAPI scripts: what a VMM and its guest do, one call a line, on the model or on a real kernel.

    {"op": "create_vm"}
    {"op": "create_guest_memfd", "size": "64K", "flags": 3, "name": "f"}
    {"op": "mmap", "size": "64K", "fd": "f", "name": "m"}
    {"op": "set_user_memory_region2", "slot": 0, "flags": 4, "gpa": 0, "size": "64K", "hva": "m", "fd": "f"}
    {"op": "create_vcpu"}
    {"op": "guest_write", "gpa": "0x1000", "stamp": 7}

What a call returns gets a name, and later lines use it: descriptors as `"f"` (or a number), addresses as `"m"`,
`"m+0x1000"` (or a number). Where the call failed, the name stands for descriptor -1, or for an address where nothing
is. Numbers may also be texts: "0x1000", "64K", "2M", "1G"; bytes are "hex:00ff". docs/live.md has all calls.

A `Script` is the calls by name; it turns names into numbers and hands each call to a `Front`, which does it.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from cvmcore.errors import InputError
from cvmcore.hookspecs import HOOKS
from cvmcore.script import Operation, located, perform, read

Answer: TypeAlias = dict[str, Any]
"""What a call says: `status` ("OK", or the errno's name), `why` where the model refused, and its results."""
Number: TypeAlias = int | str
Fd: TypeAlias = int | str
Address: TypeAlias = int | str

NOWHERE = 0x1F00_0000_0000
"""What stands for the address of a mapping that failed: a place where neither front ever maps anything."""
MOST_PAGES = 1 << 18
"""Pages of one guest or host access: 1 GiB."""
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Front(Protocol):
    """Who does the calls: the model, or a real kernel. Descriptors and addresses are numbers here."""

    def call(self, op: str, arguments: dict[str, Any]) -> Answer:
        """Do one call. What it returns as `fd` or `addr` gets the name that the line gives it.

        Raises InputError for what this front cannot do at all.
        """

    def state(self, fd: int) -> dict[str, Any] | None:
        """What stands in the guest_memfd behind a descriptor, None where there is none: `allocated` (pages), and
        while they are few `pages` ([first, count] of each run) and `content` ([first, count, stamp]) where the host
        may read them."""

    def close(self) -> None:
        """The process ends, with all that it had; the next call is another's."""


def number(value: Number, what: str) -> int:
    """A whole number, or a text such as "0x1000", "64K". Raises InputError."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"(?:(\d{1,20})([KMGT]?)|0x([0-9a-fA-F]{1,16}))", value, re.ASCII)
    if match is None:
        raise InputError(f"{what}: '{value}' is no number: give 4096, \"0x1000\" or \"4K\"")
    return int(match[3], 16) if match[3] else int(match[1]) << _UNITS[match[2]]


def runs_of(values: Iterable[int]) -> list[list[int]]:
    """[value, how many times] of each run of equal values."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def recorded(op: str, arguments: Mapping[str, Any], answer: Answer) -> str:
    """The line of a recorded script: the call, and its answer."""
    kept = {name: value for name, value in answer.items() if name != "op"}
    return json.dumps({"op": op, **arguments, "answer": kept})


class Script:
    """The calls of a script by name; their signatures are its schema. `front` does them."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.fds: dict[str, int] = {}
        self.files: dict[str, int] = {}
        """Those of the descriptors that are a guest_memfd's."""
        self.addresses: dict[str, int] = {}
        self.operations: Mapping[str, Operation] = {
            name: getattr(self, name) for name in vars(Script) if not name.startswith("_") and name not in _NO_CALLS
        }

    def play(self, lines: Iterable[str], source: str) -> Iterator[Answer]:
        """Do a script line by line: `line`, `op` and what the call answered. InputError names file and line."""
        for answer, _ in self.play_recording(lines, source, states=False):
            yield answer

    def play_recording(self, lines: Iterable[str], source: str, states: bool) -> Iterator[tuple[Answer, str]]:
        """As `play`, with `state` behind each call where asked for; and the line of a recorded script."""
        for line, op, arguments in read(lines, source):
            with located(source, line):
                arguments.pop("answer", None)
                answer = self.do(op, arguments)
                if states:
                    answer["state"] = self.state()
            yield {"line": line, **answer}, recorded(op, arguments, answer)

    def do(self, op: str, arguments: Mapping[str, Any]) -> Answer:
        """One call, its arguments checked. Raises InputError."""
        return {"op": op, **perform(self.operations, op, arguments)}

    def state(self) -> dict[str, Any]:
        """What stands in each guest_memfd that a name is open for."""
        found = {name: self.front.state(fd) for name, fd in self.files.items()}
        return {name: state for name, state in found.items() if state is not None}

    # ---- VMs --------------------------------------------------------------------------------------------------

    def create_vm(self, name: str = "vm", type: Number | None = None) -> Answer:
        """KVM_CREATE_VM of a type by number; without one, the backend's own type."""
        return self._opens(name, "create_vm", type=None if type is None else number(type, "type"))

    def check_extension(self, cap: int, vm: Fd = "vm") -> Answer:
        """KVM_CHECK_EXTENSION on the VM: its `value`."""
        return self._do("check_extension", vm=self._fd(vm), cap=cap)

    def create_vcpu(self, name: str = "vcpu", id: int = 0, vm: Fd = "vm") -> Answer:
        """KVM_CREATE_VCPU."""
        return self._opens(name, "create_vcpu", vm=self._fd(vm), id=id)

    def create_guest_memfd(self, name: str, size: Number, flags: int = 0, vm: Fd = "vm") -> Answer:
        """KVM_CREATE_GUEST_MEMFD; flags: 1 MMAP, 2 INIT_SHARED."""
        answer = self._opens(name, "create_guest_memfd", vm=self._fd(vm), size=number(size, "size"), flags=flags)
        self.files[name] = self.fds[name]
        return answer

    def set_user_memory_region(
        self, slot: int, gpa: Number, size: Number, hva: Address = 0, flags: int = 0, vm: Fd = "vm"
    ) -> Answer:
        """KVM_SET_USER_MEMORY_REGION; flags: 1 LOG_DIRTY_PAGES, 2 READONLY. Size 0 deletes the slot."""
        return self._do(
            "set_user_memory_region", vm=self._fd(vm), slot=slot, flags=flags, gpa=number(gpa, "gpa"),
            size=number(size, "size"), hva=self._address(hva, "hva"),
        )  # fmt: skip

    def set_user_memory_region2(
        self, slot: int, gpa: Number, size: Number, hva: Address = 0, flags: int = 0, fd: Fd = -1, offset: Number = 0,
        vm: Fd = "vm",
    ) -> Answer:  # fmt: skip
        """KVM_SET_USER_MEMORY_REGION2; flags: 1 LOG_DIRTY_PAGES, 2 READONLY, 4 GUEST_MEMFD. Size 0 deletes the slot."""
        return self._do(
            "set_user_memory_region2", vm=self._fd(vm), slot=slot, flags=flags, gpa=number(gpa, "gpa"),
            size=number(size, "size"), hva=self._address(hva, "hva"), fd=self._fd(fd), offset=number(offset, "offset"),
        )  # fmt: skip

    def get_dirty_log(self, slot: int, vm: Fd = "vm") -> Answer:
        """KVM_GET_DIRTY_LOG: the `dirty` pages of the slot."""
        return self._do("get_dirty_log", vm=self._fd(vm), slot=slot)

    def set_memory_attributes(
        self, gpa: Number, size: Number, attributes: int, flags: int = 0, vm: Fd = "vm"
    ) -> Answer:
        """KVM_SET_MEMORY_ATTRIBUTES; attributes: 8 PRIVATE."""
        return self._do(
            "set_memory_attributes", vm=self._fd(vm), gpa=number(gpa, "gpa"), size=number(size, "size"),
            attributes=attributes, flags=flags,
        )  # fmt: skip

    def memory_encrypt_op(self, command: str, arguments: dict[str, Any] | None = None, vm: Fd = "vm") -> Answer:
        """KVM_MEMORY_ENCRYPT_OP: a vendor's command under its own name, with the fields of its structure (numbers,
        addresses, bytes as "hex:00ff"): the `fields` that come back. The model only."""
        fields = {name: self._field(value, name) for name, value in (arguments or {}).items()}
        return self._do("memory_encrypt_op", vm=self._fd(vm), command=command, arguments=fields)

    def register_region(self, hva: Address, size: Number, vm: Fd = "vm") -> Answer:
        """KVM_MEMORY_ENCRYPT_REG_REGION."""
        return self._do("register_region", vm=self._fd(vm), hva=self._address(hva, "hva"), size=number(size, "size"))

    def unregister_region(self, hva: Address, size: Number, vm: Fd = "vm") -> Answer:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION."""
        return self._do("unregister_region", vm=self._fd(vm), hva=self._address(hva, "hva"), size=number(size, "size"))

    def launch_update(self, gpa: Number, contents: list[str], kind: str = "normal", vm: Fd = "vm") -> Answer:
        """Load image pages, each given in hexadecimal, zeros behind: how many were `done`. The model only."""
        try:
            pages = [bytes.fromhex(text) for text in contents]
        except ValueError:
            raise InputError("contents: each page is a text of hexadecimal digits, two for a byte") from None
        if any(len(page) > 4096 for page in pages):
            raise InputError("contents: a page has 4096 bytes")
        return self._do("launch_update", vm=self._fd(vm), gpa=number(gpa, "gpa"), contents=pages, kind=kind)

    def launch_finish(self, vm: Fd = "vm") -> Answer:
        """The image is complete; the VM may run. The model only."""
        return self._do("launch_finish", vm=self._fd(vm))

    # ---- vCPUs and the guest ----------------------------------------------------------------------------------

    def pre_fault_memory(self, gpa: Number, size: Number, flags: int = 0, vcpu: Fd = "vcpu") -> Answer:
        """KVM_PRE_FAULT_MEMORY: `gpa` and `size` of what is left."""
        return self._do(
            "pre_fault_memory", vcpu=self._fd(vcpu), gpa=number(gpa, "gpa"), size=number(size, "size"), flags=flags
        )

    def guest_write(
        self, stamp: int, gpa: Number = 0, pages: int = 1, gfns: list[int] | None = None, private: bool | None = None,
        vcpu: Fd = "vcpu",
    ) -> Answer:  # fmt: skip
        """KVM_RUN while the guest writes a stamp (32 bits) to each page, in order: pages `done`, and the `exit`.

        The pages are `pages` from `gpa` on, or those of the list `gfns`. private: through which alias; without it, as
        the attribute of the first page says (the default of VMs without attributes is their own).
        """
        if not 0 <= stamp < 1 << 32:
            raise InputError("guest_write: a stamp has 32 bits")
        at = self._pages(gpa, pages, gfns)
        return self._do("guest_write", vcpu=self._fd(vcpu), stamp=stamp, gfns=at, private=private)

    def guest_read(
        self, gpa: Number = 0, pages: int = 1, gfns: list[int] | None = None, private: bool | None = None,
        vcpu: Fd = "vcpu",
    ) -> Answer:  # fmt: skip
        """KVM_RUN while the guest reads the pages, in order: pages `done`, the stamps `seen` as [stamp, pages] of each
        run, and the `exit`."""
        return self._do("guest_read", vcpu=self._fd(vcpu), gfns=self._pages(gpa, pages, gfns), private=private)

    def guest_accept(
        self, gpa: Number = 0, pages: int = 1, gfns: list[int] | None = None, level: int = 1, vcpu: Fd = "vcpu"
    ) -> Answer:
        """KVM_RUN while the guest accepts private pages of a level (1: 4K, 2: 2M; gpa and gfns are heads). The model
        only."""
        if level not in (1, 2, 3):
            raise InputError("guest_accept: the level is 1, 2 or 3")
        at = self._pages(gpa, pages, gfns)
        if gfns is None:
            at = [at[0] + i * 512 ** (level - 1) for i in range(pages)]
        return self._do("guest_accept", vcpu=self._fd(vcpu), gfns=at, level=level)

    def guest_convert(
        self, private: bool, gpa: Number = 0, pages: int = 1, gfns: list[int] | None = None, vcpu: Fd = "vcpu"
    ) -> Answer:
        """KVM_RUN while the guest converts pages to private or shared: pages `done`, and the `exit` that asks user
        space, after which the script sets the attributes and lets the guest convert what is left. The model only."""
        return self._do("guest_convert", vcpu=self._fd(vcpu), gfns=self._pages(gpa, pages, gfns), private=private)

    def fail_next(self, hook: str, error: str = "") -> Answer:
        """The next call of a vendor hook fails before it did anything: with an errno by name, or, of hooks that install
        pages, so that it is tried again. An empty name takes back what did not strike yet. The model only."""
        info = HOOKS.get(hook)
        if hook and (info is None or info.kind not in ("install", "call")):
            raise InputError(f"fail_next: '{hook[:40]}' is no hook that may fail")
        code = getattr(errno, error, None) if error in errno.errorcode.values() else None
        if hook and code is None and (error or info is None or info.kind == "call"):
            raise InputError(f"fail_next: '{error[:40]}' is no errno, as {hook} needs one")
        return self._do("fail_next", hook=hook, error=code or 0)

    def stats(self, fd: Fd = "vcpu") -> Answer:
        """KVM_GET_STATS_FD of a VM or a vCPU: `stats` by name. They differ between kernels and are not compared."""
        return self._do("stats", fd=self._fd(fd))

    # ---- files ------------------------------------------------------------------------------------------------

    def fallocate(self, fd: Fd, size: Number, offset: Number = 0, mode: int = 1) -> Answer:
        """fallocate(2); mode: 1 KEEP_SIZE allocates, 3 also PUNCH_HOLE."""
        return self._do(
            "fallocate", fd=self._fd(fd), mode=mode, offset=number(offset, "offset"), size=number(size, "size")
        )

    def fstat(self, fd: Fd) -> Answer:
        """fstat(2): `size` and `blocks`."""
        return self._do("fstat", fd=self._fd(fd))

    def read(self, fd: Fd, size: Number = 1) -> Answer:
        """read(2)."""
        return self._do("read", fd=self._fd(fd), size=number(size, "size"))

    def write(self, fd: Fd, size: Number = 1) -> Answer:
        """write(2) of zeros."""
        return self._do("write", fd=self._fd(fd), size=number(size, "size"))

    def lseek(self, fd: Fd, offset: Number = 0, whence: int = 0) -> Answer:
        """lseek(2); whence: 0 SET, 1 CUR, 2 END, 3 DATA, 4 HOLE."""
        return self._do("lseek", fd=self._fd(fd), offset=number(offset, "offset"), whence=whence)

    def ftruncate(self, fd: Fd, size: Number) -> Answer:
        """ftruncate(2)."""
        return self._do("ftruncate", fd=self._fd(fd), size=number(size, "size"))

    def cachestat(self, fd: Fd) -> Answer:
        """cachestat(2) of the whole file: how many pages are `allocated`."""
        return self._do("cachestat", fd=self._fd(fd))

    def dup(self, fd: Fd, name: str) -> Answer:
        """dup(2)."""
        answer = self._opens(name, "dup", fd=self._fd(fd))
        if fd in self.files:
            self.files[name] = self.fds[name]
        return answer

    def close(self, fd: Fd) -> Answer:
        """close(2) of any descriptor; its name then stands for none."""
        answer = self._do("close", fd=self._fd(fd))
        if isinstance(fd, str) and answer["status"] == "OK":
            self.fds[fd] = -1
            self.files.pop(fd, None)
        return answer

    def exit(self) -> Answer:
        """The process ends, with all that it had; the lines behind are another's, and have no names yet."""
        self.front.close()
        for names in (self.fds, self.files, self.addresses):
            names.clear()
        return {"status": "OK"}

    def memory_failure(self, fd: Fd, offset: Number) -> Answer:
        """The hardware reports a broken page of a guest_memfd. The model only: a real machine keeps its memory."""
        return self._do("memory_failure", fd=self._fd(fd), offset=number(offset, "offset"))

    # ---- memory of the VMM ------------------------------------------------------------------------------------

    def mmap(
        self, name: str, size: Number, fd: Fd | None = None, offset: Number = 0, shared: bool = True
    ) -> Answer:
        """mmap(2) of a guest_memfd, readable and writable; without fd, of anonymous private memory."""
        answer = self._do(
            "mmap", fd=None if fd is None else self._fd(fd), offset=number(offset, "offset"),
            size=number(size, "size"), shared=shared,
        )  # fmt: skip
        self.addresses[name] = answer.pop("addr", NOWHERE)
        return answer

    def munmap(self, addr: Address, size: Number) -> Answer:
        """munmap(2)."""
        return self._do("munmap", addr=self._address(addr, "addr"), size=number(size, "size"))

    def madvise(self, addr: Address, size: Number) -> Answer:
        """madvise(2), MADV_DONTNEED."""
        return self._do("madvise", addr=self._address(addr, "addr"), size=number(size, "size"))

    def mlock(self, addr: Address, size: Number) -> Answer:
        """mlock(2), as root."""
        return self._do("mlock", addr=self._address(addr, "addr"), size=number(size, "size"))

    def migrate_pages(self, addr: Address, size: Number) -> Answer:
        """The kernel moves the pages to other frames: how many `moved`. The model only."""
        return self._do("migrate_pages", addr=self._address(addr, "addr"), size=number(size, "size"))

    def host_write(self, addr: Address, stamp: int, pages: int = 1) -> Answer:
        """The VMM writes a stamp (32 bits) to each page, in order: pages `done`; EFAULT where the next one cannot be
        touched (a real VMM would be killed by SIGSEGV or SIGBUS)."""
        if not 0 <= stamp < 1 << 32:
            raise InputError("host_write: a stamp has 32 bits")
        return self._do("host_write", addr=self._page(addr), stamp=stamp, pages=_counted(pages))

    def host_read(self, addr: Address, pages: int = 1) -> Answer:
        """The VMM reads the pages, in order: pages `done`, and the stamps `seen` as [stamp, pages] of each run."""
        return self._do("host_read", addr=self._page(addr), pages=_counted(pages))

    # ---- names ------------------------------------------------------------------------------------------------

    def _do(self, op: str, **arguments: Any) -> Answer:
        for name, value in arguments.items():
            bits = 32 if name in _OF_32_BITS else 63 if op in _OF_OFF_T else 64
            if isinstance(value, int) and not -(1 << min(bits, 63)) <= value < 1 << bits:
                raise InputError(f"{name}: {value} has more than {bits} bits")
        return self.front.call(op, arguments)

    def _opens(self, name: str, op: str, **arguments: Any) -> Answer:
        _named(name)
        answer = self._do(op, **arguments)
        self.fds[name] = answer.pop("fd", -1)
        self.files.pop(name, None)
        return answer

    def _fd(self, fd: Fd) -> int:
        if isinstance(fd, int):
            return fd
        if fd not in self.fds:
            have = f"there are {', '.join(self.fds)}" if self.fds else "there is none yet"
            raise InputError(f"no line before gave a descriptor the name '{fd}'; {have}")
        return self.fds[fd]

    def _address(self, address: Address, what: str) -> int:
        if isinstance(address, int):
            return address
        name, _, offset = address.partition("+")
        if name in self.addresses:
            return self.addresses[name] + (number(offset, what) if offset else 0)
        if name[:1].isdigit():
            return number(address, what)
        have = f"there are {', '.join(self.addresses)}" if self.addresses else "there is none yet"
        raise InputError(f"no line before gave an address the name '{name}'; {have}")

    def _field(self, value: Any, what: str) -> int | bytes:
        """A field of a vendor's structure."""
        if isinstance(value, str) and value.startswith("hex:"):
            try:
                return bytes.fromhex(value[4:])
            except ValueError:
                raise InputError(f"{what}: '{value[:40]}' has other than hexadecimal digits") from None
        if not isinstance(value, int | str):
            raise InputError(f"{what}: a field is a number, an address, or bytes as in \"hex:00ff\"")
        return self._address(value, what)

    def _page(self, address: Address) -> int:
        at = self._address(address, "addr")
        if at & 4095 or not 0 <= at < 1 << 63:
            raise InputError("addr: an access begins at a whole page")
        return at

    def _pages(self, gpa: Number, pages: int, gfns: list[int] | None) -> list[int] | range:
        """The gfns of a guest's access."""
        if gfns is not None:
            if not gfns or gfns != sorted(set(gfns)) or gfns[0] < 0 or gfns[-1] >= 1 << 52:
                raise InputError("gfns: page numbers of the guest, in ascending order")
            return gfns
        at = number(gpa, "gpa")
        if at & 4095 or not 0 <= at < 1 << 63:
            raise InputError("gpa: an access begins at a whole page")
        return range(at >> 12, (at >> 12) + _counted(pages))


_OF_32_BITS = frozenset({"vm", "vcpu", "fd", "slot", "id", "cap", "type", "mode", "whence"})
_OF_OFF_T = frozenset({"fallocate", "lseek", "ftruncate"})
_NO_CALLS = frozenset({"play", "play_recording", "do", "state"})


def _named(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
        raise InputError(f"name '{name[:40]}' does not begin with a letter, or has other than letters, digits, _ . -")


def _counted(pages: int) -> int:
    if not 0 < pages <= MOST_PAGES:
        raise InputError(f"pages: 1 to {MOST_PAGES}")
    return pages
