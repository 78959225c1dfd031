"""Differential fuzzing: drawn UAPI scripts (`cvmcore.testing.scripts`) on the model and on a kernel.

Needs hypothesis (`pip install cvmcore[test]`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import attrs
from hypothesis import HealthCheck, Phase, given, seed, settings

from cvmcore.difference import Step, beside, explained
from cvmcore.modelfront import model_fronts
from cvmcore.testing.scripts import Line, known, scripts
from cvmcore.uapiscript import Front, Script, recorded


@attrs.define
class Outcome:
    """steps: calls compared. quirks: known ones that were met, by name. script: the shortest one that differs, empty
    where none does, and `why` it does."""

    steps: int = 0
    cases: int = 0
    quirks: Counter[str] = attrs.field(factory=Counter)
    statuses: Counter[str] = attrs.field(factory=Counter)
    script: list[Line] = attrs.field(factory=list)
    why: str = ""


class Enough(Exception):
    """So many calls were compared."""


class Differs(AssertionError):
    """Model and kernel disagree."""


def diff_fuzz(
    kernel: Front,
    steps: int,
    seed_of_all: int,
    *,
    backend: str = "default",
    options: dict[str, str] | None = None,
    version: str = "6.18",
    told: Callable[[Outcome], None] = lambda outcome: None,
    record: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Run drawn scripts on both until so many calls were compared, or one differs and was made short.

    told: after each case. record: takes the lines of all cases with the kernel's answers, as a recorded script.
    """
    outcome = Outcome()
    make = model_fronts(backend, kernel=version, options=options)

    def first_difference(lines: list[Line]) -> Step | None:
        model, real = Script(make()), Script(kernel)
        try:
            for step in beside(model, real, map(json.dumps, lines), "script"):
                outcome.steps += 1
                outcome.statuses[f"{step.op} {step.kernel['status']}"] += 1
                record(recorded(step.op, step.arguments, step.kernel))
                if step.differs:
                    if step.quirk is None:
                        return step
                    outcome.quirks[step.quirk.name] += 1
                    if step.quirk.ends:
                        return None
            return None
        finally:
            record(recorded("exit", {}, {"status": "OK", "state": {}}))
            kernel.close()
            model.front.close()

    def run(lines: list[Line]) -> None:
        if outcome.steps >= steps:
            raise Enough
        outcome.cases += 1
        step = first_difference(lines)
        told(outcome)
        if step is not None:
            outcome.script, outcome.why = shortened(lines[: step.line], first_difference)
            raise Differs(outcome.why)

    test = settings(
        max_examples=steps, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )(given(scripts())(run))  # fmt: skip
    with suppress(Differs, Enough):
        seed(seed_of_all)(test)()
    return outcome


def shortened(
    lines: list[Line], first_difference: Callable[[list[Line]], Step | None]
) -> tuple[list[Line], str]:
    """As few of the lines as still differ, with numbers as small as still do; and what differs.

    Quicker than hypothesis's own way of making examples smaller: each try costs a process and a VM.
    """
    why = ""

    def differs(some: list[Line]) -> list[Line] | None:
        nonlocal why
        step = first_difference(known(some))
        if step is None:
            return None
        why = explained(step)
        return known(some)[: step.line]

    best = differs(lines) or lines
    size = len(best)
    while size:
        at = len(best) - size
        while at >= 0:
            best = differs(best[:at] + best[at + size :]) or best
            at = min(at, len(best)) - size
        size //= 2
    for at, one in enumerate(best):
        for key, value in one.items():
            for simpler in _SIMPLER.get(key, ()):
                if value == simpler:
                    break
                if differs([*best[:at], one | {key: simpler}, *best[at + 1 :]]) is not None:
                    one[key] = simpler
                    break
    differs(best)
    return best, why


_SIMPLER = {"pages": (1, 2), "size": (4096, 8192), "gpa": (0,), "offset": (0,), "slot": (0,), "stamp": (1,), "id": (0,)}
