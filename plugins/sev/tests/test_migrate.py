"""Intra-host migration and mirrors through the UAPI: KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, _COPY_ENC_CONTEXT_FROM."""

from __future__ import annotations

import errno
from collections.abc import Callable

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


def machine(pinning: str, name: str = "sev") -> Machine:
    backend = load_backend(name)
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


@pytest.mark.parametrize("name", ["sev", "sev-es"])
@pytest.mark.parametrize("pinning", ["upfront", "demand"])
def test_the_target_reads_what_the_source_wrote(pinning: str, name: str) -> None:
    source = machine(pinning, name)
    want = source.guest.read(run(0, PAGES))
    target = target_of(source)
    vcpu = target.create_vcpu()

    target.move_enc_context_from(source.vm)
    touch = Touch(run(0, PAGES), write=False, private=True)
    assert vcpu.run(touch) is None

    assert np.array_equal(touch.seen, want)
    source.destroy()
    assert source.leftovers() == []


def test_save_areas_move_along_and_leave_the_source_without_any() -> None:
    source = machine("demand", "sev-es")
    area = source.vcpus[0].vcpu.arch
    target = target_of(source)
    vcpu = target.create_vcpu()
    target.move_enc_context_from(source.vm)
    assert vcpu.vcpu.arch is area
    with pytest.raises(UapiError, match="save area") as caught:
        source.vcpus[0].run(Touch(run(0, 1), write=False))
    assert caught.value.errno == errno.EINVAL
    other = target_of(source)
    other.create_vcpu()
    again = target_of(source)
    again.create_vcpu()
    other.memory_encrypt_op("KVM_SEV_LAUNCH_START", {"policy": 4})
    with pytest.raises(UapiError, match="save area"):  # no LAUNCH_UPDATE_VMSA yet
        again.move_enc_context_from(other)
    for vm in (other, again):
        vm.close()
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


# ---- mirrors --------------------------------------------------------------------------------------------------------


def refused(call: Callable[[], object]) -> int:
    with pytest.raises(UapiError) as caught:
        call()
    return caught.value.errno


@pytest.mark.parametrize("pinning", ["upfront", "demand"])
def test_a_mirror_reads_what_its_owner_wrote_and_outlives_its_descriptor(pinning: str) -> None:
    source = machine(pinning)
    want = source.guest.read(run(0, PAGES))
    mirror = target_of(source)
    mirror.copy_enc_context_from(source.vm)
    vcpu = mirror.create_vcpu()

    touch = Touch(run(0, PAGES), write=False, private=True)
    assert vcpu.run(touch) is None
    assert np.array_equal(touch.seen, want)
    source.vm.close()
    assert source.vm.vm in source.host.vms  # kvm_get_kvm of the owner
    mirror.close()
    source.destroy()
    assert source.host.vms == [] and source.leftovers() == []


def test_what_a_mirror_may_not() -> None:
    """sev.md 1.2: REG_REGION and UNREG_REGION of a mirror -EINVAL; commands outside its allow-list -EINVAL."""
    source = machine("upfront")
    mirror = target_of(source)
    mirror.copy_enc_context_from(source.vm)
    hva = source.regions[0].hva

    assert refused(lambda: mirror.register_region(hva, 4096)) == errno.EINVAL
    assert refused(lambda: mirror.unregister_region(hva, 4096)) == errno.EINVAL
    assert refused(lambda: mirror.memory_encrypt_op("KVM_SEV_LAUNCH_MEASURE")) == errno.EINVAL
    assert refused(lambda: mirror.memory_encrypt_op("no such command")) == errno.EINVAL
    assert refused(mirror.launch_finish) == errno.EINVAL
    assert "handle" in mirror.memory_encrypt_op("KVM_SEV_GUEST_STATUS")


def test_who_cannot_be_a_mirror_or_be_mirrored() -> None:
    """No mirror of a mirror or of itself, none with vCPUs, none that has begun a launch, none of another type."""
    source = machine("demand")
    mirror = target_of(source)
    mirror.copy_enc_context_from(source.vm)
    busy, begun, other, third = target_of(source), target_of(source), target_of(source, "sev-es"), target_of(source)
    busy.create_vcpu()
    begun.memory_encrypt_op("KVM_SEV_INIT2")

    for target, owner in (
        (source.vm, source.vm), (third, mirror), (busy, source.vm), (begun, source.vm), (other, source.vm),
        (mirror, source.vm),
    ):  # fmt: skip
        assert refused(lambda target=target, owner=owner: target.copy_enc_context_from(owner)) == errno.EINVAL
    assert refused(lambda: third.move_enc_context_from(source.vm)) == errno.EINVAL  # it has a mirror
