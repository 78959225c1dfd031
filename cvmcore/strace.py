"""Import of `strace` output: the calls that a VMM made of KVM, as a UAPI script with what each answered.

    strace -f -e trace=openat,open,ioctl,fallocate,mmap,munmap,madvise,dup,fcntl,close,ftruncate -o OUT VMM ...

VMs, vCPUs, guest_memfds and the memory behind memslots get names; memory of the VMM is mapped where a memslot first
uses it. What the guest did nobody sees, so KVM_RUN is left out. An argument that strace did not decode (it shows a
pointer; KVM_SET_USER_MEMORY_REGION2 and KVM_CREATE_GUEST_MEMFD need a newer strace than 6.1) makes a comment in place
of the call.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import attrs

from cvmcore.errors import InputError
from cvmcore.script import located

Line: TypeAlias = dict[str, Any]

FLAGS = {
    "KVM_MEM_LOG_DIRTY_PAGES": 1, "KVM_MEM_READONLY": 2, "KVM_MEM_GUEST_MEMFD": 4, "KVM_MEMORY_ATTRIBUTE_PRIVATE": 8,
    "GUEST_MEMFD_FLAG_MMAP": 1, "GUEST_MEMFD_FLAG_INIT_SHARED": 2, "FALLOC_FL_KEEP_SIZE": 1,
    "FALLOC_FL_PUNCH_HOLE": 2, "FALLOC_FL_COLLAPSE_RANGE": 8, "FALLOC_FL_ZERO_RANGE": 16,
}  # fmt: skip
"""What strace says for bits."""
UNDECODED = {
    (0xAE, 0x49): "KVM_SET_USER_MEMORY_REGION2", (0xAE, 0xD4): "KVM_CREATE_GUEST_MEMFD",
    (0xAE, 0xD2): "KVM_SET_MEMORY_ATTRIBUTES", (0xAE, 0xD5): "KVM_PRE_FAULT_MEMORY",
}  # fmt: skip
"""ioctls that an older strace shows by type and number."""

_WHO = r"(?:\[pid +)?(?:(\d+)\]? +)?(?:\d[\d:.]* +)?"
_CALL = re.compile(_WHO + r"(\w+)\((.*)\) += (0x[0-9a-f]+|-?\d+|\?)(?:<[^>]*>)?(.*)$")
_UNFINISHED = re.compile(_WHO + r"(\w+)\((.*?) *<unfinished \.\.\.>$")
_RESUMED = re.compile(_WHO + r"<\.\.\. (\w+) resumed>(.*)$")
_IOC = re.compile(r"_IOC\([^,]*, (0x[0-9a-f]+|0), (0x[0-9a-f]+|0), ")
_ERRNO = re.compile(r" (E[A-Z0-9]+)")


@attrs.define
class Memory:
    """A mapping of the VMM: where, how much, and its name once a line made it."""

    size: int
    fd: str | None = None
    offset: int = 0
    name: str = ""


class Importer:
    """Goes through the lines of strace's output. `skipped` counts calls of KVM that became a comment, by name."""

    def __init__(self) -> None:
        self.fds: dict[int, str] = {}
        """What is behind descriptors: "kvm", or the name of a VM, a vCPU or a guest_memfd."""
        self.memory: dict[int, Memory] = {}
        self.numbers: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.calls = 0
        self._waiting: dict[str, str] = {}

    def lines(self, lines: Iterable[str], source: str) -> Iterator[str]:
        """The lines of the script. Raises InputError where nothing in the input is a system call, and, with file and
        line, where an argument is not understood."""
        seen = 0
        for number, text in enumerate(lines, 1):
            call = self._whole(text.rstrip("\n"))
            if call is None:
                continue
            seen += 1
            with located(source, number):
                found = list(self._call(*call))
            for line in found:
                if isinstance(line, str):
                    yield f"# {line}"
                else:
                    self.calls += 1
                    yield json.dumps(line)
        if not seen:
            raise InputError(f"{source}: no line is a system call as strace prints it")

    def _whole(self, text: str) -> tuple[str, list[str], int, str] | None:
        """(call, arguments, result, errno or "") of a line, both halves of a call that was interrupted put together."""
        if match := _UNFINISHED.match(text):
            self._waiting[match[1] or ""] = f"{match[2]}({match[3]}"
            return None
        if match := _RESUMED.match(text):
            begun = self._waiting.pop(match[1] or "", None)
            if begun is None:
                return None
            text = begun + match[3].lstrip() if match[3].startswith(")") else f"{begun} {match[3].lstrip()}"
        match = _CALL.match(text)
        if match is None or match[4] == "?":
            return None
        result = int(match[4], 0)
        error = _ERRNO.match(match[5]) if result == -1 else None
        return match[2], _arguments(match[3]), result, error[1] if error else ""

    # ---- calls ------------------------------------------------------------------------------------------------

    def _call(self, call: str, given: list[str], result: int, error: str) -> Iterator[Line | str]:
        status = error or "OK"
        match call, given:
            case ("openat" | "open", [*_, path, _] | [*_, path, _, _]) if path == '"/dev/kvm"' and not error:
                self.fds[result] = "kvm"
            case "ioctl", [fd, request, *rest]:
                yield from self._ioctl(self._name(fd), request, rest, result, status)
            case "fallocate", [fd, mode, offset, size] if name := self._file(fd):
                yield _line(
                    "fallocate", status, fd=name, mode=_number(mode), offset=_number(offset), size=_number(size)
                )
            case "ftruncate", [fd, size] if name := self._file(fd):
                yield _line("ftruncate", status, fd=name, size=_number(size))
            case "mmap", [_, size, _, flags, fd, offset]:
                yield from self._mmap(_number(size), flags, self._file(fd), fd, _number(offset), result, status)
            case "munmap" | "madvise", [addr, size, *rest]:
                yield from self._forget(call, _number(addr), _number(size), rest, status)
            case ("dup", [fd]) | ("fcntl", [fd, "F_DUPFD" | "F_DUPFD_CLOEXEC", _]) if (
                name := self._name(fd)
            ) and name != "kvm" and not error:
                self.fds[result] = self._new(name.rstrip("0123456789") or "d")
                yield _line("dup", status, fd=name, name=self.fds[result])
            case "close", [fd] if (name := self._name(fd)) and not error:
                del self.fds[_number(fd)]
                if name != "kvm":
                    yield _line("close", status, fd=name)

    def _ioctl(self, name: str, request: str, rest: list[str], result: int, status: str) -> Iterator[Line | str]:
        if undecoded := _IOC.match(", ".join([request, *rest])):
            request = UNDECODED.get((int(undecoded[1], 0), int(undecoded[2], 0)), "")
        if not request.startswith("KVM_") or not name or not rest:
            return
        made = _MADE.get(request)
        if made is not None:
            kind, op = made
            more: Line = {}
            if op == "create_guest_memfd":
                fields = _fields(rest, ("size", "flags"))
                if fields is None:
                    yield self._comment(request)
                    return
                more = {"size": _number(fields["size"]), "flags": _number(fields["flags"])}
            elif op == "create_vcpu":
                more = {"id": _number(rest[0])}
            else:
                more = {"type": _number(rest[0])}
            line: Line = {"op": op, "name": self._new(kind), **more}
            if op != "create_vm":
                line["vm"] = name
            if status == "OK":
                self.fds[result] = line["name"]
            yield line | {"answer": {"status": status}}
        elif request in _PLAIN:
            op, keys = _PLAIN[request]
            fields = _fields(rest, keys.values())
            if fields is None:
                yield self._comment(request)
                return
            line = {"op": op, ("vcpu" if op == "pre_fault_memory" else "vm"): name}
            for key, field in keys.items():
                line[key] = _number(fields[field])
            if "hva" in line:
                yield from self._backed(line)
            if "fd" in line:
                line["fd"] = self.fds.get(line["fd"], -1)
            yield line | {"answer": {"status": status}}

    def _comment(self, request: str) -> str:
        self.skipped[request] += 1
        return f"{request}: its argument was not decoded by this strace; it is left out"

    # ---- memory -----------------------------------------------------------------------------------------------

    def _mmap(
        self, size: int, flags: str, file: str, fd: str, offset: int, result: int, status: str
    ) -> Iterator[Line | str]:
        if file:
            name = self._new("m")
            yield _line("mmap", status, name=name, size=size, fd=file, offset=offset, shared="MAP_SHARED" in flags)
            if status == "OK":
                self.memory[result] = Memory(size, file, offset, name)
        elif status == "OK" and not self._name(fd):
            self.memory[result] = Memory(size)

    def _backed(self, line: Line) -> Iterator[Line]:
        """The memory behind a memslot by name, made by a line before where none has yet."""
        hva = line["hva"]
        start = self._at(hva)
        if start is None:
            return
        memory = self.memory[start]
        if not memory.name:
            memory.name = self._new("m")
            yield {"op": "mmap", "name": memory.name, "size": memory.size, "answer": {"status": "OK"}}
        line["hva"] = memory.name + (f"+{hva - start:#x}" if hva != start else "")

    def _at(self, hva: int) -> int | None:
        starts = sorted(self.memory)
        i = bisect_right(starts, hva) - 1
        return starts[i] if i >= 0 and hva < starts[i] + self.memory[starts[i]].size else None

    def _forget(self, call: str, addr: int, size: int, rest: list[str], status: str) -> Iterator[Line]:
        start = self._at(addr)
        if start is None or (call == "madvise" and rest != ["MADV_DONTNEED"]):
            return
        memory = self.memory[start]
        if memory.name:
            place = memory.name + (f"+{addr - start:#x}" if addr != start else "")
            yield _line(call, status, addr=place, size=size)
        if call == "munmap" and addr == start and size >= memory.size:
            del self.memory[start]

    # ---- names ------------------------------------------------------------------------------------------------

    def _new(self, kind: str) -> str:
        self.numbers[kind] += 1
        return f"{kind}{self.numbers[kind]}"

    def _name(self, fd: str) -> str:
        """The name behind a descriptor, "" where it is none of KVM's."""
        number = re.match(r"-?\d+", fd)
        return self.fds.get(int(number[0]), "") if number else ""

    def _file(self, fd: str) -> str:
        name = self._name(fd)
        return name if name.startswith("f") else ""


_MADE = {
    "KVM_CREATE_VM": ("vm", "create_vm"), "KVM_CREATE_VCPU": ("vcpu", "create_vcpu"),
    "KVM_CREATE_GUEST_MEMFD": ("f", "create_guest_memfd"),
}  # fmt: skip
_REGION = {
    "slot": "slot", "flags": "flags", "gpa": "guest_phys_addr", "size": "memory_size", "hva": "userspace_addr",
}  # fmt: skip
_PLAIN: dict[str, tuple[str, dict[str, str]]] = {
    "KVM_SET_USER_MEMORY_REGION": ("set_user_memory_region", _REGION),
    "KVM_SET_USER_MEMORY_REGION2": (
        "set_user_memory_region2", _REGION | {"offset": "guest_memfd_offset", "fd": "guest_memfd"},
    ),
    "KVM_SET_MEMORY_ATTRIBUTES": (
        "set_memory_attributes", {"gpa": "address", "size": "size", "attributes": "attributes", "flags": "flags"},
    ),
    "KVM_PRE_FAULT_MEMORY": ("pre_fault_memory", {"gpa": "gpa", "size": "size", "flags": "flags"}),
    "KVM_GET_DIRTY_LOG": ("get_dirty_log", {"slot": "slot"}),
}  # fmt: skip
"""ioctl: the call, and its arguments by the field of the structure."""


def _line(op: str, status: str, **arguments: Any) -> Line:
    return {"op": op, **arguments, "answer": {"status": status}}


def _arguments(text: str) -> list[str]:
    """Arguments of a call, parted at commas outside of brackets and quotes."""
    parts, depth, quoted, start = [], 0, False, 0
    for at, char in enumerate(text):
        if char == '"' and text[at - 1 : at] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif char in "{[(<":
            depth += 1
        elif char in "}])>":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def _fields(rest: list[str], wanted: Iterable[str]) -> dict[str, str] | None:
    """The fields of a structure that strace decoded; None where it shows a pointer, or leaves a wanted one out."""
    if not rest or not rest[0].startswith("{"):
        return None
    inner = rest[0][1:].rsplit("}", 1)[0]
    pairs = (part.partition("=") for part in _arguments(inner))
    fields = {name: value for name, equals, value in pairs if equals}
    return fields if fields.keys() >= set(wanted) else None


def _number(text: str) -> int:
    """A number as strace prints it: decimal, hexadecimal, octal, flags by name."""
    total = 0
    for part in text.split(" /*")[0].split("|"):
        match = re.match(r"-?(?:0x[0-9a-fA-F]+|\d+)", part)
        if match:
            digits = match[0]
            total |= int(digits, 8) if re.fullmatch(r"0[0-7]+", digits) else int(digits, 0)
        elif part in FLAGS:
            total |= FLAGS[part]
        elif part not in ("NULL", ""):
            raise InputError(f"strace's '{part[:40]}' is no number that is known here")
    return total


__all__ = ["Importer"]
