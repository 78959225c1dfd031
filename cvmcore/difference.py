"""A UAPI script on two fronts, the model and a real kernel (or what one answered before), compared step by step.

What is compared: status, results, exits, and, behind every call, which pages each guest_memfd has and what stands in
them. What is not: the model's word for a refusal, and statistics.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs

from cvmcore.errors import InputError
from cvmcore.script import located, read
from cvmcore.uapiscript import Answer, Script

NOT_COMPARED = ("why", "stats")


@attrs.frozen
class Step:
    """One call on both sides. Both answers include `state` (`Script.state`)."""

    line: int
    op: str
    arguments: dict[str, Any]
    model: Answer
    kernel: Answer

    @property
    def differs(self) -> list[str]:
        """Fields of the answers that are not the same, the weightiest first."""
        ours, theirs = compared(self.model), compared(self.kernel)
        # What strace saw is the status only: compared is what it has.
        names = sorted({*ours, *theirs} if "state" in theirs else theirs, key=_weight)
        return [name for name in names if ours.get(name) != theirs.get(name)]

    @property
    def quirk(self) -> Quirk | None:
        """The known quirk of a kernel that explains all that differs."""
        return next((quirk for quirk in QUIRKS if self.differs == quirk.differs and quirk.matches(self)), None)

    @property
    def call(self) -> str:
        """The call as a line of a script."""
        return json.dumps({"op": self.op, **self.arguments})


@attrs.frozen
class Quirk:
    """A difference that is known, and why it is none of the model's. `matches` and `differs` are narrow, so that
    nothing else hides behind it."""

    name: str
    reason: str
    differs: list[str]
    matches: Callable[[Step], bool]


QUIRKS: tuple[Quirk, ...] = ()


def _weight(field: str) -> tuple[int, str]:
    order = ("status", "exit", "done", "seen", "state")
    return (order.index(field) if field in order else 1, field)


def compared(answer: Answer) -> Answer:
    """What is compared of an answer."""
    kept = {name: value for name, value in answer.items() if name not in NOT_COMPARED}
    if isinstance(leave := kept.get("exit"), dict):
        kept["exit"] = {name: value for name, value in leave.items() if name != "why"}
    return kept


def beside(model: Script, kernel: Script, lines: Iterable[str], source: str) -> Iterator[Step]:
    """Do a script on both. InputError names file and line."""
    for line, op, arguments in read(lines, source):
        with located(source, line):
            arguments.pop("answer", None)
            yield Step(line, op, arguments, answered(model, op, arguments), answered(kernel, op, arguments))


def against(model: Script, lines: Iterable[str], source: str) -> Iterator[Step]:
    """Do a recorded script, whose lines have the kernel's `answer`, on the model."""
    for line, op, arguments in read(lines, source):
        with located(source, line):
            kernel = arguments.pop("answer", None)
            if not isinstance(kernel, dict):
                raise InputError('a recorded script has an "answer" in each line: `--live --record` writes one')
            yield Step(line, op, arguments, answered(model, op, arguments), kernel)


def answered(script: Script, op: str, arguments: dict[str, Any]) -> Answer:
    """What a call answers, and what stands in the files behind it."""
    answer = script.do(op, arguments)
    del answer["op"]
    return answer | {"state": script.state()}


def explained(step: Step) -> str:
    """The difference in words: which line, which fields, what each side says, and why the model does."""
    fields = step.differs
    said = [f"line {step.line}: {step.call}", f"  the model and the kernel differ in {', '.join(fields)}"]
    for field in fields:
        if field == "state":
            said += _states(step.model["state"], step.kernel.get("state", {}))
        else:
            for who, answer in (("model", step.model), ("kernel", step.kernel)):
                said.append(f"  {field}, {who}: {json.dumps(compared(answer).get(field))}")
    if why := step.model.get("why"):
        said.append(f"  the model refused because: {why}")
    if "state" not in fields and step.model["state"]:
        said.append(f"  what stands in the files is the same: {json.dumps(step.model['state'])}")
    return "\n".join(said)


def _states(model: dict[str, Any], kernel: dict[str, Any]) -> Iterator[str]:
    for name in sorted({*model, *kernel}):
        ours, theirs = model.get(name, {}), kernel.get(name, {})
        for field in ("allocated", "pages", "content"):
            if ours.get(field) != theirs.get(field):
                yield f"  {field} of {name}, model: {json.dumps(ours.get(field))}"
                yield f"  {field} of {name}, kernel: {json.dumps(theirs.get(field))}"
