"""Memory of the host and of its VMs: the five state owners and the three verbs (docs/design.md)."""
