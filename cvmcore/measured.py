"""Measured launch: a firmware image becomes a VM's initial memory, and the trusted party measures it step by step.

An entry point of the group `cvmcore.launch` names a backend's `Launcher`. It turns the bytes of an image, and options,
into the calls that a VMM makes; the core makes them on a fresh host. What is measured, in which order and with which
running digest, the hardware tells: nothing here knows how any digest is made.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from cvmcore.backend import Option, parse_options
from cvmcore.errors import InputError, PluginError
from cvmcore.guest import Progress, silent
from cvmcore.host import Host
from cvmcore.plugins import load, load_backend
from cvmcore.runner import load_profile_for
from cvmcore.types import KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, PAGE_BYTES, VmView
from cvmcore.uapi import Process, VmFd

GROUP = "cvmcore.launch"
FILES = ("kernel", "initrd")
"""Options that name a file; a launcher gets its bytes, empty where none is given."""
MAX_FIRMWARE_BYTES, MAX_FILE_BYTES = 256 << 20, 4 << 30


# ---- the calls of a VMM -----------------------------------------------------------------------------------------


@attrs.frozen
class AddMemory:
    """A memslot with memory of its own; private where the VM type has private memory."""

    gpa: int
    size_bytes: int


@attrs.frozen
class AddVcpu:
    """The next vCPU. state: registers that user space gives it, in the vendor's layout; empty: as at reset."""

    state: bytes = b""


@attrs.frozen
class Write:
    """The VMM writes to its own memory behind a gpa, from a page's start on."""

    gpa: int
    contents: bytes


@attrs.frozen
class Load:
    """Pages for `launch_update`; contents shorter than size_bytes are padded with zeros."""

    kind: str
    gpa: int
    size_bytes: int
    contents: bytes = b""


@attrs.frozen
class Hva:
    """In the arguments of a command: where the memory behind a gpa is in the VMM's address space."""

    gpa: int


@attrs.frozen
class Command:
    """KVM_MEMORY_ENCRYPT_OP, and the gpa that it is about, if any."""

    command: str
    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    gpa: int | None = None


@attrs.frozen
class Finish:
    """The image is complete, and the vendor does what is left (`launch_finish`)."""


Call: TypeAlias = AddMemory | AddVcpu | Write | Load | Command | Finish
Tell: TypeAlias = Callable[[str, int | None, bytes], None]
"""Told (type of what was measured, gpa or None where the hardware does not know it, digest so far)."""


@attrs.frozen
class Launcher:
    """How images are launched on one backend.

    options: those that it takes, named as the command line names them. plan(image, options) -> the calls; raises
    InputError for an image or options that cannot be. watch(vm, tell): have the hardware tell what it measures.
    """

    options: tuple[Option, ...]
    plan: Callable[[bytes, Mapping[str, Any]], Sequence[Call]]
    watch: Callable[[VmView, Tell], None]


# ---- a launch ---------------------------------------------------------------------------------------------------


@attrs.frozen
class Step:
    """Something that was measured: its type, its gpa where it has one, and the digest (hexadecimal) with it."""

    type: str
    gpa: int | None
    digest: str


@attrs.frozen(eq=False)
class Launch:
    """What a launch measured, on the VM that was launched."""

    backend: str
    options: dict[str, Any]
    steps: list[Step]
    vm: VmFd

    @property
    def digest(self) -> str:
        """The launch digest, in hexadecimal."""
        return self.steps[-1].digest if self.steps else ""

    def counts(self) -> dict[str, int]:
        """Steps by type, in the order of their first."""
        return dict(Counter(step.type for step in self.steps))


def load_launcher(name: str) -> Launcher:
    """A backend's launcher. InputError where there is none, PluginError where it cannot be used."""
    launcher = load(GROUP, name, "measured launch for backend")
    if not isinstance(launcher, Launcher):
        raise PluginError(f"launch {name}: its entry point names a {type(launcher).__name__}, not a Launcher")
    return launcher


def launch(backend: str, firmware: Path, given: Mapping[str, str], *, progress: Progress = silent) -> Launch:
    """Launch an image on a fresh host of a backend. given: options as text; FILES are read here.

    Raises InputError for files, images and options that cannot be, UapiError for a call that KVM would refuse.
    """
    launcher = load_launcher(backend)
    options = parse_options(launcher.options, dict(given), f"the launch of {backend}")
    arguments: dict[str, Any] = dict(options)
    for name in FILES:
        if name in arguments:
            arguments[name] = _read(Path(arguments[name]), MAX_FILE_BYTES) if arguments[name] else b""
    calls = launcher.plan(_read(firmware, MAX_FIRMWARE_BYTES), arguments)
    vendor = load_backend(backend)
    vmm = _Vmm(Process(Host(vendor, load_profile_for(vendor, None))), launcher)
    for done, call in enumerate(calls):
        progress(done, len(calls), "launch")
        vmm.perform(call)
    return Launch(backend, options, vmm.steps, vmm.vm)


def _read(path: Path, most: int) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > most:
        raise InputError(f"{path}: more than {most >> 20} MiB")
    return content


class _Vmm:
    """The user space of one VM that is being launched."""

    def __init__(self, process: Process, launcher: Launcher) -> None:
        self.process = process
        self.vm = process.create_vm()
        self.memory: list[tuple[AddMemory, int]] = []
        """Memslots, and where each is in the VMM."""
        self.steps: list[Step] = []
        self._gpa: int | None = None
        launcher.watch(self.vm.vm, self._told)

    def _told(self, type: str, gpa: int | None, digest: bytes) -> None:
        self.steps.append(Step(type, self._gpa if gpa is None else gpa, digest.hex()))

    def perform(self, call: Call) -> None:
        """Make one call. Raises UapiError where it fails."""
        vm = self.vm
        self._gpa = getattr(call, "gpa", None)
        match call:
            case AddMemory():
                self._add(call)
            case AddVcpu():
                vm.create_vcpu(None, call.state)
            case Write():
                memory = self.process.host.memory
                for at, page in enumerate(_pages(call.contents, len(call.contents))):
                    self.process.write(self._hva(call.gpa + at * PAGE_BYTES), memory.intern(page), 1)
            case Load():
                pages = _pages(call.contents, call.size_bytes)
                done = vm.launch_update(call.gpa, pages, call.kind)
                if done < len(pages):
                    vm.launch_update(call.gpa + done * PAGE_BYTES, pages[done:], call.kind)
            case Command():
                arguments = {
                    name: self._hva(value.gpa) if isinstance(value, Hva) else value
                    for name, value in call.arguments.items()
                }
                vm.memory_encrypt_op(call.command, arguments)
            case Finish():
                vm.launch_finish()

    def _add(self, call: AddMemory) -> None:
        vm, slot = self.vm, len(self.memory)
        hva = self.process.mmap(call.size_bytes)
        if vm.vm.caps.private_by_attribute:
            fd = vm.create_guest_memfd(call.size_bytes)
            vm.set_user_memory_region2(slot, KVM_MEM_GUEST_MEMFD, call.gpa, call.size_bytes, hva, fd, 0)
            vm.set_memory_attributes(call.gpa, call.size_bytes, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        else:
            vm.set_user_memory_region2(slot, 0, call.gpa, call.size_bytes, hva)
        self.memory.append((call, hva))

    def _hva(self, gpa: int) -> int:
        for slot, hva in self.memory:
            if slot.gpa <= gpa < slot.gpa + slot.size_bytes:
                return hva + gpa - slot.gpa
        raise InputError(f"the launch touches gpa {gpa:#x}, which is no memory of the VM")


def _pages(contents: bytes, size_bytes: int) -> list[bytes]:
    rest = bytes(PAGE_BYTES)
    stop = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
    return [contents[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0") or rest for at in range(0, stop, PAGE_BYTES)]


def cover(ranges: Iterable[tuple[int, int]]) -> list[AddMemory]:
    """Memslots for (gpa, size) ranges: what touches or overlaps is one."""
    slots: list[tuple[int, int]] = []
    for gpa, size_bytes in sorted(ranges):
        if slots and gpa <= slots[-1][1]:
            slots[-1] = slots[-1][0], max(slots[-1][1], gpa + size_bytes)
        else:
            slots.append((gpa, gpa + size_bytes))
    return [AddMemory(start, end - start) for start, end in slots if end > start]


# ---- comparing steps --------------------------------------------------------------------------------------------


def lines(steps: Iterable[Step]) -> Iterable[str]:
    """Steps as JSON lines."""
    for step in steps:
        gpa = None if step.gpa is None else hex(step.gpa)
        yield json.dumps({"type": step.type, "gpa": gpa, "digest": step.digest}) + "\n"


def read_steps(path: Path) -> list[Step]:
    """Steps from a file of JSON lines. InputError, with file and line, for what is none."""
    steps = []
    for number, line in enumerate(_read(path, MAX_FILE_BYTES).decode(errors="replace").splitlines(), 1):
        try:
            value = json.loads(line)
            gpa = None if value["gpa"] is None else int(value["gpa"], 16)
            step = Step(value["type"], gpa, value["digest"])
            if not isinstance(step.type, str) or not isinstance(step.digest, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"{path}:{number}: this is no step: an object with type, gpa and digest") from None
        steps.append(step)
    return steps


def difference(steps: Sequence[Step], others: Sequence[Step], where: str) -> str:
    """A sentence about the first step that is not the same in another launch (`where`); empty where none is."""
    for number, (ours, theirs) in enumerate(zip(steps, others, strict=False), 1):
        if ours != theirs:
            what = _said(theirs) if (ours.type, ours.gpa) != (theirs.type, theirs.gpa) else "other content"
            return f"step {number} differs: {_said(ours)}; {where} has {what}"
    if len(steps) != len(others):
        longer, name = (steps, "this launch") if len(steps) > len(others) else (others, where)
        number = min(len(steps), len(others))
        return f"step {number + 1} is in {name} only: {_said(longer[number])}"
    return ""


def _said(step: Step) -> str:
    return step.type if step.gpa is None else f"{step.type} at {step.gpa:#x}"
