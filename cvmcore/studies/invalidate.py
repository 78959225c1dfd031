"""Study `invalidate` (mail 002): one callback by gfn with a reason, or pages handed over by frame?

Each contract of the policy `invalidation` runs through the moments that the mail argues about, on every installed
backend whose private memory is in a guest_memfd. Counted: memslots walked and frames looked up to find what is to be
cleaned, vendor hooks and operations, work under mmu_lock held for write. Looked at afterwards: whether the guest has
its data, and whether each frame that the host got back is the host's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.backend import GROUP, Backend
from cvmcore.effects import Steps
from cvmcore.errors import CvmError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.mem.contract import CONTRACTS
from cvmcore.mem.mmulock import RANK_MMU
from cvmcore.pages import run
from cvmcore.plugins import installed, load_backend
from cvmcore.study import Column, Findings, Study, StudyContext
from cvmcore.types import KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, PAGE_SHIFT, HostVerdict, Use

NAME = "invalidate"
PAGES = 1024
"""Of the guest, all of them private and written at the beginning."""
PART = run(256, 256)
"""What a moment is about."""
FRAMES = 1 << 14

ROTH = (
    "claimed (M. Roth): handing pages over by frame needs no memslot and no gfn, works anywhere in the life cycle, and "
    "spares the walk from gfns to frames"
)
YAMAHATA = (
    "claimed (I. Yamahata): where removing the entry is all the clean-up, the callback by gfn does, if it tells "
    "private from shared; nobody needs to know a hole from a closed file"
)


# ---- the moments ----------------------------------------------------------------------------------------------


def _convert(machine: Machine) -> None:
    """To shared, back to private, written again."""
    machine.guest.convert(PART, private=False)
    machine.guest.write(PART, private=False)
    machine.guest.convert(PART, private=True)
    machine.guest.write(PART)


def _punch_after(machine: Machine) -> None:
    """A hole where the attribute says shared already."""
    machine.guest.convert(PART, private=False)
    machine.punch(PART)


def _closed_bound(machine: Machine) -> None:
    """The file is closed while its memslot is there: release, then unbind."""
    machine.process.close(machine.regions[0].gmem_fd)


def _closed_unbound(machine: Machine) -> None:
    """The memslot goes first, then the file."""
    region = machine.regions[0]
    size = region.npages << PAGE_SHIFT
    machine.vm.set_user_memory_region2(0, KVM_MEM_GUEST_MEMFD, 0, 0, region.hva, region.gmem_fd, 0)
    machine.process.close(region.gmem_fd)
    machine.process.munmap(region.hva, size)


def _mixed(machine: Machine) -> None:
    """A range that is private but for one page becomes private."""
    machine.guest.convert(run(PART.start, 1), private=False)
    machine.vm.set_memory_attributes(
        PART.start << PAGE_SHIFT, PART.stop - PART.start << PAGE_SHIFT, KVM_MEMORY_ATTRIBUTE_PRIVATE
    )
    machine.guest.shared[PART.start] = 0


def _notified(machine: Machine) -> None:
    """The host takes away the VMM's memory behind private pages: an event of shared memory."""
    region = machine.regions[0]
    machine.process.write(region.hva + (PART.start << PAGE_SHIFT), 7, PART.stop - PART.start)
    machine.discard_shared(PART)


MOMENTS: dict[str, Callable[[Machine], None]] = {
    "convert and back": _convert,
    "punch after conversion": _punch_after,
    "close, memslot bound": _closed_bound,
    "close, no memslot": _closed_unbound,
    "to private, mixed range": _mixed,
    "notifier, private range": _notified,
}
OVER = frozenset({"close, memslot bound", "close, no memslot"})
"""The guest has no memory afterwards."""


# ---- measuring ------------------------------------------------------------------------------------------------


class UnderLock:
    """A driver that runs operations to their end and keeps apart what is charged under mmu_lock held for write."""

    def __init__(self) -> None:
        self.host: Host | None = None
        self.counts: Counter[str] = Counter()

    def __call__(self, steps: Steps[Any]) -> Any:
        before: dict[str, int] = {}
        while True:
            try:
                effect = next(steps)
            except StopIteration as stop:
                return stop.value
            if self.host is None or effect.lock is None or effect.lock.rank != RANK_MMU:
                continue
            if effect.kind == "write":
                before = dict(self.host.meter.counts)
            elif before:
                self.counts.update(_less(self.host.meter.counts, before))
                before = {}


def _calls(host: Host) -> dict[str, int]:
    return {name: hook.pages for name, hook in host.ops.hooks.items()}


def _less(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {key: n - before.get(key, 0) for key, n in now.items() if n != before.get(key, 0)}


@attrs.frozen
class Measured:
    """One moment under one contract on one backend. charged: by price item, elsewhere: the same on other CPUs, locked:
    the part under mmu_lock. hooks: pages or entries that the vendor's hooks were called for. broken: what went wrong,
    and why."""

    backend: str
    contract: str
    moment: str
    charged: dict[str, int]
    elsewhere: dict[str, int]
    locked: dict[str, int]
    hooks: int
    operations: int
    broken: tuple[str, str]


def _play(backend: Backend, context: StudyContext, contract: str, moment: str) -> Measured:
    watch = UnderLock()
    host = Host(
        backend, context.profile(backend.name), nr_frames=FRAMES, policies={"invalidation": contract}, drive=watch
    )
    machine = Machine(host, PAGES << PAGE_SHIFT)
    machine.launch()
    machine.guest.write(run(0, PAGES))
    private = machine.frames_of(run(0, PAGES))
    watch.host, meter = host, host.meter
    before = dict(meter.counts), dict(meter.elsewhere), dict(meter.ops), _calls(host)
    failed: tuple[str, str] | None = None
    try:
        MOMENTS[moment](machine)
    except CvmError as error:
        failed = "is refused", str(error)
    watch.host = None
    after = meter.counts, meter.elsewhere, meter.ops, _calls(host)
    charged, elsewhere, ops, hooks = (_less(now, then) for now, then in zip(after, before, strict=True))
    return Measured(
        backend.name, contract, moment, charged, elsewhere, dict(watch.counts), sum(hooks.values()), sum(ops.values()),
        failed or _broken(machine, private, moment),
    )


def _broken(machine: Machine, private: npt.NDArray[np.int64], moment: str) -> tuple[str, str]:
    host = machine.host
    if moment not in OVER and (wrong := machine.guest.check()):
        return "guest data is lost", wrong[0]
    back = np.sort(private[host.frames.use[private] == Use.FREE])
    bad = [pfn for pfn in back.tolist() if host.host_access(run(pfn, 1), True) is not HostVerdict.OK]
    if bad:
        return f"{len(bad)} frames go back unclean", f"the host owns pfn {bad[0]:#x} again, and may not write to it"
    return "", ""


def measure(context: StudyContext) -> list[Measured]:
    """Every moment under every contract on every installed backend with private memory of its own."""
    backends = [one for name in installed(GROUP) if _has_gmem(one := load_backend(name), context)]
    grid = [(one, contract, moment) for one in backends for contract in CONTRACTS for moment in MOMENTS]
    found = []
    for done, (one, contract, moment) in enumerate(grid):
        context.progress(done, len(grid), f"{one.name}, {contract}")
        found.append(_play(one, context, contract, moment))
    return found


def _has_gmem(backend: Backend, context: StudyContext) -> bool:
    host = Host(backend, context.profile(backend.name), nr_frames=1 << 10)
    return host.capabilities(backend.vm_type, host.options).private_by_attribute


# ---- evaluating -----------------------------------------------------------------------------------------------

COLUMNS = (
    Column("backend", "backend"),
    Column("contract", "contract"),
    Column("moment", "moment"),
    Column("walks", "memslot walks"),
    Column("lookups", "frames looked up"),
    Column("hooks", "hook calls"),
    Column("operations", "vendor operations"),
    Column("us", "time", "us", 1),
    Column("locked_us", "of it under mmu_lock", "us", 1),
    Column("result", "result"),
)


def evaluate(measured: list[Measured], context: StudyContext) -> Findings:
    """Prices what was counted, and says for each backend which contracts hold and what they cost."""
    rows = []
    for one in measured:
        prices = context.profile(one.backend).ns_by_item()

        def us(counts: dict[str, int], prices: dict[str, Any] = prices) -> float:
            return float(sum(prices[item] * n for item, n in counts.items())) / 1e3

        rows.append({
            "backend": one.backend, "contract": one.contract, "moment": one.moment,
            "walks": one.charged.get("memslot_walk", 0), "lookups": one.charged.get("gmem_lookup_4k", 0),
            "hooks": one.hooks, "operations": one.operations, "us": us(one.charged) + us(one.elsewhere),
            "locked_us": us(one.locked), "result": one.broken[0] or "holds", "why": one.broken[1],
        })  # fmt: skip
    sentences, verdict = [], []
    seen = list(dict.fromkeys(one.backend for one in measured))
    for name in seen:
        sentence, found = _concluded(name, [row for row in rows if row["backend"] == name])
        sentences.append(sentence)
        verdict.append((name, *found))
    return Findings(
        rows=rows,
        calibrated=[],
        predicted=["every time: prices of single operations, none fitted to an invalidation"],
        notes=[
            ROTH,
            YAMAHATA,
            f"a guest of {PAGES} private pages, all written; each moment is about {PART.stop - PART.start} of them, or "
            "the file; in the callback, mmu_lock is held for write",
            "no private memory in a guest_memfd, so nothing to tell: "
            + ", ".join(name for name in installed(GROUP) if name not in seen),
            "words of each contract: " + "; ".join(f"{name}: {_words(name)}" for name in CONTRACTS),
        ],
        conclusion="\n".join(sentences),
        verdict=tuple(verdict),
    )


def _words(name: str) -> str:
    contract = CONTRACTS[name]
    words = ", ".join(dict.fromkeys(word or "nothing" for word in contract.words.values()))
    return words + (", frames when freed" if contract.by_pfn else "")


def _concluded(name: str, rows: list[dict[str, Any]]) -> tuple[str, tuple[Any, ...]]:
    by_contract = {contract: [row for row in rows if row["contract"] == contract] for contract in CONTRACTS}
    broken = {
        contract: [row["moment"] for row in some if row["result"] != "holds"] for contract, some in by_contract.items()
    }
    hold = [contract for contract in CONTRACTS if not broken[contract]]
    cost = {contract: sum(row["us"] for row in by_contract[contract]) for contract in hold}
    least = min(cost.values(), default=0.0)
    cheapest = [contract for contract in hold if cost[contract] <= least * 1.001]
    told = [f"{contract} at: {', '.join(moments)}" for contract, moments in broken.items() if moments]
    sentence = f"{name}: holds with {', '.join(hold) or 'none'}, cheapest {', '.join(cheapest) or 'none'}"
    sentence += f"; breaks with {'; '.join(told)}" if told else ""
    needs_frames = "decoupled" in hold and not {"flags3", "flags2"} & set(hold)
    agrees = (
        "pages must be handed over by frame, as M. Roth says"
        if needs_frames
        else "the callback by gfn is enough if it tells private from shared, as I. Yamahata says"
        if "untold" not in hold
        else "any contract will do"
    )
    same = all(
        {k: v for k, v in a.items() if k != "contract"} == {k: v for k, v in b.items() if k != "contract"}
        for a, b in zip(by_contract["flags3"], by_contract["flags2"], strict=True)
    )
    sentence += f"; {agrees}; to tell a hole from a closed file changes {'nothing' if same else 'something'}."
    return sentence, (tuple(hold), tuple(cheapest), agrees, same)


def draw(findings: Findings, figure: Any) -> None:
    """Time of each moment by contract, a panel for each backend; what breaks is hatched."""
    backends = list(dict.fromkeys(row["backend"] for row in findings.rows))
    panels = figure.subplots(len(backends), 1, squeeze=False)[:, 0]
    figure.set_size_inches(10, 2.6 * len(backends))
    for panel, name in zip(panels, backends, strict=True):
        for number, contract in enumerate(CONTRACTS):
            rows = [row for row in findings.rows if (row["backend"], row["contract"]) == (name, contract)]
            places = np.arange(len(rows)) + (number - 2) * 0.16
            bars = panel.bar(places, [row["us"] for row in rows], 0.15, label=contract)
            for bar, row in zip(bars, rows, strict=True):
                if row["result"] != "holds":
                    bar.set_hatch("///")
        panel.set_title(f"{name} (hatched: breaks)")
        panel.set_ylabel("us")
        panel.set_xticks(range(len(MOMENTS)), list(MOMENTS), fontsize=7)
    panels[0].legend(fontsize=7)


INVALIDATE = Study(
    name=NAME,
    question="one callback by gfn that is told why, or private pages handed over by frame when they are freed?",
    source="mail 002, I. Yamahata and M. Roth, June 2023",
    columns=COLUMNS,
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)
