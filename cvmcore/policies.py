"""Choices of the core itself, for studies that compare its designs: `-p NAME=VALUE`, or `Host(policies=...)`.

The default of each is what the kernel does. A backend does not see them.
"""

from __future__ import annotations

from cvmcore.backend import Option

POLICIES: tuple[Option, ...] = (
    Option("mmu_lock", "rw", "what guards a VM's tables: one rwlock, or one for each GiB of gfns", ("rw", "sharded")),
    Option(
        "invalidation", "decoupled", "how a vendor learns that private pages go back, and why gfns are zapped",
        ("decoupled", "flags3", "flags2", "attributes", "untold"),
    ),
    Option(
        "walker", "mirror", "what a private fault walks where there is a mirror: that, or the trusted table itself",
        ("mirror", "external"),
    ),
    Option(
        "merge", "none",
        "when small private pages become large again: never; when a thread finds a full table; in faults; when a table "
        "is used that a thread has blocked",
        ("none", "scan", "fault", "block"),
    ),
)  # fmt: skip
