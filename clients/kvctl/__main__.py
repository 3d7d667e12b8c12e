"""`python -m kvctl`: the same as the console script."""

from kvctl.cli import main

main()
