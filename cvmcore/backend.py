"""What a plugin puts behind an entry point of the group `cvmcore.backends`: a `Backend`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from cvmcore.errors import InputError

GROUP = "cvmcore.backends"


@attrs.frozen
class Option:
    """A backend or workload option, `-o name=value`: one of `choices`, or an integer where there are none."""

    name: str
    default: str | int
    help: str
    choices: tuple[str, ...] = ()

    def parse(self, text: str | int) -> str | int:
        """The option's value. Raises InputError where it is none of the choices, or no number."""
        if self.choices:
            if text not in self.choices:
                raise InputError(f"option {self.name}: '{text}' is none of {', '.join(self.choices)}")
            return text
        if isinstance(self.default, str):
            return str(text)
        try:
            return int(text, 16) if isinstance(text, str) and text[:2] in ("0x", "0X") else int(text)
        except ValueError:
            raise InputError(f"option {self.name}: '{text}' is not a whole number") from None


def parse_options(declared: tuple[Option, ...], given: dict[str, str], owner: str) -> dict[str, Any]:
    """All declared options with their values. Raises InputError for an option that `owner` does not have."""
    known = {option.name: option for option in declared}
    for name in given:
        if name not in known:
            have = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"{owner} has no option '{name}'; {have}")
    return {name: option.parse(given.get(name, option.default)) for name, option in known.items()}


@attrs.frozen
class Backend:
    """One VM type of one vendor, as a plugin offers it.

    Backends with the same `vendor` share a Host: `make()` gives the object whose hook implementations serve all VM
    types of the vendor. `profile` is the TOML file of its prices; `charges` names the prices that its hooks charge.
    """

    name: str
    vendor: str
    vm_type: str
    summary: str
    api_version: int
    make: Callable[[], object]
    profile: Path
    charges: frozenset[str] = frozenset()
    options: tuple[Option, ...] = ()
    kvm_type: int | None = None
    """The number that KVM_CREATE_VM has for the VM type, where it has one (KVM_VM_TYPE_*)."""
    policy_words: tuple[tuple[str, str, str], ...] = ()
    """(policy, the vendor's word, the core's): choices of the core that people know by the vendor's name for them."""
