"""KVM's UAPI as data: numbers and structures of <linux/kvm.h> for x86-64, little endian, in `struct`'s notation."""

from __future__ import annotations

API_VERSION = 12

# ---- ioctls ---------------------------------------------------------------------------------------------------

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_CREATE_VCPU = 0xAE41
KVM_GET_DIRTY_LOG = 0x4010AE42
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_USER_MEMORY_REGION2 = 0x40A0AE49
KVM_RUN = 0xAE80
KVM_GET_REGS = 0x8090AE81
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90
KVM_MEMORY_ENCRYPT_REG_REGION = 0x8010AEBB
KVM_MEMORY_ENCRYPT_UNREG_REGION = 0x8010AEBC
KVM_GET_STATS_FD = 0xAECE
KVM_SET_MEMORY_ATTRIBUTES = 0x4020AED2
KVM_CREATE_GUEST_MEMFD = 0xC040AED4
KVM_PRE_FAULT_MEMORY = 0xC040AED5

NAMES = {number: name for name, number in list(globals().items()) if name.startswith("KVM_")}
"""ioctls by number."""

# ---- structures -----------------------------------------------------------------------------------------------

REGION2 = "<IIQQQQII14Q"
"""slot, flags, guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset, guest_memfd, pad. The first 32 bytes
are those of KVM_SET_USER_MEMORY_REGION."""
REGION_BYTES = 32
GUEST_MEMFD = "<QQ6Q"
"""size, flags, reserved."""
ATTRIBUTES = "<QQQQ"
"""address, size, attributes, flags."""
PRE_FAULT = "<QQQ5Q"
"""gpa, size, flags, padding."""
DIRTY_LOG = "<IIQ"
"""slot, pad, address of the bitmap."""
ENC_REGION = "<QQ"
"""addr, size."""
REGS = "<18Q"
"""rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags."""
RAX, RCX, RSI, RDI, RSP, RIP, RFLAGS = 0, 2, 4, 5, 6, 16, 17
SREGS_BYTES = 312
SEGMENT = "<QIH8Bxx"
"""base, limit, selector, type, present, dpl, db, s, l, g, avl; unusable and padding behind."""
SEGMENTS = {"cs": 0, "ds": 24, "es": 48, "fs": 72, "gs": 96, "ss": 120, "tr": 144, "ldt": 168}
DESCRIPTOR_TABLES = {"gdt": 192, "idt": 208}
CONTROL = {"cr0": 224, "cr3": 240, "cr4": 248, "efer": 264}
CPUID_HEADER, CPUID_ENTRY_BYTES, CPUID_ENTRIES = "<II", 40, 256

RUN_IMMEDIATE_EXIT, RUN_EXIT_REASON, RUN_UNION = 1, 8, 32
MMIO = "<Q8sIB"
"""phys_addr, data, len, is_write; at RUN_UNION."""
MEMORY_FAULT = "<QQQ"
"""flags, gpa, size; at RUN_UNION."""
INTERNAL = "<II"
"""suberror, ndata; at RUN_UNION."""
EXITS = {
    0: "UNKNOWN", 1: "EXCEPTION", 2: "IO", 3: "HYPERCALL", 5: "HLT", 6: "MMIO", 8: "SHUTDOWN", 9: "FAIL_ENTRY",
    10: "INTR", 17: "INTERNAL_ERROR", 24: "SYSTEM_EVENT", 39: "MEMORY_FAULT",
}  # fmt: skip

STATS_HEADER = "<6I"
"""flags, name_size, num_desc, id_offset, desc_offset, data_offset."""
STATS_DESC = "<IhHII"
"""flags, exponent, size (values), offset, bucket_size; the name behind."""

# ---- capabilities ---------------------------------------------------------------------------------------------

CAPABILITIES = {
    "NR_MEMSLOTS": 10, "READONLY_MEM": 81, "MAX_VCPU_ID": 128, "IMMEDIATE_EXIT": 136, "BINARY_STATS_FD": 203,
    "USER_MEMORY2": 231, "MEMORY_FAULT_INFO": 232, "MEMORY_ATTRIBUTES": 233, "GUEST_MEMFD": 234, "VM_TYPES": 235,
    "PRE_FAULT_MEMORY": 236, "GUEST_MEMFD_FLAGS": 244,
}  # fmt: skip
NEEDED = ("USER_MEMORY2", "GUEST_MEMFD")
"""Without these there is nothing to compare."""
WITHOUT = {
    "GUEST_MEMFD_FLAGS": "guest_memfd cannot be mapped, and serves no ordinary guest",
    "MEMORY_ATTRIBUTES": "no private memory: no attributes, no conversions",
    "PRE_FAULT_MEMORY": "no KVM_PRE_FAULT_MEMORY (shadow paging, or an older kernel)",
    "MEMORY_FAULT_INFO": "exits without KVM_EXIT_MEMORY_FAULT",
    "BINARY_STATS_FD": "no statistics",
    "READONLY_MEM": "no read-only memslots",
    "IMMEDIATE_EXIT": "the guest cannot be run: its instructions could not be finished",
}
"""What is missing with each of the others."""
SYS_CACHESTAT = 451
