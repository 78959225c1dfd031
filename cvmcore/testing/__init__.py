"""What tests of cvmcore and of its backends are made of: invariants as code, and a state machine over the UAPI."""
