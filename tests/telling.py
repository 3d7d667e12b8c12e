"""A daemon that says what is in it, once: `python -m tests.telling FIFO ARGUMENTS`. Who reads the pipe at FIFO is told.

One thread more than the command has, named `telling`, and nothing else.
"""

import json
import sys
import threading
from pathlib import Path
from typing import NamedTuple


class Inside(NamedTuple):
    """What is in a process."""

    threads: list[str]
    modules: list[str]


def told(fifo: Path) -> Inside:
    """Waits for its answer."""
    return Inside(*json.loads(fifo.read_text()))


def _tell(fifo: Path) -> None:
    with fifo.open("w") as reader:  # once there is one
        json.dump(Inside([thread.name for thread in threading.enumerate()], sorted(sys.modules)), reader)


def main() -> int:
    """Be the daemon."""
    from kvstored.entry import main as run

    threading.Thread(target=_tell, args=(Path(sys.argv.pop(1)),), name="telling", daemon=True).start()
    return run()


if __name__ == "__main__":
    sys.exit(main())
