"""The front of a UAPI script that is a real kernel: it talks to `cvmcore.live.server`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from cvmcore.errors import CvmError, InputError
from cvmcore.live.probe import Probe, probe
from cvmcore.uapiscript import Answer, runs_of

COMMAND = [sys.executable, "-m", "cvmcore.live.server"]


class LiveError(CvmError):
    """The process that drives the kernel ended, or the machine has no usable KVM."""


class Server:
    """The process that forks one process per case. Use it as a context manager, or call `stop`."""

    def __init__(self) -> None:
        self.probe: Probe = probe()
        if self.probe.why:
            raise LiveError(f"no live run: {self.probe.why}")
        self._process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process; a case that runs is killed with it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()
            self._process.stdout.read()
            self._process.stdout.close()
            self._process.wait()

    def ask(self, request: list[Any]) -> dict[str, Any]:
        """One request, one answer. LiveError where nobody answers."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer's end says the same
        return self.listen()

    def listen(self) -> dict[str, Any]:
        """The next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LiveError("the process that drives /dev/kvm has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


    def begin(self) -> None:
        """A process for a case."""
        self.answer(self.ask(["begin"]), "ready")

    def measure(self, times: int) -> dict[str, list[float]]:
        """What calls cost, in a process of its own (`cvmcore.live.measure`): so many samples of each, sorted, in ns."""
        self.begin()
        found: dict[str, list[float]] = self.answer(self.ask(["measure", times]), "answer")
        self.ask(["end"])
        return found

    def answer(self, answer: dict[str, Any], wanted: str) -> Any:
        """What an answer has; InputError where the driver refused, LiveError where the case is over."""
        if wanted in answer:
            return answer[wanted]
        if "refused" in answer:
            raise InputError(f"live: {answer['refused']}")
        if "failed" in answer:
            self.listen()  # how the process ended
            raise LiveError(f"live: the process of this case failed: {answer['failed']}")
        raise LiveError(f"live: the process of this case was killed by {answer.get('ended') or 'nobody knows what'}")


class LiveFront:
    """One case on a real kernel (`cvmcore.uapiscript.Front`). kvm_type: of VMs that a script creates without a type."""

    def __init__(self, server: Server, kvm_type: int = 0) -> None:
        self.server = server
        self.kvm_type = kvm_type
        self._open = False

    def call(self, op: str, arguments: dict[str, Any]) -> Answer:
        """Do one call on the kernel; the first one begins the case."""
        if not self._open:
            self._open = True
            self.server.begin()
        if op == "create_vm" and arguments["type"] is None:
            arguments = {"type": self.kvm_type}
        if isinstance(gfns := arguments.get("gfns"), range):
            arguments = arguments | {"gfns": list(gfns)}
        if op == "launch_update":
            raise InputError("launch_update is not tried on a real machine")
        answer: Answer = self._answer(self.server.ask(["call", op, arguments]), "answer")
        if "seen" in answer:
            answer["seen"] = runs_of(answer["seen"])
        return answer

    def state(self, fd: int) -> dict[str, Any] | None:
        """What stands in the guest_memfd behind a descriptor."""
        found: dict[str, Any] | None = self._answer(self.server.ask(["state", fd]), "answer")
        return found

    def close(self) -> None:
        """The process ends, and all it had with it; the next call begins another."""
        if self._open:
            self._open = False
            self.server.ask(["end"])

    def _answer(self, answer: dict[str, Any], wanted: str) -> Any:
        try:
            return self.server.answer(answer, wanted)
        except LiveError:
            self._open = False
            raise
