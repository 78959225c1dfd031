"""Trusted hardware by itself: a script of operations (`cvmcore.script`), and what each answers.

An entry point of the group `cvmcore.hw` names a factory that makes fresh hardware and returns its operations by name:

    {"op": "host_share_hyp", "pfn": 100, "nr": 4}

Most are the methods of a `Console` that are marked with `op`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from cvmcore.errors import InputError, PluginError
from cvmcore.plugins import load
from cvmcore.script import Operation

GROUP = "cvmcore.hw"
S = TypeVar("S", bound="Console")
P = ParamSpec("P")
Answer = TypeVar("Answer", bound=Mapping[str, Any])


def load_hardware(name: str) -> Mapping[str, Operation]:
    """Fresh hardware, by its name. InputError where there is none, PluginError where it cannot be used."""
    factory = load(GROUP, name, "hardware")
    operations = factory() if callable(factory) else None
    if not isinstance(operations, Mapping):
        raise PluginError(f"hardware {name}: its entry point does not make a mapping of operations")
    return operations


def op(fn: Callable[Concatenate[S, P], Answer]) -> Callable[Concatenate[S, P], Answer]:
    """A method that scripts may call; what the model's own interface refuses (ValueError and the like) is bad input."""

    @functools.wraps(fn)
    def checked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        try:
            return fn(self, *args, **kwargs)
        except (ValueError, OverflowError, IndexError) as error:
            raise InputError(f"{fn.__name__}: {error}") from None

    checked.is_op = True  # type: ignore[attr-defined]
    return checked


class Console:
    """A piece of hardware, and how what it says is told: one method an operation, each marked with `op`."""

    def operations(self) -> dict[str, Operation]:
        """By name."""
        return {name: fn for name, fn in inspect.getmembers(self, inspect.ismethod) if hasattr(fn, "is_op")}
