"""`cvm launch` on SEV, SEV-ES and SNP: digests beside those of sev-snp-measure, the RMP behind them, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sev_helpers import ALL_SECTIONS, firmware

from cvmcore import cli
from cvmcore.errors import InputError, UapiError
from cvmcore.measured import launch
from cvmcore.pages import run
from cvmcore_sev.errors import PageState

OVMF = Path("/usr/share/ovmf/OVMF.fd")
MODES = {"sev": "SEV", "sev-es": "SEV_ES", "snp": "SEV_SNP"}


@pytest.fixture
def image(tmp_path):
    """A small image that asks for everything."""
    path = tmp_path / "small.fd"
    path.write_bytes(firmware([*ALL_SECTIONS, (0x811000, 0x3000, 1)]))
    return path


def theirs(mode, path, *, vcpus=1, cpu="EPYC-Milan", vmm="qemu", kernel="", initrd="", append="", features=1):
    """What sev-snp-measure says."""
    pytest.importorskip("sevsnpmeasure", reason="sev-snp-measure is not installed")
    from sevsnpmeasure.guest import calc_launch_digest
    from sevsnpmeasure.sev_mode import SevMode
    from sevsnpmeasure.vcpu_types import CPU_SIGS
    from sevsnpmeasure.vmm_types import VMMType

    return calc_launch_digest(
        SevMode[MODES[mode]], vcpus, CPU_SIGS[cpu], str(path), str(kernel), str(initrd), append, features,
        vmm_type=VMMType["QEMU" if vmm == "qemu" else vmm],
    ).hex()  # fmt: skip


@pytest.mark.parametrize("kernel", [False, True], ids=["", "kernel"])
@pytest.mark.parametrize("vmm", ["qemu", "gce", "ec2"])
@pytest.mark.parametrize(("vcpus", "cpu"), [(1, "EPYC-Milan"), (2, "EPYC-Rome-v2"), (5, "EPYC-Genoa")])
@pytest.mark.parametrize("backend", MODES)
def test_digest_is_that_of_sev_snp_measure(backend, vcpus, cpu, vmm, kernel, image, tmp_path):
    given, files = {}, {}
    if kernel:
        for name, content in (("kernel", b"a kernel" * 999), ("initrd", b"a disk")):
            (tmp_path / name).write_bytes(content)
            files[name] = tmp_path / name
        given = {name: str(path) for name, path in files.items()} | {"append": "console=ttyS0 ümläut"}
        files["append"] = given["append"]
    done = launch(backend, image, {"vcpus": str(vcpus), "vcpu-type": cpu, "vmm-type": vmm, **given})
    assert done.digest == theirs(backend, image, vcpus=vcpus, cpu=cpu, vmm=vmm, **files)


@pytest.mark.parametrize("backend", MODES)
@pytest.mark.parametrize("vmm", ["qemu", "gce", "ec2"])
def test_digest_of_debians_ovmf(backend, vmm):
    if not OVMF.exists():
        pytest.skip("the package ovmf is not installed")
    done = launch(backend, OVMF, {"vcpus": "4", "vcpu-type": "EPYC-Milan-v2", "vmm-type": vmm})
    assert done.digest == theirs(backend, OVMF, vcpus=4, vmm=vmm)


def test_digest_with_other_guest_features(image):
    assert launch("snp", image, {"guest-features": "0x21"}).digest == theirs("snp", image, features=0x21)


def test_a_cpu_may_be_given_by_its_signature(image):
    assert launch("snp", image, {"vcpu-type": "0xA00F11"}).digest == launch("snp", image, {}).digest


def test_steps_of_an_snp_launch_and_what_is_left_in_the_rmp(image):
    done = launch("snp", image, {"vcpus": "2"})
    gpas = [(1 << 32) - at * 4096 for at in (4, 3, 2, 1)]
    gpas += [0x800000, 0x801000, 0x80D000, 0x80E000, 0x80F000, 0x810000, 0x811000, 0x812000, 0x813000]
    types = ["normal"] * 4 + ["zero", "zero", "secrets", "cpuid", "zero", "zero", "zero", "zero", "zero"]
    vmsa = ("vmsa", 0xFFFF_FFFF_F000)
    assert [(step.type, step.gpa) for step in done.steps] == [*zip(types, gpas, strict=True), vmsa, vmsa]
    assert len({step.digest for step in done.steps}) == len(done.steps)

    vm = done.vm.vm
    rmp = vm.host.hw.rmp
    states = np.concatenate([rmp.state(run(0, 1 << 14)), *(rmp.state(run(v.arch.vmsa_pfn, 1)) for v in vm.vcpus)])
    assert np.count_nonzero(states == PageState.GUEST_VALID) == len(done.steps)
    assert rmp.asid_pages[vm.key] == len(done.steps) and not np.count_nonzero(states == PageState.PRE_GUEST)
    assert vm.arch.finished and vm.arch.launch_digest.hex() == done.digest


def test_each_page_is_pre_guest_when_it_is_measured(image, monkeypatch):
    from cvmcore_sev.hw import Psp

    seen, original = [], Psp._launch

    def spied(psp, guest, frames, gfns, page_type):
        seen.extend(psp.rmp.state(frames).tolist())
        original(psp, guest, frames, gfns, page_type)

    monkeypatch.setattr(Psp, "_launch", spied)
    done = launch("snp", image, {})
    assert seen == [PageState.PRE_GUEST] * len(done.steps)


def test_steps_of_an_sev_es_launch(image, tmp_path):
    (tmp_path / "kernel").write_bytes(b"k")
    done = launch("sev-es", image, {"vcpus": "2", "kernel": str(tmp_path / "kernel")})
    gpas = [(1 << 32) - at * 4096 for at in (4, 3, 2, 1)]
    assert [(step.type, step.gpa) for step in done.steps] == [
        *(("data", gpa) for gpa in gpas), ("data", 0x80FC00), ("vmsa", None), ("vmsa", None),
    ]  # fmt: skip
    vm = done.vm.vm
    assert np.count_nonzero(vm.host.memory.key) == 4 + 1 + 2  # encrypted: the image, the hashes' page, the save areas


@pytest.mark.parametrize(
    ("backend", "given", "why"),
    [
        ("sev", {"guest-features": "1"}, "the launch of sev has no option 'guest-features'"),
        ("snp", {"order": "gpa"}, "the launch of snp has no option 'order'"),
        ("snp", {"vcpus": "0"}, "0 vCPUs"),
        ("snp", {"vcpus": "many"}, "'many' is not a whole number"),
        ("snp", {"vcpu-type": "Pentium"}, "vCPU type 'Pentium' is none of EPYC,"),
        ("snp", {"vmm-type": "xen"}, "'xen' is none of qemu, gce, ec2"),
        ("snp", {"guest-features": "0"}, "an SNP guest has bit 0"),
        ("snp", {"policy": "-1"}, "no number of 64 bits"),
        ("sev", {"policy": "0x100000000"}, "no number of 32 bits"),
        ("snp", {"initrd": __file__}, "--initrd goes with --kernel"),
        ("sev", {"append": "quiet"}, "--append goes with --kernel"),
        ("sev", {"kernel": "/nowhere/vmlinuz"}, "/nowhere/vmlinuz: cannot be read: No such file"),
    ],
)
def test_options_that_cannot_be(backend, given, why, image):
    with pytest.raises(InputError, match=why):
        launch(backend, image, given)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"guest-features": "3"}, "vmsa_features 0x2"),  # KVM does not know it
        ({"policy": "0x10000"}, "bit 17 must be one"),
        ({"policy": "0x20000"}, "POLICY_FAILURE"),  # the host has SMT on
    ],
)
def test_options_that_kvm_or_the_firmware_refuses(given, why, image):
    with pytest.raises(UapiError, match=why):
        launch("snp", image, given)


@pytest.mark.parametrize(
    ("content", "given", "why"),
    [
        (b"", {}, "whole pages"),
        (b"x" * 5000, {}, "whole pages"),
        (bytes(8192), {}, "no AP reset address"),  # no table at all
        (firmware([(0x1000, 0x1000, 9)]), {}, "unknown type 9"),
        (firmware(version=2), {}, "version 2"),
        (firmware(signature=b"ASEW"), {}, "b'ASEW'"),
        (firmware(ALL_SECTIONS[:4]), {"kernel": __file__}, "no section for its hashes"),
        (firmware([(0x800000, 0x2000, 1), (0x801000, 0x1000, 2)]), {}, "refused the page at 0x801000"),  # twice
    ],
)
def test_a_bad_image_is_one_sentence_and_exit_code_2(content, given, why, tmp_path, capfd):
    path = tmp_path / "bad.fd"
    path.write_bytes(content)
    options = [text for name, value in given.items() for text in (f"--{name}", value)]
    assert cli.main(["launch", str(path), "--backend", "snp", *options]) == 2
    out, err = capfd.readouterr()
    assert not out and why in err and err.count("\n") == 1


def test_steps_are_written_and_the_first_that_differs_is_named(image, tmp_path, capfd):
    steps, other = tmp_path / "steps.jsonl", tmp_path / "other.fd"
    base = ["launch", "--backend", "snp"]
    assert cli.main([*base, str(image), "--steps", str(steps)]) == 0
    capfd.readouterr()
    rows = [json.loads(line) for line in steps.read_text().splitlines()]
    assert rows[4]["type"] == "zero" and rows[4]["gpa"] == "0x800000" and len(rows[4]["digest"]) == 96

    assert cli.main([*base, str(image), "--against", str(steps), "--json"]) == 0
    done = json.loads(capfd.readouterr().out)
    assert done["first_difference"] is None and done["digest"] == rows[-1]["digest"] and done["steps"] == len(rows)
    assert done["measured"] == {"normal": 4, "zero": 7, "secrets": 1, "cpuid": 1, "vmsa": 1}

    content = bytearray(image.read_bytes())
    content[2 * 4096 + 7] ^= 1
    other.write_bytes(content)
    assert cli.main([*base, str(other), "--against", str(steps)]) == 1
    assert "step 3 differs: normal at 0xffffe000" in capfd.readouterr().out
    assert cli.main([*base, str(image), "--vcpus", "2", "--against", str(steps)]) == 1
    assert "step 15 is in this launch only: vmsa at 0xfffffffff000" in capfd.readouterr().out


def test_a_failed_launch_leaves_no_steps(tmp_path, image, capfd):
    steps = tmp_path / "steps.jsonl"
    assert cli.main(["launch", str(image), "--backend", "snp", "--policy", "0", "--steps", str(steps)]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.fd"]
    (tmp_path / "other.jsonl").write_text('{"type": "normal", "gpa": "0x0", "digest": "00"}\n{"type": 1}\n')
    code = cli.main(["launch", str(image), "--backend", "snp", "--against", str(tmp_path / "other.jsonl")])
    assert code == 2 and "other.jsonl:2: this is no step" in capfd.readouterr().err
