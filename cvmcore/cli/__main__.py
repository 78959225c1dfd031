"""`python -m cvmcore.cli`."""

import sys

from cvmcore.cli import main

sys.exit(main())
