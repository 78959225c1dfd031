"""`cvm record`: what a real VM, or a real program, does to memory while a command runs.

A VM's page faults, exits and backing pages by KVM's tracepoints, in a private instance of tracefs that sees the command
and its children only; or a program's accesses by valgrind's lackey. Either text replays with `cvm run trace`.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from cvmcore.errors import InputError

TRACEFS = Path("/sys/kernel/tracing")
EVENTS: tuple[str, ...] = (
    # guest faults
    "kvm/kvm_page_fault", "kvmmmu/kvm_mmu_spte_requested", "kvmmmu/kvm_mmu_set_spte",
    # tables
    "kvmmmu/kvm_mmu_get_page", "kvmmmu/kvm_mmu_prepare_zap_page", "kvmmmu/kvm_mmu_zap_all_fast",
    # exits
    "kvm/kvm_userspace_exit", "kvm/kvm_pio", "kvm/kvm_mmio",
    # the host takes pages away; backing pages come and go
    "kvm/kvm_unmap_hva_range", "filemap/mm_filemap_add_to_page_cache", "filemap/mm_filemap_delete_from_page_cache",
    # what the VMM asked for
    "syscalls/sys_enter_fallocate", "syscalls/sys_enter_madvise",
)  # fmt: skip
BUFFER_KB = 16384
"""For each CPU."""


@attrs.frozen
class Recorded:
    """status: the command's exit code, negative for a signal. missing: events that this kernel does not have. lost:
    events that did not fit the buffer."""

    status: int
    events: int
    lost: int
    missing: tuple[str, ...]


def record_vm(command: Sequence[str], output: Path, tracefs: Path = TRACEFS) -> Recorded:
    """Run the command, and write what the tracepoints tell to a file, as tracefs prints it (`cvmcore.traces.ftrace`).

    Raises InputError, in one sentence: who may not, what is missing, or that the command cannot be run.
    """
    if not tracefs.joinpath("instances").is_dir():
        why = "" if os.geteuid() == 0 else ", or only root may look there"
        raise InputError(f"there is no tracefs at {tracefs}{why}; as root: mount -t tracefs nodev {tracefs}")
    _there(command)
    with _instance(tracefs) as instance:
        missing = tuple(event for event in EVENTS if not instance.joinpath("events", event).is_dir())
        if all(event in missing for event in EVENTS if event.startswith("kvm")):
            raise InputError("this kernel has no tracepoints of KVM (is kvm loaded?)")
        _write(instance / "buffer_size_kb", str(BUFFER_KB))
        _write(instance / "options/event-fork", "1")
        with _out(output) as out:
            # The command waits for its tracer: nothing that it does is missed.
            gate, go = os.pipe()
            process = _started(command, gate)
            os.close(gate)
            try:
                _write(instance / "set_event_pid", str(process.pid))
                for event in EVENTS:
                    if event not in missing:
                        _write(instance / "events" / event / "enable", "1")
                os.write(go, b"!")
            except BaseException:
                process.kill()  # it has not begun
                process.wait()
                raise
            finally:
                os.close(go)
            events = _drained(instance / "trace_pipe", process, out)
        lost = sum(_lost(stats) for stats in sorted(instance.glob("per_cpu/cpu*/stats")))
        return Recorded(process.returncode, events, lost, missing)


def record_program(command: Sequence[str], output: Path) -> Recorded:
    """Run the command under valgrind's lackey; its accesses go to a file (`cvmcore.traces.lackey`). Raises InputError.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise InputError("--lackey needs valgrind, which is not installed")
    _there(command)
    with _out(output):
        pass
    tool = [valgrind, "--tool=lackey", "--trace-mem=yes", f"--log-file={output}", "--"]
    process = subprocess.run([*tool, *command], check=False)
    with open(output, "rb") as lines:
        events = sum(line[:3] in (b"I  ", b" L ", b" S ", b" M ") for line in lines)
    return Recorded(process.returncode, events, 0, ())


def _there(command: Sequence[str]) -> None:
    if not command:
        raise InputError("no command is given: cvm record -o OUT -- COMMAND")
    if shutil.which(command[0]) is None:
        raise InputError(f"the command '{command[0]}' is not there, or cannot be run")


@contextmanager
def _instance(tracefs: Path) -> Iterator[Path]:
    """A private instance, gone afterwards."""
    instance = tracefs / "instances" / f"cvm-{os.getpid()}"
    try:
        instance.mkdir()
    except OSError as error:
        raise InputError(f"no private instance of tracefs can be made: {error.strerror or error}") from None
    try:
        yield instance
    finally:
        instance.rmdir()


@contextmanager
def _out(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def _started(command: Sequence[str], gate: int) -> subprocess.Popen[bytes]:
    """The command, behind a process that waits until something comes through the gate."""
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", _WAIT, str(gate), *command], pass_fds=[gate])


_WAIT = "import os, sys; os.read(int(sys.argv[1]), 1); os.close(int(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])"


def _drained(pipe: Path, process: subprocess.Popen[bytes], out: int) -> int:
    """Copy events to the file until the command has ended and no more come; how many."""
    ended = threading.Event()

    def wait() -> None:
        process.wait()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    source = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    events = 0
    try:
        while True:
            over = ended.is_set()
            try:
                block = os.read(source, 1 << 20)
            except BlockingIOError:
                block = b""
            if block:
                events += block.count(b"\n")
                while block:
                    block = block[os.write(out, block) :]
            elif over:
                return events
            else:
                select.select([source], [], [], 0.05)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        raise
    finally:
        os.close(source)


def _lost(stats: Path) -> int:
    """Events that were overwritten, or dropped, on one CPU."""
    counts = dict(line.split(": ", 1) for line in stats.read_text().splitlines() if ": " in line)
    return int(counts.get("overrun", 0)) + int(counts.get("dropped events", 0))
