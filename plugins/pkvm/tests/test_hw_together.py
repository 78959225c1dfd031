"""Host, hyp, FF-A and several VMs of both kinds on the same few pages, at random: after each step every state is legal
together, nobody reads what is not theirs, content is where it was, and a refusal is no step at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvmcore.pages import run
from cvmcore.types import Walk
from cvmcore_pkvm.errors import Errno, Ffa
from cvmcore_pkvm.hw import LOCK_DESIGNS, HypVm, Owner, PageState, Prot

NR = 1024 + 64  # frames in play: two blocks, and a rest; the host gives to EL2 from the top
BLOCK = 512

pages = st.one_of(st.integers(0, 6), st.integers(508, 516), st.integers(1020, 1030))
lengths = st.one_of(st.integers(1, 3), st.just(BLOCK))
who = st.integers(0, 1)
STEPS = st.one_of(
    *(
        st.tuples(st.just(op), who, pages, pages, lengths)
        for op in (
            "donate", "share_host", "unshare_host", "force", "np_share", "np_block", "np_unshare", "np_unshare_block",
            "share_hyp", "unshare_hyp", "pin", "unpin", "donate_hyp", "return_hyp", "ffa", "ffa_back", "touch", "relax",
            "wrprotect", "old", "young", "guest_write", "host_write",
        )
    ),
    st.tuples(st.sampled_from(["kill", "reclaim", "finalise"]), who, pages, pages, lengths),
)  # fmt: skip


class Everybody:
    """Two protected and two np VMs, and what each frame should hold by now."""

    def __init__(self, make_rig: Any, design: str) -> None:
        self.rig = make_rig(hyp_lock=design, checked=True)
        self.hyp, self.memory = self.rig.hyp, self.rig.memory
        self.pvms = [self.rig.make_vm(protected=True, spare=48) for _ in range(2)]
        self.nps = [self.rig.make_vm(protected=False, spare=48) for _ in range(2)]
        self.content = np.arange(1, NR + 1, dtype=np.uint32)
        self.memory.stamp[:NR] = self.content
        self.pinned: list[tuple[int, int]] = []
        self.lent: list[tuple[int, int]] = []
        self.state = dict.fromkeys(self.pvms, "alive")
        self.next = NR + 1

    # ---- what the states say, read by somebody who does not use the operations' own code ----

    def host_state(self, pfns: Any) -> Any:
        return self.hyp.frame[pfns] & 3

    def private(self) -> Any:
        return np.flatnonzero((self.hyp.frame[:NR] & 0x33) == PageState.NOPAGE)

    # ---- steps: each returns whether it took effect ----

    def ok(self, result: Any) -> int:
        done: int = result.done
        return done

    def donate(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.host_donate_guest(self.rig.cpu(self.pvms[i]), run(pfn, n), run(gfn, n)))

    def share_host(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.guest_share_host(self.rig.cpu(self.pvms[i]), run(gfn, n)))

    def unshare_host(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.guest_unshare_host(self.rig.cpu(self.pvms[i]), run(gfn, n)))

    def cleared(self, pfns: Any) -> None:
        self.content[pfns] = 0

    def force(self, i: int, pfn: int, gfn: int, n: int) -> int:
        result = self.hyp.host_force_reclaim(run(pfn, n))
        self.cleared(slice(pfn, pfn + result.done))
        return self.ok(result)

    def np_share(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(
            self.hyp.host_share_guest(self.rig.cpu(self.nps[i]), run(pfn, n), run(gfn, n), 1, Prot.RWX)
        )

    def np_block(self, i: int, pfn: int, gfn: int, n: int) -> int:
        pfn, gfn = pfn & -BLOCK, gfn & -BLOCK
        cpu = self.rig.cpu(self.nps[i])
        return self.ok(self.hyp.host_share_guest(cpu, run(pfn, 1, BLOCK), run(gfn, 1, BLOCK), BLOCK, Prot.RWX))

    def np_unshare(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.host_unshare_guest(self.nps[i], run(gfn, n), 1))

    def np_unshare_block(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.host_unshare_guest(self.nps[i], run(gfn & -BLOCK, 1, BLOCK), BLOCK))

    def share_hyp(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.host_share_hyp(run(pfn, n)))

    def unshare_hyp(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.host_unshare_hyp(run(pfn, n)))

    def pin(self, i: int, pfn: int, gfn: int, n: int) -> int:
        result = self.hyp.hyp_pin(pfn, n)
        if result.ok:
            self.pinned.append((pfn, n))
        return self.ok(result)

    def unpin(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.hyp_unpin(*self.pinned.pop())) if self.pinned else 0

    def donate_hyp(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.host_donate_hyp(pfn, n))

    def return_hyp(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.hyp_donate_host(pfn, n))

    def ffa(self, i: int, pfn: int, gfn: int, n: int) -> int:
        if self.hyp.ffa_mem_share([(pfn, n)]) != Ffa.SUCCESS:
            return 0
        self.lent.append((pfn, n))
        return n

    def ffa_back(self, i: int, pfn: int, gfn: int, n: int) -> int:
        if not self.lent:
            return 0
        self.hyp.ffa_mem_reclaim([self.lent.pop()])
        return 1

    def touch(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.handle_host_mem_abort(run(pfn, n)))

    def relax(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.relax_perms(self.rig.cpu(self.nps[i]), run(gfn, n), Prot.W))

    def wrprotect(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.wrprotect(self.nps[i], run(gfn, n), 1))

    def old(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.test_clear_young(self.nps[i], run(gfn, n), 1, True))

    def young(self, i: int, pfn: int, gfn: int, n: int) -> int:
        return self.ok(self.hyp.mkyoung(self.rig.cpu(self.nps[i]), run(gfn, n)))

    def stamp(self) -> int:
        self.next += 1
        return self.next

    def guest_write(self, i: int, pfn: int, gfn: int, n: int) -> int:
        """A guest of either kind writes where its stage 2 lets it."""
        vms = [vm for vm in (self.pvms[i], self.nps[i]) if self.state.get(vm, "alive") == "alive"]
        for vm in vms:
            access = self.hyp.guest_access(self.rig.cpu(vm), run(gfn, 1), write=True)
            if access.status == Walk.OK:
                at = int(np.atleast_1d(np.r_[access.pfns])[0])
                self.content[at] = self.memory.stamp[at] = self.stamp()
        return 1

    def host_write(self, i: int, pfn: int, gfn: int, n: int) -> int:
        if not self.hyp.handle_host_mem_abort(run(pfn, 1)).ok:
            return 0
        self.content[pfn] = self.memory.stamp[pfn] = self.stamp()
        return 1

    def kill(self, i: int, pfn: int, gfn: int, n: int) -> int:
        if self.state[self.pvms[i]] != "alive":
            return 0
        self.rig.kill(self.pvms[i])
        self.state[self.pvms[i]] = "dying"
        return 1

    def reclaim(self, i: int, pfn: int, gfn: int, n: int) -> int:
        private = self.private()
        result = self.hyp.host_reclaim_guest(self.pvms[i], run(gfn, n))
        self.cleared(np.setdiff1d(private, self.private()))
        assert self.state[self.pvms[i]] == "dying" or result.status == Errno.EINVAL
        return self.ok(result)

    def finalise(self, i: int, pfn: int, gfn: int, n: int) -> int:
        result = self.hyp.finalize_teardown_vm(self.pvms[i])
        if result.ok:
            self.state[self.pvms[i]] = "gone"
        return self.ok(result)

    # ---- what must hold ----

    def check(self) -> None:
        """Content, and nobody's page in another's hands."""
        assert self.memory.stamp[:NR].tolist() == self.content.tolist()
        readers: dict[int, set[str]] = {}
        for vm in self.hyp.vm_table:
            if isinstance(vm, HypVm):
                for gfn in np.flatnonzero(vm.stage2.pages & 0x12).tolist():  # owned or borrowed, not poison
                    readers.setdefault(int(vm.stage2.pages[gfn]) >> 5, set()).add(f"{vm.handle:#x}")
        for pfn, vms in readers.items():
            owner = int(self.hyp.owner[pfn])
            if self.host_state(pfn) == PageState.NOPAGE:
                assert owner != Owner.HYP and vms == {f"{owner:#x}"}
                assert not self.hyp.handle_host_mem_abort(run(pfn, 1)).ok
            elif self.host_state(pfn) == PageState.SHARED_BORROWED:
                assert len(vms) == 1


@pytest.mark.slow
@pytest.mark.parametrize("design", LOCK_DESIGNS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(STEPS, min_size=1, max_size=20))
def test_everybody_at_once(make_rig: Any, design: str, history: list[Any]) -> None:
    """`Hyp(checked=True)` holds every state against the table of legal combinations after each operation."""
    world = Everybody(make_rig, design)
    for op, i, pfn, gfn, n in history:
        before = world.rig.snapshot()
        done = getattr(world, op)(i, pfn, gfn, n)
        if not done and op not in ("donate", "np_share", "np_block"):  # these refill a memcache before they fail
            after = world.rig.snapshot()
            before.pop("counts")
            after.pop("counts")
            assert after == before
        world.check()
    world.hyp.check_legal()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(STEPS, min_size=1, max_size=20))
def test_lock_designs_differ_in_locks_only(make_rig: Any, history: list[Any]) -> None:
    """The same history under every lock design leaves the same states, answers and counts."""
    worlds = [Everybody(make_rig, design) for design in LOCK_DESIGNS]
    for op, *arguments in history:
        assert len({getattr(world, op)(*arguments) for world in worlds}) == 1
        assert worlds[0].rig.snapshot() == worlds[1].rig.snapshot() == worlds[2].rig.snapshot()
