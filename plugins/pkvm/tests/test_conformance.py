"""The backends of this plugin conform: hooks, invariants, content, failures, leaks."""

from __future__ import annotations

import pytest

from cvmcore.testing.conformance import conformance

pytestmark = pytest.mark.slow

test_pkvm = conformance("pkvm")
