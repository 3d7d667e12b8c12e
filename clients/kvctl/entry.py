"""The console script. An engine's installation has it too, without what it needs: then it says so."""

import sys


def main() -> None:
    """Run kvctl. Exits with 1 where its packages are missing."""
    try:
        from kvctl.cli import main as run  # noqa: PLC0415  what is missing is to be named
    except ModuleNotFoundError as missing:
        sys.exit(f"kvctl needs the package {missing.name}: pip install 'kvstored[ctl]'")
    run()
