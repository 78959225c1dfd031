"""What KVM makes of a trusted party that refuses: a table of calls and their refusals, each tried at many places.

A vendor's tests hold a `Table`: every `Call` that its code makes, and a `Refusal` for each way in which that may be
refused, with what comes of it while the VM is made, while it runs, and while it goes, and which function of the kernel
makes that of it. `Table.missing` reads the vendor's code, and says what has no row. `Table.refuse` tells the life of a
VM, counts the calls, and tells it again with the refusal at some or all of them: all invariants, the content, the
outcome that the table says, every frame back or listed as leaked, and another VM that works on the same host.
`Table.storm` has calls refused at random, in a life of random actions.
"""

from __future__ import annotations

import enum
import errno
import importlib
import random
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import attrs
import numpy as np

from cvmcore.backend import Backend
from cvmcore.errors import UapiError, errno_name
from cvmcore.host import Host
from cvmcore.observers import observes
from cvmcore.testing.faults import FailingCall
from cvmcore.testing.player import PASSING, Died, Failed, Player
from cvmcore.testing.story import BLOCK, SMALL
from cvmcore.testing.trusted import calls_made, statuses_of
from cvmcore.testing.workbench import Bench, Setting
from cvmcore.types import GuestException
from cvmcore.uapi import Process

MOST: Final = 3
"""Places at which each refusal is tried in usual tests, at most: the first, the last, and between them."""
SMALLEST: Final = 12
"""Pages of the VM whose story is told with a refusal at every place."""


@attrs.frozen
class Outcome:
    """What comes of a refusal: the errno that user space gets (0: it hears nothing), whether the VM is dead, whether
    frames are leaked and listed, whether the VM cannot go on though it lives (a launch that failed half way), and
    whether it is the guest that hears of it."""

    errno: int = 0
    dead: bool = False
    leaks: bool = False
    stuck: bool = False
    guest: bool = False

    def __str__(self) -> str:
        words = [f"-{errno_name(self.errno)}"] if self.errno else []
        words += [name for name in ("dead", "leaks", "stuck", "guest") if getattr(self, name)]
        return " ".join(words) or "goes on"


LARGE_PAGES: Final = Setting("2m")
GOES_ON: Final = Outcome()
"""It is tried again, or passed by: nobody hears of it."""
DEAD: Final = Outcome(errno.EIO, dead=True)
"""KVM_BUG_ON: whatever is asked of the VM afterwards is EIO."""
DEAD_LEAKS: Final = Outcome(errno.EIO, dead=True, leaks=True)
LEAKS: Final = Outcome(leaks=True)
GUEST: Final = Outcome(guest=True)

Story: TypeAlias = Callable[[Player], None]


# ---- the table ------------------------------------------------------------------------------------------------


@attrs.frozen
class Call:
    """A call of the trusted party.

    name: its spec's. operation: its path on the host's hardware. statuses: the enum of what it answers. answer: the
    answer to a call that is refused with a status, made from (elements done before, status, arguments). elements:
    positions of the arguments that are selectors of a batch. fine: statuses of the enum that refuse nothing.
    """

    name: str
    operation: str
    statuses: type[enum.IntEnum]
    answer: Callable[[int, Any, tuple[Any, ...]], Any]
    elements: tuple[int, ...] = ()
    fine: frozenset[enum.IntEnum] = frozenset()

    def failing(self, status: Any, nth: int = 0, times: int = 1) -> FailingCall:
        """The n-th of these calls is refused so."""
        return FailingCall(
            self.operation, lambda done, args: self.answer(done, status, args), nth, elements=self.elements, times=times
        )


@attrs.frozen
class Refusal:
    """One row: a call, what it says when it refuses, and what comes of it in each phase.

    statuses: none for all that the code of the hardware has for the call and no other row does. makes: for "call 1"
    alone where that is there, else by the hook that was called last before the refusal, else by phase; a phase that
    is not there may not have the call. kernel: who makes it of the refusal.
    """

    call: Call
    statuses: tuple[enum.IntEnum, ...]
    makes: Mapping[str, Outcome]
    kernel: str
    times: int = 1
    earlier: bool = False
    """Whether another VM lived, and went, on the host before."""
    setting: Setting = LARGE_PAGES
    story: Story | None = None

    def __str__(self) -> str:
        says = "|".join(status.name for status in self.statuses) or "otherwise"
        return f"{self.call.name} {says}" + (f" x{self.times}" if self.times > 1 else "")


def row(
    call: Call, status: enum.IntEnum | None, makes: Mapping[str, Outcome], kernel: str, **more: Any
) -> Refusal:
    """A row for one status, or (None) for all that no other row of the call names."""
    return Refusal(call, () if status is None else (status,), makes, kernel, **more)


@attrs.frozen(eq=False)
class Table:
    """What a vendor's code asks of its trusted party.

    modules: the vendor's code, by name. calls: those that it makes. questions: methods of the hardware that it names
    and that cannot refuse, each with the reason. never: statuses that cannot come, by call's name and status' name
    ("*": of any call), each with the reason. rows: by backend.
    """

    modules: tuple[str, ...]
    calls: tuple[Call, ...]
    questions: Mapping[str, str]
    never: Mapping[tuple[str, str], str]
    rows: tuple[tuple[Backend, Refusal], ...]

    def _hardware(self, backend: Backend, setting: Setting = LARGE_PAGES) -> Any:
        return Bench(backend, setting).host(checked=False).hw

    def _refusals(self, hw: object, call: Call) -> tuple[enum.IntEnum, ...]:
        """What the call can be refused with, by the code of the hardware."""
        return tuple(
            status
            for status in statuses_of(hw, call.operation, call.statuses)
            if status and status not in call.fine
            and (call.name, status.name) not in self.never and ("*", status.name) not in self.never
        )  # fmt: skip

    def statuses(self, row: Refusal, hw: object) -> tuple[enum.IntEnum, ...]:
        """What a row is about: its own statuses, or all that no other row of its call names."""
        if row.statuses:
            return row.statuses
        named = {status for _, other in self.rows if other.call is row.call for status in other.statuses}
        return tuple(status for status in self._refusals(hw, row.call) if status not in named)

    def missing(self) -> list[str]:
        """What the vendor's code asks, or may hear, and no row is about; and what the table has too much of."""
        hw = self._hardware(self.rows[0][0])
        made = calls_made(map(importlib.import_module, self.modules), hw)
        listed = {call.operation: call for call in self.calls}
        found = [f"{name}: neither a call nor a question" for name in sorted(made - set(listed) - set(self.questions))]
        found += [f"{name}: nobody calls it" for name in sorted({*listed, *self.questions} - made)]
        for call in self.calls:
            rows = [row for _, row in self.rows if row.call is call]
            covered = {status for row in rows for status in self.statuses(row, hw)}
            lacking = [status.name for status in self._refusals(hw, call) if status not in covered]
            found += [f"{call.name}: no row for {', '.join(lacking)}"] if lacking else []
            found += [f"{call.name}: no row"] if not rows else []
            found += [f"{row}: it is about nothing" for row in rows if not self.statuses(row, hw)]
        return found

    # ---- trying it --------------------------------------------------------------------------------------------

    def refuse(self, backend: Backend, row: Refusal, *, most: int = MOST) -> int:
        """Try a row at up to `most` places of its story, each with the next of its statuses; at how many it was."""
        statuses = self.statuses(row, self._hardware(backend, row.setting))
        bench = Bench(backend, row.setting)
        counting = row.call.failing(statuses[0])
        _once(bench, row, counting, BLOCK + 8)
        assert counting.seen, f"{row.call.name} is never called"
        places = np.unique(np.linspace(1, counting.seen, min(most, counting.seen)).astype(int)).tolist()
        self._at(bench, row, places, statuses, counting.seen, BLOCK + 8)
        return len(places)

    def refuse_everywhere(self, backend: Backend, row: Refusal) -> int:
        """Try a row at every place of a small VM's story, or a large one's where the small one makes no such call, and
        with every status; at how many it was. Where the call is refused several times in a row, at some places: that it
        is refused at each is another row's."""
        statuses = self.statuses(row, self._hardware(backend, row.setting))
        bench, npages = Bench(backend, attrs.evolve(row.setting, backing="4k")), SMALLEST
        counting = row.call.failing(statuses[0])
        _once(bench, row, counting, npages)
        if not counting.seen:
            bench, npages = Bench(backend, row.setting), BLOCK + 8
            _once(bench, row, counting, npages)
        places = list(range(1, counting.seen + 1))
        if row.times > 1:
            places = places[:: -(-len(places) // 6)]
        places *= -(-len(statuses) // len(places))
        self._at(bench, row, places, statuses, counting.seen, npages, afterwards=16)
        return len(places)

    def _at(
        self, bench: Bench, row: Refusal, places: list[int], statuses: tuple[Any, ...], seen: int, npages: int,
        afterwards: int = 1,
    ) -> None:  # fmt: skip
        """afterwards: another VM lives on the host after every so many of them."""
        for i, nth in enumerate(places):
            status = statuses[i % len(statuses)]
            try:
                _once(bench, row, row.call.failing(status, nth, row.times), npages, not i % afterwards)
            except Exception as error:
                error.add_note(f"{row}, at call {nth} of {seen}, with {status.name}")
                raise

    def storm(self, backend: Backend, seed: int, *, setting: Setting = LARGE_PAGES, chance: float = 0.05) -> int:
        """A life of random actions, in which every call may be refused with any status; how many were.

        Nothing is lost, leaked without being listed, or inconsistent, however often the VM dies of it.
        """
        draw = random.Random(seed)
        bench = Bench(backend, setting)
        told = _Told()
        host = bench.host(told)
        struck: list[str] = []
        failing: list[FailingCall] = []
        for call in self.calls:
            if statuses := self._refusals(host.hw, call):

                def answer(
                    done: int, args: tuple[Any, ...], call: Call = call, statuses: tuple[Any, ...] = statuses
                ) -> Any:
                    status = draw.choice(statuses)
                    struck.append(f"{call.name} {status.name}")
                    return call.answer(done, status, args)

                luck = draw.randrange(1 << 30)
                failing.append(FailingCall(call.operation, answer, elements=call.elements, chance=chance, seed=luck))
                failing[-1].install(host)

        def rest(whether: bool) -> None:
            for one in failing:
                one.resting = whether

        def story(player: Player) -> None:
            rest(False)
            _wander(player, draw)

        try:
            for launch_fails in (False, True, False):
                rest(not launch_fails)
                told.phase = "launch"
                _tell(host, Process(host), told, story, BLOCK + 8 if bench.large else SMALL)
            bench.done(host, leaks=True)
        except Exception as error:
            error.add_note(f"seed {seed}, in {told.phase}, after {told.hook}; refused: {'; '.join(struck)}")
            raise
        return len(struck)


class Guest(Player):
    """It tries again whatever errno it gets, and whatever its own calls say."""

    passing = PASSING | {errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ENOENT, errno.EFAULT}

    def __init__(self, told: _Told, *args: Any, **kwargs: Any) -> None:
        self.told = told
        super().__init__(*args, **kwargs)

    def excepted(self, exception: GuestException) -> None:
        self.told.guest = True


def life(player: Player) -> None:
    """Fault in large and small, convert both ways, split, punch, discard, read all back. The image lies at the end."""
    n = player.npages
    low, block = (100, BLOCK) if n > BLOCK else (4, 8)
    player.write(range(block))
    player.write(range(block, n))
    player.convert(range(low, low + 3), False)
    player.write(range(low - 1, low + 4))
    player.convert(range(low, low + 2), True)
    player.write(range(low - 2, low + 5))
    if player.fd >= 0:
        player.punch(range(block - 2, block + 4))
    player.discard(range(low + 2, low + 3))
    player.write(range(block - 4, n), vcpu=1)
    player.check()


def _wander(player: Player, draw: random.Random) -> None:
    """Random actions on random ranges, large and small."""
    n = player.npages
    for _ in range(12):
        low = draw.choice([0, draw.randrange(n)])
        some = range(low, min(n, low + draw.choice([1, 3, 20, n])))
        match draw.randrange(9):
            case 0 | 1:
                player.write(some, vcpu=draw.randrange(2))
            case 2 | 3:
                player.convert(some, draw.random() < 0.5, vcpu=draw.randrange(2))
            case 4:
                player.read(some)
            case 5 if player.fd >= 0:
                player.punch(some)
            case 6 if player.fd >= 0:  # elsewhere the guest would lose what it has not forgotten
                player.discard(some)
            case 7 if player.caps.dirty_logging and player.fd < 0:
                player.log_dirty(draw.random() < 0.5)
            case 8:
                player.recover()
    player.check()


@attrs.define(eq=False)
class _Told:
    """What a story came to."""

    struck: tuple[str, str] | None = None
    phase: str = "launch"
    hook: str = ""
    dead: bool = False
    stuck: bool = False
    guest: bool = False
    errnos: list[int] = attrs.field(factory=list)

    @observes
    def intercept(self, hook: str, arguments: dict[str, Any]) -> None:
        """Which hook was called last."""
        self.hook = hook

    def strike(self) -> None:
        """A call is refused."""
        self.struck = self.struck or (self.hook, self.phase)


def _short(player: Player) -> None:
    player.write(range(0, player.npages, 3))
    player.check()


def _tell(host: Host, process: Process, told: _Told, story: Story, npages: int) -> None:
    failed, last = Failed(), 0
    try:
        player = Guest(told, host, npages, process=process, launch=False, failed=failed)
        for i, page in enumerate((b"image", b"more")):
            player.load(npages - 8 + i, [page])
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


def _once(bench: Bench, row: Refusal, failing: FailingCall, npages: int, afterwards: bool = True) -> None:
    story = row.story or life
    told = _Told()
    host = bench.host(told)
    if row.earlier:
        _tell(host, Process(host), _Told(), _short, npages)
    failing.install(host)
    failing.on_strike = told.strike
    _tell(host, Process(host), told, story, npages)
    leaked = host.frames.leaked()
    bench.done(host, leaks=True)
    if not failing.nth:
        bad = told.dead or told.stuck or told.guest or told.errnos or leaked
        assert not bad, f"without any refusal: {told}, leaked: {leaked}"
        return
    assert told.struck is not None, "the call was not made again where it was made before"
    hook, phase = told.struck
    wanted = row.makes.get(f"call {failing.nth}") or row.makes.get(hook) or row.makes.get(phase)
    assert wanted is not None, f"the table does not say what a refusal makes in {phase}, after {hook}"
    if told.dead and not told.errnos:
        told.errnos.append(wanted.errno)  # KVM_RUN may end in an exit that says so
    got = Outcome(next(iter(told.errnos), 0), told.dead, leaked > 0, told.stuck, told.guest)
    alike = got == wanted and (len(told.errnos) <= 1 or told.dead or told.stuck)
    assert alike, f"in {phase}, after {hook}, it makes: {got}, not: {wanted}"
    if not afterwards:
        return
    failing.nth = 0  # the rest of the host's life goes well
    after = _Told()
    _tell(host, Process(host), after, _short, npages)
    assert not (after.dead or after.stuck or after.guest or after.errnos), f"the next VM on the host: {after}"
    bench.done(host, leaks=True)
    assert host.frames.leaked() == leaked, "the next VM on the host leaks"


def named(one: object) -> str:
    """Rows and backends as pytest shows them."""
    return one.name if isinstance(one, Backend) else str(one)


def as_tests(table: Table) -> tuple[Callable[..., None], ...]:
    """Three pytest tests: that the table is whole, each row at some places, and (slow) each row at every place."""
    import pytest

    def every_call_and_every_status_has_a_row() -> None:
        assert table.missing() == []

    @pytest.mark.parametrize(("backend", "row"), table.rows, ids=named)
    def a_refusal_makes_what_the_table_says(backend: Backend, row: Refusal) -> None:
        assert table.refuse(backend, row) > 0

    @pytest.mark.slow
    @pytest.mark.parametrize(("backend", "row"), table.rows, ids=named)
    def a_refusal_makes_it_at_every_place(backend: Backend, row: Refusal) -> None:
        assert table.refuse_everywhere(backend, row) > 0

    return every_call_and_every_status_has_a_row, a_refusal_makes_what_the_table_says, a_refusal_makes_it_at_every_place

