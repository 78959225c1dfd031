"""The contracts of mail 002: what each tells the vendor, where each breaks, and the study that counts it."""

from __future__ import annotations

import json

import pytest

from cvmcore.cli import main
from cvmcore.errors import InputError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.mem.contract import CONTRACTS, Cause
from cvmcore.pages import run
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.studies.invalidate import INVALIDATE, MOMENTS
from cvmcore.study import Outcome
from cvmcore.study import run as run_study
from cvmcore.types import Filter

B, P, S = Filter.BOTH, Filter.PRIVATE, Filter.SHARED
# Which mappings are zapped, and whether the vendor cleans up in the callback: what the mail says of each cause.
# In the order NOTIFIER, TO_PRIVATE, TO_SHARED, PUNCH_HOLE, RELEASE.
TOLD = {
    "decoupled":  ((S, False), (S, False), (P, False), (P, False), (P, False)),
    "flags3":     ((S, False), (S, False), (P, False), (P, True), (P, True)),
    "flags2":     ((S, False), (S, False), (P, False), (P, True), (P, True)),
    "attributes": ((S, False), (S, False), (P, True), (P, True), (P, True)),
    "untold":     ((B, True), (B, True), (B, True), (B, True), (B, True)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRACTS)
@pytest.mark.parametrize("cause", Cause, ids=lambda cause: cause.name)
def test_what_a_callback_zaps_and_cleans(name: str, cause: Cause) -> None:
    kinds, cleans = TOLD[name][list(Cause).index(cause)]
    meant = S if cause in (Cause.NOTIFIER, Cause.TO_PRIVATE) else P

    assert CONTRACTS[name].kinds(cause, meant) == kinds
    assert CONTRACTS[name].cleans(cause) is cleans


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    for plugin in ("cvmcore_sev", "cvmcore_tdx"):
        pytest.importorskip(plugin)
    return run_study(INVALIDATE, {}, draws=2)


NO_SLOT, MIXED, NOTIFIED = "close, no memslot", "to private, mixed range", "notifier, private range"
UNCLEAN, LOST = "1024 frames go back unclean", "guest data is lost"
# M. Roth: a flag depends on an active memslot. I. Yamahata: to private must zap shared pages only, as a notifier must.
BREAKS = {
    ("snp", "flags3", NO_SLOT): UNCLEAN,
    ("snp", "flags2", NO_SLOT): UNCLEAN,
    ("snp", "attributes", NO_SLOT): UNCLEAN,
    ("snp", "untold", NO_SLOT): UNCLEAN,
    ("snp", "untold", MIXED): LOST,
    ("snp", "untold", NOTIFIED): LOST,
    ("tdx", "untold", MIXED): LOST,
    ("tdx", "untold", NOTIFIED): LOST,
}


def test_what_breaks_is_what_the_mail_says(outcome: Outcome) -> None:
    rows = outcome.findings.rows
    ours = [row for row in rows if row["backend"] in ("snp", "swprot", "tdx")]

    assert len(ours) == 3 * len(CONTRACTS) * len(MOMENTS)
    found = {(r["backend"], r["contract"], r["moment"]): r["result"] for r in ours if r["result"] != "holds"}
    assert found == BREAKS


def test_walking_is_what_handing_over_by_frame_spares(outcome: Outcome) -> None:
    rows = {(r["backend"], r["contract"], r["moment"]): r for r in outcome.findings.rows}
    hole = "punch after conversion"

    by_frame, by_gfn = rows["snp", "decoupled", hole], rows["snp", "flags3", hole]
    assert (by_frame["walks"], by_frame["lookups"]) == (0, 0)
    assert (by_gfn["walks"], by_gfn["lookups"]) == (1, 256)
    assert by_frame["operations"] == by_gfn["operations"]
    assert by_gfn["locked_us"] > 5 * by_frame["locked_us"]  # RMPUPDATE of each page under mmu_lock
    # Attributes alone cannot tell a conversion from a hole: each is cleaned, and assigned again.
    there, back = rows["snp", "decoupled", "convert and back"], rows["snp", "attributes", "convert and back"]
    assert back["operations"] == there["operations"] + 2 * 256
    # Where removing the entry is the clean-up, all contracts cost the same.
    assert len({rows["tdx", name, hole]["us"] for name in ("decoupled", "flags3", "flags2", "attributes")}) == 1


def test_the_conclusion_names_who_is_right_for_whom(outcome: Outcome) -> None:
    told = {line.partition(":")[0]: line for line in outcome.findings.conclusion.splitlines()}

    assert "handed over by frame, as M. Roth says" in told["snp"]
    assert "enough if it tells private from shared, as I. Yamahata says" in told["tdx"]
    assert "any contract will do" in told["swprot"]
    assert all("a hole from a closed file changes nothing" in line for line in told.values())
    assert outcome.flips == 0


def test_pages_that_nobody_took_back_stay_the_guests() -> None:
    """With flags, a hole in a range that no memslot binds frees frames that the hardware still protects."""
    pytest.importorskip("cvmcore_sev")
    backend = load_backend("snp")
    for contract, writable in (("decoupled", True), ("flags3", False)):
        host = Host(backend, load_profile_for(backend, None), nr_frames=1 << 12, policies={"invalidation": contract})
        machine = Machine(host, 64 << 12)
        machine.launch()
        machine.guest.write(run(0, 64))
        pfns = machine.frames_of(run(0, 64))
        region = machine.regions[0]
        machine.vm.set_user_memory_region2(0, 4, 0, 0, region.hva, region.gmem_fd, 0)
        machine.process.fallocate(region.gmem_fd, 3, 0, 64 << 12)

        verdict = host.host_access(run(int(pfns[0]), 1), True)
        assert (verdict.name == "OK") is writable


def test_policy_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cvmcore_sev")
    said = {}
    for name in ("decoupled", "flags2"):
        assert main(["run", "balloon", "--backend", "snp", "--mem", "16M", "-p", f"invalidation={name}", "--json"]) == 0
        said[name] = json.loads(capsys.readouterr().out)["reports"][0]
    assert said["flags2"]["cpu_ns"] > said["decoupled"]["cpu_ns"]
    assert main(["run", "touch", "-p", "invalidation=other"]) == 2
    assert "invalidation" in capsys.readouterr().err


def test_an_unknown_contract_is_refused() -> None:
    backend = load_backend("swprot")
    with pytest.raises(InputError, match="decoupled"):
        Host(backend, load_profile_for(backend, None), policies={"invalidation": "flags4"})
