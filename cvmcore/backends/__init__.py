"""Backends that ship with the core: VM types that need no vendor."""
