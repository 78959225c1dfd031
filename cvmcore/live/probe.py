"""What this machine's KVM has, and what is missing, by name."""

from __future__ import annotations

import errno
import fcntl
import os
import platform

import attrs

from cvmcore.live import layouts


@attrs.frozen
class Probe:
    """why: what is missing for a live front at all, "" where nothing is. values: by capability."""

    why: str = ""
    values: dict[str, int] = attrs.field(factory=dict)

    @property
    def missing(self) -> dict[str, str]:
        """Capabilities that are not there, with what is missing for it."""
        return {name: what for name, what in layouts.WITHOUT.items() if not self.values.get(name)}

    @property
    def vm_types(self) -> list[int]:
        """Numbers of the VM types that KVM_CREATE_VM takes."""
        return [number for number in range(32) if self.values.get("VM_TYPES", 1) >> number & 1]


def probe(device: str = "/dev/kvm") -> Probe:
    """Look at this machine; never raises."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return Probe(f"the live front drives Linux on x86_64, and this is {platform.system()} on {platform.machine()}")
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        what = "it is not there" if error.errno == errno.ENOENT else (error.strerror or str(error))
        return Probe(f"{device} cannot be used: {what}")
    try:
        version = fcntl.ioctl(fd, layouts.KVM_GET_API_VERSION, 0)
        if version != layouts.API_VERSION:
            return Probe(f"{device} has API version {version}, not {layouts.API_VERSION}")
        values = {
            name: fcntl.ioctl(fd, layouts.KVM_CHECK_EXTENSION, number)
            for name, number in layouts.CAPABILITIES.items()
        }  # fmt: skip
    except OSError as error:
        return Probe(f"{device} cannot be used: {error.strerror or error}")
    finally:
        os.close(fd)
    for name in layouts.NEEDED:
        if not values[name]:
            return Probe(f"this kernel has no KVM_CAP_{name} (6.8 and later have it)", values)
    return Probe("", values)
