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
from cvmcore.modelfront import ModelFront
from cvmcore.script import located, read
from cvmcore.uapi import MAX_GFN
from cvmcore.uapiscript import Answer, Script, number

NOT_COMPARED = ("why", "stats")


@attrs.frozen
class Step:
    """One call on both sides. Both answers include `state` (`Script.state`)."""

    line: int
    op: str
    arguments: dict[str, Any]
    model: Answer
    kernel: Answer
    front: ModelFront | None = None
    """The model behind the call, for a look at what explains a difference."""
    fd: int = -1
    """The model's descriptor that the call was made on."""

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
        found = set(self.differs)
        return next((quirk for quirk in QUIRKS if found and found <= quirk.fields and quirk.matches(self)), None)

    @property
    def call(self) -> str:
        """The call as a line of a script."""
        return json.dumps({"op": self.op, **self.arguments})


@attrs.frozen
class Quirk:
    """A difference that is known, and why. `fields` and `matches` are narrow: nothing else hides behind it.

    ends: the two sides are in different states by then, and the comparison ends.
    """

    name: str
    reason: str
    fields: frozenset[str]
    matches: Callable[[Step], bool]
    ends: bool = False


def _reads_what_is_behind(step: Step) -> bool:
    """Each page that differs has other memory behind it, was accessed by this call, and shows that memory's stamp; the
    files lack such pages, and differ in nothing else."""
    if step.op not in ("guest_read", "guest_write") or step.front is None:
        return False
    gfns = step.arguments.get("gfns")
    if gfns is None:
        first = number(step.arguments.get("gpa", 0), "gpa") >> 12
        gfns = range(first, first + step.arguments.get("pages", 1))
    behind, done = step.front.behind(step.fd), gfns[: step.model.get("done", 0)]
    if step.op == "guest_read":
        for gfn, ours, theirs in zip(done, _unrolled(step.model), _unrolled(step.kernel), strict=True):
            if ours != theirs and behind.get(gfn) != theirs:
                return False
    lacking = 0
    for name, ours in step.model["state"].items():
        theirs = step.kernel["state"].get(name)
        if theirs is None or "pages" not in ours or "pages" not in theirs:
            return False
        if not _indexes(theirs["pages"]) <= _indexes(ours["pages"]):
            return False
        lacking += ours["allocated"] - theirs["allocated"]
        kept = _indexes(theirs["pages"])
        if {i: s for i, s in _stamps(ours).items() if i in kept} != _stamps(theirs):
            return False
    return lacking <= sum(gfn in behind for gfn in done)


def _logs_what_was_only_read(step: Step) -> bool:
    """The model logs more pages, and those hold zeros in anonymous memory."""
    if step.op != "get_dirty_log" or step.front is None:
        return False
    ours, theirs = set(step.model["dirty"]), set(step.kernel["dirty"])
    return theirs < ours and ours - theirs <= step.front.unwritten(step.fd, step.arguments["slot"])


def _lies_above_48_bits(step: Step) -> bool:
    """A memslot that the model refuses for its address alone, and that a kernel whose addresses are wider makes."""
    if step.op not in ("set_user_memory_region", "set_user_memory_region2"):
        return False
    end = number(step.arguments["gpa"], "gpa") + number(step.arguments["size"], "size")
    return (step.model["status"], step.kernel["status"]) == ("EINVAL", "OK") and MAX_GFN << 12 < end <= 1 << 52


def _unrolled(answer: Answer) -> list[int]:
    return [stamp for stamp, n in answer["seen"] for _ in range(n)]


def _indexes(runs: list[list[int]]) -> set[int]:
    return {index for first, n in runs for index in range(first, first + n)}


def _stamps(state: dict[str, Any]) -> dict[int, int]:
    return {index: stamp for first, n, stamp in state.get("content", ()) for index in range(first, first + n)}


QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "prefetch-behind-guest-memfd",
        "with shadow paging 6.18 maps pages next to the one that faults from userspace_addr, though guest_memfd serves "
        "the slot: where other memory stands there, the guest gets that (give the slot a mapping of its own file)",
        frozenset({"seen", "state"}),
        _reads_what_is_behind,
        ends=True,
    ),
    Quirk(
        "no-zero-page",
        "the model gives memory that is only read a page of its own, mapped writable and so logged as dirty; the "
        "kernel maps the zero page read-only, and logs the page when it is written",
        frozenset({"dirty"}),
        _logs_what_was_only_read,
    ),
    Quirk(
        "guest-physical-width",
        "guest physical addresses of the model have 48 bits; with shadow paging, and on larger machines, up to 52",
        frozenset({"status"}),
        _lies_above_48_bits,
        ends=True,
    ),
)
"""Known differences: defects of kernels, and what the model leaves out."""


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
            ours, theirs = answered(model, op, arguments), answered(kernel, op, arguments)
            yield Step(line, op, arguments, ours, theirs, *_made_on(model, op, arguments))


def against(model: Script, lines: Iterable[str], source: str) -> Iterator[Step]:
    """Do a recorded script, whose lines have the kernel's `answer`, on the model."""
    for line, op, arguments in read(lines, source):
        with located(source, line):
            kernel = arguments.pop("answer", None)
            if not isinstance(kernel, dict):
                raise InputError('a recorded script has an "answer" in each line: `--live --record` writes one')
            ours = answered(model, op, arguments)
            yield Step(line, op, arguments, ours, kernel, *_made_on(model, op, arguments))


def _made_on(model: Script, op: str, arguments: dict[str, Any]) -> tuple[ModelFront | None, int]:
    """The model's front, and the descriptor of the vCPU or the VM that a call was made on."""
    fd = arguments.get("vcpu", "vcpu") if op.startswith("guest_") else arguments.get("vm", "vm")
    front = model.front if isinstance(model.front, ModelFront) else None
    return front, model.fds.get(fd, -1) if isinstance(fd, str) else fd


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
