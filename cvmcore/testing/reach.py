"""All that objects reach: as one number, to tell two situations apart; by what it differs from a start; and kept, to be
put back as it stood."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache, partial
from itertools import count
from operator import is_, itemgetter
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
from typing import Any, TypeAlias, TypeVar

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
    "_log", "advanced", "alloc", "backend", "calls", "caps", "checker", "checks", "contract", "drive", "exits",
    "faults", "generation", "in_use", "kicks", "meter", "ops", "options", "peak", "policies", "profile", "retries",
    "time_ns", "watch",
})  # fmt: skip
"""Attributes that decide nothing: counters, the clock, observers, the driver; and choices that never change."""
_BLANK = (Ops, Hook, Meter, Profile, ModuleType, CodeType, FrameType, TracebackType)
"""Objects that are passed over for the same reasons, wherever they are met."""

T = TypeVar("T")
Parts: TypeAlias = Callable[[Any], tuple[object, ...]]
"""What an object is made of: plain values, and objects to be looked into in their turn."""


class PerType(dict[type, T]):
    """What is found out about a type when it is first asked for, but for what is known from the start."""

    def __init__(self, find: Callable[[type], T], known: Mapping[type, T] | None = None) -> None:
        super().__init__(known or {})
        self.find = find

    def __missing__(self, kind: type) -> T:
        found = self[kind] = self.find(kind)
        return found


def fingerprint(*objects: object, elements: int = ELEMENTS) -> int:
    """A hash of all that stands in these objects and what they reach; see `Fingerprint`."""
    return Fingerprint(elements).take(*objects)


class Fingerprint:
    """A hash of all that stands in objects and what they reach: to compare two situations.

    Follows attributes, containers, arrays, closures and suspended generators: where each stands, its variables and what
    it has on its stack. An object that was met before counts by when it was met. Counters and the clock are left out.
    An object whose inside cannot be seen makes every number another one.
    met: objects (by id) that count as met already, with their numbers; those below `base` are of a `Baseline`. What is
    met from now on has numbers from `first` on.
    """

    def __init__(
        self, elements: int = ELEMENTS, met: dict[int, int] | None = None, base: int = 0, first: int = 0
    ) -> None:
        self.elements = elements
        self.met: dict[int, int] = {} if met is None else met
        self.base = base
        self.first = first
        self.keep: list[object] = []
        """What was met, in order: none of it may make room for another object of its id."""
        self.held: set[int] = set()
        """What of it can change, by id."""
        self.again: list[int] = []
        """Numbers of what was met again."""
        self._found: list[Any] = []

    def take(self, *objects: object) -> int:
        """The hash of all that was taken so far, and these."""
        found, met, keep, again, held = self._found, self.met, self.keep, self.again, self.held
        base, first, kinds = self.base, self.first, _KINDS
        stack: list[object] = list(objects)
        while stack:
            item = stack.pop()
            key = id(item)
            at = met.get(key)
            if at is not None:
                found.append(at)
                again.append(at)
                continue
            kind = type(item)
            keep.append(item)
            if not (base and _IS_VALUE[kind]):
                met[key] = first + len(keep)
                held.add(key)
            elif _IS_ONE[kind]:
                met[key] = first + len(keep)
            if kind is np.ndarray:
                self._look(item, stack)  # type: ignore[arg-type]
                continue
            _spread(kinds[kind](item), found, stack)
        return hash(tuple(found))

    def _look(self, array: npt.NDArray[Any], stack: list[object]) -> None:
        """What is in an array; in a view of one of the baseline, it is that one's."""
        whole = array.base
        if not array.size:
            self.held.discard(id(array))
        if self.base and type(whole) is np.ndarray:
            at = self.met.get(id(whole), self.base)
            if at < self.base:
                start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
                self._found += (at, start, array.shape, array.strides, array.dtype.str)
                return
            stack.append(whole)
        self._found.append(_raw(array, self.elements).rstrip(b"\0"))


def _raw(array: npt.NDArray[Any], elements: int) -> bytes:
    """An array's bytes. Zeros at their end are what it has room for, and say nothing."""
    return (array[:elements] if array.ndim else array).tobytes()


_SORTED: dict[tuple[type, ...], tuple[Any, Any]] = {}


def _spread(values: tuple[object, ...], found: list[Any], stack: list[object]) -> None:
    """Several values: the plain ones are found, in what is left it is looked. How they come apart is found out once for
    each order of types."""
    types = tuple(map(type, values))
    parts = _SORTED.get(types)
    if parts is None:
        plain = [i for i, kind in enumerate(types) if kind in _PLAIN]
        deep = [i for i, kind in enumerate(types) if kind not in _PLAIN and kind not in _PASSED]
        parts = _SORTED[types] = _picker(plain), _picker(deep)
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


_UNKNOWN = count()
_SEEN: dict[tuple[str, ...], Any] = {}


def _of_function(item: Any) -> tuple[object, ...]:
    return id(item.__code__), *(item.__closure__ or ()), *(item.__defaults__ or ())


def _of_generator(item: Any) -> tuple[object, ...]:
    frame = item.gi_frame
    if frame is None:
        return ("ended",)
    code, variables = item.gi_code, frame.f_locals
    # The collector is told of all that a suspended frame holds: its variables and its stack.
    held = [
        one for one in gc.get_referents(item)
        if one is not variables and not (type(one) is FunctionType and one.__code__ is code)
    ]
    return id(code), frame.f_lasti, *sorted(variables), *held


def _of_instance(item: Any) -> tuple[object, ...]:
    own = item.__dict__
    names = tuple(own)
    pick = _SEEN.get(names, _SEEN)
    if pick is _SEEN:
        pick = _SEEN[names] = _picker([i for i, name in enumerate(names) if name not in _UNSEEN])
    name = type(item).__name__
    return (name,) if pick is None else (name, *pick(tuple(own.values())))


def _of_unknown(item: Any) -> tuple[object, ...]:
    return "unknown", next(_UNKNOWN)


def _of_nothing(item: Any) -> tuple[object, ...]:
    return (type(item).__name__,)


def _slots_of(kind: type) -> list[str]:
    names: list[str] = []
    for one in kind.__mro__:
        slots = one.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__weakref__", "__dict__")]


_SLOTS = PerType(_slots_of)


def _of_slots(kind: type) -> Parts:
    names = [name for name in _SLOTS[kind] if name not in _UNSEEN]
    if any("__dict__" in one.__dict__ for one in kind.__mro__[:-1]):
        return lambda item: (*[getattr(item, name, None) for name in names], *_of_instance(item))
    return lambda item: (kind.__name__, *[getattr(item, name, None) for name in names])


_PLAIN: frozenset[type] = frozenset({int, float, str, bytes, bool, type(None), range})
_PASSED = frozenset({FrameType, CodeType})
"""What the collector tells of a generator besides."""
_LIVE: frozenset[type] = frozenset({
    type(iter({})), type(iter({}.values())), type(iter({}.items())), type(iter(set())), type(reversed({})),
    type(reversed({}.values())), type(reversed({}.items())),
})  # fmt: skip
"""Iterators that tell what is left of what they go through, and not what that is."""
_ITERATORS: tuple[type, ...] = (
    type(iter([])), type(iter(())), type(iter(range(0))), type(iter("")), type(iter(b"")), enumerate, zip, map,
    reversed, type(reversed([])), *_LIVE,
)  # fmt: skip


def _of_plain(item: Any) -> tuple[object, ...]:
    return (item,)


def _of_name(item: Any) -> tuple[object, ...]:
    return (item.__qualname__,)


def _of_sequence(item: Any) -> tuple[object, ...]:
    return len(item), *item


def _of_dict(item: Any) -> tuple[object, ...]:
    return len(item), *item, *item.values()


def _of_set(item: Any) -> tuple[object, ...]:
    return len(item), *sorted(map(hash, item))


def _of_builtin(item: Any) -> tuple[object, ...]:
    return item.__qualname__, item.__self__


def _parts_of(kind: type) -> Parts:
    """What an object of this type is made of. An iterator tells how it can be made again, and so where it stands."""
    if issubclass(kind, _BLANK):
        return _of_nothing
    for of, parts in (
        (type, _of_name), (Lock | Effect, lambda item: (item.name,)), (Enum | np.generic, lambda item: (hash(item),)),
        (BaseException, lambda item: (type(item).__name__, *item.args)),
        (_ITERATORS, lambda item: item.__reduce__()[1:]), (dict, _of_dict), (list | tuple, _of_sequence),
    ):  # fmt: skip
        if issubclass(kind, of):
            return parts
    if _SLOTS[kind]:
        return _of_slots(kind)
    if any("__dict__" in one.__dict__ for one in kind.__mro__[:-1]):
        return _of_instance
    return _of_nothing if kind.__module__ == "_hashlib" else _of_unknown


_KINDS = PerType[Parts](_parts_of, {
    **dict.fromkeys(_PLAIN, _of_plain), slice: lambda item: (item.start, item.stop, item.step), dict: _of_dict,
    list: _of_sequence, tuple: _of_sequence, deque: _of_sequence, set: _of_set, frozenset: _of_set,
    FunctionType: _of_function, MethodType: lambda item: (item.__func__, item.__self__),
    CellType: lambda item: tuple(gc.get_referents(item)), GeneratorType: _of_generator, object: _of_nothing,
    BuiltinFunctionType: _of_builtin, MethodWrapperType: _of_builtin, MethodDescriptorType: _of_name,
    WrapperDescriptorType: _of_name, partial: lambda item: (item.func, item.args, item.keywords),
})  # fmt: skip
"""What each type is made of; others are found out when they are first met."""


# ---- by what it differs -----------------------------------------------------------------------------------------

_VALUES = (
    tuple, frozenset, slice, FunctionType, MethodType, BuiltinFunctionType, MethodWrapperType,
    MethodDescriptorType, WrapperDescriptorType, type, Lock, Effect, Enum, np.generic, *_BLANK, *_PLAIN,
)  # fmt: skip
_IS_VALUE = PerType[bool](lambda kind: issubclass(kind, _VALUES) or kind is object or kind.__setattr__ is _FROZEN)
"""Whether what is of a type never changes, so that two who have it have nothing in common but what it holds."""
_IS_ONE = PerType[bool](lambda kind: issubclass(kind, Lock) or kind.__setattr__ is _FROZEN)
"""Whether values of a type that look alike are told apart nevertheless."""


def _same(one: object, other: object) -> bool:
    """Whether two parts are one, or values that are the same."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, (*_PLAIN, Enum, np.generic)) and one == other


_OWN = 1 << 40
"""Numbers of objects that are one owner's own are not below that."""


@cache
def _of_modules(nr_modules: int) -> tuple[dict[int, int], list[object]]:
    """Tables and other objects of the loaded modules of this project and its plugins, with negative numbers, and the
    objects themselves. What a module holds is the same in every case, and nobody's own."""
    whole = Fingerprint()
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("cvmcore")]
    held = [one for module in modules for name, one in vars(module).items() if name[:2] != "__"]
    whole.take(*(one for one in held if type(one) not in _PLAIN))
    numbered = [item for item in whole.keep if not _IS_VALUE[type(item)]]
    return {id(item): -1 - i for i, item in enumerate(numbered)}, whole.keep


@attrs.frozen(eq=False)
class _Own:
    """What an owner had of its own when it was last looked at: what could change it, by id, and all that was met."""

    owner: object
    moves: int
    number: int
    held: set[int]
    keep: list[object]


class Baseline:
    """Objects, and all they reach, as they stood once: to tell now by what is another than it was then.

    What stood there counts by its number, and only what changed, or is new, is looked into; a tenth of the work of a
    `Fingerprint` of all.
    """

    def __init__(self, *objects: object, elements: int = ELEMENTS) -> None:
        whole = Fingerprint(elements)
        whole.take(*objects)
        self.elements = elements
        self._keep = whole.keep
        met: dict[int, int] = {}
        self._arrays: list[tuple[int, npt.NDArray[Any], bytes]] = []
        self._last: dict[int, tuple[bytes, bytes]] = {}
        self._objects: list[tuple[int, object, Parts, tuple[object, ...]]] = []
        self._instances: list[tuple[int, object, dict[str, Any], int, Any, tuple[object, ...]]] = []
        for item in whole.keep:
            kind = type(item)
            if _IS_VALUE[kind] and not isinstance(item, Lock):
                continue
            number = met[id(item)] = len(met)
            if isinstance(item, np.ndarray):
                self._arrays.append((number, item, _raw(item, elements)))
                if type(item.base) is np.ndarray:  # whoever has a view of it as well has this one's base
                    met.setdefault(id(item.base), number)
                continue
            parts = _KINDS[kind]
            seen = [name for name in item.__dict__ if name not in _UNSEEN] if parts is _of_instance else []
            if len(seen) > 1:
                own = item.__dict__
                self._instances.append((number, item, own, len(own), itemgetter(*seen), parts(item)))
            else:
                self._objects.append((number, item, parts, parts(item)))
        self._modules = _of_modules(len(sys.modules))
        self._base = len(met)
        self._met = self._modules[0] | met
        self._owned: dict[int, _Own] = {}

    def now(self, *owners: object, moves: Sequence[int] = ()) -> tuple[int, list[int], frozenset[int], bool]:
        """Where it stands now, and its owners with it: a fingerprint of what it is; one for each of them, of what is
        its own; which of them (by number) hold on to something that is new in it; whether no two of them hold on to one
        thing that is not in it, so that what one does with its own is nothing to the others. If they do, there is
        one fingerprint for all together.

        moves: how often each owner did something. One that did nothing since it was looked at is as it was, if nobody
        else could reach what it has.
        """
        base, owned = self._base, self._owned
        state = Fingerprint(self.elements, self._met.copy(), base, base)
        taken = state.take(*self._changed())
        tied: set[int] = set()
        for i, owner in enumerate(owners):
            was = owned.get(i)
            if was is not None and moves and was.owner is owner and was.moves == moves[i]:
                continue
            its = Fingerprint(self.elements, state.met.copy(), base, _OWN)
            number = its.take(owner)
            if any(base <= at < _OWN for at in its.again) or not _LIVE.isdisjoint(map(type, its.keep)):
                tied.add(i)
            owned[i] = _Own(owner, moves[i] if moves else 0, number, its.held, its.keep)
        all_ = [owned[i] for i in range(len(owners))]
        apart = len(set().union(*(one.held for one in all_))) == sum(len(one.held) for one in all_)
        own = [one.number for one in all_] if apart else [state.take(*owners)]
        if apart:
            for i in tied:
                del owned[i]
        else:
            owned.clear()
        return taken, own, frozenset(tied), apart

    def _changed(self) -> list[tuple[object, ...]]:
        """What is not as it was, each with its number."""
        changed: list[tuple[object, ...]] = []
        for number, array, before in self._arrays:
            raw = _raw(array, self.elements)
            if raw != before:
                last = self._last.get(number)
                if last is None or last[0] != raw:  # else these bytes know their hash
                    last = self._last[number] = raw, raw.rstrip(b"\0")
                changed.append((number, last[1]))
        for number, item, own, size, pick, was in self._instances:
            try:
                if len(own) == size and all(map(is_, pick(own), was[1:])):
                    continue
            except KeyError:
                pass
            now = _of_instance(item)
            if len(now) != len(was) or not all(map(_same, now, was)):
                changed.append((number, *now))
        for number, item, parts, was in self._objects:
            now = parts(item)
            if len(now) != len(was) or not (all(map(is_, now, was)) or all(map(_same, now, was))):
                changed.append((number, *now))
        return changed


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
            slots = tuple((name, getattr(item, name)) for name in _SLOTS[kind] if hasattr(item, name))
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
