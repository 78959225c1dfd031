"""The story of the conformance suite: told again from any step it ends alike, and it comes to all that may fail."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from fakes import MIRROR

from cvmcore.backend import Backend
from cvmcore.backends.swprot import SWPROT, SwProt
from cvmcore.hookspecs import HOOKS, hookimpl
from cvmcore.testing.conformance import CHECKS, run_check
from cvmcore.testing.faults import ANSWERS, MEMORY, Failures
from cvmcore.testing.story import SHORT, Places, Tale, spread
from cvmcore.testing.workbench import Bench, Setting, settings_of


@pytest.mark.parametrize("setting", ["4k", "2m"])
def test_what_is_put_back_goes_on_as_it_did(cvm_backend: Backend, setting: str) -> None:
    """Each step, told again in the world that was kept before it, ends where it ended."""
    bench = Bench(cvm_backend, Setting(setting))
    places = Places(bench)

    for at in reversed(range(places.tale.steps)):
        places.kept[at].restore()
        places.tale.tell(bench, at)
        assert places.tale.looks() == places.looks[at], f"step {at} of {places.tale.steps}"


def test_a_failure_is_told_until_nothing_of_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step where it is mended there; a launch that failed is followed for a few, and then ends."""
    places = Places(Bench(MIRROR, Setting()))
    told: list[int] = []
    tell = Tale.tell

    def count(tale: Tale, bench: Bench, at: int) -> None:
        told.append(at)
        tell(tale, bench, at)

    monkeypatch.setattr(Tale, "tell", count)
    places.fail("set_private_spte", places.count["set_private_spte"])
    assert len(told) == 1
    told.clear()
    places.fail(MEMORY, 1, dies=True)
    assert told in ([0], [*range(SHORT + 1), places.tale.steps - 1])


def test_failures_at_random_are_those_of_their_seed() -> None:
    """The same seed strikes at the same places; it does strike."""
    struck = []
    for seed in (1, 1, 2, 3):
        failures, bench = Failures(chance=0.2, seed=seed), Bench(SWPROT, Setting())
        Tale(bench, failures, dies=True, leaks=True).all(bench)
        struck.append((failures.struck, tuple(failures.seen.items())))

    assert struck[0] == struck[1]
    assert len(set(struck)) > 1
    assert all(n for n, _ in struck)


def test_places_are_spread_from_the_first_to_the_last() -> None:
    assert spread(0, 3) == []
    assert spread(2, 3) == [1, 2]
    assert spread(100, 3) == [1, 50, 100]


class Uncalled(SwProt):
    """A hook that the core calls for tables of the vendor's own, on a backend that has none."""

    @hookimpl
    def promote_private_spt(self) -> Any:
        raise AssertionError


def test_a_hook_that_nobody_calls_is_named() -> None:
    """So a developer hears that nothing was looked at."""
    check = next(c for c in CHECKS if c.name == "hooks.reached")

    outcome = run_check(check, attrs.evolve(SWPROT, make=Uncalled), Setting())

    assert outcome.status == "failed"
    assert outcome.why.startswith("implemented, and never called: promote_private_spt")


class Leaky(SwProt):
    """Every lookup loses a page."""

    @hookimpl
    def gmem_prepare(self, vm: Any) -> None:
        vm.host.frames.alloc(1, 4)


def test_what_a_failure_loses_is_found_with_its_place() -> None:
    check = next(c for c in CHECKS if c.name == "failure.memory")

    outcome = run_check(check, attrs.evolve(SWPROT, make=Leaky), Setting())

    assert outcome.status == "failed"


def test_every_hook_that_may_fail_has_an_answer() -> None:
    """Those that KVM's own paths call; the rest are a command's, or the guest's."""
    may = {name for name, info in HOOKS.items() if info.kind in ("install", "call")}

    assert may - ANSWERS.keys() == {"memory_encrypt_op", "guest_convert", "guest_accept", "host_access"}


def test_policies_are_settings_where_they_have_hooks_called() -> None:
    assert [str(one) for one in settings_of(MIRROR) if one.policies][-1].endswith("walker=external")


def test_a_failing_promotion_unblocks() -> None:
    """As the contract asks of one that fails: the injected one does it in the hook's stead."""
    called: list[str] = []

    class Ops:
        def call_now(self, name: str, **arguments: Any) -> None:
            called.append(name)

        def observe(self, observer: object) -> None:
            pass

    class Frames:
        alloc = None

    host: Any = attrs.make_class("FakeHost", ["ops", "frames"])(Ops(), Frames())
    failures = Failures(("promote_private_spt", 1))
    failures.install(host)

    assert failures.intercept("promote_private_spt", {"vm": None, "gfn": 0, "level": 2, "blocked": True}) is not None
    assert called == ["unblock_private_spt"]
