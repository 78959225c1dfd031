"""Writes down what a test does through the UAPI, as a script that `cvm uapi FILE --backend B --check` plays again.

`Recorder.of(process)` stands in for a `Process`: the VMs, vCPUs and files that come out of it are recorded as well.
What the kit makes by `process_of(host)` while a recorder is `recording` is recorded.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np

from cvmcore.host import Host
from cvmcore.pages import array_of
from cvmcore.uapi import Process
from cvmcore.vcpu import Accept, Convert, Touch


class Recorder:
    """The lines so far, and the names of descriptors and addresses in them."""

    def __init__(
        self, backend: str, backing: str, options: Mapping[str, str], policies: Mapping[str, str] | None = None
    ) -> None:
        more = "".join(f" -o {name}={value}" for name, value in options.items())
        more += "".join(f" -p {name}={value}" for name, value in (policies or {}).items())
        self.lines = [f"# cvm uapi THIS --backend {backend} --backing {backing}{more} --check"]
        self.host: Host | None = None
        """The machine that the lines are about; another one begins a new script."""
        self.fds: dict[int, str] = {}
        self.areas: list[tuple[int, int, str]] = []
        self.names = 0

    def of(self, process: Process) -> Any:
        """The process, recorded. Descriptors and addresses are its own: those of one before it mean nothing to it."""
        self.fds.clear()
        self.areas.clear()
        return _Recorded(process, self, "")

    def begin(self, host: Host) -> None:
        """What follows is about this machine."""
        if self.host is not host:
            self.host = host
            del self.lines[1:]

    def fail_next(self, hook: str, error: int = 0) -> None:
        """The next call of a hook fails, with an errno or to be tried again; of no hook, where it is empty."""
        name = {"error": errno.errorcode[error]} if error else {}
        self.lines.append(json.dumps({"op": "fail_next", "hook": hook, **name}))

    # ---- names ------------------------------------------------------------------------------------------------

    def new(self, letter: str) -> str:
        self.names += 1
        return f"{letter}{self.names}"

    def fd(self, fd: int) -> str | int:
        return self.fds.get(fd, fd)

    def address(self, hva: int) -> str | int:
        for low, high, name in self.areas:
            if low <= hva < high:
                return f"{name}+{hva - low:#x}" if hva > low else name
        return hva


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """What is done by `process_of(host)` meanwhile is written down."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def process_of(host: Host) -> Process:
    """A process on the machine, recorded where somebody asks for it."""
    process, recorder = Process(host), _recorder.get()
    if recorder is None:
        return process
    recorder.begin(host)
    recorded: Process = recorder.of(process)
    return recorded


class _Recorded:
    """An object whose calls are recorded; everything else is its own."""

    def __init__(self, target: Any, recorder: Recorder, name: str) -> None:
        self.__dict__.update(_target=target, _recorder=recorder, _name=name)

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._target, attribute)
        line = _LINES.get(attribute)
        recorder, me = self._recorder, self._name
        if attribute in _NO_LINE:
            recorder.lines.append(f"# {attribute}: scripts have no such call")
        if line is None or not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            said = line(recorder, *args, **kwargs)
            if said is None:
                return found(*args, **kwargs)
            if attribute == "create_vcpu" and said["id"] is None:
                said["id"] = len(self._target.vm.vcpus)
            said = {key: value for key, value in said.items() if value is not None}
            if me and attribute == "close":
                said["fd"] = me
            elif me:
                said["vcpu" if attribute in ("run", "pre_fault_memory") else "vm"] = me
            recorder.lines.append(json.dumps(said))
            result = found(*args, **kwargs)
            name = said.get("name", "")
            if attribute in ("create_guest_memfd", "dup"):
                recorder.fds[result] = name
            elif attribute in ("mmap", "mmap_gmem"):
                recorder.areas.append((result, result + said["size"], name))
            elif attribute in ("create_vm", "create_vcpu"):
                return _Recorded(result, recorder, name)
            return result

        return call


def _run(recorder: Recorder, action: Any) -> dict[str, Any] | None:
    left = array_of(action.gfns)[action.done :].tolist()
    if not left:
        return None  # the guest only goes on behind its call
    common: dict[str, Any] = {"gfns": left}
    if left == list(range(left[0], left[0] + len(left))):
        common = {"gpa": left[0] << 12, "pages": len(left)}
    if isinstance(action, Touch):
        common["private"] = action.private
        if action.write:
            stamps = np.atleast_1d(np.asarray(action.stamps))
            return {"op": "guest_write", "stamp": int(stamps[min(action.done, len(stamps) - 1)]), **common}
        return {"op": "guest_read", **common}
    if isinstance(action, Accept):
        return {"op": "guest_accept", "level": action.level, "gfns": left}
    assert isinstance(action, Convert)
    return {"op": "guest_convert", "private": action.private, **common}


_LINES: dict[str, Callable[..., dict[str, Any] | None]] = {
    "create_vm": lambda r, vm_type=None: {"op": "create_vm", "name": r.new("vm")},
    "create_vcpu": lambda r, vcpu_id=None: {"op": "create_vcpu", "name": r.new("vcpu"), "id": vcpu_id},
    "create_guest_memfd": lambda r, size, flags=0: {
        "op": "create_guest_memfd", "name": r.new("f"), "size": size, "flags": flags,
    },
    "set_user_memory_region2": lambda r, slot, flags, gpa, size, hva=0, fd=-1, offset=0: {
        "op": "set_user_memory_region2", "slot": slot, "flags": flags, "gpa": gpa, "size": size,
        "hva": r.address(hva), "fd": r.fd(fd), "offset": offset if offset >= 0 else None,
    },
    "set_memory_attributes": lambda r, gpa, size, attributes, flags=0: {
        "op": "set_memory_attributes", "gpa": gpa, "size": size, "attributes": attributes, "flags": flags,
    },
    "register_region": lambda r, hva, size: {"op": "register_region", "hva": r.address(hva), "size": size},
    "unregister_region": lambda r, hva, size: {"op": "unregister_region", "hva": r.address(hva), "size": size},
    "get_dirty_log": lambda r, slot: {"op": "get_dirty_log", "slot": slot},
    "launch_update": lambda r, gpa, contents, kind="normal": {
        "op": "launch_update", "gpa": gpa, "contents": [page.hex() for page in contents], "kind": kind,
    },
    "launch_finish": lambda r: {"op": "launch_finish"},
    "run": _run,
    "pre_fault_memory": lambda r, gpa, size, flags=0: {"op": "pre_fault_memory", "gpa": gpa, "size": size},
    "mmap": lambda r, size: {"op": "mmap", "name": r.new("m"), "size": size},
    "mmap_gmem": lambda r, fd, offset, size, shared=True: {
        "op": "mmap", "name": r.new("m"), "size": size, "fd": r.fd(fd), "offset": offset,
    },
    "munmap": lambda r, hva, size: {"op": "munmap", "addr": r.address(hva), "size": size},
    "mlock": lambda r, hva, size: {"op": "mlock", "addr": r.address(hva), "size": size},
    "madvise_dontneed": lambda r, hva, size: {"op": "madvise", "addr": r.address(hva), "size": size},
    "migrate_pages": lambda r, hva, size: {"op": "migrate_pages", "addr": r.address(hva), "size": size},
    "write": lambda r, hva, stamps, n, *rest: {
        "op": "host_write", "addr": r.address(hva), "stamp": int(np.atleast_1d(stamps)[0]), "pages": n,
    },
    "read": lambda r, hva, n, *rest: {"op": "host_read", "addr": r.address(hva), "pages": n},
    "fallocate": lambda r, fd, mode, offset, size: {
        "op": "fallocate", "fd": r.fd(fd), "mode": mode, "offset": offset, "size": size,
    },
    "memory_failure": lambda r, fd, offset: {"op": "memory_failure", "fd": r.fd(fd), "offset": offset},
    "dup": lambda r, fd: {"op": "dup", "fd": r.fd(fd), "name": r.new("f")},
    "close": lambda r, fd=None: {"op": "close", "fd": None if fd is None else r.fd(fd)},
    "exit": lambda r: {"op": "exit"},
}  # fmt: skip
"""Method of the UAPI's front -> its line of the script."""
_NO_LINE = frozenset({"move_enc_context_from", "copy_enc_context_from", "memory_encrypt_op"})
