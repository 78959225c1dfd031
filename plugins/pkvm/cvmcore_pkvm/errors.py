"""Numbers of guest hypercalls, and what EL2 answers: kernel errnos to the host, SMCCC codes to a guest, FF-A codes to
the host's TrustZone driver."""

from __future__ import annotations

import enum


class Errno(enum.IntEnum):
    """The result of a host hypercall (include/uapi/asm-generic/errno*.h, negated)."""

    OK = 0
    EPERM = -1
    ENOENT = -2
    E2BIG = -7
    EAGAIN = -11
    ENOMEM = -12
    EFAULT = -14
    EBUSY = -16
    EINVAL = -22
    ERANGE = -34
    EOPNOTSUPP = -95  # what the host makes of SMCCC NOT_SUPPORTED (kvm_call_hyp_nvhe)
    EHWPOISON = -133


class Hvc(enum.IntEnum):
    """Numbers of the calls of a protected guest that EL2 serves (include/linux/arm-smccc.h, ARM_SMCCC_KVM_FUNC_*)."""

    HYP_MEMINFO = 0xC6000002
    MEM_SHARE = 0xC6000003
    MEM_UNSHARE = 0xC6000004


class Smccc(enum.IntEnum):
    """The result of a guest hypercall (include/linux/arm-smccc.h)."""

    SUCCESS = 0
    NOT_SUPPORTED = -1
    INVALID_PARAMETER = -3


class Ffa(enum.IntEnum):
    """The result of an FF-A call (include/linux/arm_ffa.h)."""

    SUCCESS = 0
    INVALID_PARAMETERS = -2
    DENIED = -6
