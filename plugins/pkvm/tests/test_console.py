"""`cvm hw pkvm`: the hypervisor's operations by name, with what they answer and the state they leave."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from cvmcore.errors import InputError
from cvmcore_pkvm.console import machine
from cvmcore_pkvm.hw import TRANSITIONS

NAMES = (
    "host_share_hyp", "host_unshare_hyp", "hyp_pin", "hyp_unpin", "host_donate_hyp", "hyp_donate_host",
    "host_share_ffa", "host_unshare_ffa", "host_share_guest", "host_unshare_guest", "host_donate_guest",
    "guest_share_host", "guest_unshare_host", "host_reclaim_guest", "host_force_reclaim", "relax_perms", "wrprotect",
    "test_clear_young", "mkyoung",
)  # fmt: skip
"""Section 3 of the pkvm facts, in order."""


@pytest.fixture
def ops() -> Any:
    return machine()


def test_every_transition_has_its_name(ops: Any) -> None:
    assert set(NAMES) <= set(ops)
    assert {name for name in TRANSITIONS if "," not in name} <= set(ops)


def test_operations_are_typed_and_told(ops: Any) -> None:
    """The signature is the schema: every argument has a type, every operation a sentence."""
    for name, fn in ops.items():
        for parameter in inspect.signature(fn, eval_str=True).parameters.values():
            assert parameter.annotation in (int, bool, str, list[int], list[list[int]]), (name, parameter)
        assert fn.__doc__, name


def test_life_of_a_page(ops: Any) -> None:
    """Donated, shared, taken back, reclaimed: the states of the sheet's sequence check."""
    vm = ops["make_vm"]()
    handle, cpu = vm["handle"], vm["cpus"][0]
    assert ops["host_write"](100, "image")["status"] == "OK"

    told = ops["host_donate_guest"](cpu, 100, 7)
    assert (told["status"], told["code"], told["done"]) == ("OK", 0, 1)
    owner = f"GUEST {handle:#x} gfn 7"
    private = {"gfn": 7, "guest": "OWNED", "pfn": 100, "host": "NOPAGE", "hyp": "NOPAGE", "owner": owner}
    assert told["state"] == [private]
    assert ops["handle_host_mem_abort"](100)["status"] == "EPERM"
    assert ops["content"](100)["text"] == "image"

    shared = {"gfn": 7, "guest": "SHARED_OWNED", "pfn": 100, "host": "SHARED_BORROWED", "hyp": "NOPAGE"}
    assert ops["mem_share"](cpu, 7)["state"] == [shared]
    assert ops["mem_share"](cpu, 7) | {"state": []} == {
        "status": "INVALID_PARAMETER", "code": -3, "done": 0, "calls": 1, "abort": False, "state": [],
    }  # fmt: skip
    assert ops["mem_share"](cpu, 8)["abort"]
    assert ops["guest_unshare_host"](cpu, 7)["work"] == {"tlbi_host": 1, "pte": 2}

    assert ops["host_reclaim_guest"](handle, 7)["status"] == "EINVAL"
    ops["vcpu_put"](cpu)
    assert ops["start_teardown_vm"](handle)["status"] == "OK"
    assert ops["host_reclaim_guest"](handle, 7)["state"] == [{"gfn": 7, "guest": "NOPAGE"}]
    assert ops["content"](100)["text"] == ""
    assert ops["finalize_teardown_vm"](handle)["back"][0] > 0
    assert ops["state"](100)["state"] == [{"pfn": 100, "host": "OWNED", "hyp": "NOPAGE"}]


def test_poison(ops: Any) -> None:
    cpu = ops["make_vm"]()["cpus"][0]
    ops["host_donate_guest"](cpu, 100, 7)

    assert ops["host_force_reclaim"](100)["state"] == [{"pfn": 100, "host": "OWNED", "hyp": "NOPAGE"}]
    assert ops["guest_access"](cpu, 7)["state"] == [{"gfn": 7, "guest": "POISON"}]
    assert ops["vcpu_in_poison_fault"](cpu, 7)["poison"]
    assert ops["host_donate_guest"](cpu, 100, 7)["status"] == "EPERM"


def test_np_and_ffa(ops: Any) -> None:
    vm = ops["make_vm"](protected=False)
    handle, cpu = vm["handle"], vm["cpus"][0]

    told = ops["host_share_guest"](cpu, 512, 512, 512, "rw")["state"][0]
    assert (told["pages"], told["prot"], told["share_count"]) == (512, "rw", 1)
    assert ops["host_unshare_guest"](handle, 512)["status"] == "E2BIG"
    assert ops["wrprotect"](handle, 512, 512)["state"][0]["prot"] == "r"
    assert ops["relax_perms"](cpu, 600, "x")["state"][0]["prot"] == "rx"
    assert ops["test_clear_young"](handle, 512, 512, True)["young"]
    assert ops["mkyoung"](cpu, 700)["state"][0]["young"]
    assert ops["ffa_mem_share"]([[2000, 2], [512, 1]])["status"] == "DENIED"
    assert ops["ffa_mem_share"]([[2000, 2]])["status"] == "SUCCESS"
    assert ops["ffa_mem_reclaim"]([[2000, 2]])["status"] == "SUCCESS"


@pytest.mark.parametrize(("name", "arguments"), [
    ("host_share_hyp", [-1]), ("host_share_hyp", [5, 0]), ("hyp_unpin", [5]), ("ffa_mem_reclaim", [[[5, 1]]]),
    ("ffa_mem_share", [[[5]]]), ("guest_state", [1, 0]), ("topup", [1, 0, 5]), ("guest_access", [3, 0]),
    ("mem_share", [0, 5, 1, 513]), ("relax_perms", [0, 5, "rq"]), ("make_vm", [True, 99]), ("content", [1 << 20]),
    ("init_vm", [0x1000, True, 1, 1, -1, 3]), ("hyp_pin", [5, 0]),
])  # fmt: skip
def test_misuse_is_bad_input(ops: Any, name: str, arguments: list[Any]) -> None:
    ops["make_vm"]()

    with pytest.raises(InputError, match=name):
        ops[name](*arguments)
