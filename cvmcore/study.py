"""Studies: questions about a design, answered with numbers. An entry point of the group `cvmcore.studies` names one.

A study *measures* once, by running the model, and *evaluates* what it has measured at the prices of the moment: those
of the profiles, or, to see how far the answer hangs on them, prices drawn within their confidence.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import attrs
import numpy as np

from cvmcore.backend import Option, parse_options
from cvmcore.cost import Profile
from cvmcore.errors import PluginError
from cvmcore.guest import Progress, silent
from cvmcore.plugins import load, load_backend
from cvmcore.runner import load_profile_for

GROUP = "cvmcore.studies"


@attrs.frozen
class Column:
    """A column of the table: the key in a row, the title above it, a unit, and how many digits a number gets."""

    name: str
    title: str
    unit: str = ""
    digits: int = 0


@attrs.frozen
class Findings:
    """What came out. rows: one dict each, with the columns of the study and whatever else a program may want.
    calibrated, predicted: which figures were fitted to a published one, and which follow. conclusion: a sentence made
    from the numbers. verdict: the part of it that may turn out otherwise at other prices. flips_in: the column where
    each row has a verdict of its own, if any; rows come in the same order at all prices."""

    rows: list[dict[str, Any]]
    calibrated: list[str]
    predicted: list[str]
    notes: list[str]
    conclusion: str
    verdict: Hashable
    flips_in: str = ""


@attrs.define(eq=False)
class StudyContext:
    """What a study works with: its options, prices by backend, a seed, and whom to tell how far it is."""

    options: dict[str, Any]
    progress: Progress = silent
    seed: int = 0
    draw: int | None = None
    """Which draw of prices this is; None: the nominal ones."""
    _profiles: dict[str, Profile] = attrs.field(factory=dict)

    def profile(self, backend: str) -> Profile:
        """The prices of a backend: its own, or those of this draw. Raises InputError where it is not installed."""
        if backend not in self._profiles:
            profile = load_profile_for(load_backend(backend), None)
            if self.draw is not None:
                rng = np.random.default_rng([self.seed, self.draw, zlib.crc32(backend.encode())])
                profile = profile.resampled(rng)
            self._profiles[backend] = profile
        return self._profiles[backend]


@attrs.frozen
class Study:
    """A question and how it is answered.

    measure: runs the model, once. evaluate: prices what was measured; called once for the nominal prices and once for
    each draw. draw: paints findings on a matplotlib figure. source: what raised the question.
    """

    name: str
    question: str
    source: str
    columns: tuple[Column, ...]
    measure: Callable[[StudyContext], Any]
    evaluate: Callable[[Any, StudyContext], Findings]
    draw: Callable[[Findings, Any], None] | None = None
    options: tuple[Option, ...] = ()


@attrs.frozen
class Outcome:
    """Findings at nominal prices; of how many draws; the verdicts of those that came out otherwise, with counts; and
    how often each row did (`Findings.flips_in`)."""

    findings: Findings
    draws: int = 0
    others: dict[Hashable, int] = attrs.field(factory=dict)
    row_flips: list[int] = attrs.field(factory=list)

    @property
    def flips(self) -> int:
        """Draws whose verdict is another one."""
        return sum(self.others.values())


def load_study(name: str) -> Study:
    """A study by name. InputError where there is none, PluginError where it cannot be used."""
    study = load(GROUP, name, "study")
    if not isinstance(study, Study):
        raise PluginError(f"study {name}: its entry point names a {type(study).__name__}, not a Study")
    return study


def run(
    study: Study,
    given: dict[str, str],
    *,
    draws: int = 0,
    seed: int = 0,
    progress: Progress = silent,
) -> Outcome:
    """Measure, evaluate, and evaluate again with `draws` draws of prices. InputError for an option that is none."""
    options = parse_options(study.options, given, f"study {study.name}")
    context = StudyContext(options, progress, seed)
    measured = study.measure(context)
    progress(0, None, "evaluate")
    findings = study.evaluate(measured, context)
    others: Counter[Hashable] = Counter()
    column = findings.flips_in
    row_flips = [0] * len(findings.rows) if column and draws else []
    for draw in range(draws):
        progress(draw, draws, "draw prices")
        found = study.evaluate(measured, StudyContext(options, seed=seed, draw=draw))
        if found.verdict != findings.verdict:
            others[found.verdict] += 1
        for i in range(len(row_flips)):
            row_flips[i] += found.rows[i][column] != findings.rows[i][column]
    return Outcome(findings, draws, dict(others.most_common()), row_flips)
