"""A real KVM driven from Python (x86-64): the live front of UAPI scripts.

`layouts` is the UAPI as data, `probe` says what this machine has, `server` makes one short-lived process per case,
`driver` does the calls there, `guest` is the guest that it runs. `front` talks to it. docs/live.md has what was tried.

Only `front` and `probe` are imported by the rest of cvmcore; the others run in processes of their own and import
nothing but the standard library and `cvmcore.errors`.
"""
