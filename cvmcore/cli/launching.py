"""`cvm launch`: the digest that a measured launch of a firmware image gives."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from cvmcore.cli.arguments import AsJson
from cvmcore.cli.output import WRONG, complain, dump, say, table


def launch(
    firmware: Annotated[Path, typer.Argument(metavar="FIRMWARE", help="The image, for instance OVMF.fd.")],
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="See `cvm backends`.")],
    vcpus: Annotated[str | None, typer.Option(metavar="N", help="How many vCPUs.")] = None,
    vcpu_type: Annotated[str | None, typer.Option(metavar="TYPE", help="CPU model, as QEMU names it.")] = None,
    vmm_type: Annotated[str | None, typer.Option(metavar="VMM", help="Whose way of setting up a VM.")] = None,
    kernel: Annotated[str | None, typer.Option(metavar="FILE", help="Kernel, booted directly.")] = None,
    initrd: Annotated[str | None, typer.Option(metavar="FILE", help="Its initial RAM disk.")] = None,
    append: Annotated[str | None, typer.Option(metavar="TEXT", help="Its command line.")] = None,
    policy: Annotated[str | None, typer.Option(metavar="N", help="Guest policy, decimal or 0x...")] = None,
    guest_features: Annotated[str | None, typer.Option(metavar="N", help="Features of the guest, as policy.")] = None,
    order: Annotated[str | None, typer.Option(metavar="ORDER", help="In which order pages are measured.")] = None,
    steps: Annotated[Path | None, typer.Option(metavar="OUT", help="Write each step: type, gpa, digest.")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="Name the first step that differs from such a file's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Launch a firmware image and print its digest.

    Page by page through the model. An option that the backend has no use for is refused.
    """
    from cvmcore.measured import difference, lines, read_steps
    from cvmcore.measured import launch as launch_image
    from cvmcore.outfile import OutFile
    from cvmcore.progress import Bar

    given = {
        "vcpus": vcpus, "vcpu-type": vcpu_type, "vmm-type": vmm_type, "kernel": kernel, "initrd": initrd,
        "append": append, "policy": policy, "guest-features": guest_features, "order": order,
    }  # fmt: skip
    others = None if against is None else read_steps(against)
    with OutFile(steps) if steps is not None else nullcontext() as out:
        with Bar("launch") as bar:
            done = launch_image(
                backend, firmware, {name: text for name, text in given.items() if text is not None}, progress=bar
            )
        if out is not None:
            for line in lines(done.steps):
                out.put(line)
    differs = "" if others is None else difference(done.steps, others, str(against))
    if as_json:
        dump({
            "backend": backend, "firmware": str(firmware), "options": done.options, "digest": done.digest,
            "steps": len(done.steps), "measured": done.counts(),
        } | ({} if others is None else {"first_difference": differs or None}))  # fmt: skip
    else:
        say(table(("measured", "steps"), [(kind, str(n)) for kind, n in done.counts().items()]))
        say(f"\nlaunch digest: {done.digest}")
        if others is not None:
            say(differs or f"all steps as in {against}")
    if differs:
        complain("the launch is not the same")
        raise typer.Exit(WRONG)
