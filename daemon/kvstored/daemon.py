"""The process put together: memory, store, leaf threads, hot socket, control socket, and the loop that turns them."""

import fcntl
import gc
import logging
import os
import resource
import secrets
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO, TypeVar

from kvproto.errors import Code
from kvstore.store import Limits, Store
from kvstored.admin import Admin
from kvstored.config import Loaded
from kvstored.control import AdminPort, ControlServer
from kvstored.hot import SOCKET_NAME, HotServer
from kvstored.leaf import LeafThreads
from kvstored.loop import Loop
from kvstored.memory import HostMemory

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_AROUND_NS = 10**9
CONTROL_GRACE_S = 1.0
DESCRIPTORS_APART = 96  # tables, sockets, gRPC, and a few sessions
# A thread that holds the GIL gives it up this soon when the owner thread wants it. The default of 5 ms is a hundred
# round trips.
SWITCH_INTERVAL_S = 50e-6


class AlreadyRunningError(Exception):
    """Another daemon serves this runtime directory."""


class HostClock:
    """`kvstore.ports.Clock` of a real host."""

    def now_ns(self) -> int:
        """See the port."""
        return time.monotonic_ns()

    def wall_s(self) -> int:
        """See the port."""
        return int(time.time())


class HostRandomness:
    """`kvstore.ports.Randomness` of a real host."""

    def word(self) -> int:
        """See the port."""
        return secrets.randbits(64)


class Daemon:
    """One daemon's life: `serve` returns when `stop` was called or a termination signal came."""

    def __init__(self, loaded: Loaded) -> None:
        config = loaded.config
        self._config = config
        self._loop = Loop()
        self._leaf = LeafThreads(config.leaf_threads, self._loop.wake)
        self._memory = HostMemory(
            config.dram_bytes // config.arena_bytes,
            config.arena_bytes,
            prefault=config.prefault,
            lock=config.lock,
            punched=lambda arena: self._loop.call(lambda: self._store.arena_punched(arena)),
        )
        self._hot = HotServer(config, self._loop, self._memory, self._leaf)
        limits = Limits(
            config.dram_bytes,
            config.arena_bytes,
            ticket_ttl_ns=int(config.ticket_ttl_s * 1e9),
            lease_ttl_ns_max=int(config.lease_ttl_max_s * 1e9),
        )
        self._store = Store(limits, HostClock(), HostRandomness(), self._memory, self._hot)
        self._hot.store = self._store
        self._admin = Admin(loaded, self._store, self._hot, self._memory)
        self._control = ControlServer(self, config.runtime_dir)
        self._look_around_ns = 0

    def ask(self, question: Callable[[AdminPort], T], timeout_s: float) -> T:
        """`kvstored.control.Owner`. Any other thread."""
        return self._loop.ask(lambda: question(self._admin), timeout_s)

    def stop(self) -> None:
        """End `serve`. Any thread, and signal handlers."""
        self._loop.stop()

    def serve(self, announce: Callable[[], None]) -> None:
        """Serve until told to stop; `announce` is called once clients can connect. The caller holds `only_one`.

        Raises OSError if the runtime directory cannot be used.
        """
        with ExitStack() as stack:
            _raise_descriptor_limit(self._config.dram_bytes // self._config.arena_bytes)
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            gc.collect()
            gc.freeze()  # what start-up made stays; a full collection then has little to walk
            self._memory.start()
            stack.callback(self._memory.stop)
            self._leaf.start()
            stack.callback(self._leaf.stop)
            self._hot.listen(self._config.runtime_dir / SOCKET_NAME)
            stack.callback(self._hot.close, Code.SHUTTING_DOWN, "the daemon is shutting down")
            self._control.start()
            stack.callback(self._control.stop, CONTROL_GRACE_S)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self.stop())
            announce()
            self._loop.run(self._turn)
            self._control.announce(serving=False)

    def _turn(self) -> int:
        """What events have brought about, what time has, and when to look again (ns)."""
        self._hot.finish_copies()
        now_ns = time.monotonic_ns()
        soonest_ns = self._store.next_tick_ns()
        if soonest_ns is not None and soonest_ns <= now_ns:
            self._store.tick()
            soonest_ns = self._store.next_tick_ns()
        if self._look_around_ns <= now_ns:
            self._hot.look_around(now_ns)
            self._look_around_ns = now_ns + LOOK_AROUND_NS
        return self._look_around_ns if soonest_ns is None else min(soonest_ns, self._look_around_ns)


def _raise_descriptor_limit(arenas: int) -> None:
    """An arena and a session each take a descriptor or two. Raises OSError where the limit allows not even few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = arenas + DESCRIPTORS_APART
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise OSError(
            f"{arenas} arenas need {wanted} descriptors, and the limit is {hard}: raise it, or take larger arenas"
        )
    log.debug("descriptors: limit raised from %d to %d", soft, hard)


def _open_lock(path: Path) -> TextIO:
    """Never truncates, follows no link and waits for no fifo: what lies under the name may be anybody's."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PermissionError(f"{path} is not a regular file")
    return os.fdopen(fd, "w")


def only_one(runtime_dir: Path) -> ExitStack:
    """Hold the lock of a runtime directory, made if missing, until the stack is closed.

    Raises AlreadyRunningError, or OSError if the directory cannot be used.
    """
    runtime_dir.mkdir(parents=True, exist_ok=True)
    owner = runtime_dir.stat().st_uid
    if owner not in {0, os.geteuid()}:
        raise PermissionError(f"{runtime_dir} belongs to uid {owner}, who could replace the sockets in it")
    stack = ExitStack()
    lock = stack.enter_context(_open_lock(runtime_dir / "lock"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stack.close()
        raise AlreadyRunningError(f"another daemon serves {runtime_dir}") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return stack
