"""`python -m kvstored`: the same as the console script."""

import sys

from kvstored.cli import main

sys.exit(main())
