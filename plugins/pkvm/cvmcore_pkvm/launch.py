"""How a VM is launched under pKVM: there is no measured launch by the host, so there is nothing to digest here.

Upstream, the VMM writes the image into its own memory before the first KVM_RUN, and that is all: pages stay the
host's until the guest touches them, and are then donated as they are (`load`). What a protected guest runs first is
therefore the host's choice, and the guest has to find out.

Android closes that gap with pvmfw, a firmware in a carve-out of memory that EL2 copies into the guest's address space
when the page there is donated; it starts first, checks the payload by itself and derives secrets from it (DICE).
Upstream has no pvmfw and no attestation, and neither is modelled: `load` is plain writes for every VM type here.
"""

from __future__ import annotations

import numpy as np

from cvmcore.memory import Memory
from cvmcore.pages import Sel

KINDS = frozenset({"normal", "zero"})
"""Kinds of launch pages that mean anything here: no page is measured, so none can be unmeasured, or a secret."""


def load(memory: Memory, pfns: Sel, contents: list[bytes]) -> None:
    """The VMM writes an image into frames that are still the host's: contents[i], at most 4096 bytes, into frame i."""
    memory.write(pfns, np.array([memory.intern(content) for content in contents], np.uint32), 0)
