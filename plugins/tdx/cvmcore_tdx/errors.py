"""What the TDX module answers: completion statuses and operand ids, under their ABI names and numbers.

A status is a 64-bit number: the code in bits 63:32 (63 error, 62 not recoverable, 61 fatal), and in bits 31:0 which
operand it is about. Compare codes, not whole statuses: `code(status) == Status.TDX_OPERAND_BUSY`.

Source: TDX module 1.5 ABI, 'Interface Function Completion Status'.
"""

from __future__ import annotations

import enum


def _code(high: int) -> int:
    return high << 32


class Status(enum.IntEnum):
    """Completion statuses, operand bits zero."""

    TDX_SUCCESS = _code(0x0000_0000)
    TDX_INTERRUPTED_RESUMABLE = _code(0x8000_0003)
    TDX_INTERRUPTED_RESTARTABLE = _code(0x8000_0004)
    TDX_OPERAND_INVALID = _code(0xC000_0100)
    TDX_OPERAND_ADDR_RANGE_ERROR = _code(0xC000_0101)
    TDX_OPERAND_BUSY = _code(0x8000_0200)
    TDX_PREVIOUS_TLB_EPOCH_BUSY = _code(0x8000_0201)
    TDX_SYS_BUSY = _code(0x8000_0202)
    TDX_RND_NO_ENTROPY = _code(0x8000_0203)
    TDX_OPERAND_BUSY_HOST_PRIORITY = _code(0x8000_0204)
    TDX_HOST_PRIORITY_BUSY_TIMEOUT = _code(0x9000_0205)
    TDX_PAGE_METADATA_INCORRECT = _code(0xC000_0300)
    TDX_TD_ASSOCIATED_PAGES_EXIST = _code(0xC000_0400)
    TDX_TD_FATAL = _code(0xE000_0604)
    TDX_TD_NON_DEBUG = _code(0xC000_0605)
    TDX_TDCS_NOT_ALLOCATED = _code(0xC000_0606)
    TDX_LIFECYCLE_STATE_INCORRECT = _code(0xC000_0607)
    TDX_OP_STATE_INCORRECT = _code(0xC000_0608)
    TDX_NO_VCPUS = _code(0xC000_0609)
    TDX_TDCX_NUM_INCORRECT = _code(0xC000_0610)
    TDX_VCPU_STATE_INCORRECT = _code(0xC000_0700)
    TDX_VCPU_NOT_ASSOCIATED = _code(0x8000_0702)
    TDX_TD_KEYS_NOT_CONFIGURED = _code(0x8000_0810)
    TDX_KEY_CONFIGURED = _code(0x0000_0815)
    TDX_WBCACHE_NOT_COMPLETE = _code(0x8000_0817)
    TDX_HKID_NOT_FREE = _code(0xC000_0820)
    TDX_NO_HKID_READY_TO_WBCACHE = _code(0x0000_0821)
    TDX_FLUSHVP_NOT_DONE = _code(0x8000_0824)
    TDX_EPT_WALK_FAILED = _code(0xC000_0B00)
    TDX_EPT_ENTRY_FREE = _code(0xC000_0B01)
    TDX_EPT_ENTRY_NOT_FREE = _code(0xC000_0B02)
    TDX_EPT_ENTRY_NOT_PRESENT = _code(0xC000_0B03)
    TDX_GPA_RANGE_NOT_BLOCKED = _code(0xC000_0B06)
    TDX_GPA_RANGE_ALREADY_BLOCKED = _code(0x0000_0B07)
    TDX_TLB_TRACKING_NOT_DONE = _code(0xC000_0B08)
    TDX_EPT_INVALID_PROMOTE_CONDITIONS = _code(0xC000_0B09)
    TDX_PAGE_ALREADY_ACCEPTED = _code(0x0000_0B0A)
    TDX_PAGE_SIZE_MISMATCH = _code(0xC000_0B0B)
    TDX_GPA_RANGE_BLOCKED = _code(0xC000_0B0C)
    TDX_EPT_ENTRY_STATE_INCORRECT = _code(0xC000_0B0D)
    TDX_EPT_PAGE_NOT_FREE = _code(0xC000_0B0E)


class Operand(enum.IntEnum):
    """Operand ids: which operand, or which lock, a status is about."""

    RAX = 0
    RCX = 1
    RDX = 2
    R8 = 8
    R9 = 9
    TDR = 128
    SEPT_TREE = 146
    TD_EPOCH = 169
    OP_STATE = 172
    KOT = 186
    WBCACHE = 188


_OPERAND_BITS = 0xFFFF_FFFF
LEVEL_STATUSES = (Status.TDX_PAGE_ALREADY_ACCEPTED, Status.TDX_PAGE_SIZE_MISMATCH)
"""Their low bits hold the level that was found."""


def code(status: int) -> int:
    """The status without its operand; equals a member of `Status`."""
    return status & ~_OPERAND_BITS


def operand(status: int) -> int:
    """The low 32 bits of a status."""
    return status & _OPERAND_BITS


def is_busy(status: int) -> bool:
    """Whether somebody else holds a lock; calling again may succeed (kernel: tdx_operand_busy)."""
    return code(status) == Status.TDX_OPERAND_BUSY


def describe(status: int) -> str:
    """A status as people write it: TDX_OPERAND_BUSY|SEPT_TREE."""
    try:
        name = Status(code(status)).name
    except ValueError:
        return f"{status:#018x}"
    low = operand(status)
    if not low:
        return name
    if code(status) in LEVEL_STATUSES:
        return f"{name}|level {low}"
    return f"{name}|{Operand(low).name if low in Operand._value2member_map_ else low}"
