"""The backends of this plugin conform: hooks, invariants, content, failures, leaks."""

from __future__ import annotations

from cvmcore.testing.conformance import conformance

test_tdx = conformance("tdx")
