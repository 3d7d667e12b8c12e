"""`python -m kvstored`: the same as the console script."""

import sys

from kvstored.entry import main

sys.exit(main())
