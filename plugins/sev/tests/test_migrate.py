"""Intra-host migration through the UAPI: KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from cvmcore.errors import UapiError
from cvmcore.guest import Machine
from cvmcore.host import Host
from cvmcore.pages import run
from cvmcore.plugins import load_backend
from cvmcore.runner import load_profile_for
from cvmcore.sched import Lockdep
from cvmcore.types import PAGE_SHIFT
from cvmcore.uapi import VmFd
from cvmcore.vcpu import Touch

PAGES = 64


def machine(pinning: str) -> Machine:
    backend = load_backend("sev")
    host = Host(
        backend, load_profile_for(backend, None), nr_frames=1 << 12, options={"pinning": pinning}, drive=Lockdep()
    )
    made = Machine(host, PAGES << PAGE_SHIFT)
    made.launch()
    made.guest.write(run(0, PAGES))
    return made


def target_of(source: Machine, vm_type: str | None = None) -> VmFd:
    """A second VM over the same memory of the same process."""
    vm = source.process.create_vm(vm_type)
    vm.set_user_memory_region2(0, 0, 0, PAGES << PAGE_SHIFT, source.regions[0].hva)
    return vm


@pytest.mark.parametrize("pinning", ["upfront", "demand"])
def test_the_target_reads_what_the_source_wrote(pinning: str) -> None:
    source = machine(pinning)
    want = source.guest.read(run(0, PAGES))
    target = target_of(source)
    vcpu = target.create_vcpu()

    target.move_enc_context_from(source.vm)
    touch = Touch(run(0, PAGES), write=False, private=True)
    assert vcpu.run(touch) is None

    assert np.array_equal(touch.seen, want)
    source.destroy()
    assert source.leftovers() == []


def test_nothing_moves_to_itself_or_twice() -> None:
    source = machine("demand")
    target = target_of(source)
    other = target_of(source)
    with pytest.raises(UapiError) as caught:
        source.vm.move_enc_context_from(source.vm)
    assert caught.value.errno == errno.EINVAL
    target.move_enc_context_from(source.vm)
    with pytest.raises(UapiError) as caught:
        other.move_enc_context_from(source.vm)
    assert caught.value.errno == errno.EINVAL


def test_a_vm_type_without_a_context() -> None:
    backend = load_backend("swprot")
    host = Host(backend, load_profile_for(backend, None), nr_frames=1 << 10)
    a, b = Machine(host, 1 << 14), Machine(host, 1 << 14)
    with pytest.raises(UapiError) as caught:
        a.vm.move_enc_context_from(b.vm)
    assert caught.value.errno == errno.EINVAL
