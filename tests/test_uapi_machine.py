"""The state machine of the UAPI itself: what its numbers stand for, and what a call of it costs."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from cvmcore.backends.swprot import SWPROT
from cvmcore.testing.machine import BURST, PICKS, run_machine, uapi_machine

WORTH = 25
"""A call with all that is looked at costs at most so many draws of a number (it is about 8)."""


def test_a_number_is_an_action_with_its_arguments() -> None:
    """0 does nothing; the numbers reach every action and every argument; the first are the simplest."""
    machine = uapi_machine(SWPROT)()
    calls = len(machine.recorder.lines)
    machine.burst((0,) * BURST)
    assert len(machine.recorder.lines) == calls

    for action in machine.actions:
        assert action.arguments(0) == {name: values[0] for name, values in action.choices.items()}
        largest = 1
        for values in action.choices.values():
            largest *= len(values)
        assert largest * len(machine.actions) <= PICKS
        last = action.arguments(largest - 1)
        assert all(last[name] is values[-1] or last[name] == values[-1] for name, values in action.choices.items())
    machine.teardown()


def test_of_two_gfns_that_show_one_page_the_last_write_stays() -> None:
    """Two slots over the same memory of the VMM, of which the upper was made first: gfns are written in order."""
    machine = uapi_machine(SWPROT)()
    for base, page in (1536, 1536), (1024, 1280):
        machine.fill_gap(base=base, npages=512, skew=page - base, pick=0, with_file=False)
    slots = [(slot.base, slot.page, slot.npages) for slot in machine.slots.values()]
    assert slots == [(0, 0, 1024), (1536, 1536, 512), (1024, 1280, 512)]

    machine.write(gfns=np.arange(1024, 2048), vcpu=0, private=False)
    machine.content_is_intact()
    machine.read(gfns=np.arange(1024, 2048), vcpu=0, private=False)
    machine.teardown()


class Draws(RuleBasedStateMachine):
    """Draws what the machine draws, and does nothing with it."""

    @rule(picks=st.tuples(*[st.integers(0, PICKS - 1)] * BURST))
    def burst(self, picks: tuple[int, ...]) -> None:
        pass


def test_a_call_costs_no_more_than_some_draws() -> None:
    """Beside what hypothesis needs for as many numbers, run at the same time: the best of three."""
    examples, steps = 8, 48

    def draws() -> None:
        run_state_machine_as_test(Draws, settings=settings(
            max_examples=examples, stateful_step_count=steps // BURST, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate,),
        ))  # fmt: skip

    def seconds(run: Callable[[], None]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    floor = min(seconds(draws) for _ in range(3))
    cost = min(seconds(lambda: run_machine(SWPROT, examples=examples, steps=steps, shrink=False)) for _ in range(3))
    assert cost < WORTH * floor, f"{cost / floor:.0f} draws"
