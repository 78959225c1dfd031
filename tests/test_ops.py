"""Binding a backend's hooks, the helper that calls them, and the observers that watch."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from fakes import MIRROR, Box, Recorder

from cvmcore.clock import Meter
from cvmcore.effects import FAULT_HOOK, Steps, drain
from cvmcore.errors import PluginError, UapiError
from cvmcore.events import Event
from cvmcore.hookspecs import HOOKS, hookimpl
from cvmcore.observers import FaultInjector, HookCosts, Log, observes
from cvmcore.ops import Ops
from cvmcore.pages import run
from cvmcore.types import PG_LEVEL_2M, Batch, Fatal, InstallResult, Retry, Stopped


class Vendor:
    """One plain hook, one that yields, one that names few arguments, one that stops."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl
    def topup(self, nr_pages: int) -> InstallResult:
        self.seen.append(("topup", nr_pages))
        return None

    @hookimpl
    def pin_pfn(self, write: bool, batch: Batch) -> Steps[InstallResult]:
        yield FAULT_HOOK
        self.seen.append(("pin_pfn", write, len(batch)))
        return None

    @hookimpl
    def set_private_spte(self, batch: Batch) -> InstallResult:
        return Stopped(2, Retry())

    @hookimpl
    def vm_destroy(self) -> None:
        self.seen.append("vm_destroy")

    @hookimpl
    def register_region(self) -> None:
        raise UapiError(errno.ENOMEM, "pin_user_pages", "no")


BATCH = Batch(slot=None, level=PG_LEVEL_2M, gfns=run(512, 3, 512), pfns=run(1024, 3, 512))  # type: ignore[arg-type]


def ops_of(vendor: object, *observers: object) -> Ops:
    ops = Ops(vendor, "test", Meter({"vm_exit": 5}))
    for observer in observers:
        ops.observe(observer)
    return ops


# ---- binding --------------------------------------------------------------------------------------------------------


def test_implemented_hooks_are_bound_in_life_cycle_order() -> None:
    ops = ops_of(Vendor())

    assert list(ops.hooks) == [name for name in HOOKS if hasattr(Vendor, name)]
    assert ops.has("topup")
    assert not ops.has("vm_init")


def test_a_bound_hook_knows_which_arguments_it_names() -> None:
    ops = ops_of(Vendor())

    assert ops.hooks["topup"].arguments == ("nr_pages",)
    assert ops.hooks["pin_pfn"].arguments == ("write", "batch")
    assert ops.hooks["vm_destroy"].arguments == ()


def test_two_instances_do_not_share_hooks() -> None:
    """The class is looked at once; each instance is bound."""
    one, two = Vendor(), Vendor()
    ops_of(one)

    drain(ops_of(two).call("vm_destroy"))

    assert (one.seen, two.seen) == ([], ["vm_destroy"])


def test_unknown_hook_is_told_in_a_sentence() -> None:
    class Wrong:
        @hookimpl
        def set_private_pte(self) -> None: ...

    with pytest.raises(PluginError, match=r"backend test: .*set_private_pte") as caught:
        ops_of(Wrong())
    assert "\n" not in str(caught.value)


def test_wrong_argument_is_told_in_a_sentence() -> None:
    class Wrong:
        @hookimpl
        def set_private_spte(self, batch: Batch, colour: int) -> None: ...

    with pytest.raises(PluginError, match=r"backend test: .*set_private_spte.*colour") as caught:
        ops_of(Wrong())
    assert "\n" not in str(caught.value)


# ---- calling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observers", [(), (Recorder(),)], ids=["alone", "observed"])
def test_a_hook_gets_only_what_it_names(observers: tuple[object, ...]) -> None:
    vendor = Vendor()
    ops = ops_of(vendor, *observers)

    result = drain(ops.call("topup", 7, vm=None, vcpu=None, nr_pages=7))

    assert result is None
    assert vendor.seen == [("topup", 7)]
    assert (ops.hooks["topup"].calls, ops.hooks["topup"].pages) == (1, 7)


@pytest.mark.parametrize("observers", [(), (Recorder(),)], ids=["alone", "observed"])
def test_a_generator_hook_runs_within_its_caller(observers: tuple[object, ...]) -> None:
    vendor = Vendor()
    ops = ops_of(vendor, *observers)

    steps = ops.call("pin_pfn", 3, vm=None, batch=BATCH, write=True)

    assert next(steps) is FAULT_HOOK
    assert vendor.seen == []
    with pytest.raises(StopIteration):
        next(steps)
    assert vendor.seen == [("pin_pfn", True, 3)]


@pytest.mark.parametrize("observers", [(), (Recorder(),)], ids=["alone", "observed"])
def test_pages_that_were_not_reached_do_not_count(observers: tuple[object, ...]) -> None:
    """Stopped(2): the kernel made the call for pages 0 and 1, and for page 2, which failed."""
    ops = ops_of(Vendor(), *observers)

    assert drain(ops.call("set_private_spte", 9, vm=None, batch=BATCH)) == Stopped(2, Retry())
    assert (ops.hooks["set_private_spte"].calls, ops.hooks["set_private_spte"].pages) == (1, 3)


def test_a_hook_that_is_not_implemented_answers_none() -> None:
    ops = ops_of(Vendor())

    assert drain(ops.call("gmem_prepare", 3, vm=None)) is None
    assert "gmem_prepare" not in ops.hooks


def test_an_error_of_a_hook_goes_through() -> None:
    with pytest.raises(UapiError) as caught:
        ops_of(Vendor()).call_now("register_region", vm=None, hva=0, size_bytes=0)
    assert caught.value.errno == errno.ENOMEM


# ---- observers ------------------------------------------------------------------------------------------------------


def test_begin_and_end_of_a_hook_are_told() -> None:
    recorder = Recorder()
    ops = ops_of(Vendor(), recorder)

    drain(ops.call("set_private_spte", 3, vm=None, batch=BATCH))

    begin, end = recorder.events
    assert (begin.kind, begin.name, begin.phase, begin.n) == ("hook", "set_private_spte", "begin", 3)
    assert (begin.level, begin.gfns, begin.pfns) == (PG_LEVEL_2M, slice(512, 2048, 1), slice(1024, 2560, 1))
    assert (end.phase, end.n, end.info["result"]) == ("end", 3, Stopped(2, Retry()))


def test_the_end_comes_after_the_generator_has_run() -> None:
    recorder = Recorder()
    ops = ops_of(Vendor(), recorder)

    steps = ops.call("pin_pfn", 3, vm=None, batch=BATCH, write=True)
    next(steps)

    assert [event.phase for event in recorder.events] == ["begin"]
    assert list(steps) == []
    assert [event.phase for event in recorder.events] == ["begin", "end"]


def test_nobody_listens_nothing_is_built() -> None:
    ops = ops_of(Vendor())

    assert not ops.observed
    ops.emit("vm", "create", vm=1)
    ops.observe(Recorder())
    assert ops.observed


def test_an_injected_answer_replaces_the_hook() -> None:
    vendor = Vendor()
    answer = Stopped(1, Fatal(errno.EIO))
    ops = ops_of(vendor, FaultInjector("topup", 2, answer))

    results = [drain(ops.call("topup", 4, vm=None, vcpu=None, nr_pages=4)) for _ in range(3)]

    assert results == [None, answer, None]
    assert vendor.seen == [("topup", 4)] * 2


def test_an_injected_error_is_raised() -> None:
    ops = ops_of(Vendor(), FaultInjector("topup", 1, UapiError(errno.ENOMEM, "topup", "injected")))

    with pytest.raises(UapiError) as caught:
        drain(ops.call("topup", 4, vm=None, vcpu=None, nr_pages=4))
    assert caught.value.errno == errno.ENOMEM


def test_the_injector_counts_its_own_hook_only() -> None:
    ops = ops_of(Vendor(), FaultInjector("topup", 1, Stopped(0, Retry())))

    drain(ops.call("vm_destroy", vm=None))

    assert drain(ops.call("topup", 1, vm=None, vcpu=None, nr_pages=1)) == Stopped(0, Retry())


def test_hook_costs() -> None:
    """Calls, pages and virtual time by hook."""
    costs = HookCosts()
    meter = Meter({"vm_exit": 5})

    class Charging:
        @hookimpl
        def topup(self, nr_pages: int) -> None:
            meter.charge("vm_exit", nr_pages)

    ops = Ops(Charging(), "test", meter)
    ops.observe(costs)
    drain(ops.call("topup", 4, vm=None, vcpu=None, nr_pages=4))
    drain(ops.call("topup", 2, vm=None, vcpu=None, nr_pages=2))

    assert (costs.calls, costs.pages, costs.ns) == ({"topup": 2}, {"topup": 6}, {"topup": 30})


def test_log_keeps_the_last_events() -> None:
    log = Log(keep=2)
    ops = ops_of(Vendor(), log)

    for name in ("one", "two", "three"):
        ops.emit("vm", name)

    assert [event.name for event in log.events] == ["two", "three"]


def test_quiet_is_told_when_a_call_is_complete() -> None:
    class Quiet:
        seen: list[Any]

        def __init__(self) -> None:
            self.seen = []

        @observes
        def on_quiet(self, vm: Any) -> None:
            assert vm.frame.in_progress == 0
            self.seen.append(vm.id)

    quiet = Quiet()
    box = Box(MIRROR, 8, observers=[quiet])
    quiet.seen.clear()

    box.touch(3)
    box.set_private(3, private=False)
    box.punch(3)

    assert quiet.seen == [0, 0, 0]


def test_a_wrong_observer_is_told_in_a_sentence() -> None:
    class Wrong:
        @observes
        def on_event(self, event: Event, colour: int) -> None: ...

    with pytest.raises(PluginError, match=r"observer Wrong: .*colour"):
        ops_of(Vendor(), Wrong())


def test_what_a_hook_is_about_is_told() -> None:
    """gfns, pfns, level and VM of a call, whatever its arguments are called."""
    recorder = Recorder()
    box = Box(MIRROR, 8, observers=[recorder])
    recorder.clear()

    box.touch(3)

    by_name = {event.name: event for event in recorder.events if event.kind == "hook" and event.phase == "begin"}
    assert (by_name["link_private_spt"].gfns, by_name["link_private_spt"].level) == (slice(0, 512, 512), 2)
    assert (by_name["set_private_spte"].gfns, by_name["set_private_spte"].vm) == (slice(3, 4, 1), 0)
