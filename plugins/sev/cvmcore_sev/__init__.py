"""AMD SEV, SEV-ES and SEV-SNP for cvmcore.

`ops` is KVM's vendor code (untrusted), `hw` the RMP and the secure processor (trusted), `launch` the measured launch.
"""

__version__ = "0.1.0"
