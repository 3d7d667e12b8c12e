"""Threads are as nice as they should be, and no less so than the daemon was started."""

import os
import subprocess
import sys

import pytest

SHOWN = """
import os, threading
from kvstored.niceness import be_nice

os.nice(int({started}))
said = []
def run():
    be_nice(10)
    said.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
thread = threading.Thread(target=run)
thread.start()
thread.join()
print(*said)
"""


@pytest.mark.parametrize(("started", "nice"), [(0, 10), (10, 10), (19, 19)])
def test_a_thread_is_as_nice_as_told_or_as_the_process_is(started: int, nice: int) -> None:
    more = max(0, started - os.nice(0))
    command = [sys.executable, "-c", SHOWN.format(started=more)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.stdout.split() == [str(max(nice, os.nice(0)))], said.stderr
