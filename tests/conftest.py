"""Makes `fakes` importable: under pytest's importlib mode the tests' folder is not on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
