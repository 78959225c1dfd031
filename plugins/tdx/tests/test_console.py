"""`cvm hw tdx`: the module's leaves by name, with what they answer and the state they leave."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from cvmcore.cli import main
from cvmcore.errors import InputError
from cvmcore_tdx.console import machine
from cvmcore_tdx.hw import MEM_LEAVES, TdxModule

TDR, TDVPR = 100, 110


@pytest.fixture
def ops() -> Any:
    return machine()


def build(ops: Any) -> None:
    """A TD with a vCPU and tables down to 4K, by leaves alone."""
    told = [
        ops["tdh_mng_create"](TDR, 65), ops["tdh_mng_key_config"](TDR), ops["tdh_mng_addcx"](TDR, 101, 6),
        ops["tdh_mng_init"](TDR), ops["tdh_vp_create"](TDR, TDVPR), ops["tdh_vp_addcx"](TDVPR, 111, 5),
        ops["tdh_vp_init"](TDVPR),
        *(ops["tdh_mem_sept_add"](TDR, level, 0, 120 + level) for level in (3, 2, 1)),
    ]  # fmt: skip
    assert {answer["status"] for answer in told} == {"TDX_SUCCESS"}


def test_every_leaf_has_its_name(ops: Any) -> None:
    """All leaves of the module that can be called, and nothing is untyped."""
    leaves = {name for name in dir(TdxModule) if name.startswith(("tdh_", "tdg_"))} - {"tdh_sys_tdmr_init"}
    assert leaves <= set(ops)
    assert {leaf.name.lower().replace(".", "_") for leaf in MEM_LEAVES} <= set(ops)
    for name, fn in ops.items():
        for parameter in inspect.signature(fn, eval_str=True).parameters.values():
            assert parameter.annotation in (int, bool, str), (name, parameter)
        assert fn.__doc__, name


def test_life_of_a_page(ops: Any) -> None:
    build(ops)
    ops["host_write"](200, "image")
    assert ops["tdh_mem_page_add"](TDR, 5, 300, 200)["state"] == [
        {"gfn": 5, "level": 0, "state": "MAPPED", "pfn": 300}
    ]
    assert ops["tdh_mr_extend"](TDR, 0x5000, 16)["done"] == 16
    assert len(ops["tdh_mr_finalize"](TDR)["mrtd"]) == 96
    assert ops["guest_read"](TDR, 5)["text"] == "image"

    assert ops["tdh_mem_page_aug"](TDR, 0, 6, 301)["state"][0]["state"] == "PENDING"
    assert ops["guest_write"](TDR, 6, "x")["status"] == "UNACCEPTED"
    assert ops["tdg_mem_page_accept"](TDR, 0, 6)["outcome"] == "ACCEPTED"
    again = ops["tdg_mem_page_accept"](TDR, 0, 6)
    assert (again["status"], again["code"], again["level"]) == ("TDX_PAGE_ALREADY_ACCEPTED", "0x00000b0a00000000", 0)
    smaller = ops["tdg_mem_page_accept"](TDR, 1, 0)
    assert (smaller["status"], smaller["level"], "operand" in smaller) == ("TDX_PAGE_SIZE_MISMATCH", 1, False)
    assert ops["tdg_mem_page_accept"](TDR, 0, 7) == {
        "status": "TD_EXIT", "code": None, "qualification": "0x0", "outcome": "EPT_VIOLATION",
        "state": [{"gfn": 7, "level": 0, "state": "FREE"}],
    }  # fmt: skip
    assert ops["guest_write"](TDR, 6, "secret")["text"] == "secret"
    assert ops["host_read"](301)["status"] == "ZEROS"

    refused = ops["tdh_mem_page_remove"](TDR, 0, 6)
    assert refused == {
        "status": "TDX_GPA_RANGE_NOT_BLOCKED", "code": "0xc0000b0600000000", "operand": "RCX", "done": 0, "rcx": 301,
        "rdx": {"level": 0, "state": 4}, "state": [{"gfn": 6, "level": 0, "state": "MAPPED", "pfn": 301}],
    }  # fmt: skip
    assert ops["tdh_vp_enter"](TDVPR)["status"] == "TDX_SUCCESS"
    ops["tdh_mem_range_block"](TDR, 0, 6)
    assert ops["tdh_mem_page_remove"](TDR, 0, 6)["status"] == "TDX_TLB_TRACKING_NOT_DONE"
    assert ops["tdh_mem_track"](TDR)["epoch"] == 2
    assert ops["tdh_mem_page_remove"](TDR, 0, 6)["status"] == "TDX_TLB_TRACKING_NOT_DONE"
    ops["td_exit"](TDVPR)
    removed = ops["tdh_mem_page_remove"](TDR, 0, 6)
    assert (removed["status"], removed["rcx"]) == ("TDX_SUCCESS", [301])
    assert ops["pamt"](301)["state"] == [{"pfn": 301, "type": "PT_NDA"}]
    assert ops["tdh_mem_sept_rd"](TDR, 0, 5)["rdx"] == {"level": 0, "state": 4}


def test_what_cannot_be_asked(ops: Any) -> None:
    for call in (
        lambda: ops["td_exit"](5), lambda: ops["guest_read"](5, 0), lambda: ops["tdh_mem_range_block"](TDR, 9, 0),
        lambda: ops["host_read"](1 << 20), lambda: ops["tdh_mr_extend"](TDR, -1),
    ):  # fmt: skip
        with pytest.raises(InputError):
            call()
    assert ops["tdh_mem_range_block"](TDR, 0, 0)["operand"] == "RDX"


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.jsonl"
    line = '{"op": "tdh_mng_create", "tdr": 100, "hkid": %d}\n'
    script.write_text(line % 65 + line % 66)
    assert main(["hw", "tdx", str(script)]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["status"] for answer in told] == ["TDX_SUCCESS", "TDX_PAGE_METADATA_INCORRECT"]
    assert told[1]["operand"] == "RCX"

    script.write_text('{"op": "tdh_mng_create", "tdr": "one", "hkid": 65}\n')
    assert main(["hw", "tdx", str(script)]) == 2
    assert "script.jsonl:1" in capsys.readouterr().err
