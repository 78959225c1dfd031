"""Trusted hardware by itself: a script of operations, one JSON object a line, and what each answers.

An entry point of the group `cvmcore.hw` names a factory that makes fresh hardware and returns its operations by name.
The signature of each is the schema of its arguments:

    {"op": "host_share_hyp", "pfn": 100, "nr": 4}
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, get_args, get_origin

from cvmcore.errors import CvmError, InputError, PluginError
from cvmcore.plugins import load

GROUP = "cvmcore.hw"

Operation: TypeAlias = Callable[..., Mapping[str, Any]]
_NAMES = {int: "a whole number", bool: "true or false", str: "a text", list: "a list", type(None): "null"}


def load_hardware(name: str) -> Mapping[str, Operation]:
    """Fresh hardware, by its name. InputError where there is none, PluginError where it cannot be used."""
    factory = load(GROUP, name, "hardware")
    operations = factory() if callable(factory) else None
    if not isinstance(operations, Mapping):
        raise PluginError(f"hardware {name}: its entry point does not make a mapping of operations")
    return operations


def play(operations: Mapping[str, Operation], lines: Iterable[str], source: str) -> Iterator[dict[str, Any]]:
    """Run a script line by line; empty lines and those that begin with # are passed over.

    Raises InputError, naming file and line, for what is no JSON object, an unknown operation, or wrong arguments;
    what came before has been done.
    """
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            name, arguments = _parse(text)
            answer = _call(operations, name, arguments)
        except InputError as error:
            raise InputError(f"{source}:{number}: {error}") from None
        except CvmError as error:
            raise CvmError(f"{source}:{number}: {error}") from None
        yield {"op": name, **answer}


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("op"), str):
        raise InputError('a line is a JSON object with the operation\'s name, as in {"op": "..."}')
    return value.pop("op"), value


def _call(operations: Mapping[str, Operation], name: str, arguments: dict[str, Any]) -> Mapping[str, Any]:
    if name not in operations:
        raise InputError(f"there is no operation '{name}' here; there are {', '.join(sorted(operations))}")
    parameters = inspect.signature(operations[name], eval_str=True).parameters
    for given in arguments:
        if given not in parameters:
            raise InputError(f"{name} has no argument '{given}'; it takes {', '.join(parameters) or 'none'}")
    for wanted, parameter in parameters.items():
        if wanted in arguments:
            _check(name, wanted, parameter.annotation, arguments[wanted])
        elif parameter.default is inspect.Parameter.empty:
            raise InputError(f"{name} needs the argument '{wanted}'")
    return operations[name](**arguments)


def _check(name: str, argument: str, wanted: Any, value: Any) -> None:
    if not _fits(value, wanted):
        raise InputError(f"{name}: '{argument}' must be {_said(wanted)}, not {json.dumps(value)[:40]}")


def _fits(value: Any, wanted: Any) -> bool:
    origin = get_origin(wanted)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, get_args(wanted)[0]) for one in value)
    if origin is not None:  # X | None
        return any(_fits(value, one) for one in get_args(wanted))
    return type(value) is wanted


def _said(wanted: Any) -> str:
    origin = get_origin(wanted)
    if origin is list:
        return f"a list, each of it {_said(get_args(wanted)[0])}"
    if origin is not None:
        return " or ".join(_said(one) for one in get_args(wanted))
    return _NAMES.get(wanted, str(wanted))


def described(operations: Mapping[str, Operation]) -> list[tuple[str, str, str]]:
    """(name, arguments, what it does) of each operation."""
    found = []
    for name, fn in operations.items():
        arguments = str(inspect.signature(fn, eval_str=True)).partition(" ->")[0][1:-1]
        found.append((name, arguments, (inspect.getdoc(fn) or "").partition("\n")[0]))
    return found
