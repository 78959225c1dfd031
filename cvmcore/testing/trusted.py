"""What a vendor's code asks of its trusted party, and what that may answer: read from the code of both.

Nothing here is written down by hand, so a call or a status that somebody adds is seen: `calls_made` finds which public
methods of the hardware the vendor's modules name, `statuses_of` which members of an enum of statuses lie behind a
method. Both say too much rather than too little: a status that a helper mentions counts, whoever asks the helper.
"""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, TypeVar

from cvmcore.effects import Lock

S = TypeVar("S", bound=enum.IntEnum)


@functools.cache
def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


@functools.cache
def _defined(module: ModuleType) -> dict[str, list[ast.AST]]:
    """What stands behind each name of a module: "function", "Class", "Class.method", "CONSTANT"."""
    found: dict[str, list[ast.AST]] = {}
    for node in _tree(module).body:
        match node:
            case ast.FunctionDef(name=name):
                found.setdefault(name, []).append(node)
            case ast.ClassDef(name=name):
                found.setdefault(name, []).append(node)
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        found.setdefault(f"{name}.{inner.name}", []).append(inner)
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            found.setdefault(part.id, []).append(value)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.AST() as value):
                found.setdefault(name, []).append(value)
    return found


def _parts(hw: object) -> Iterator[tuple[str, object]]:
    """The hardware, and its parts that have methods of their own, with their paths."""
    yield "", hw
    module = type(hw).__module__
    for name, value in vars(hw).items():
        if type(value).__module__ == module and not name.startswith("_") and not isinstance(value, Lock | enum.Enum):
            yield f"{name}.", value


def _methods(part: object) -> set[str]:
    named = {name for cls in type(part).__mro__[:-1] for name in vars(cls)}
    return {name for name in named if not name.startswith("_") and callable(getattr(part, name, None))}


def calls_made(modules: Iterable[ModuleType], hw: object) -> set[str]:
    """Public methods of the hardware ("tdh_mem_page_aug", "psp.df_flush") that the modules name anywhere."""
    named = {node.attr for module in modules for node in ast.walk(_tree(module)) if isinstance(node, ast.Attribute)}
    return {path + name for path, part in _parts(hw) for name in _methods(part) & named}


def statuses_of(hw: object, operation: str, statuses: type[S]) -> tuple[S, ...]:
    """Members of the enum that lie behind an operation: in it, in what it calls, in the tables that these name."""
    path, _, name = operation.rpartition(".")
    owner: Any = getattr(hw, path) if path else hw
    cls = next(cls for cls in type(owner).__mro__ if name in vars(cls))
    module = sys.modules[cls.__module__]
    defined = _defined(module)
    found: set[S] = set()
    todo, seen = [f"{cls.__name__}.{name}"], {cls.__name__, statuses.__name__}
    while todo:
        for node in defined.get(at := todo.pop(), ()):
            seen.add(at)
            for inner in ast.walk(node):
                behind = ""
                match inner:
                    case ast.Attribute(value=ast.Name(id=of), attr=member) if of == statuses.__name__:
                        found |= {statuses[member]} if member in statuses.__members__ else set()
                    case ast.Attribute(value=ast.Name(id="self"), attr=method):
                        behind = f"{cls.__name__}.{method}"
                    case ast.Name(id=name):
                        behind = name
                if behind in defined and behind not in seen:
                    seen.add(behind)
                    todo.append(behind)
    return tuple(sorted(found))
