"""All that objects reach: as one number, to tell two situations apart, and kept, to be put back as it stood."""

from __future__ import annotations

import gc
from collections import deque
from enum import Enum
from itertools import count
from operator import itemgetter
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    GeneratorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    TracebackType,
    WrapperDescriptorType,
)
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.clock import Meter
from cvmcore.cost import Profile
from cvmcore.effects import Effect, Lock
from cvmcore.ops import Hook, Ops

ELEMENTS = 1 << 13
"""Of an array so many elements are looked at: keep gfns and frames below that."""

_UNSEEN = frozenset({
    "_log", "backend", "calls", "caps", "checks", "contract", "drive", "exits", "faults", "generation", "in_use",
    "kicks", "meter", "ops", "options", "peak", "policies", "profile", "retries", "time_ns", "watch",
})  # fmt: skip
"""Attributes that decide nothing: counters, the clock, observers, the driver; and choices that never change."""
_BLANK = (Ops, Hook, Meter, Profile, ModuleType, CodeType, FrameType, TracebackType)
"""Objects that are passed over for the same reasons, wherever they are met."""


def fingerprint(*objects: object, elements: int = ELEMENTS) -> int:
    """A hash of all that stands in these objects and what they reach; see `Fingerprint`."""
    return Fingerprint(elements).take(*objects)


class Fingerprint:
    """A hash of all that stands in objects and what they reach: to compare two situations.

    Follows attributes, containers, arrays, closures and suspended generators: where each stands, its variables and what
    it has on its stack. An object that was met before counts by when it was met. Counters and the clock are left out.
    An object whose inside cannot be seen makes every number another one.
    seen: bytes of arrays, kept from one to the next, so that an array that did not change is not hashed again.
    """

    def __init__(self, elements: int = ELEMENTS, seen: dict[int, tuple[bytes, bytes]] | None = None) -> None:
        self.elements = elements
        self._seen: dict[int, tuple[bytes, bytes]] = {} if seen is None else seen
        self._met: dict[int, int] = {}
        self._keep: list[object] = []  # what was met must not make room for another object of its id
        self._found: list[Any] = []

    def take(self, *objects: object) -> int:
        """The hash of all that was taken so far, and these."""
        found, met, keep, kinds = self._found, self._met, self._keep, _KINDS
        stack: list[object] = list(objects)
        while stack:
            item = stack.pop()
            key = id(item)
            at = met.get(key)
            if at is not None:
                found.append(at)
                continue
            met[key] = len(met)
            keep.append(item)
            kind = type(item)
            if kind is np.ndarray:
                found.append(self._bytes(item))  # type: ignore[arg-type]
                continue
            look = kinds.get(kind)
            if look is None:
                look = kinds[kind] = _kind(kind)
            look(item, found, stack)
        return hash(tuple(found))

    def _bytes(self, array: npt.NDArray[Any]) -> bytes:
        """The array's bytes, zeros at its end left out: what it has room for says nothing. As long as it does not
        change they are the same object, which knows its hash."""
        raw = (array[: self.elements] if array.ndim else array).tobytes()
        known = self._seen.get(id(array))
        if known is None or known[0] != raw:
            known = self._seen[id(array)] = raw, raw.rstrip(b"\0")
        return known[1]


_PARTS: dict[tuple[type, ...], tuple[Any, Any]] = {}


def _spread(values: Any, found: list[Any], stack: list[object]) -> None:
    """Several values: the plain ones are found, in what is left it is looked. How they come apart is found out once for
    each order of types."""
    types = tuple(map(type, values))
    parts = _PARTS.get(types)
    if parts is None:
        plain = [i for i, kind in enumerate(types) if kind in _PLAIN]
        deep = [i for i, kind in enumerate(types) if kind not in _PLAIN and kind not in _PASSED]
        parts = _PARTS[types] = _picker(plain), _picker(deep)
    plainly, deeply = parts
    if plainly is not None:
        found.append(plainly(values))
    if deeply is not None:
        stack += deeply(values)


def _picker(places: list[int]) -> Any:
    """What takes these elements out of a tuple, as a tuple; None for none."""
    if not places:
        return None
    if len(places) == 1:
        at = places[0]
        return lambda values: (values[at],)
    return itemgetter(*places)


def _look_nowhere(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(type(item).__name__)


def _look_plain(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(item)


def _look_slice(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append((item.start, item.stop, item.step))


def _look_sequence(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(len(item))
    _spread(tuple(item), found, stack)


def _look_dict(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(len(item))
    if item:
        _spread(tuple(item), found, stack)
        _spread(tuple(item.values()), found, stack)


def _look_set(item: Any, found: list[Any], stack: list[object]) -> None:
    found += [len(item), *sorted(map(hash, item))]


def _look_value(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(hash(item))


def _look_name(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(item.__qualname__)


def _look_lock(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(item.name)


def _look_function(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(id(item.__code__))
    _spread((*(item.__closure__ or ()), *(item.__defaults__ or ())), found, stack)


def _look_method(item: Any, found: list[Any], stack: list[object]) -> None:
    stack += (item.__func__, item.__self__)


def _look_builtin(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(item.__qualname__)
    stack.append(item.__self__)


def _look_cell(item: Any, found: list[Any], stack: list[object]) -> None:
    _spread(gc.get_referents(item), found, stack)


def _look_generator(item: Any, found: list[Any], stack: list[object]) -> None:
    frame = item.gi_frame
    if frame is None:
        found.append("ended")
        return
    code, variables = item.gi_code, frame.f_locals
    found += (id(code), frame.f_lasti, tuple(variables))
    # The collector is told of all that a suspended frame holds: its variables and its stack.
    held = [
        one for one in gc.get_referents(item)
        if one is not variables and not (type(one) is FunctionType and one.__code__ is code)
    ]
    _spread(held, found, stack)


def _look_error(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(type(item).__name__)
    _spread(item.args, found, stack)


def _look_iterator(item: Any, found: list[Any], stack: list[object]) -> None:
    """An iterator tells how it can be made again, and with it where it stands."""
    _spread(item.__reduce__()[1:], found, stack)


def _look_instance(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(type(item).__name__)
    own = item.__dict__
    names = tuple(own)
    pick = _NAMES.get(names, _NAMES)
    if pick is _NAMES:
        pick = _NAMES[names] = _picker([i for i, name in enumerate(names) if name not in _UNSEEN])
    if pick is not None:
        _spread(pick(tuple(own.values())), found, stack)


_NAMES: dict[tuple[str, ...], Any] = {}
_UNKNOWN = count()


def _look_unknown(item: Any, found: list[Any], stack: list[object]) -> None:
    found.append(("unknown", next(_UNKNOWN)))


def _slots_of(kind: type) -> list[str]:
    names: list[str] = []
    for one in kind.__mro__:
        slots = one.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__weakref__", "__dict__")]


def _slotted(kind: type) -> Any:
    names = [name for name in _slots_of(kind) if name not in _UNSEEN]
    plain = any("__dict__" in one.__dict__ for one in kind.__mro__[:-1])

    def look(item: Any, found: list[Any], stack: list[object]) -> None:
        found.append(kind.__name__)
        _spread(tuple([getattr(item, name, None) for name in names]), found, stack)
        if plain:
            _look_instance(item, found, stack)

    return look


_PLAIN: frozenset[type] = frozenset({int, float, str, bytes, bool, type(None), range})
_PASSED = frozenset({FrameType, CodeType})
"""What the collector tells of a generator besides."""
_KINDS: dict[type, Any] = {
    **dict.fromkeys(_PLAIN, _look_plain), slice: _look_slice, dict: _look_dict, list: _look_sequence,
    tuple: _look_sequence, deque: _look_sequence, set: _look_set, frozenset: _look_set, FunctionType: _look_function,
    MethodType: _look_method, CellType: _look_cell, GeneratorType: _look_generator, object: _look_nowhere,
    BuiltinFunctionType: _look_builtin, MethodWrapperType: _look_builtin, MethodDescriptorType: _look_name,
    WrapperDescriptorType: _look_name,
}  # fmt: skip
"""How each type is looked into; others are found out when they are first met."""
_ITERATORS: tuple[type, ...] = (
    type(iter([])), type(iter(())), type(iter({})), type(iter({}.values())), type(iter({}.items())), type(iter(set())),
    type(iter(range(0))), type(iter("")), type(iter(b"")), enumerate, zip, map, reversed, type(reversed([])),
)  # fmt: skip


def _kind(kind: type) -> Any:
    """How a type is looked into."""
    if issubclass(kind, _BLANK):
        return _look_nowhere
    for of, look in (
        (type, _look_name), (Lock | Effect, _look_lock), (Enum | np.generic, _look_value), (BaseException, _look_error),
        (_ITERATORS, _look_iterator), (dict, _look_dict), (list | tuple, _look_sequence),
    ):  # fmt: skip
        if issubclass(kind, of):
            return look
    if _slots_of(kind):
        return _slotted(kind)
    if any("__dict__" in one.__dict__ for one in kind.__mro__[:-1]):
        return _look_instance
    return _look_nowhere if kind.__module__ == "_hashlib" else _look_unknown


# ---- kept, and put back -----------------------------------------------------------------------------------------


class Kept:
    """What stands in objects and all they reach, so that it can be put back: the same objects, as they were.

    For worlds at rest: no generator may be under way. Functions are followed into what they enclose. What has no
    attributes and is no container counts as a value that never changes.
    """

    def __init__(self, *objects: object, elements: int = ELEMENTS) -> None:
        self._arrays: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._slots: list[tuple[object, tuple[tuple[str, Any], ...]]] = []
        self._lists: list[tuple[Any, list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._cells: list[tuple[CellType, Any]] = []
        self._elements = elements
        met: dict[int, object] = {}
        stack: list[object] = list(objects)
        while stack:
            item = stack.pop()
            kind = type(item)
            if kind in _PLAIN or kind is slice or id(item) in met or issubclass(kind, _STILL):
                continue
            met[id(item)] = item
            self._keep(item, kind, stack)

    def _keep(self, item: Any, kind: type, stack: list[object]) -> None:
        if kind is np.ndarray:
            if item.flags.writeable:
                self._arrays.append((item[: self._elements], item[: self._elements].copy()))
        elif issubclass(kind, dict):
            self._dicts.append((item, dict(item)))
            stack += item.keys()
            stack += item.values()
        elif issubclass(kind, list | deque):
            self._lists.append((item, list(item)))
            stack += item
        elif issubclass(kind, set):
            self._sets.append((item, set(item)))
            stack += item
        elif issubclass(kind, tuple | frozenset):
            stack += item
        elif kind is CellType:
            if gc.get_referents(item):
                self._cells.append((item, item.cell_contents))
                stack.append(item.cell_contents)
        elif kind in (FunctionType, MethodType, BuiltinFunctionType):
            stack += [getattr(item, "__self__", None), *(getattr(item, "__closure__", None) or ())]
            stack += [getattr(item, "__func__", None), *(getattr(item, "__defaults__", None) or ())]
        elif issubclass(kind, GeneratorType):
            raise ValueError(f"{item.__qualname__} is under way: only a world at rest can be kept")
        else:
            slots = tuple((name, getattr(item, name)) for name in _slots_of(kind) if hasattr(item, name))
            stack += [value for _, value in slots]
            if slots and kind.__setattr__ is not _FROZEN:
                self._slots.append((item, slots))
            own = getattr(item, "__dict__", None)
            if own is not None:
                self._attributes.append((own, dict(own)))
                stack += own.values()

    def restore(self) -> None:
        """Put everything back."""
        for array, words in self._arrays:
            array[:] = words
        for own, attributes in self._attributes:
            own.update(attributes)
            if len(own) != len(attributes):
                for name in own.keys() - attributes.keys():
                    del own[name]
        for mapping, items in self._dicts:
            if mapping or items:
                mapping.clear()
                mapping.update(items)
        for sequence, elements in self._lists:
            if len(sequence) or elements:
                sequence.clear()
                sequence.extend(elements)
        for members, all_ in self._sets:
            members.clear()
            members.update(all_)
        for item, slots in self._slots:
            for name, value in slots:
                if getattr(item, name) is not value:
                    object.__setattr__(item, name, value)
        for cell, content in self._cells:
            cell.cell_contents = content


_FROZEN: object = attrs.make_class("_Frozen", [], frozen=True).__setattr__
_STILL = (type, Lock, Effect, Enum, ModuleType, CodeType, Profile)
"""What never changes, or only keeps what it made."""
