"""`teardown`: a populated VM goes away. Every report says what that costs; here it is the point."""

from __future__ import annotations

from cvmcore.workloads import Context, Whole, Workload


def run(context: Context) -> None:
    """Populate; the runner destroys the VM, on the clock."""
    context.machine.launch()
    context.populate(0, context.portion(context.options["share"]))


TEARDOWN = Workload(
    name="teardown",
    summary="populate a VM, then destroy it",
    run=run,
    options=(Whole("share", 100, "percent of memory that is populated first", low=1, high=100),),
)
