"""`python -m kvctl`: the same as the console script."""

from kvctl.entry import main

main()
