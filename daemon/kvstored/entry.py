"""The console script. An engine's installation has it too, without what it needs: then it says so."""

import sys


def main() -> int:
    """Run the daemon. Exits with 1 where its packages are missing."""
    try:
        from kvstored.cli import main as run  # noqa: PLC0415  what is missing is to be named

        return run()  # which imports most of it
    except ModuleNotFoundError as missing:
        sys.exit(f"kvstored needs the package {missing.name}: pip install 'kvstored[daemon]'")
