"""What KVM makes of a trusted party that refuses: a table of calls and their refusals, each tried at many places.

A vendor's tests hold one `Refusal` for every call that its specification lets fail, and say what comes of it while the
VM is made, while it runs, and while it goes. `refuse` tells the life of a VM, counts the calls, and tells it again with
the refusal at a few of them, the first and the last among these: all invariants, the content, the outcome that the
table says, every frame back or listed as leaked, and another VM that works on the same host.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import attrs
import numpy as np

from cvmcore.backend import Backend
from cvmcore.errors import UapiError, errno_name
from cvmcore.host import Host
from cvmcore.observers import observes
from cvmcore.testing.conformance import BLOCK, Bench, Setting
from cvmcore.testing.faults import FailingCall
from cvmcore.testing.player import PASSING, Died, Failed, Player
from cvmcore.uapi import Process

MOST: Final = 5
"""Places at which each refusal is tried, at most: the first, the last, and between them."""


@attrs.frozen
class Outcome:
    """What comes of a refusal: the errno that user space gets (0: it hears nothing), whether the VM is dead, whether
    frames are leaked and listed, and whether the VM cannot go on though it lives (a launch that failed half way)."""

    errno: int = 0
    dead: bool = False
    leaks: bool = False
    stuck: bool = False

    def __str__(self) -> str:
        words = [f"-{errno_name(self.errno)}"] if self.errno else []
        words += [name for name in ("dead", "leaks", "stuck") if getattr(self, name)]
        return " ".join(words) or "goes on"


LARGE_PAGES: Final = Setting("2m")
GOES_ON: Final = Outcome()
"""It is tried again, or passed by: nobody hears of it."""
DEAD: Final = Outcome(errno.EIO, dead=True)
"""KVM_BUG_ON: whatever is asked of the VM afterwards is EIO."""
DEAD_LEAKS: Final = Outcome(errno.EIO, dead=True, leaks=True)
LEAKS: Final = Outcome(leaks=True)


@attrs.frozen
class Refusal:
    """One row: a call by its spec's name, what it says when it refuses, and what comes of it in each phase.

    answer: made from how many elements of a batch were done before. elements: positions of the arguments that are
    selectors of a batch. makes: for "call 1" alone where that is there, else by the hook that was
    called last before the refusal, else by phase; a phase that is not there may not have the call.
    """

    call: str
    says: str
    operation: str
    answer: Callable[[int], Any]
    makes: Mapping[str, Outcome]
    elements: tuple[int, ...] = ()
    times: int = 1
    earlier: bool = False
    """Whether another VM lived, and went, on the host before."""
    setting: Setting = LARGE_PAGES
    story: Callable[[Player], None] | None = None

    def __str__(self) -> str:
        return f"{self.call} {self.says}" + (f" x{self.times}" if self.times > 1 else "")


class Guest(Player):
    """It tries again whatever errno it gets."""

    passing = PASSING | {errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.EFAULT}


Story: TypeAlias = Callable[[Player], None]


def life(player: Player) -> None:
    """Fault in 2M and 4K, convert both ways, split, punch, discard, read all back. The image lies behind the block."""
    player.write(range(BLOCK))
    player.write(range(BLOCK, player.npages))
    player.convert(range(100, 103), False)
    player.write(range(99, 104))
    player.convert(range(100, 102), True)
    player.write(range(98, 105))
    if player.fd >= 0:
        player.punch(range(BLOCK - 2, BLOCK + 4))
    player.discard(range(102, 103))
    player.write(range(BLOCK - 4, player.npages), vcpu=1)
    player.check()


@attrs.define(eq=False)
class _Told:
    """What a story came to."""

    struck: tuple[str, str] | None = None
    phase: str = "launch"
    hook: str = ""
    dead: bool = False
    stuck: bool = False
    errnos: list[int] = attrs.field(factory=list)

    @observes
    def intercept(self, hook: str, arguments: dict[str, Any]) -> None:
        """Which hook was called last."""
        self.hook = hook

    def strike(self) -> None:
        """A call is refused."""
        self.struck = self.struck or (self.hook, self.phase)


def _short(player: Player) -> None:
    player.write(range(0, BLOCK + 8, 3))
    player.check()


def _tell(host: Host, process: Process, told: _Told, story: Story) -> None:
    failed, last = Failed(), 0
    try:
        player = Guest(host, BLOCK + 8, process=process, launch=False, failed=failed)
        for i, page in enumerate((b"image", b"more")):
            player.load(BLOCK + i, [page])
        player.finish_launch()
        told.phase = "run"
        story(player)
    except Died as died:
        if isinstance(died.__context__, UapiError):
            last = died.__context__.errno
    except UapiError as error:
        told.stuck = True
        last = error.errno
    told.errnos += [*failed.by_errno, *([last] if last and last not in failed.by_errno else [])]
    vms = list(host.vms)
    told.phase = "destroy"
    process.exit()
    told.dead = any(vm.dead for vm in vms)


def _once(bench: Bench, row: Refusal, failing: FailingCall, story: Story) -> None:
    told = _Told()
    host = bench.host(told)
    if row.earlier:
        _tell(host, Process(host), _Told(), _short)
    failing.install(host)
    failing.on_strike = told.strike
    _tell(host, Process(host), told, story)
    leaked = host.frames.leaked()
    bench.done(host, leaks=True)
    if not failing.nth:
        assert not (told.dead or told.stuck or told.errnos or leaked), f"without any refusal: {told}, leaked: {leaked}"
        return
    assert told.struck is not None, "the call was not made again where it was made before"
    hook, phase = told.struck
    wanted = row.makes.get(f"call {failing.nth}") or row.makes.get(hook) or row.makes.get(phase)
    assert wanted is not None, f"the table does not say what a refusal makes in {phase}, after {hook}"
    if told.dead and not told.errnos:
        told.errnos.append(wanted.errno)  # KVM_RUN may end in an exit that says so
    got = Outcome(next(iter(told.errnos), 0), told.dead, leaked > 0, told.stuck)
    alike = got == wanted and (len(told.errnos) <= 1 or told.dead or told.stuck)
    assert alike, f"in {phase}, after {hook}, it makes: {got}, not: {wanted}"
    failing.nth = 0  # the rest of the host's life goes well
    after = _Told()
    _tell(host, Process(host), after, _short)
    assert not after.dead and not after.stuck and not after.errnos, f"the next VM on the host: {after}"
    bench.done(host, leaks=True)
    assert host.frames.leaked() == leaked, "the next VM on the host leaks"


def refuse(backend: Backend, row: Refusal, *, most: int = MOST) -> int:
    """Try a row at up to `most` places of its story; how many those were. AssertionError: the outcome is another."""
    bench, story = Bench(backend, row.setting), row.story or life
    counting = FailingCall(row.operation, row.answer, elements=row.elements)
    _once(bench, row, counting, story)
    assert counting.seen, f"{row.call} is never called"
    places = np.unique(np.linspace(1, counting.seen, min(most, counting.seen)).astype(int)).tolist()
    for nth in places:
        failing = FailingCall(row.operation, row.answer, nth, elements=row.elements, times=row.times)
        try:
            _once(bench, row, failing, story)
        except Exception as error:
            error.add_note(f"{row}, at call {nth} of {counting.seen}")
            raise
    return len(places)
