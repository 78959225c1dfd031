"""Page state changes (section 5 of the facts): by the MSR, and by the buffer with its partial progress."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmcore.pages import array_of, contiguous, run
from cvmcore_sev.ghcb import (
    ERROR_GENERIC,
    ERROR_INVALID_ENTRY,
    ERROR_INVALID_HEADER,
    PRIVATE,
    PSMASH,
    SHARED,
    UNSMASH,
    Buffer,
    Entry,
    MapRange,
    begin,
    begin_msr,
    complete,
    fill,
    split_2m,
)


def buffer(*entries, cur=0, end=None):
    return Buffer(list(entries), cur, len(entries) - 1 if end is None else end)


def play(asked, answer=lambda n: 0):
    """All exits of a buffer, and the result that the guest gets."""
    exits = []
    while isinstance(request := begin(asked), MapRange):
        exits.append((request.gfn, request.npages, request.private))
        failed = complete(asked, request, answer(len(exits)))
        if failed is not None:
            return exits, failed
    return exits, request


# ---- the MSR -------------------------------------------------------------------------------------------------------


def msr(gfn, operation):
    return 0x014 | gfn << 12 | operation << 52


@pytest.mark.parametrize(
    ("name", "request_", "enabled", "answer"),
    [
        ("1 is private", msr(0x123, 1), True, MapRange(0x123, 1, True)),
        ("2 is shared", msr(0x123, 2), True, MapRange(0x123, 1, False)),
        ("bad operation", msr(0x123, 3), True, 1 << 32 | 0x015),
        ("no operation", msr(0x123, 0), True, 1 << 32 | 0x015),
        ("hypercall exit not enabled", msr(0x123, 1), False, 1 << 32 | 0x015),
    ],
)
def test_msr(name, request_, enabled, answer):
    assert begin_msr(request_, enabled) == answer


# ---- the buffer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "result"),
    [
        ("end >= 253", buffer(Entry(1, PRIVATE), end=253), 1 << 32 | 1),
        ("cur_page > npages", buffer(Entry(1, PRIVATE, cur_page=2)), 1 << 32 | 2),
        ("cur_page > npages of 2M", buffer(Entry(512, PRIVATE, True, 513)), 1 << 32 | 2),
        ("gfn unaligned for 2M", buffer(Entry(513, PRIVATE, True)), 1 << 32 | 2),
        ("cur behind end: nothing to do", buffer(Entry(1, PRIVATE), cur=1), 0),
        ("all done before", buffer(Entry(1, PRIVATE, cur_page=1), Entry(2, SHARED, cur_page=1)), 0),
    ],
)
def test_a_buffer_that_leads_to_no_exit(name, asked, result):
    assert begin(asked) == result
    assert (ERROR_INVALID_HEADER, ERROR_INVALID_ENTRY, ERROR_GENERIC) == (1 << 32 | 1, 1 << 32 | 2, 0x100 << 32)


def test_exit_not_enabled():
    assert begin(buffer(Entry(1, PRIVATE)), exit_enabled=False) == 0x100 << 32


@pytest.mark.parametrize(
    ("name", "entries", "exits"),
    [
        ("consecutive, same op, same size", [Entry(g, PRIVATE) for g in range(5, 9)], [(5, 4, True)]),
        ("2M pages", [Entry(512, SHARED, True), Entry(1024, SHARED, True)], [(512, 1024, False)]),
        ("other op", [Entry(5, PRIVATE), Entry(6, SHARED)], [(5, 1, True), (6, 1, False)]),
        ("other size", [Entry(511, PRIVATE), Entry(512, PRIVATE, True)], [(511, 1, True), (512, 512, True)]),
        ("a gap", [Entry(5, PRIVATE), Entry(7, PRIVATE)], [(5, 1, True), (7, 1, True)]),
        ("a half-done 2M entry in 4K", [Entry(512, PRIVATE, True, 500)], [(1012, 12, True)]),
        ("... merged with none behind it", [Entry(512, PRIVATE, True, 500), Entry(1024, PRIVATE, True)],
         [(1012, 12, True), (1024, 512, True)]),
        ("... and none before it", [Entry(512, SHARED, True), Entry(1024, SHARED, True, 1)],
         [(512, 512, False), (1025, 511, False)]),
        ("done entries are passed over", [Entry(5, PRIVATE, cur_page=1), Entry(6, PRIVATE)], [(6, 1, True)]),
        ("SMASH and UNSMASH are no-ops", [Entry(512, PSMASH, True), Entry(1024, UNSMASH, True), Entry(7, SHARED)],
         [(7, 1, False)]),
    ],
)  # fmt: skip
def test_exits_of_a_buffer(name, entries, exits):
    asked = buffer(*entries)
    assert play(asked) == (exits, 0)
    assert asked.cur_entry == len(entries) and all(entry.cur_page == entry.npages for entry in entries)


def test_where_user_space_fails_the_guest_sees_how_far_it_came():
    entries = [Entry(5, PRIVATE), Entry(7, PRIVATE), Entry(9, PRIVATE)]
    asked = buffer(*entries)
    assert play(asked, lambda n: 22 if n == 2 else 0) == ([(5, 1, True), (7, 1, True)], ERROR_GENERIC)
    assert asked.cur_entry == 1 and [entry.cur_page for entry in entries] == [1, 0, 0]
    assert play(asked) == ([(7, 1, True), (9, 1, True)], 0)  # the guest asks again, and it goes on


gfn_sets = st.one_of(
    st.builds(run, st.integers(0, 1100), st.integers(1, 1500)),
    st.lists(st.integers(0, 900), min_size=1, max_size=300, unique=True).map(
        lambda gfns: contiguous(np.array(sorted(gfns), np.int64))
    ),
)


@settings(max_examples=60, deadline=None)
@given(gfn_sets, st.booleans())
def test_what_ops_counts_is_what_kvm_would_do_with_the_guests_buffers(gfns, private):
    large, small = split_2m(gfns)
    operation = PRIVATE if private else SHARED
    entries = [Entry(gfn, operation, True) for gfn in array_of(large).tolist()]
    entries += [Entry(gfn, operation) for gfn in array_of(small).tolist()]
    entries.sort(key=lambda entry: entry.gfn)
    done, exits = [], 0
    for at in range(0, len(entries), 253):
        ranges, result = play(buffer(*entries[at : at + 253]))
        assert result == 0
        exits += len(ranges)
        done += [gfn for start, n, _ in ranges for gfn in range(start, start + n)]
    assert fill(gfns) == (len(entries), exits) and done == array_of(gfns).tolist()
