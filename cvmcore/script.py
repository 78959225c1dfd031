"""Scripts of operations, one JSON object a line: `op` names the operation, the other keys are its arguments.

The signature of each operation is the schema of its arguments. Empty lines and those that begin with # are passed over.
Lines are read as they are wanted, so a script may be of any length, or come from a pipe.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeAlias, get_args, get_origin

from cvmcore.errors import CvmError, InputError

Operation: TypeAlias = Callable[..., Mapping[str, Any]]
_NAMES = {
    int: "a whole number", bool: "true or false", str: "a text", list: "a list", dict: "an object", type(None): "null",
}  # fmt: skip


@contextmanager
def located(source: str, number: int) -> Iterator[None]:
    """What goes wrong in the block is said with file and line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}:{number}: {error}") from None
    except CvmError as error:
        raise CvmError(f"{source}:{number}: {error}") from None


def read(lines: Iterable[str], source: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line number, operation, arguments) of each line. Raises InputError, naming file and line, for what is none."""
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            with located(source, number):
                name, arguments = _parse(text)
            yield number, name, arguments


def play(operations: Mapping[str, Operation], lines: Iterable[str], source: str) -> Iterator[dict[str, Any]]:
    """Run a script line by line: each operation and what it answers.

    Raises InputError, naming file and line, for what is no JSON object, an unknown operation, or wrong arguments;
    what came before has been done.
    """
    for number, name, arguments in read(lines, source):
        with located(source, number):
            answer = perform(operations, name, arguments)
        yield {"op": name, **answer}


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("op"), str):
        raise InputError('a line is a JSON object with the operation\'s name, as in {"op": "..."}')
    return value.pop("op"), value


def perform(operations: Mapping[str, Operation], name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Call one operation. Raises InputError for one that does not exist, or arguments that are not its own."""
    if name not in operations:
        raise InputError(f"there is no operation '{name}' here; there are {', '.join(sorted(operations))}")
    parameters = _parameters(operations[name])
    for given in arguments:
        if given not in parameters:
            raise InputError(f"{name} has no argument '{given}'; it takes {', '.join(parameters) or 'none'}")
    for wanted, parameter in parameters.items():
        if wanted in arguments:
            _check(name, wanted, parameter.annotation, arguments[wanted])
        elif parameter.default is inspect.Parameter.empty:
            raise InputError(f"{name} needs the argument '{wanted}'")
    return operations[name](**arguments)


def _parameters(operation: Operation) -> Mapping[str, inspect.Parameter]:
    method = getattr(operation, "__func__", None)
    if method is None:
        return inspect.signature(operation, eval_str=True).parameters
    return _of_method(method)


@lru_cache
def _of_method(method: Operation) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(method, eval_str=True).parameters
    return {name: parameter for name, parameter in parameters.items() if name != "self"}


def _check(name: str, argument: str, wanted: Any, value: Any) -> None:
    if not _fits(value, wanted):
        raise InputError(f"{name}: '{argument}' must be {_said(wanted)}, not {json.dumps(value)[:40]}")


def _fits(value: Any, wanted: Any) -> bool:
    origin = get_origin(wanted)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, get_args(wanted)[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict)  # whose values the operation checks
    if origin is not None:  # X | None
        return any(_fits(value, one) for one in get_args(wanted))
    return type(value) is wanted


def _said(wanted: Any) -> str:
    origin = get_origin(wanted)
    if origin is list:
        return f"a list, each of it {_said(get_args(wanted)[0])}"
    if origin is dict:
        return _NAMES[dict]
    if origin is not None:
        return " or ".join(_said(one) for one in get_args(wanted))
    return _NAMES.get(wanted, str(wanted))


def described(operations: Mapping[str, Operation]) -> list[tuple[str, str, str]]:
    """(name, arguments, what it does) of each operation."""
    found = []
    for name, fn in operations.items():
        arguments = ", ".join(str(parameter) for parameter in _parameters(fn).values())
        found.append((name, arguments, (inspect.getdoc(fn) or "").partition("\n")[0]))
    return found
