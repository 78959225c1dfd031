"""pKVM (arm64) for cvmcore: protected and non-protected VMs under a hypervisor at EL2 that the host cannot overrule."""

__version__ = "0.1.0"
