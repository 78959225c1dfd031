"""cvmcore: an executable model of how KVM manages the memory of confidential VMs."""

__version__ = "0.1.0"
