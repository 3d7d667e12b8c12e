"""Daemons that die in the middle of something: each kills itself, as by `kill -9`, when it comes to a step that was
chosen, or when it has done it.

    test: environment DIES = "step/calls/when"   daemon: from SIGUSR1 on, or from the start, its calls of that step are
                                                 counted; at the last one it is gone

They are forked off a prepared process, as those of `tests/prepared.py` are, since there are hundreds of them.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from bench.harness import ROOT
from tests.prepared import Prepared, _become, _load, next_daemon

DIES = "DAEMON_DIES"  # what a daemon of a test is told by

# By point: steps, each with its module, the owner in it if it is a method, and its name; and how often a short life
# takes it at least, or nearly.
STEPS: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "commit": {"commit": ("kvstore.reserving:Reserving.commit", 8), "copy": ("kvstored.leaf:_checksum", 40)},
    "publish": {
        "publish": ("kvstore.reserving:Reserving.copied", 40), "tell": ("kvstored.hot:HotServer.published", 8),
    },
    "demotion": {
        "place": ("kvstore.tier.demotion:Demotion._write", 8), "write": ("kvstored.drive_work:_write", 10),
        "written": ("kvstore.tier.demotion:Demotion.saved", 8),
    },
    "promotion": {
        "begin": ("kvstore.tier.loading:Loading.load", 4), "read": ("kvstored.drive_work:load", 5),
        "read through": ("kvstore.streams:Streams.finished", 4),
    },
    "index commit": {
        "records": ("kvstore.tier.commits:Commits._pack", 6), "sync": ("kvstored.drive:Drives.sync", 4),
        "transaction": ("kvstored.index:Index.commit", 4), "durable": ("kvstore.tier.commits:Commits.committed", 4),
    },
    "hand-over": {
        "table": ("kvstored.memory:HostMemory.table", 12), "arena": ("kvstored.memory:HostMemory.take_arena", 3),
        "dropped": ("kvstored.memory:HostMemory.drop_kept", 1),
        "parents": ("kvstore.restart:_TakeOver._without_parents", 1),
        "withheld": ("kvstore.restart:_TakeOver._withhold", 1), "settled": ("kvstore.restart:_TakeOver._settle", 1),
        "said": ("kvstore.registry:Registry.begin_with", 1),
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Death:
    """Where a daemon dies."""

    point: str
    step: str
    calls: int
    after: bool  # the last of them has done its work

    def __str__(self) -> str:
        return f"{self.point}/{self.step}/{self.calls}/{'after' if self.after else 'before'}"

    @classmethod
    def at(cls, point: str, random: Random) -> "Death":
        """Somewhere in there."""
        step = random.choice(list(STEPS[point]))
        return cls(point, step, random.randrange(STEPS[point][step][1]) + 1, random.random() < 0.5)

    @classmethod
    def parse(cls, text: str) -> "Death":
        """What `str` gave."""
        point, step, calls, when = text.split("/")
        return cls(point, step, int(calls), when == "after")


class Dying(Prepared):
    """The prepared process of such daemons. Without `DIES` in the environment one lives as ever."""

    def _begin(self) -> socket.socket:
        if self._channel is None:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                line = [sys.executable, "-m", "tests.dying", str(theirs.fileno())]
                self._process = subprocess.Popen(line, cwd=ROOT, pass_fds=(theirs.fileno(),))
        return self._channel


# -- in the daemon -----------------------------------------------------------------------------------------------------


def plant(death: Death, *, armed: bool) -> None:
    """Die there, once `armed`: at once, or by SIGUSR1."""
    counts = threading.Event()
    if armed:
        counts.set()
    else:
        signal.signal(signal.SIGUSR1, lambda *_: counts.set())
    owner, name = _owner_of(STEPS[death.point][death.step][0])
    real: Callable[..., Any] = getattr(owner, name)
    left = death.calls
    lock = threading.Lock()

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        with lock:
            left -= counts.is_set()
            last = left == 0
        if last and not death.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


def _owner_of(step: str) -> tuple[Any, str]:
    module_name, path = step.split(":")
    __import__(module_name)
    owner: Any = sys.modules[module_name]
    *owners, name = path.split(".")
    for one in owners:
        owner = getattr(owner, one)
    return owner, name


def main() -> int:
    """Prepare, then be a daemon in every fork, and perhaps die in it."""
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        _load()
        wanted = next_daemon(channel)
    _become(wanted)
    text = os.environ.pop(DIES, "")
    if text:
        death = Death.parse(text)
        plant(death, armed=death.point == "hand-over")
    from kvstored.entry import main as run  # as the console script does

    return run()


if __name__ == "__main__":
    sys.exit(main())
