"""The machine: frames and their content, the trusted hardware, CPUs, the clock, and the one vendor bound to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cvmcore.backend import Backend, parse_options
from cvmcore.clock import Meter
from cvmcore.effects import Steps, drain
from cvmcore.errors import InputError, UapiError
from cvmcore.mem.contract import CONTRACTS
from cvmcore.mem.frames import Frames
from cvmcore.mem.mm import Mm
from cvmcore.memory import SCRAMBLED, Memory
from cvmcore.observers import Log
from cvmcore.ops import Ops
from cvmcore.pages import Sel, Words, array_of, count, take
from cvmcore.policies import POLICIES
from cvmcore.types import (
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    Capabilities,
    HostMode,
    HostVerdict,
)
from cvmcore.vm import Vm

if TYPE_CHECKING:
    from cvmcore.cost import Profile

R = TypeVar("R")

KERNELS = ("6.18", "7.x")
BACKINGS = {"4k": PG_LEVEL_4K, "2m": PG_LEVEL_2M}
FRAMES_256_GIB = 1 << 26


class Host:
    """A machine with one vendor's hardware. VM types of that vendor live on it side by side.

    backend: which vendor, and the VM type that `create_vm` makes unless told otherwise. profile: prices. nr_frames:
    memory in 4K frames. policies: choices of the core itself (`cvmcore.policies`). kernel: whose errno where versions
    differ, "6.18" or "7.x"; it changes nothing else. backing: "4k" or "2m", the largest pages the host backs memory
    with. memlock_limit_bytes: RLIMIT_MEMLOCK of the VMM, None without a limit. observers: see `cvmcore.observers`.
    drive: runs operations, `drain` unless told otherwise.
    """

    def __init__(
        self,
        backend: Backend,
        profile: Profile,
        *,
        nr_frames: int = FRAMES_256_GIB,
        options: dict[str, str] | None = None,
        policies: dict[str, str] | None = None,
        kernel: str = "6.18",
        backing: str = "4k",
        nr_cpus: int = 16,
        memlock_limit_bytes: int | None = None,
        observers: Iterable[object] = (),
        drive: Callable[[Steps[Any]], Any] = drain,
    ) -> None:
        if kernel not in KERNELS:
            raise InputError(f"kernel '{kernel}' is none of {', '.join(KERNELS)}")
        if backing not in BACKINGS:
            raise InputError(f"backing '{backing}' is none of {', '.join(BACKINGS)}")
        self.backend = backend
        self.kernel = kernel
        self.backing_level = BACKINGS[backing]
        self.nr_cpus = nr_cpus
        self.memlock_limit_bytes = memlock_limit_bytes
        self.options = parse_options(backend.options, options or {}, f"backend {backend.name}")
        given = dict(policies or {})
        for name, word, choice in backend.policy_words:
            if given.get(name) == word:
                given[name] = choice
        self.policies = parse_options(POLICIES, given, "the core")
        self.contract = CONTRACTS[self.policies["invalidation"]]
        self.drive: Callable[[Steps[Any]], Any] = drive
        self.profile = profile
        self.meter = Meter(profile.ns_by_item())
        self.memory = Memory(nr_frames)
        self.frames = Frames(nr_frames)
        self.hw: Any = None
        self.vms: list[Vm] = []
        self.nr_vms = 0
        self.ops = Ops(backend.make(), backend.name, self.meter, self)
        self._log: Log | None = None
        for observer in observers:
            if isinstance(observer, Log):
                self._log = observer
            self.ops.observe(observer)
        if self.ops.watches_locks and drive is drain:
            self.drive = self.ops.drain
        self.ops.call_now("host_init", host=self)

    @property
    def nr_frames(self) -> int:
        """Frames of the machine."""
        return self.frames.nr_frames

    def last_events(self) -> tuple[object, ...]:
        """What happened last, for the message of a broken invariant; empty where no Log observes."""
        return tuple(self._log.events) if self._log else ()

    def capabilities(self, vm_type: str, options: dict[str, Any]) -> Capabilities:
        """What the bound vendor says of a VM type."""
        caps = self.ops.call_now("capabilities", vm_type=vm_type, options=options)
        return caps if isinstance(caps, Capabilities) else Capabilities()

    def make_vm(self, mm: Mm, vm_type: str | None = None, options: dict[str, Any] | None = None) -> Vm:
        """A new VM in an address space. UapiError from the vendor: nothing is left behind."""
        vm_type = vm_type or self.backend.vm_type
        options = self.options if options is None else options
        vm = Vm(self, self.nr_vms, vm_type, self.capabilities(vm_type, options), options, mm)
        try:
            self.ops.call_now("vm_init", vm=vm)
        except UapiError:
            mm.notifiers.remove(vm)
            raise
        self.nr_vms += 1
        self.vms.append(vm)
        self.ops.emit("vm", "create", vm=vm.id)
        return vm

    # ---- memory goes back, or is looked at --------------------------------------------------------------------

    def free_gmem(self, pfns: Sel) -> Steps[None]:
        """Frames leave a guest_memfd inode: the vendor takes them back (`mem.contract`), then they are free."""
        if self.ops.observed:
            self.ops.emit("gmem", "free_folio", pfns=pfns, n=count(pfns))
        self.frames.free((yield from self.contract.free(self, pfns)))

    def host_access(self, pfns: Sel, write: bool, mode: HostMode = HostMode.USER) -> HostVerdict:
        """What happens when the host touches frames: the hook's verdict, or by key where there is no hook."""
        verdict = self.ops.call_now("host_access", count(pfns), host=self, pfns=pfns, write=write, mode=mode)
        if verdict is not None:
            if verdict == HostVerdict.RECLAIMED:
                # The hardware took the page from its owner, translations included.
                for vm in self.vms:
                    for vcpu in vm.vcpus:
                        vcpu.tlb.drop_frames(pfns)
            return HostVerdict(verdict)
        return HostVerdict.CIPHERTEXT if np.count_nonzero(take(self.memory.key, pfns)) else HostVerdict.OK

    def host_read(self, pfns: Sel, mode: HostMode = HostMode.USER) -> tuple[HostVerdict, Words]:
        """The stamps that a host read returns: content only where the verdict is OK."""
        verdict = self.host_access(pfns, False, mode)
        n = len(array_of(pfns))
        if verdict in (HostVerdict.OK, HostVerdict.RECLAIMED):
            return verdict, self.memory.read(pfns, 0)
        return verdict, np.full(n, 0 if verdict is HostVerdict.ZEROS else SCRAMBLED, np.uint32)
