"""Intel TDX for cvmcore. `hw` is the TDX module, `ops` is KVM's side of it; listing backends imports neither."""

__version__ = "0.1.0"
