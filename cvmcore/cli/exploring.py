"""`cvm explore`: a race, in every order."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cvmcore.cli.arguments import AsJson, Seed, whole
from cvmcore.cli.output import WRONG, complain, dump, say, table
from cvmcore.errors import InputError

if TYPE_CHECKING:
    from cvmcore.sched import Played


def explore(
    name: Annotated[
        str | None, typer.Argument(metavar="[SCENARIO]", help="Which; without it, all are listed.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="See `cvm backends`.")] = "swprot",
    off: Annotated[
        bool, typer.Option("--off", help="With what closes the race switched off: it must be found.")
    ] = False,
    replay: Annotated[
        str | None, typer.Option("--replay", metavar="SCHEDULE", help="Run one schedule again, as 0*5,1*3,0.")
    ] = None,
    at_random: Annotated[
        int,
        typer.Option("--random", metavar="N", help="N schedules at random in place of all.", parser=whole("--random")),
    ] = 0,
    interruptions: Annotated[
        int | None,
        typer.Option(
            "--interruptions",
            metavar="N",
            help="Only orders with so many interruptions.",
            parser=whole("--interruptions"),
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> int:
    """Run a small race in every interleaving.

    Invariants and content are checked at each step.
    """
    from cvmcore import sched
    from cvmcore.host import Host
    from cvmcore.plugins import load_backend
    from cvmcore.runner import load_profile_for
    from cvmcore.testing.scenarios import NOT_MODELLED, scenario, scenarios

    if name is None:
        if as_json:
            rows = [
                {"name": s.name, "race": s.text, "closed_by": s.closed_by, "needs": s.whose}
                for s in scenarios().values()
            ]
            dump({"scenarios": rows, "not_modelled": NOT_MODELLED})
        else:
            rows_ = [(s.name, s.text, s.closed_by, s.whose) for s in scenarios().values()]
            say(table(("scenario", "race", "closed by", "needs"), rows_))
            for row, why in NOT_MODELLED.items():
                typer.echo(f"not modelled: {row}: {why}")
        return 0
    chosen, owner = scenario(name), load_backend(backend)
    host = Host(owner, load_profile_for(owner, None), nr_frames=1 << 10)
    caps = host.capabilities(owner.vm_type, host.options)
    if not chosen.fits(owner, caps):
        raise InputError(f"backend {backend} cannot have the race {name}: it needs {chosen.whose}")
    make: Callable[[], Any] = lambda: chosen.make(owner)  # noqa: E731
    start = time.perf_counter()
    with chosen.off() if off else nullcontext():
        figures: dict[str, int] = {}
        played: Played | None = None
        if replay is not None:
            played = sched.replay(make(), _schedule(replay))
            figures = {"schedules": 1, "steps": len(played.steps)}
        elif at_random:
            played = sched.at_random(make, at_random, seed)
            figures = {"schedules": at_random}
        else:
            try:
                seeks = off and interruptions is None
                found = sched.seek(make) if seeks else sched.explore(make, interruptions=interruptions)
                figures = {
                    "schedules": found.schedules, "given_up": found.pruned, "situations": found.situations,
                    "ends": found.ends, "steps": found.steps, "steps_foreseen": found.known,
                }  # fmt: skip
            except Exception as error:
                if not hasattr(error, "schedule"):
                    raise
                played = sched.replay(make(), error.schedule)
                played = played if played.error is not None else sched.Played(played.names, played.steps, error)
    seconds = time.perf_counter() - start
    race = played is not None and played.error is not None
    _show(name, backend, off, figures, played, race, seconds, as_json, replay is not None)
    return WRONG if race != off and replay is None else 0


def _show(
    name: str, backend: str, off: bool, figures: dict[str, int], played: Played | None, race: bool, seconds: float,
    as_json: bool, replayed: bool,
) -> None:  # fmt: skip
    why = "" if played is None or played.error is None else " ".join(str(played.error).partition("\n")[0].split())
    if as_json:
        dump({
            "scenario": name, "backend": backend, "off": off, "race": race, "why": why, **figures,
            "seconds": round(seconds, 3), "schedule": written(played.schedule) if played and race else "",
        })  # fmt: skip
        return
    if played is not None and (race or replayed):
        rows = [
            (str(i + 1), *(what if actor == who else "" for who in range(len(played.names))))
            for i, (actor, what) in enumerate(played.steps)
        ]
        say(table(("step", *played.names), rows))
        again = f"cvm explore {name} --backend {backend}{' --off' if off else ''} --replay {written(played.schedule)}"
        typer.echo(f"again: {again}")
    said = ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in figures.items())
    state = " with its protocol switched off" if off else ""
    outcome = f"a race: {why}" if race else "no race"
    took = f"{said} in {seconds:.1f} s" if said else f"{seconds:.1f} s"
    typer.echo(f"{name} on {backend}{state}: {took}: {outcome}")
    if race != off and not replayed:
        complain(f"{name} on {backend}: " + ("a race" if race else "the race that must be there is not found"))


def written(schedule: list[int]) -> str:
    """A schedule as text: 0*5,1*3,0."""
    parts: list[tuple[int, int]] = []
    for actor in schedule:
        if parts and parts[-1][0] == actor:
            parts[-1] = actor, parts[-1][1] + 1
        else:
            parts.append((actor, 1))
    return ",".join(f"{actor}*{n}" if n > 1 else f"{actor}" for actor, n in parts)


def _schedule(text: str) -> list[int]:
    """The actors' numbers. Raises InputError."""
    found: list[int] = []
    for one in text.split(","):
        match = re.fullmatch(r"(\d)(?:\*(\d{1,4}))?", one.strip())
        if match is None:
            raise InputError(f"--replay '{text[:40]}' is no schedule: give actors' numbers, as 0*5,1*3,0")
        found += [int(match[1])] * int(match[2] or 1)
    return found
