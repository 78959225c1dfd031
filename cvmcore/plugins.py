"""Finding backends, workloads and what else is installed by entry points. Listing imports nothing."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import attrs

from cvmcore.backend import GROUP, Backend
from cvmcore.errors import InputError, PluginError
from cvmcore.hookspecs import API_VERSION


@attrs.frozen
class Found:
    """An entry point, not loaded: its name and the distribution that brings it."""

    name: str
    distribution: str
    version: str
    summary: str
    entry: EntryPoint


def installed(group: str) -> dict[str, Found]:
    """What is installed in an entry-point group, by name, without importing any of it."""
    found: dict[str, Found] = {}
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        dist = entry.dist
        found[entry.name] = Found(
            entry.name,
            dist.name if dist else "?",
            dist.version if dist else "?",
            (dist.metadata["Summary"] or "") if dist else "",
            entry,
        )
    return found


def load(group: str, name: str, what: str) -> Any:
    """Load one entry point. InputError where there is none of that name, PluginError where it does not import."""
    found = installed(group)
    if name not in found:
        raise InputError(f"there is no {what} '{name}' here; installed: {', '.join(found) or 'none'}")
    try:
        return found[name].entry.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PluginError(f"{what} {name} (from {found[name].distribution}) cannot be imported: {reason}") from None


def load_backend(name: str) -> Backend:
    """A backend by name. PluginError where it is none, or was written for another version of the contract."""
    backend = load(GROUP, name, "backend")
    if not isinstance(backend, Backend):
        raise PluginError(f"backend {name}: its entry point names a {type(backend).__name__}, not a Backend")
    if backend.api_version != API_VERSION:
        raise PluginError(
            f"backend {name} was written for version {backend.api_version} of the hook contract; this is {API_VERSION}"
        )
    return backend


def load_all_backends() -> tuple[dict[str, Backend], dict[str, str]]:
    """Every backend that loads, and for every other its name with the reason."""
    good: dict[str, Backend] = {}
    bad: dict[str, str] = {}
    for name in installed(GROUP):
        try:
            good[name] = load_backend(name)
        except PluginError as error:
            bad[name] = str(error)
    return good, bad


def imported_plugins(prefix: str = "cvmcore_") -> list[str]:
    """Plugin modules imported so far in this process (a check that listing imports none)."""
    return sorted(name for name in sys.modules if name.startswith(prefix) and "." not in name)
