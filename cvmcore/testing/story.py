"""A guest's life in steps, in which all that may fail happens; and how it goes on from every failure.

`Tale` tells it on a host. `everywhere` tells it once without a failure and keeps what stood before each step; then, for
every place at which something may fail, it puts the step's world back, lets the place fail, and goes on until all
stands as it did without the failure (from there on nothing new can come) or the story is at its end.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from cvmcore.errors import UapiError
from cvmcore.host import Host
from cvmcore.testing.faults import MEMORY, TRY_LOCK, Failures
from cvmcore.testing.player import Died, Failed, Player
from cvmcore.testing.reach import Kept, fingerprint
from cvmcore.testing.workbench import Bench
from cvmcore.types import Capabilities
from cvmcore.uapi import Process

SMALL = 24
"""Pages of a small VM."""
BLOCK = 512

Step: TypeAlias = Callable[[Player], None]


# ---- the steps ------------------------------------------------------------------------------------------------


def _write(low: int, high: int, vcpu: int = 0) -> Step:
    """The guest writes pages; `high` not above 0: counted from the end."""
    return lambda player: player.write(range(low, high if high > 0 else player.npages + high), vcpu)


def _convert(low: int, high: int, private: bool) -> Step:
    return lambda player: player.convert(range(low, high), private)


def _punch(low: int, high: int) -> Step:
    return lambda player: player.punch(range(low, high))


def _discard(player: Player) -> None:
    player.discard(range(2, 3))
    if player.in_place and player.two_kinds:
        player.shared.pop(2, None)


def _read_log(player: Player) -> None:
    player.vm.get_dirty_log(0)


def _unknown_command(player: Player) -> None:
    try:
        player.vm.memory_encrypt_op("KVM_NO_SUCH_COMMAND")
    except UapiError:
        return
    raise AssertionError("an unknown command does something")


def _always(tale: Tale) -> bool:
    return True


def _if(fits: Callable[[Tale], bool], *steps: Step) -> tuple[tuple[Callable[[Tale], bool], Step], ...]:
    """Steps of some tales only."""
    return tuple((fits, step) for step in steps)


STORY: tuple[tuple[Callable[[Tale], bool], Step], ...] = (
    *_if(_always, _write(0, -4), _convert(2, 6, False), _write(2, 8), _convert(3, 5, True), _write(0, 0, vcpu=1)),
    *_if(lambda tale: tale.caps.private_by_attribute, _punch(6, 12)),
    *_if(_always, _discard, _write(1, 0), Player.check),
    # The dirty log: leaves are split or lose write access, and get it back.
    *_if(
        lambda tale: tale.caps.dirty_logging and not tale.caps.private_by_attribute,
        lambda player: player.log_dirty(True), _write(4, 12), _read_log, _write(6, 8),
        lambda player: player.log_dirty(False), _write(0, 0),
    ),
    *_if(lambda tale: tale.host.ops.has("unregister_region"), Player.unregister, Player.register),
    *_if(lambda tale: not tale.caps.memslots_fixed_after_run, Player.delete_slot, Player.add_slot, _write(0, 4)),
    # A block is used anew, beginning with one page of it.
    *_if(
        lambda tale: tale.caps.private_by_attribute and tale.pages > BLOCK,
        _convert(0, BLOCK, True), _punch(0, BLOCK), _write(3, 4), _write(0, BLOCK),
    ),
    # Small pages are merged where the policy says so; blocked tables serve again where a part of one is converted.
    *_if(
        lambda tale: tale.caps.promotes and tale.pages > BLOCK,
        _convert(5, 6, False), _convert(5, 6, True), _write(0, BLOCK), Player.recover,
        _convert(200, 300, False), _convert(200, 300, True), _write(0, BLOCK), Player.recover,
        _convert(7, 9, False), _convert(7, 9, True), _write(0, BLOCK), Player.recover,
        _write(9, 10), _write(300, 301), Player.recover,
    ),
    *_if(lambda tale: tale.host.ops.has("memory_encrypt_op"), _unknown_command),
    *_if(lambda tale: tale.host.ops.has("vm_copy"), Player.mirror),
    *_if(lambda tale: tale.host.ops.has("vm_move"), Player.move),
    *_if(_always, Player.check),
)  # fmt: skip
"""Steps, and in which tales they are. A step is about one call, so that little is told again."""
SHORT = 3
"""Steps of a VM whose launch did not go well, before it ends: it may be another one, and never be like the first."""


# ---- telling them ---------------------------------------------------------------------------------------------


class Tale:
    """The story on a host: a VM is made, it lives, it goes, and everything comes back.

    dies: the VM may be dead of a failure; leaks: the vendor may leak, and list, what it could not take back.
    """

    def __init__(self, bench: Bench, failures: Failures, *, dies: bool = False, leaks: bool = False) -> None:
        self.host: Host = bench.host(drive=failures.drive)
        self.failures = failures
        failures.install(self.host)
        self.pages: int = BLOCK + 8 if bench.large else SMALL
        self.caps: Capabilities = self.host.capabilities(bench.backend.vm_type, self.host.options)
        self.script = [step for fits, step in STORY if fits(self)]
        self.steps = len(self.script) + 2
        self.dies, self.leaks = dies, leaks
        self.died = self.over = False
        self.failed = Failed()
        self.process = Process(self.host)
        self.player: Player | None = None

    def tell(self, bench: Bench, at: int) -> None:
        """One step: 0 makes the VM, the last one ends everything."""
        if at == 0:
            self._begin()
        elif at == self.steps - 1:
            self._end(bench)
        elif self.player is not None:
            try:
                self.script[at - 1](self.player)
            except Died:
                assert self.dies, "the VM is dead of a failure that passes"
                self.died = True
                self._end(bench)

    def all(self, bench: Bench, start: int = 0) -> None:
        """All steps, from one on."""
        for at in range(start, self.steps):
            if not self.over:
                self.tell(bench, at)

    def _begin(self) -> None:
        for _ in range(3):
            try:
                self.player = Player(self.host, self.pages, process=self.process, launch=False, failed=self.failed)
                self.player.load(self.pages - 8, [b"image"])
                self.player.finish_launch()
            except (UapiError, Died) as error:
                # A launch that failed half way cannot always go on: another VM.
                assert self.dies or not isinstance(error, Died), "the VM is dead of a failure that passes"
                if isinstance(error, UapiError):
                    assert error.errno in (errno.ENOMEM, errno.EIO, errno.EBUSY, errno.EAGAIN), error
                self.died |= isinstance(error, Died)
                self.player = None
                self.process.exit()
                self.process = Process(self.host)
            else:
                return

    def _end(self, bench: Bench) -> None:
        self.process.exit()
        bench.done(self.host, leaks=self.died or self.dies or self.leaks or errno.EIO in self.failed.by_errno)
        self.over = True

    def looks(self) -> int:
        """A number for all that decides how the story goes on."""
        player = self.player
        known = player and (player.private, player.shared, player.as_shared, player.accepted, player.stamp, player.vm)
        return fingerprint(self.host, self.process, known, elements=self.host.nr_frames)


class Places:
    """All places of the story at which something may fail: counted by what it is and by step."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.failures = Failures()
        self.tale = Tale(bench, self.failures)
        self.kept: list[Kept] = []
        self.looks: list[int] = []
        self.before: list[dict[str, int]] = []
        """Places of each kind before each step."""
        for at in range(self.tale.steps):
            self.kept.append(Kept(self.tale, elements=self.tale.host.nr_frames))
            self.before.append(dict(self.failures.seen))
            self.tale.tell(bench, at)
            self.looks.append(self.tale.looks())
        self.count = dict(self.failures.seen)
        self.called: set[str] = set()
        """Hooks that were called so far, by whatever was told."""
        self._note()

    def _note(self) -> None:
        self.called |= {name for name, hook in self.tale.host.ops.hooks.items() if hook.calls}

    def fail(self, what: str, nth: int, *, dies: bool = False, leaks: bool = False) -> None:
        """The story with one place failing. Raises what goes wrong."""
        tale = self.tale
        start = max(at for at, seen in enumerate(self.before) if seen.get(what, 0) < nth)
        self.kept[start].restore()
        tale.dies, tale.leaks, self.failures.at = dies, leaks, (what, nth)
        assert not self.failures.struck
        for at in range(start, tale.steps):
            tale.tell(self.bench, at)
            if tale.over or tale.looks() == self.looks[at]:
                break
            if start == 0 and at == SHORT:
                tale.tell(self.bench, tale.steps - 1)
                break
        assert self.failures.struck, "what was there before is not called again: the story was not put back whole"
        self._note()


def spread(n: int, most: int) -> list[int]:
    """At most so many of 1 to n, the first and the last among them."""
    return np.unique(np.linspace(1, n, min(most, n)).astype(int)).tolist() if n else []


__all__ = ["BLOCK", "MEMORY", "SMALL", "STORY", "TRY_LOCK", "Places", "Tale", "spread"]
