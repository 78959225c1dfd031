"""Who may import whom: the contracts of `.importlinter`, run on the code as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

CONTRACTS = Path(__file__).parents[1] / ".importlinter"


def test_import_rules_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """Every contract is kept; the report of the linter says which import breaks one."""
    status = lint_imports(config_filename=str(CONTRACTS), no_cache=True, no_logo=True)

    assert status == 0, capsys.readouterr().out
