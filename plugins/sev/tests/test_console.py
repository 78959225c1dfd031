"""`cvm hw snp`: instructions and commands by name, with what they answer and the entries they leave."""

from __future__ import annotations

import inspect
import io
import json

import pytest

from cvmcore import cli
from cvmcore.errors import InputError
from cvmcore_sev.console import machine

NAMES = {
    "rmpupdate", "psmash", "rmpread", "pvalidate", "rmpadjust", "rmpquery", "vmrun", "snp_gctx_create",
    "snp_launch_start", "snp_activate", "snp_launch_update", "snp_launch_finish", "snp_page_reclaim",
    "snp_page_unsmash", "snp_page_set_state", "snp_decommission", "df_flush", "launch_start", "activate",
    "launch_update_data", "launch_update_vmsa", "launch_measure", "launch_secret", "launch_finish", "guest_status",
}  # fmt: skip


@pytest.fixture
def ops():
    return machine()


def test_every_instruction_and_command_has_its_name(ops):
    assert set(ops) >= NAMES


def test_operations_are_typed_and_told(ops):
    for name, fn in ops.items():
        for parameter in inspect.signature(fn, eval_str=True).parameters.values():
            assert parameter.annotation in (int, bool, str), (name, parameter)
        assert fn.__doc__, name


def test_life_of_a_guests_page(ops):
    told = ops["rmpupdate"](100, gfn=7, asid=1)
    assert (told["status"], told["code"], told["done"]) == ("OK", 0, 1)
    entry = {
        "pfn": 100, "state": "GUEST_INVALID", "assigned": True, "gfn": 7, "size": "4k", "immutable": False, "asid": 1,
        "validated": False, "vmsa": False, "perms": [31, 0, 0, 0],
    }  # fmt: skip
    assert told["entries"] == [entry]
    assert ops["private_access"](100, 7, 1)["status"] == "VC"
    told = ops["pvalidate"](100, 7, 1)
    assert told["entries"] == [entry | {"state": "GUEST_VALID", "validated": True}]
    assert ops["pvalidate"](100, 7, 1) | {"entries": []} == {
        "status": "NO_CHANGE", "code": 255, "answers": ["NO_CHANGE"], "entries": [],
    }  # fmt: skip
    assert ops["private_access"](100, 7, 1, access="write")["status"] == "OK"
    assert ops["private_access"](100, 8, 1)["status"] == "NPF_RMP"
    assert ops["host_access"](100, write=True)["status"] == "HOST_PF"
    assert ops["rmpupdate"](100, assigned=False)["entries"][0]["state"] == "HYPERVISOR"  # the host may take it back
    assert ops["private_access"](100, 7, 1)["status"] == "NPF_RMP"


def test_2m_pages(ops):
    assert ops["rmpupdate"](512, gfn=512, asid=1, size="2m")["done"] == 1
    assert ops["rmpupdate"](513, gfn=1, asid=1)["status"] == "FAIL_OVERLAP"
    assert ops["pvalidate"](513, 513, 1)["status"] == "NPF_SIZEM"
    assert ops["rmpread"](513)["hpage_region_status"] == [True]
    assert ops["psmash"](700)["status"] == "OK"
    told = ops["psmash"](512)
    assert (told["status"], told["code"]) == ("FAIL_BADADDR", 4)
    assert ops["pvalidate"](512, 512, 1, size="2m")["status"] == "FAIL_SIZEMISMATCH"
    assert ops["pvalidate"](513, 513, 1, nr=3)["answers"] == ["OK"] * 3


def test_a_launch(ops):
    ops["rmpupdate"](1, immutable=True)
    assert ops["snp_gctx_create"](1)["entries"][0]["state"] == "CONTEXT"
    assert ops["snp_launch_start"](1)["status"] == ops["snp_activate"](1, 5)["status"] == "SUCCESS"
    ops["write"](10, "aa" * 4096)
    ops["rmpupdate"](10, gfn=1, asid=5, immutable=True)
    told = ops["snp_launch_update"](1, 10)
    assert told["digest"].startswith("83f2b12dec4ffc7a") and told["entries"][0]["state"] == "GUEST_VALID"
    assert ops["snp_launch_update"](1, 10)["status"] == "INVALID_PAGE_STATE"
    assert ops["read"](10)["noise"] and ops["read"](10, asid=5, size=2)["hex"] == "aaaa"
    assert ops["snp_launch_finish"](1)["status"] == "SUCCESS"
    assert ops["snp_decommission"](1)["entries"][0]["state"] == "FIRMWARE"
    # the pages that the guest leaves behind keep its ASID from the next one
    ops["rmpupdate"](2, immutable=True)
    ops["snp_gctx_create"](2)
    ops["snp_launch_start"](2)
    told = ops["snp_activate"](2, 5)
    assert (told["status"], told["code"], told["asid_pages"]) == ("INVALID_CONFIG", 3, 1)


def test_an_sev_launch(ops):
    handle = ops["launch_start"]()["handle"]
    assert ops["activate"](handle, 200)["status"] == "SUCCESS"
    assert ops["launch_update_data"](handle, 4096 + 8, 16)["status"] == "INVALID_ADDRESS"
    assert len(ops["launch_update_data"](handle, 4096, 4096)["digest"]) == 64
    assert ops["launch_measure"](handle, 10) == {"status": "INVALID_LENGTH", "code": 4, "length": 48}
    assert len(ops["launch_measure"](handle)["hex"]) == 96
    assert ops["launch_finish"](handle)["status"] == "SUCCESS"
    assert ops["guest_status"](handle)["state"] == "RUNNING"


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("rmpupdate", {"pfn": -1}, "give a page number"),
        ("rmpupdate", {"pfn": 1, "nr": 0}, "1 to 8192 pages"),
        ("rmpupdate", {"pfn": 1, "asid": 5000}, "no asid 5000"),
        ("rmpupdate", {"pfn": 1, "size": "1g"}, "neither 4k nor 2m"),
        ("pvalidate", {"pfn": 1, "gfn": 1, "asid": 1, "vmpl": 4}, "at VMPL 4"),
        ("rmpadjust", {"pfn": 1, "gfn": 1, "asid": 1, "target_vmpl": 1, "perms": 99}, "permissions have 5 bits"),
        ("pvalidate", {"pfn": 1, "gfn": 1, "asid": 0}, "no guest has ASID 0"),
        ("private_access", {"pfn": 1, "gfn": 1, "asid": 1024}, "no guest has ASID 1024"),
        ("vmrun", {"pfn": 1, "gfn": 1, "asid": 5000}, "no guest has ASID 5000"),
        ("rmpquery", {"pfn": 1, "gfn": 1, "asid": 1, "target_vmpl": 9}, "at VMPL 9"),
        ("private_access", {"pfn": 1, "gfn": 1, "asid": 1, "access": "x"}, "access 'x'"),
        ("launch_start", {"policy": 1 << 32}, "32 bits"),
        ("receive_start", {"session": "00" * 32, "policy": -1}, "32 bits"),
        ("snp_launch_start", {"gctx": 1, "policy": 1 << 64}, "64 bits"),
        ("write", {"pfn": 9999, "hex": ""}, "no frame 9999"),
        ("write", {"pfn": 1, "hex": "zz"}, "not hexadecimal"),
        ("write", {"pfn": 1, "hex": "00" * 5000}, "4096 bytes"),
        ("read", {"pfn": 1, "size": 0}, "1 to 4096"),
        ("snp_launch_update", {"gctx": 1, "pfn": 1, "type": "big"}, "type 'big'"),
        ("snp_launch_update", {"gctx": 1, "pfn": 8000, "nr": 500}, "no frame"),
        ("lock", {"pfn": 99999}, "no frame"),
    ],
)
def test_what_nobody_could_ask_for_is_refused(ops, name, arguments, why):
    with pytest.raises(InputError, match=why):
        ops[name](**arguments)


def test_frames_past_the_table_are_answered_as_the_hardware_does(ops):
    assert ops["rmpupdate"](9000, asid=1)["status"] == "FAIL_INPUT"
    assert ops["rmpread"](9000)["status"] == "FAIL_INPUT"
    assert ops["rmpread"](8191, nr=2)["answers"] == ["OK", "FAIL_INPUT"]
    assert ops["psmash"](9000)["status"] == "FAIL_INPUT"
    assert ops["pvalidate"](9000, 1, 1)["status"] == "NPF_RMP"
    assert ops["host_access"](9000, write=True)["status"] == "OK"
    for name in ("snp_gctx_create", "snp_launch_start", "snp_launch_finish", "snp_decommission"):
        assert ops[name](9000)["status"] != "SUCCESS"
    for name in ("snp_page_reclaim", "snp_page_unsmash", "snp_page_set_state"):
        assert ops[name](9000)["done"] == 0, name


def test_what_the_hypervisor_sees_of_a_fault(ops):
    """EXITINFO1: 31 RMP, 34 ENC, 35 SIZEM, 36 VMPL."""
    ops["rmpupdate"](512, 512, asid=1, size="2m")
    assert ops["private_access"](512, 512, 2)["exitinfo1"] == hex(1 << 31 | 1 << 34)
    assert ops["private_access"](512, 512, 1)["exitinfo1"] == hex(1 << 31 | 1 << 34 | 1 << 35)
    assert ops["pvalidate"](512, 512, 1)["exitinfo1"] == hex(1 << 31 | 1 << 35)
    assert ops["pvalidate"](512, 512, 2)["exitinfo1"] == hex(1 << 31)
    assert ops["shared_access"](512, write=True)["exitinfo1"] == hex(1 << 31)
    assert "exitinfo1" not in ops["private_access"](512, 512, 1, size="2m")  # #VC in the guest: not validated
    assert "exitinfo1" not in ops["host_access"](512, write=True)  # the host's own page fault
    ops["pvalidate"](512, 512, 1, size="2m")
    assert ops["private_access"](512, 512, 1, size="2m", vmpl=1)["exitinfo1"] == hex(1 << 36)


def test_the_command_names_the_line_of_a_mistake(monkeypatch, capfd):
    script = '{"op": "rmpupdate", "pfn": 100, "gfn": 7, "asid": 1}\n{"op": "pvalidate", "pfn": 100}\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    assert cli.main(["hw", "snp", "-"]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out)["entries"][0]["state"] == "GUEST_INVALID"
    assert "standard input:2: pvalidate needs the argument 'gfn'" in err
