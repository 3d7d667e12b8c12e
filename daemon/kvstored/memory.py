"""Arenas and tables as memfds: made, faulted in, locked and punched.

The owner thread makes, looks up and closes; one memory thread faults in and punches, so that nothing waits for
the kernel to zero pages. Every memfd is sealed against shrinking, growing and further seals: a client that maps it
never gets SIGBUS. `F_SEAL_FUTURE_WRITE` is left out on purpose: it would lock out a restarted daemon too.
"""

import fcntl
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from kvkernels import libc
from kvkernels.libc import Bytes
from kvproto.limits import MIB

log = logging.getLogger(__name__)

STEP_BYTES = 16 * MIB  # about 8 ms of zeroing: how long a punch may have to wait


@dataclass(slots=True, eq=False)
class Region:
    """One memfd and the daemon's own writable map of it."""

    fd: int
    region_bytes: int
    address: int
    view: Bytes
    gone: bool = False  # nobody needs it any more: not worth faulting in

    def unmap(self) -> None:
        """Nothing in the daemon looks there any more."""
        libc.unmap(self.address, self.region_bytes)
        self.address = 0


def make_region(name: str, region_bytes: int, *, writable: bool = True) -> Region:
    """A sealed memfd, mapped. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, region_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        address = libc.map_shared(fd, region_bytes, writable=writable)
    except OSError:
        os.close(fd)
        raise
    return Region(fd, region_bytes, address, libc.bytes_at(address, region_bytes))


class HostMemory:
    """The memory port of a real daemon (`kvstore.ports.Memory`). Owner thread, but for what says otherwise."""

    def __init__(
        self, arenas: int, arena_bytes: int, *, prefault: bool, lock: bool, punched: Callable[[int], None]
    ) -> None:
        """`punched` is called on the memory thread."""
        self._arena_bytes = arena_bytes
        self._lock = lock
        self._punched = punched
        self._arenas: dict[int, Region] = {}
        self._tables: dict[str, Region] = {}
        self._spare: deque[Region] = deque()
        self._spares_wanted = threading.Semaphore(arenas if prefault else 0)
        self._prefault = prefault
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self.populated_bytes = 0
        self.locked_bytes = 0
        self.faults: list[str] = []  # what status warns of

    def start(self) -> None:
        """Begin to fault arenas in."""
        self._thread.start()

    def stop(self) -> None:
        """End the memory thread; maps stay until the process ends."""
        self._work.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    # -- kvstore.ports.Memory ------------------------------------------------------------------------------------

    def table(self, name: str, table_bytes: int) -> Bytes:
        """See the port."""
        region = make_region(f"kvstored-{name}", table_bytes)
        self._tables[name] = region
        return region.view

    def new_arena(self, arena: int, arena_bytes: int) -> bool:
        """See the port. Takes one that is faulted in already, if there is one."""
        assert arena_bytes == self._arena_bytes
        if self._spare:
            self._arenas[arena] = self._spare.popleft()
            return True
        try:
            region = make_region("kvstored-arena", arena_bytes)
        except OSError as error:
            self._fault(f"cannot make an arena: {error}")
            return False
        self._arenas[arena] = region
        if self._spares_wanted.acquire(blocking=False):  # it takes the place of a spare that was yet to be made
            self._work.put(lambda: self._fault_in(region))
        return True

    def punch_arena(self, arena: int) -> None:
        """See the port."""
        region = self._arenas[arena]
        self._work.put(lambda: self._punch(arena, region))

    def held_bytes(self, arena: int) -> int:
        """See the port."""
        return os.fstat(self._arenas[arena].fd).st_blocks * 512

    def close_arena(self, arena: int) -> None:
        """See the port."""
        os.close(self._arenas.pop(arena).fd)

    # -- for the hot server --------------------------------------------------------------------------------------

    def view(self, arena: int) -> Bytes:
        """An arena's bytes, writable."""
        return self._arenas[arena].view

    def open_read_only(self, arena: int) -> int:
        """A new descriptor of an arena for a client: read-only, so that no map made from it can write."""
        return os.open(f"/proc/self/fd/{self._arenas[arena].fd}", os.O_RDONLY | os.O_CLOEXEC)

    def fault_in(self, region: Region) -> None:
        """Have a ring faulted in, in the background."""
        self._work.put(lambda: self._allocate(region))

    def drop(self, region: Region) -> None:
        """Free, unmap and close a ring, after whatever was asked for it before. A client may keep its map."""
        region.gone = True
        self._work.put(lambda: self._close(region))

    # -- memory thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            work = self._next()
            if work is None:
                return
            work()

    def _next(self) -> Callable[[], None] | None:
        """What was asked for; else a spare arena, if any is wanted."""
        try:
            return self._work.get_nowait()
        except Empty:
            if self._spares_wanted.acquire(blocking=False):
                return self._make_spare
            return self._work.get()

    def _make_spare(self) -> None:
        try:
            region = make_region("kvstored-arena", self._arena_bytes)
        except OSError as error:
            self._fault(f"cannot make an arena ahead of time: {error}")
            return
        self._fault_in(region)
        self._spare.append(region)

    def _fault_in(self, region: Region) -> None:
        try:
            for start in range(0, region.region_bytes, STEP_BYTES):
                self._punch_meanwhile()
                if not region.address:
                    return  # given up before it was ready
                step_bytes = min(STEP_BYTES, region.region_bytes - start)
                libc.advise(region.address + start, step_bytes, libc.MADV_POPULATE_WRITE)
                self.populated_bytes += step_bytes
        except OSError as error:
            self._fault(f"cannot fault an arena in: {error}")
            return
        if self._lock and not self.faults:
            try:
                libc.lock(region.address, region.region_bytes)
                self.locked_bytes += region.region_bytes
            except OSError as error:
                self._fault(f"memory is not locked ({error}): raise `ulimit -l`, or set dram.lock = false")

    def _punch_meanwhile(self) -> None:
        while not self._work.empty():
            work = self._work.get()
            if work is None:  # the end: leave it for the loop
                self._work.put(None)
                return
            work()

    def _allocate(self, region: Region) -> None:
        if region.gone:
            return
        try:
            os.posix_fallocate(region.fd, 0, region.region_bytes)
        except OSError as error:  # the session may be over, or memory short: the client faults it in itself
            log.info("ring not faulted in: %s", error)

    def _close(self, region: Region) -> None:
        region.unmap()
        try:
            libc.punch(region.fd, region.region_bytes)  # a descriptor that the client kept would keep the pages
        except OSError as error:
            self._fault(f"cannot give a ring back: {error}")
        os.close(region.fd)

    def _punch(self, arena: int, region: Region) -> None:
        try:
            region.unmap()
            libc.punch(region.fd, region.region_bytes)
        except OSError as error:
            self._fault(f"cannot give an arena back: {error}")
        self.populated_bytes = max(0, self.populated_bytes - region.region_bytes)
        self.locked_bytes = max(0, self.locked_bytes - region.region_bytes)
        if self._prefault:
            self._spares_wanted.release()
        self._punched(arena)

    def _fault(self, text: str) -> None:
        if text not in self.faults and len(self.faults) < 16:
            self.faults.append(text)
            log.warning("%s", text)
