"""Studies `hugepages` and `mirror`.

`hugepages` (mail 004): private pages were split; how do large pages come back, and what does that cost? Two things
split them: a cycle of dirty logging, which splits all of a slot at once, and a storm of conversions, each of which
splits the large pages at its edges. Part of memory is hot: the guest uses it all the time. For each option of the mail
(A scan, B in faults, C block and merge what is used, none) the model runs the same rounds: the guest works, then the
recovery thread has a turn. What is counted: leaves of each size, SEAMCALLs by leaf, who paid for them.

`mirror` (mail 001): what does KVM's copy of the Secure EPT spare? The same faults are resolved with walks of the mirror
and, as the counterfactual, with a SEAMCALL for each entry that a walk looks at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.backend import Option
from cvmcore.effects import Steps
from cvmcore.errors import InputError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.mem.tdp import PRESENT, TABLE
from cvmcore.pages import Sel, as_sel
from cvmcore.sched import Timed
from cvmcore.study import Column, Findings, Study, StudyContext
from cvmcore.types import KVM_MEM_LOG_DIRTY_PAGES, PAGE_BYTES, PG_LEVEL_2M
from cvmcore_tdx.ops import TDX

NEVER = "never"
POLICIES = {"none": "none", "scan": "A", "fault": "B", "block": "C"}
"""Policies of the core, and their letters in the mail."""
SCENARIOS = ("dirty-log", "conversions")
RECOVERED = 0.9
"""A region has recovered when so much of it is mapped large again."""
TOUCHED, BUFFER = 16, 16
"""Pages that the guest touches in each hot block in a round; pages of a buffer that it shares."""
TLB_MISS_NS = 40
"""What an access that misses the TLB costs more with 4K pages than with 2M (SNP on 4K and 2M nested pages: idle latency
about 40 ns longer, AMDSEV issue 225, Misono and Roth, 2024)."""
QUIET_ITEMS = frozenset({"guest_read_4k", "guest_write_4k"})
"""Work that guests do anyway."""


# ---- running the model ----------------------------------------------------------------------------------------


@attrs.frozen
class Round:
    """After a round: how much of the hot region, and of all, is mapped large; what vCPUs, and the thread, did in it (by
    price item); how often all vCPUs were kicked."""

    hot: float
    all: float
    vcpus: Counter[str]
    thread: Counter[str]
    kicks: int


@attrs.define
class Ran:
    """One option in one scenario. rounds: those before the splitting stops, and after."""

    storm: int
    rounds: list[Round] = attrs.field(factory=list)
    seamcalls: dict[str, int] = attrs.field(factory=dict)
    merged: int = 0
    refused: int = 0
    wasted: int = 0
    intact: bool = True


class Case:
    """A TD of large pages, and which of its blocks are hot."""

    def __init__(self, context: StudyContext, policy: str) -> None:
        options = context.options
        self.blocks: int = options["mem"] // 2
        self.vcpus: int = options["vcpus"]
        nr_hot = max(1, self.blocks * options["hot"] // 100)
        rng = np.random.default_rng(context.seed)
        self.hot = np.sort(rng.choice(self.blocks, nr_hot, replace=False))
        self.rng = rng
        self.host = Host(
            TDX, context.profile(TDX.name), nr_frames=self.blocks * 1024 + 8192, backing="2m",
            options={"page_aug": "2m"}, policies={"merge": policy},
        )  # fmt: skip
        self.machine = Machine(self.host, self.blocks * 512 * PAGE_BYTES, vcpus=self.vcpus)
        self.machine.launch()
        self.vm = self.machine.vm.vm
        self.machine.guest.write(slice(0, self.blocks * 512, 1))
        self.ran = Ran(0)
        self._fresh = np.zeros(self.blocks, bool)  # merged, and not used since
        self._turn = 0
        self._before: Counter[str] = Counter()
        self._kicks = 0
        self.host.meter.ops.clear()

    def large(self) -> npt.NDArray[np.bool_]:
        """Which blocks are mapped large."""
        root = self.vm.tdp.root_for(True)
        words = root.entries[PG_LEVEL_2M][: self.blocks]
        is_large: npt.NDArray[np.bool_] = (words & np.uint32(PRESENT | TABLE)) == PRESENT
        return is_large

    def vcpu(self) -> int:
        self._turn += 1
        return self._turn % self.vcpus

    def use(self, blocks: npt.NDArray[np.int64]) -> None:
        """The guest works in these blocks."""
        inside = np.sort(self.rng.choice(512, TOUCHED, replace=False))
        gfns = as_sel(((blocks << 9)[:, None] + inside).ravel())
        self.machine.guest.write(gfns, self.vcpu())
        self._fresh[blocks] = False

    def share(self, blocks: npt.NDArray[np.int64]) -> None:
        """A buffer in each of these blocks is shared, used, and taken back."""
        at = int(self.rng.integers(0, 512 // BUFFER)) * BUFFER
        gfns: Sel = as_sel(((blocks << 9)[:, None] + np.arange(at, at + BUFFER)).ravel())
        guest, vcpu = self.machine.guest, self.vcpu()
        guest.convert(gfns, False, vcpu)
        guest.write(gfns, vcpu, private=False)
        self.split_happened()
        guest.convert(gfns, True, vcpu)
        guest.write(gfns, vcpu)

    def split_happened(self) -> None:
        """Merges that nobody has used up to now were in vain where the block is small again."""
        gone = self._fresh & ~self.large()
        self.ran.wasted += int(np.count_nonzero(gone))
        self._fresh &= ~gone

    def _counted(self) -> Counter[str]:
        now = Counter(self.host.meter.counts)
        done = now - self._before
        self._before = now
        return done

    def round(self, context: StudyContext, blocks: npt.NDArray[np.int64], share: npt.NDArray[np.int64] | None) -> None:
        """The guest works, then the thread has its turn."""
        self._counted()
        kicks = self.vm.kicks
        if share is not None:
            self.share(share)
        self.use(blocks)
        by_vcpus = self._counted()
        before = self.large()
        self.vm.recover_huge_pages(-(-self.blocks // context.options["ratio"]))
        self._fresh |= self.large() & ~before
        large = self.large()
        self.ran.rounds.append(Round(
            float(large[self.hot].mean()), float(large.mean()), by_vcpus, self._counted(), self.vm.kicks - kicks
        ))  # fmt: skip

    def done(self) -> Ran:
        self.ran.wasted += int(np.count_nonzero(self._fresh))
        merge, ops = self.vm.merge, self.host.meter.ops
        self.ran.merged, self.ran.refused = merge.merged, merge.refused
        self.ran.seamcalls = {name: n for name, n in ops.items() if name.startswith("TDH.")}
        self.ran.intact = not self.machine.guest.check() and not self.vm.dead
        return self.ran


def run_case(context: StudyContext, scenario: str, policy: str) -> Ran:
    """All rounds of one option in one scenario."""
    case = Case(context, policy)
    storm = case.ran.storm = context.options["rounds"]
    slot = case.vm.slots.find(0)
    assert slot is not None
    every = np.arange(case.blocks)
    if scenario == "dirty-log":
        slot.flags |= KVM_MEM_LOG_DIRTY_PAGES
        case.vm.split_private_pages(slot)
    for number in range(storm):
        share = None if scenario == "dirty-log" else every if number == 0 else case.hot
        case.round(context, case.hot, share)
    slot.flags &= ~KVM_MEM_LOG_DIRTY_PAGES
    for _ in range(3 * context.options["ratio"]):
        case.round(context, case.hot, None)
    return case.done()


def measure(context: StudyContext) -> dict[tuple[str, str], Ran]:
    """Run every option in both scenarios. InputError for options that cannot be."""
    for name, low, high in (("mem", 8, 4096), ("vcpus", 1, 256), ("hot", 1, 99), ("rounds", 1, 100), ("ratio", 1, 64)):
        if not low <= context.options[name] <= high:
            raise InputError(f"option {name}: {context.options[name]} is not from {low} to {high}")
    cases = [(scenario, policy) for scenario in SCENARIOS for policy in POLICIES]
    found = {}
    for done, (scenario, policy) in enumerate(cases):
        context.progress(done, len(cases), f"{scenario}, merge={policy}")
        found[scenario, policy] = run_case(context, scenario, policy)
    return found


# ---- pricing --------------------------------------------------------------------------------------------------


def _ns(counts: Mapping[str, int], prices: Mapping[str, float]) -> float:
    return sum(prices[item] * n for item, n in counts.items() if item not in QUIET_ITEMS)


def chain_ns(policy: str, vcpus: int, prices: Mapping[str, float]) -> float:
    """What a guest access waits for at worst that comes upon one merge: the merge, and the exit where it faults."""
    flush = prices["range_block"] + prices["mem_track"] + prices["kick_base"] + vcpus * prices["kick_per_vcpu"]
    merge = prices["page_promote"] + prices["page_wbinvd"] + prices["movdir64b_clear_4k"] + prices["external_update"]
    fault = prices["vm_exit"] + prices["fault_fixed"]
    tried = flush + prices["page_promote"] + prices["range_unblock"]
    worst = {"none": 0.0, "scan": flush + merge, "fault": fault + max(tried, flush + merge), "block": fault + merge}
    return worst[policy]


def evaluate(measured: dict[tuple[str, str], Ran], context: StudyContext) -> Findings:
    """Price what was counted."""
    prices = context.profile(TDX.name).ns_by_item()
    rows = []
    for (scenario, policy), ran in measured.items():
        none = measured[scenario, "none"]
        vcpus = context.options["vcpus"]
        own = sum(_ns(r.vcpus, prices) for r in ran.rounds) - sum(_ns(r.vcpus, prices) for r in none.rounds)
        kicks = sum(r.kicks for r in ran.rounds) - sum(r.kicks for r in none.rounds)
        kicked = kicks * vcpus * prices["vm_exit"]
        thread = sum(_ns(r.thread, prices) for r in ran.rounds)
        after = [r.hot for r in ran.rounds[ran.storm :]]
        late = next((i + 1 for i, hot in enumerate(after) if hot >= RECOVERED), None)
        rows.append({
            "scenario": scenario, "merge": policy, "option": POLICIES[policy],
            "hot": 100 * after[-1], "all": 100 * ran.rounds[-1].all,
            "recovery": NEVER if late is None else late * context.options["period"],
            "merged": ran.merged, "wasted": ran.wasted, "refused": ran.refused,
            "seamcalls": sum(ran.seamcalls.values()) - sum(none.seamcalls.values()),
            "stall": (own + kicked) / 1e6, "thread": thread / 1e6,
            "longest": chain_ns(policy, vcpus, prices) / 1e3 if ran.merged or ran.refused else 0.0,
            "intact": ran.intact, "coverage_hot": [r.hot for r in ran.rounds],
            "coverage_all": [r.all for r in ran.rounds], "storm": ran.storm, "leaves": ran.seamcalls,
        })  # fmt: skip
    best = {scenario: _best(rows, scenario) for scenario in SCENARIOS}
    return Findings(
        rows=rows,
        calibrated=[],
        predicted=["every cell: no published figure of a merge on hardware was found"],
        notes=_notes(context, measured, prices),
        conclusion=_conclusion(rows, best, prices, context),
        verdict="; ".join(f"{scenario}: {best[scenario]}" for scenario in SCENARIOS),
    )


def _best(rows: list[dict[str, Any]], scenario: str) -> str:
    """The cheapest option, of those that bring the hot region back: what vCPUs and thread pay together."""
    able = [row for row in rows if row["scenario"] == scenario and row["recovery"] != NEVER and row["merge"] != "none"]
    return min(able, key=lambda row: row["stall"] + row["thread"])["merge"] if able else NEVER


def _conclusion(
    rows: list[dict[str, Any]], best: dict[str, str], prices: Mapping[str, float], context: StudyContext
) -> str:
    said = []
    for scenario in SCENARIOS:
        mine = {row["merge"]: row for row in rows if row["scenario"] == scenario}
        win = best[scenario]
        if win == NEVER:
            said.append(f"{scenario}: no option brings the hot region back")
            continue
        other = min(
            (row for row in mine.values() if row["merge"] not in (win, "none") and row["recovery"] != NEVER),
            key=lambda row: row["stall"] + row["thread"], default=None,
        )  # fmt: skip
        row = mine[win]
        beaten = "alone brings the hot region back" if other is None else (
            f"costs {row['stall'] + row['thread']:.2f} ms against {other['stall'] + other['thread']:.2f} ms of "
            f"{other['option']} ({other['merge']})"
        )  # fmt: skip
        said.append(
            f"{scenario}: option {row['option']} ({win}) {beaten}, {row['wasted']} of {row['merged']} merges unused, "
            f"hot region at {RECOVERED:.0%} after {row['recovery']} ms"
        )
    lost = [row for row in rows if row["merge"] == "fault"]
    pays = chain_ns("scan", context.options["vcpus"], prices) / TLB_MISS_NS
    return (
        f"{'. '.join(said)}. Option B merged {sum(row['merged'] for row in lost)} tables and was refused "
        f"{sum(row['refused'] for row in lost)} times: a fault that maps a page leaves it pending beside accepted "
        f"ones. A merge pays for itself after about {pays:.0f} accesses to the block that miss the TLB."
    )


def _notes(
    context: StudyContext, measured: dict[tuple[str, str], Ran], prices: Mapping[str, float]
) -> list[str]:
    options = context.options
    intact = all(ran.intact for ran in measured.values())
    leaves = []
    for (scenario, policy), ran in measured.items():
        more = Counter(ran.seamcalls)
        more.subtract(measured[scenario, "none"].seamcalls)
        named = ", ".join(f"{name.removeprefix('TDH.')} {n:+d}" for name, n in sorted(more.items()) if n)
        if named:
            leaves.append(f"SEAMCALLs beyond none, {scenario}, {policy}: {named}")
    return [
        f"{options['mem']} MiB, {options['hot']} % of its blocks hot, {options['vcpus']} vCPUs; {options['rounds']} "
        f"rounds of logging or conversions, then {3 * options['ratio']} quiet ones; in each the guest writes {TOUCHED} "
        f"pages of every hot block; conversions: {BUFFER} pages of every hot block, in the first round of every block",
        f"the thread has a turn after each round, {options['period']} ms, and takes one table in {options['ratio']} "
        "(kernel, NX recovery: one in 60 each minute); both only stretch the time axis",
        "dirty-log: KVM refuses to log a slot with guest_memfd, so the split that logging would make is made "
        "directly, and no page is write-blocked; the log itself is not part of the question",
        "stall: what vCPUs pay beyond merge=none (faults, merges in them, splits of what was merged too early), with "
        "an exit and entry of each vCPU for every kick; thread: what the recovery thread pays; longest: what an access "
        f"waits that comes upon one merge, {chain_ns('scan', options['vcpus'], prices) / 1e3:.0f} us for A",
        "wasted: merged, and split again, or the end of the run, before the guest used the block once",
        "merging needs the frames in place: memory that the VMM gives back on conversion comes back on other frames, "
        "and then no option merges; here it keeps them",
        *leaves,
        "content of every page was " + ("intact in every case" if intact else "LOST in some case"),
    ]  # fmt: skip


def draw(findings: Findings, figure: Any) -> None:
    """Coverage of the hot region and of all memory over the rounds, and who paid, for each scenario."""
    figure.set_size_inches(12, 7)
    axes = figure.subplots(2, len(SCENARIOS), squeeze=False)
    for column, scenario in enumerate(SCENARIOS):
        rows = [row for row in findings.rows if row["scenario"] == scenario]
        top, below = axes[0][column], axes[1][column]
        for i, row in enumerate(rows):
            x = range(1, len(row["coverage_hot"]) + 1)
            label = f"{row['option']}: {row['merge']}" if row["merge"] != "none" else "none"
            top.plot(x, [100 * c for c in row["coverage_hot"]], color=f"C{i}", label=label)
            top.plot(x, [100 * c for c in row["coverage_all"]], color=f"C{i}", linestyle=":")
        top.axvline(rows[0]["storm"], color="grey", linewidth=0.5)
        top.set_title(f"{scenario}: mapped large, % (solid: hot region, dotted: all)", fontsize=9)
        top.set_xlabel("round", fontsize=8)
        top.legend(fontsize=7)
        names = [row["merge"] for row in rows]
        below.bar(names, [row["stall"] for row in rows], label="vCPUs")
        below.bar(names, [row["thread"] for row in rows], bottom=[max(0, row["stall"]) for row in rows], label="thread")
        below.set_title("cost beyond none, ms", fontsize=9)
        below.legend(fontsize=7)


HUGEPAGES = Study(
    name="hugepages",
    question="how do private pages become large again after a split?",
    source="mail 004 (sources/004), I. Yamahata, RFC of large pages for TDX",
    columns=(
        Column("scenario", "scenario"),
        Column("merge", "merge"),
        Column("option", "option"),
        Column("hot", "hot large", "%", 0),
        Column("all", "all large", "%", 0),
        Column("recovery", "90 % of hot after", "ms", 0),
        Column("merged", "merges", "", 0),
        Column("wasted", "wasted", "", 0),
        Column("refused", "refused", "", 0),
        Column("seamcalls", "SEAMCALLs more", "", 0),
        Column("stall", "vCPU stall", "ms", 2),
        Column("thread", "thread", "ms", 2),
        Column("longest", "longest", "us", 1),
    ),
    measure=measure,
    evaluate=evaluate,
    draw=draw,
    options=(
        Option("mem", 128, "MiB of the TD"),
        Option("vcpus", 4, "vCPUs"),
        Option("hot", 25, "percent of the blocks of 2M that the guest keeps using"),
        Option("rounds", 4, "rounds of logging, or of conversions"),
        Option("ratio", 4, "the thread takes one table in so many in a turn"),
        Option("period", 100, "ms from one turn of the thread to the next"),
    ),
)
"""The study, as its entry point names it."""


# ---- mirror ---------------------------------------------------------------------------------------------------

WALKERS = ("mirror", "seamcall")
WORKLOADS = {
    "in order": "4k", "scattered": "4k", "punched and back": "4k", "large pages": "2m",
}  # fmt: skip
"""Workloads, and the largest page that is mapped."""
CONTENDED = (1, 4, 16)
"""vCPUs that fault at once while the VMM punches holes, on the timed driver."""


@attrs.frozen
class Faulted:
    """One workload with one walker: faults, priced work, SEAMCALLs by leaf, table pages of the mirror, pages mapped."""

    faults: int
    counts: Counter[str]
    seamcalls: Counter[str]
    tables: int
    mapped: int


def _machine(context: StudyContext, walker: str, page: str, mib: int, vcpus: int = 1) -> Machine:
    host = Host(
        TDX, context.profile(TDX.name), nr_frames=mib * 512 + 8192, backing=page, options={"page_aug": page},
        policies={"walker": walker},
    )  # fmt: skip
    machine = Machine(host, mib << 20, vcpus=vcpus)
    machine.launch()
    return machine


def fault_case(context: StudyContext, workload: str, walker: str) -> Faulted:
    """Fault memory in, and count."""
    mib = context.options["mem"]
    machine = _machine(context, walker, WORKLOADS[workload], mib)
    host, guest, pages = machine.host, machine.guest, mib * 256
    everything: Sel = slice(0, pages, 1)
    if workload == "punched and back":
        guest.write(everything)
        machine.punch(everything)
        guest.written[:] = 0
        guest.accepted[:] = 0
    before, leaves, faults = Counter(host.meter.counts), Counter(host.meter.ops), machine.vcpus[0].vcpu.faults
    if workload == "scattered":
        rng = np.random.default_rng(context.seed)
        guest.write(np.sort(rng.choice(pages, pages // 64, replace=False)))
    else:
        guest.write(everything)
    root = machine.vm.vm.tdp.root_for(True)
    ops = Counter(host.meter.ops) - leaves
    return Faulted(
        machine.vcpus[0].vcpu.faults - faults, Counter(host.meter.counts) - before,
        Counter({name: n for name, n in ops.items() if name.startswith("TDH.")}),
        root.table_bytes // PAGE_BYTES, root.pages_mapped,
    )  # fmt: skip


def contended_ns(context: StudyContext, walker: str, vcpus: int) -> tuple[float, int]:
    """N vCPUs fault 32 pages each while the VMM punches holes elsewhere: time until all are done, and retries."""
    machine = _machine(context, walker, "4k", 64, vcpus)
    guest = machine.guest
    guest.write(slice(8192, 8192 + 256, 1))
    for vcpu in range(vcpus):
        guest.write(slice(vcpu * 512, vcpu * 512 + 1, 1), vcpu)

    def faulting(vcpu: int) -> Steps[None]:
        for page in range(1, 33):
            yield from guest.write.steps(slice(vcpu * 512 + page, vcpu * 512 + page + 1, 1), vcpu)

    def punching() -> Steps[None]:
        for page in range(8192, 8192 + 64):
            yield from machine.punch.steps(slice(page, page + 1, 1))

    timed = Timed(machine.host)
    timed.run([*((f"vcpu{vcpu}", faulting(vcpu)) for vcpu in range(vcpus)), ("vmm", punching())])
    start = machine.host.meter.now_ns - timed.elapsed_ns
    return max(a.time_ns for a in timed.actors[:-1]) - start, sum(v.vcpu.retries for v in machine.vcpus)


def measure_walks(context: StudyContext) -> dict[tuple[str, str], Faulted]:
    """Run every workload with both walkers. InputError for options that cannot be."""
    if not 2 <= context.options["mem"] <= 8192:
        raise InputError(f"option mem: {context.options['mem']} is not from 2 to 8192")
    found = {}
    cases = [(workload, walker) for workload in WORKLOADS for walker in WALKERS]
    for done, (workload, walker) in enumerate(cases):
        context.progress(done, len(cases), f"{workload}, walker={walker}")
        found[workload, walker] = fault_case(context, workload, walker)
    return found


def evaluate_walks(measured: dict[tuple[str, str], Faulted], context: StudyContext) -> Findings:
    """Price the walks; let vCPUs contend at the prices of the moment."""
    prices = context.profile(TDX.name).ns_by_item()
    rows: list[dict[str, Any]] = []
    for workload in WORKLOADS:
        mirror, truth = (measured[workload, walker] for walker in WALKERS)
        reads = truth.seamcalls["TDH.MEM.SEPT.RD"]
        # A fault's fixed price has the walk of the mirror in it, which the counterfactual does not make.
        spent = {"mirror": _ns(mirror.counts, prices)}
        spent["seamcall"] = _ns(truth.counts, prices) - truth.faults * prices["mirror_read"]
        # Without the mirror its upkeep could go as well: an update for each entry, a page for each table.
        upkeep = mirror.counts["external_update"] * prices["external_update"]
        upkeep += mirror.counts["sept_add"] * prices["page_clear_4k"]
        even = (upkeep + mirror.faults * prices["mirror_read"]) / reads
        for walker, ran in zip(WALKERS, (mirror, truth), strict=True):
            rows.append({
                "workload": workload, "walker": walker, "vcpus": 1, "faults": ran.faults,
                "reads": ran.seamcalls["TDH.MEM.SEPT.RD"] / ran.faults,
                "seamcalls": sum(ran.seamcalls.values()) / ran.faults, "fault": spent[walker] / ran.faults,
                "slower": spent[walker] / spent["mirror"], "even": even if walker == "seamcall" else None,
                "memory": 1024 * ran.tables * 4 / (ran.mapped * 4 / 1024) if walker == "mirror" else 0.0,
                "leaves": dict(ran.seamcalls),
            })  # fmt: skip
    for vcpus in CONTENDED:
        elapsed = {walker: contended_ns(context, walker, vcpus) for walker in WALKERS}
        for walker in WALKERS:
            rows.append({
                "workload": "beside holes", "walker": walker, "vcpus": vcpus, "faults": 32 * vcpus, "reads": None,
                "seamcalls": None, "fault": elapsed[walker][0] / 32,
                "slower": elapsed[walker][0] / elapsed["mirror"][0], "even": None, "memory": None,
                "retries": elapsed[walker][1],
            })  # fmt: skip
    ratios = [row["slower"] for row in rows if row["walker"] == "seamcall" and row["even"] is not None]
    evens = [row["even"] for row in rows if row["even"] is not None]
    wins = all(ratio > 1 for ratio in ratios)
    memory = rows[0]["memory"]
    conclusion = (
        f"Reading the Secure EPT at every step makes a fault {min(ratios):.2f} to {max(ratios):.2f} times as long, "
        f"at {prices['sept_rd']:.0f} ns a read; the two would be even at {min(evens):.0f} to {max(evens):.0f} ns, so a "
        f"read would have to be {prices['sept_rd'] / max(evens):.0f} to {prices['sept_rd'] / min(evens):.0f} times "
        f"cheaper. "
        f"The mirror costs {memory / 1024:.1f} MiB for each GiB that is mapped in order, and a page for every 2 MiB "
        f"where it is sparse."
    )
    return Findings(
        rows=rows,
        calibrated=[],
        predicted=["every cell; fault_fixed, which both walkers share, is an estimate (T3)"],
        notes=[
            "a walk looks at one entry of each level, from 512G down to the level that it maps; tables that it "
            "links are read as well, as KVM's iterator does",
            "in the counterfactual KVM keeps a record for locking only: the time of its upkeep is not taken off, but "
            "is in the price at which both are even",
            "zaps are not compared: without a mirror they would have to search the Secure EPT, too",
            "beside holes: vCPUs fault 32 pages each while the VMM punches 64, on the timed driver; time per page of "
            "the last one done; a fault waits for mmu_lock while a hole is made, and a longer walk holds it longer",
        ],
        conclusion=conclusion, verdict="mirror" if wins else "seamcall" if max(ratios) < 1 else "depends",
    )  # fmt: skip


def draw_walks(findings: Findings, figure: Any) -> None:
    """A fault's time by workload, for each walker."""
    figure.set_size_inches(10, 4)
    axis = figure.add_subplot()
    for shift, walker in ((-0.2, "mirror"), (0.2, "seamcall")):
        rows = [row for row in findings.rows if row["walker"] == walker]
        axis.bar([i + shift for i in range(len(rows))], [row["fault"] / 1e3 for row in rows], 0.4, label=walker)
        names = [row["workload"] + (f", {row['vcpus']} vCPUs" if row["even"] is None and row["reads"] is None else "")
                 for row in rows]  # fmt: skip
    axis.set_xticks(range(len(names)), names, fontsize=7)
    axis.set_yscale("log")
    axis.set_title("time of a fault, us", fontsize=9)
    axis.legend(fontsize=8)


MIRROR = Study(
    name="mirror",
    question="what does a mirror of the private page table spare?",
    source="mail 001 (sources/001), I. Yamahata, patch 044 of TDX v7",
    columns=(
        Column("workload", "workload"),
        Column("walker", "walker"),
        Column("vcpus", "vCPUs"),
        Column("faults", "faults"),
        Column("reads", "reads a fault", "", 2),
        Column("seamcalls", "SEAMCALLs a fault", "", 2),
        Column("fault", "a fault", "ns", 0),
        Column("slower", "x mirror", "", 2),
        Column("even", "even at a read of", "ns", 1),
        Column("memory", "mirror, KiB a GiB", "", 0),
    ),
    measure=measure_walks,
    evaluate=evaluate_walks,
    draw=draw_walks,
    options=(Option("mem", 256, "MiB of the TD"),),
)
"""The study, as its entry point names it."""
