"""Price profiles: what each operation costs on the virtual clock, with the source of each number.

A profile is a TOML file:

    schema = 1
    unit = "ns"
    extends = "common"          # or the name of a backend: whatever is not priced here is taken from there
    [prices]
    page_aug_4k = { ns = 2000, source = "SEAMCALL + Secure-EPT walk, PAMT update", confidence = "low" }

`confidence`: high (the figure itself was read), medium (arithmetic on figures that were read), low (estimate by
analogy), fitted (to published results), measured (here, by whoever wrote the file). These are prices for comparing
designs; no profile makes the model cycle accurate.
"""

from __future__ import annotations

import math
import os
import reprlib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs
import cattrs
import numpy as np

from cvmcore.errors import CvmError, ProfileError

COMMON_PROFILE = Path(__file__).with_name("common.toml")

COMMON = frozenset({
    "vm_exit",            # per exit from the guest, re-entry included
    "user_exit",          # per return of KVM_RUN to user space, beyond vm_exit
    "fault_fixed",        # per stage-2 fault handled, beyond what it allocates, clears and installs
    "page_clear_4k", "page_clear_2m",
    "gmem_alloc_4k",
    "gup_4k", "gup_pin_4k", "gup_pin_2m", "gup_unpin_4k",
    "punch_hole_4k", "punch_hole_call",
    "spte_write", "spte_wrprot",
    "external_update",    # per entry of a mirror or mediated root
    "hugepage_split", "hugepage_merge",
    "table_scan",         # per table whose 512 entries are looked at, to see whether it could be a leaf
    "tlb_flush_base", "tlb_flush_per_cpu",
    "attributes_call", "attributes_4k",
    "memslot_call",
    "memslot_walk", "gmem_lookup_4k",  # by contracts that find frames through gfns (`mem.contract`)
    "guest_write_4k", "guest_read_4k", "host_copy_4k",
})  # fmt: skip
"""What the core itself charges; a backend's hooks add theirs (`Backend.charges`)."""

Confidence: TypeAlias = Literal["high", "medium", "low", "fitted", "measured"]
_CHOICES = (Confidence, Literal[1], Literal["ns"])

SPREAD = {
    "high": ("+-", 0.10),
    "medium": ("+-", 0.30),
    "low": ("x/:", 2.0),
    "fitted": ("+-", 0.10),
    "measured": ("+-", 0.10),
}
"""How far the truth may be from a price: plus or minus a part of it, or up to a factor either way."""

MAX_NS = 10**15


@attrs.frozen
class Price:
    """What one operation costs, where the number comes from, and how good it is."""

    ns: int | float
    source: str
    confidence: Confidence


@attrs.frozen
class Profile:
    """Prices by item, under the name of the file they came from."""

    name: str
    prices: Mapping[str, Price]

    def ns_by_item(self) -> dict[str, int | float]:
        """The bare numbers, as the clock wants them."""
        return {item: price.ns for item, price in self.prices.items()}

    def resampled(self, rng: np.random.Generator) -> Profile:
        """The profile with each price moved by chance within its confidence (SPREAD), in ns as float.

        Uniform within plus or minus, log-uniform within a factor. The same items and generator state give the
        same prices.
        """
        prices = {}
        for item in sorted(self.prices):
            price = self.prices[item]
            kind, spread = SPREAD[price.confidence]
            chance = float(rng.uniform(-1, 1))
            factor = 1 + spread * chance if kind == "+-" else spread**chance
            prices[item] = attrs.evolve(price, ns=price.ns * factor)
        return Profile(self.name, prices)


# ---- files ----------------------------------------------------------------------------------------------------


@attrs.frozen
class _File:
    """A profile file as it stands, before it is merged with what it extends."""

    schema: Literal[1]
    unit: Literal["ns"]
    prices: dict[str, Price]
    extends: str | None = None


def _as_ns(value: Any, _: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"must be a number of ns, not {reprlib.repr(value)}")
    if not 0 <= value <= MAX_NS:
        raise ValueError(f"must be from 0 to {MAX_NS:.0e} ns, not {reprlib.repr(value)}")
    return value


def _as_text(value: Any, _: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a text, not {reprlib.repr(value)}")
    return value


def _as_choice(value: Any, kind: Any) -> Any:
    for choice in kind.__args__:
        if type(value) is type(choice) and value == choice:
            return value
    raise ValueError(f"must be {' or '.join(map(repr, kind.__args__))}, not {reprlib.repr(value)}")


_CONVERTER = cattrs.Converter(forbid_extra_keys=True)
_CONVERTER.register_structure_hook_func(lambda kind: kind == (int | float), _as_ns)
_CONVERTER.register_structure_hook(str, _as_text)
_CONVERTER.register_structure_hook_func(lambda kind: kind in _CHOICES, _as_choice)


def _what(error: BaseException, _: Any) -> str:
    """What is wrong, for one error of the converter. The newline tells it from the place that cattrs appends."""
    match error:
        case cattrs.ForbiddenExtraKeysError():
            return f"has no field {sorted(error.extra_fields)[0]!r}\n"
        case KeyError():
            return "is missing\n"
        case ValueError():
            return f"{error}\n"
        case _:
            return "must be a table\n"


def _read(path: Path) -> _File:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        table = tomllib.loads(content.decode())
    except UnicodeDecodeError:
        raise ProfileError(f"{path}: is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: is not TOML: {error}") from None
    try:
        return _CONVERTER.structure(table, _File)
    except cattrs.BaseValidationError as error:
        what, _, where = cattrs.transform_error(error, "", _what)[0].partition("\n @ ")
        raise ProfileError(f"{path}: {where.lstrip('.') or 'the profile'} {what}") from None


def load_profile(path: Path, *, required: frozenset[str], resolve: Callable[[str], Path]) -> Profile:
    """The profile in a file, with the prices of what it extends.

    required: every item that somebody may charge; each must have a price, and an item that is neither required nor
    priced by an extended profile is unknown. resolve: the profile file of a backend; it raises CvmError or
    LookupError for a name that is none. Raises ProfileError, in one sentence with file and item.
    """
    files = [_read(path)]
    seen = [os.path.realpath(path)]
    extends, last = files[0].extends, path
    while extends is not None:
        try:
            last, extending = (COMMON_PROFILE if extends == "common" else resolve(extends)), last
        except (CvmError, LookupError) as error:
            raise ProfileError(f"{last}: extends {extends!r}, which is no backend: {error}") from None
        if os.path.realpath(last) in seen:
            raise ProfileError(f"{extending}: extends {extends!r}, and so extends itself")
        files.append(_read(last))
        seen.append(os.path.realpath(last))
        extends = files[-1].extends
    inherited = {item: price for file in reversed(files[1:]) for item, price in file.prices.items()}
    prices = inherited | files[0].prices
    unknown = sorted(files[0].prices.keys() - required - inherited.keys())
    if unknown:
        raise ProfileError(f"{path}: price of {unknown[0]!r}, which nothing charges")
    missing = sorted(required - prices.keys())
    if missing:
        others = f" and of {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ProfileError(f"{path}: no price of {missing[0]!r}{others}")
    return Profile(path.stem, prices)
