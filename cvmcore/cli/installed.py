"""`cvm backends`, `cvm workloads`, `cvm hooks`: what is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cvmcore.cli.arguments import AsJson
from cvmcore.cli.output import complain, described, dump, option_rows, say, table
from cvmcore.errors import PluginError

if TYPE_CHECKING:
    from cvmcore.backend import Backend
    from cvmcore.workloads import Workload


def backends(as_json: AsJson = False) -> None:
    """List the installed backends; imports none of them."""
    from cvmcore.backend import GROUP
    from cvmcore.plugins import installed

    found = installed(GROUP).values()
    if as_json:
        keys = ("name", "distribution", "version", "summary")
        dump({"backends": [{key: getattr(one, key) for key in keys} for one in found]})
    else:
        rows = [(one.name, one.distribution, one.version, one.summary) for one in found]
        say(table(("backend", "distribution", "version", "what the distribution brings"), rows))


def workloads(
    name: Annotated[str | None, typer.Argument(metavar="WORKLOAD", help="Show one, with its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the installed workloads, or show one with its options."""
    from cvmcore.plugins import installed
    from cvmcore.runner import load_workload
    from cvmcore.workloads import GROUP

    found: list[Workload] = []
    bad: list[PluginError] = []
    for one in installed(GROUP) if name is None else [name]:
        try:
            found.append(load_workload(one))
        except PluginError as error:
            if name is not None:
                raise
            bad.append(error)
    if as_json:
        dump({"workloads": [{"name": w.name, "summary": w.summary, "options": option_rows(w)} for w in found]})
    elif name is None:
        say(table(("workload", "what it does", "options"), [
            (w.name, w.summary, ", ".join(option.name for option in w.options)) for w in found
        ]))
    else:
        say(described(found[0].name, found[0].summary, found[0]))
    for reason in bad:
        complain(reason)


def hooks(
    backend: Annotated[str | None, typer.Argument(metavar="BACKEND", help="Show one backend.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the hooks, and which backend implements which."""
    from cvmcore.ops import implementations
    from cvmcore.plugins import load_all_backends, load_backend

    if backend is not None:
        found, bad = {backend: load_backend(backend)}, dict[str, str]()
    else:
        found, bad = load_all_backends()
    implemented: dict[str, set[str]] = {}
    for name, one in found.items():
        try:
            implemented[name] = {hook for hook, _, _ in implementations(one.make(), name)}
        except PluginError as error:
            if backend is not None:
                raise
            bad[name] = str(error)
    _show_hooks(implemented, found[backend] if backend is not None else None, as_json)
    for reason in bad.values():
        complain(reason)


def _show_hooks(implemented: dict[str, set[str]], one: Backend | None, as_json: bool) -> None:
    from cvmcore.hookspecs import API_VERSION, HOOKS

    if as_json:
        rows = [
            {
                "name": hook.name, "kind": hook.kind, "locks": hook.locks, "upstream": hook.upstream,
                "implemented_by": [name for name, has in implemented.items() if hook.name in has],
            }
            for hook in HOOKS.values()
        ]  # fmt: skip
        dump({"api_version": API_VERSION, "backends": list(implemented), "hooks": rows})
        return
    from rich.console import Group

    titles = ("hook", *(implemented if one is None else ()), "kind", "locks held", "upstream")
    marks = {hook: ["x" if hook in has else "" for has in implemented.values()] for hook in HOOKS}
    made = table(titles, [
        (h.name, *(marks[h.name] if one is None else ()), h.kind, h.locks, h.upstream)
        for h in HOOKS.values() if one is None or h.name in implemented[one.name]
    ])  # fmt: skip
    if one is None:
        say(made)
    else:
        has = f"{len(implemented[one.name])} of {len(HOOKS)} hooks, version {one.api_version} of the contract"
        say(Group(described(one.name, f"{one.summary} ({has})", one), "", made))
