"""A backend on the workbench: the settings in which it is looked at, and the machines that checks run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np

from cvmcore.backend import Backend
from cvmcore.cost import Profile
from cvmcore.errors import InvariantViolation
from cvmcore.host import Host
from cvmcore.observers import Log
from cvmcore.pages import contiguous
from cvmcore.runner import load_profile_for
from cvmcore.sched import Lockdep
from cvmcore.testing.invariants import Checker
from cvmcore.types import Capabilities, HostVerdict, Use


@attrs.frozen
class Setting:
    """How the host and the backend are set: the largest pages of the host, options of the backend, policies of the core
    without which some hooks are not called."""

    backing: str = "4k"
    options: tuple[tuple[str, str], ...] = ()
    policies: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return ",".join([self.backing, *(f"{name}={value}" for name, value in self.options + self.policies)])


POLICIES: tuple[tuple[tuple[str, str], Callable[[Capabilities], bool]], ...] = (
    *((("merge", way), lambda caps: caps.promotes) for way in ("scan", "fault", "block")),
    (("walker", "external"), lambda caps: caps.has_mirror),
)
"""Policies of the core, and the capability with which they have hooks called that are not called else."""


def settings_of(backend: Backend) -> list[Setting]:
    """As it is; on large pages; then every other choice of each option, on large pages; then, in the first of these
    where a policy makes a difference to the backend, that policy."""
    found = [Setting("4k"), Setting("2m")]
    for option in backend.options:
        for choice in option.choices:
            if choice != option.default:
                found.append(Setting("2m", ((option.name, choice),)))
    for policy, matters in POLICIES:
        for one in [one for one in found if one.backing == "2m" and not one.policies]:
            if matters(Bench(backend, one).caps):
                found.append(attrs.evolve(one, policies=(policy,)))
                break
    return found


class Bench:
    """A backend in one setting, and what checks make of it."""

    def __init__(self, backend: Backend, setting: Setting, *, effort: int = 1, shrink: bool = True) -> None:
        self.backend = backend
        self.setting = setting
        self.effort = effort
        """How long random checks go on: 1 is what is meant for every run."""
        self.shrink = shrink
        """Whether a failure that was found at random is made as short as it can be."""
        self._profile: Profile | None = None
        self.script: list[str] = []
        """UAPI script of the failure, where a check made one."""

    @property
    def caps(self) -> Capabilities:
        """What the backend says that it can."""
        host = self.host(checked=False)
        return host.capabilities(self.backend.vm_type, host.options)

    @property
    def large(self) -> bool:
        """Whether the host backs with 2 MiB pages."""
        return self.setting.backing == "2m"

    def host(self, *observers: object, checked: bool = True, **more: Any) -> Host:
        """A fresh machine; with the checker on it unless told otherwise (`host.checker`)."""
        if self._profile is None:
            self._profile = load_profile_for(self.backend, None)
        host = Host(
            self.backend, self._profile, nr_frames=1 << (14 if self.large else 13), backing=self.setting.backing,
            options=dict(self.setting.options), policies=dict(self.setting.policies), observers=[Log(12), *observers],
            **({"drive": Lockdep()} | more),
        )  # fmt: skip
        if checked:
            self.checker = Checker.on(host)
        return host

    def done(self, host: Host, *, leaks: bool = False) -> None:
        """All VMs are gone: nothing is left, and free frames are the host's; and nothing was leaked, where nothing had
        failed."""
        assert not host.vms, "a VM is not destroyed, though nobody holds it"
        self.checker.check_idle()
        left = host.frames.outstanding()
        meta = {use.name: n for use, n in left.items() if use in (Use.TABLE, Use.META, Use.GMEM, Use.ORPHAN)}
        assert not meta, f"frames are in use though all VMs are gone: {meta}"
        if not leaks:
            assert not host.frames.leaked(), f"{host.frames.leaked()} frames were leaked, and nothing had failed"
        frames_are_the_hosts(host)


def frames_are_the_hosts(host: Host) -> None:
    """The host may write to every frame that is free."""
    frames = host.frames
    free = np.flatnonzero(frames.use == Use.FREE)
    free = free[(free > 0) & ((free < frames.top) | (free >= frames.bottom))]  # the others were never used
    if not len(free) or host.host_access(contiguous(free), True) is HostVerdict.OK:
        return
    bad = next(pfn for pfn in free.tolist() if host.host_access(slice(pfn, pfn + 1, 1), True) != HostVerdict.OK)
    verdict = host.host_access(slice(bad, bad + 1, 1), True)
    raise InvariantViolation(
        "the host has a frame back that it cannot write to", number=17, pfn=bad, states={"verdict": verdict.name},
        events=host.last_events(),
    )  # fmt: skip
