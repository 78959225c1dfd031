"""The backends of this plugin conform: hooks, invariants, content, failures, leaks."""

from __future__ import annotations

import pytest

from cvmcore.testing.conformance import conformance

pytestmark = pytest.mark.slow

test_sev = conformance("sev")
test_sev_es = conformance("sev-es")
test_snp = conformance("snp")
