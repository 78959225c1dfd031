"""A batch means the same as its pages one by one: the RMP instructions, on random tables and batches."""

from __future__ import annotations

import copy

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sev_helpers import snapshot

from cvmcore.pages import contiguous, count, part, run
from cvmcore.types import PG_LEVEL_2M, PG_LEVEL_4K
from cvmcore_sev.errors import RmpStatus
from cvmcore_sev.hw import Rmp

# A small world, so that instructions meet: a few frames around the borders of a few regions, the last of them past the
# table's end; two guests; gfns that are mostly the frames' own numbers.
REGIONS = (0, 1, 2, 3)
NR_FRAMES = 3 * 512 + 3
near_border = st.tuples(st.sampled_from(REGIONS), st.integers(-3, 4)).map(lambda at: max(0, at[0] * 512 + at[1]))
frames_4k = st.one_of(
    st.builds(run, near_border, st.integers(1, 6)),
    st.lists(near_border, min_size=1, max_size=8, unique=True).map(lambda p: contiguous(np.array(p, np.int64))),
)
frames_2m = st.one_of(
    st.builds(lambda r, n: run(r * 512, n, 512), st.integers(0, 2), st.integers(1, 2)),
    st.lists(st.sampled_from(REGIONS), min_size=1, max_size=4, unique=True).map(
        lambda r: contiguous(np.array(r, np.int64) * 512, 512)
    ),
)
asids = st.sampled_from([1, 1, 1, 2])
STOPS = (RmpStatus.FAIL_INPUT, RmpStatus.FAIL_PERMISSION, RmpStatus.FAIL_SIZEMISMATCH, RmpStatus.NO_CHANGE)
gfn_bases = st.sampled_from([0] * 6 + [512, 1, 0xFFFF_FE00, 0xF_FFFF_FE00])


@st.composite
def steps(draw):
    """One instruction on a batch: (name, frames, gfns, keywords)."""
    kind = draw(st.sampled_from(["rmpupdate"] * 4 + ["pvalidate"] * 3 + ["psmash", "rmpadjust"]))
    level = draw(st.sampled_from([PG_LEVEL_4K] * 3 + [PG_LEVEL_2M]))
    pfns = draw(frames_2m if level == PG_LEVEL_2M or kind == "psmash" else frames_4k)
    shift = draw(gfn_bases)
    gfns = run(pfns.start + shift, count(pfns), pfns.step) if isinstance(pfns, slice) else pfns + shift
    asid = draw(asids)
    match kind:
        case "rmpupdate":
            assigned = draw(st.sampled_from([True, True, False]))
            owner = draw(st.sampled_from([asid, asid, asid, 0])) if assigned else 0
            immutable = assigned and draw(st.integers(0, 7)) == 7
            return kind, pfns, gfns, {"assigned": assigned, "asid": owner, "level": level, "immutable": immutable}
        case "psmash":
            return kind, pfns, None, {}
        case "pvalidate":
            validate = draw(st.sampled_from([True, True, False]))
            stop_at = draw(st.sampled_from([(), STOPS]))
            return kind, pfns, gfns, {"asid": asid, "level": level, "validate": validate, "stop_at": stop_at}
    target = draw(st.sampled_from([1, 1, 2, 3, 0, 4]))
    return kind, pfns, gfns, {"asid": asid, "level": level, "target_vmpl": target, "perms": draw(st.integers(0, 31))}


FULL = {
    "empty": [],
    "one guest's": [("rmpupdate", run(0, NR_FRAMES), run(0, NR_FRAMES), {"assigned": True, "asid": 1})],
    "2M pages and 4K pages": [
        ("rmpupdate", run(0, 2, 512), run(0, 2, 512), {"assigned": True, "asid": 1, "level": PG_LEVEL_2M}),
        ("rmpupdate", run(1024, 500), run(1024, 500), {"assigned": True, "asid": 1}),
        ("pvalidate", run(0, 2, 512), run(0, 2, 512), {"asid": 1, "validate": True, "level": PG_LEVEL_2M}),
        ("pvalidate", run(1024, 500), run(1024, 500), {"asid": 1, "validate": True}),
    ],
}
"""What a table holds before the random instructions."""


def table(before, locked=None):
    rmp = Rmp(NR_FRAMES)
    for instruction in FULL[before]:
        whole(rmp, *instruction)
    if locked is not None:
        rmp.lock(run(locked, 1))
    return rmp


def whole(rmp, kind, pfns, gfns, keywords):
    """The batch in one call: its answer as a list of statuses, one for each page that was tried."""
    call = getattr(rmp, kind)
    answer = call(pfns, **keywords) if gfns is None else call(pfns, gfns, **keywords)
    if kind in ("rmpupdate", "psmash"):
        return [RmpStatus.OK] * answer.done + ([answer.status] if answer.done < count(pfns) else [])
    return [answer] * count(pfns) if isinstance(answer, int) else answer.tolist()


def one_by_one(rmp, kind, pfns, gfns, keywords):
    statuses = []
    for i in range(count(pfns)):
        page = part(pfns, i, i + 1)
        statuses += whole(rmp, kind, page, None if gfns is None else part(gfns, i, i + 1), keywords)
        if kind in ("rmpupdate", "psmash") and statuses[-1]:
            break
        if statuses[-1] in keywords.get("stop_at", ()):
            # The guest stops; of 2M pages that are too large, all in a row are told before it goes on in 4K.
            asking = statuses[-1] == RmpStatus.FAIL_SIZEMISMATCH
            for rest in range(i + 1, count(pfns)):
                again = keywords | {"stop_at": ()}
                page = part(pfns, rest, rest + 1)
                status = whole(copy.deepcopy(rmp), kind, page, part(gfns, rest, rest + 1), again)[0]
                asking = asking and status == RmpStatus.FAIL_SIZEMISMATCH
                statuses.append(status if asking else RmpStatus.NOT_REACHED)
            break
    return statuses


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(FULL)), st.sampled_from([None, None, 0, 512]), st.lists(steps(), min_size=2, max_size=12))
def test_batch_equals_one_by_one(before, locked, instructions):
    left, right = table(before, locked), table(before, locked)
    for kind, pfns, gfns, keywords in instructions:
        assert whole(left, kind, pfns, gfns, keywords) == one_by_one(right, kind, pfns, gfns, keywords)
        assert left.violations() == []
    assert snapshot(left) == snapshot(right)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(FULL)), st.lists(steps(), max_size=8), frames_4k, gfn_bases, asids, st.sampled_from([1, 2]),
    st.booleans(),
)
def test_checks_of_a_batch_equal_those_of_its_pages(before, instructions, pfns, shift, asid, level, write):
    rmp = table(before)
    for step in instructions:
        whole(rmp, *step)
    gfns = run(pfns.start + shift, count(pfns)) if isinstance(pfns, slice) else pfns + shift
    checks = [
        lambda p, g: rmp.check_host(p, write, level),
        lambda p, g: rmp.check_shared(p, write, level),
        lambda p, g: rmp.check_private(p, g, asid=asid, level=level, access="write" if write else "read"),
        lambda p, g: rmp.levels(p),
        lambda p, g: rmp.assigned(p),
        lambda p, g: rmp.state(p),
    ]
    n = count(pfns)
    for check in checks:
        together = np.broadcast_to(check(pfns, gfns), n).tolist()
        apart = [
            np.broadcast_to(check(part(pfns, i, i + 1), part(gfns, i, i + 1)), 1).tolist()[0] for i in range(n)
        ]
        assert together == apart


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 6 * 512 - 1), min_size=1, max_size=12, unique=True).map(sorted),
    st.sampled_from([0, 0, 1]),
    st.sampled_from([0, 9]),
    st.lists(st.integers(0, 6 * 512 - 1), max_size=3),
)
def test_gmem_prepare_of_a_batch_equals_its_pages(make_rig, gfns, shift, order, taken):
    """A block is taken whole by its first page, or page by page: same table, same counts."""
    seen = []
    for size in (len(gfns), 1):
        rig = make_rig()
        vm = rig.vm("snp")
        for pfn in taken:
            rig.hw.rmp.rmpupdate(run(512 + pfn, 1), pfn, assigned=True, asid=9)
        for at in range(0, len(gfns), size):
            some = np.array(gfns[at : at + size], np.int64)
            pfns = contiguous(some + 512 + shift)
            assert rig.call("gmem_prepare", vm=vm, slot=None, gfns=some, pfns=pfns, max_order=order) is None
        seen.append((snapshot(rig.hw.rmp), dict(rig.items)))
    assert seen[0] == seen[1]
