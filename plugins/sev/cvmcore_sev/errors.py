"""What the hardware answers: codes of the RMP instructions and statuses of the firmware, by their specs' numbers."""

from __future__ import annotations

import enum
from typing import Final


class RmpStatus(enum.IntEnum):
    """Result of an RMP instruction or access check (APM vol. 2 15.36, vol. 3).

    Below 0x80: what the instruction returns in EAX; NO_CHANGE is Linux' number for PVALIDATE's carry flag.
    From 0x80 on: the fault that it raises instead.
    """

    OK = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4
    FAIL_BADADDR = 4  # PSMASH's name for 4
    FAIL_SIZEMISMATCH = 6
    NPF_RMP = 0x80  # nested page fault with the RMP bit, to the hypervisor
    NPF_SIZEM = 0x81  # the same with the SIZEM bit: page sizes of NPT or operand and RMP differ
    NPF_VMPL = 0x82  # the same with the VMPL bit: permissions
    VC = 0x83  # #VC 0x404 in the guest: page not validated
    HOST_PF = 0x84  # host page fault with error bit 31
    VMEXIT_INVALID = 0x85  # VMRUN refuses the VMSA
    NOT_REACHED = 0x86  # no answer: the guest stopped at an earlier page (`Rmp.pvalidate`, stop_at)
    NO_CHANGE = 255


NPF_BIT_RMP, NPF_BIT_ENC, NPF_BIT_SIZEM, NPF_BIT_VMPL = (1 << bit for bit in (31, 34, 35, 36))
"""Bits that the RMP's checks set in EXITINFO1 of a nested page fault (APM vol. 2 15.36.10)."""
NPF_BITS: Final = {
    RmpStatus.NPF_RMP: NPF_BIT_RMP,
    RmpStatus.NPF_SIZEM: NPF_BIT_RMP | NPF_BIT_SIZEM,
    RmpStatus.NPF_VMPL: NPF_BIT_VMPL,
}


def exit_info_1(status: RmpStatus, encrypted: bool = False) -> int:
    """Those bits for a status; 0 where it is no nested page fault. encrypted: a guest's access with C=1."""
    bits = NPF_BITS.get(status, 0)
    return bits | NPF_BIT_ENC if encrypted and bits & NPF_BIT_RMP else bits


class SevStatus(enum.IntEnum):
    """Status of a firmware command (SEV API, SEV-SNP firmware ABI)."""

    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    INVALID_LENGTH = 0x04
    ALREADY_OWNED = 0x05
    INVALID_CERTIFICATE = 0x06
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    BAD_SIGNATURE = 0x0A
    BAD_MEASUREMENT = 0x0B
    ASID_OWNED = 0x0C
    INVALID_ASID = 0x0D
    WBINVD_REQUIRED = 0x0E
    DFFLUSH_REQUIRED = 0x0F
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    ACTIVE = 0x12
    HWERROR_PLATFORM = 0x13
    HWERROR_UNSAFE = 0x14
    UNSUPPORTED = 0x15
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    SECURE_DATA_INVALID = 0x18
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_MDATA_ENTRY = 0x1B
    INVALID_PAGE_OWNER = 0x1C
    AEAD_OFLOW = 0x1D


class PageState(enum.IntEnum):
    """State of a page in the RMP (SEV-SNP firmware ABI, page states)."""

    HYPERVISOR = 0
    HV_FIXED = 1
    FIRMWARE = 2
    CONTEXT = 3
    METADATA = 4
    RECLAIM = 5
    PRE_GUEST = 6
    GUEST_INVALID = 7
    GUEST_VALID = 8
    PRE_SWAP = 9
    DEFAULT = 10  # past the RMP's coverage: the hypervisor's for ever


class SevGuestState(enum.IntEnum):
    """GSTATE of an SEV or SEV-ES guest."""

    INVALID = 0
    LUPDATE = 1
    LSECRET = 2
    RUNNING = 3
    SUPDATE = 4
    RUPDATE = 5
    SENT = 6


class SnpGuestState(enum.IntEnum):
    """GCTX.State of an SNP guest."""

    INIT = 0
    LAUNCH = 1
    RUNNING = 2


class PageType(enum.IntEnum):
    """PAGE_TYPE of SNP_LAUNCH_UPDATE."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


class AsidState(enum.IntEnum):
    """How the firmware keeps an ASID: allocated to a guest that does not run yet, in use, or to be flushed."""

    CLEAN = 0
    ALLOCATED = 1
    IN_USE = 2
    DIRTY = 3
