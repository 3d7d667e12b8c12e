"""Arenas and tables as memfds: made, faulted in, locked and punched; kept over a restart, and taken back.

The owner thread makes, looks up and closes; one memory thread faults in and punches, so that nothing waits for
the kernel to zero pages. `regions.py` has what they are made of.

    A successor, before `start`:

      adopt  ->  KEPT  -- table, take_arena -->  in use
                       -- drop_kept ---------->  closed      (at once, it makes a cold start)
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue

from kvkernels import libc
from kvkernels.libc import Bytes
from kvproto.limits import MIB
from kvstored.host_limits import why_not_locked
from kvstored.huge_pages import huge_bytes_of
from kvstored.keep import TABLE_PREFIX, Keeper, NoKeeper, arena_name, arena_of, table_name
from kvstored.placement import Placement
from kvstored.regions import Region, adopt_region, make_region

log = logging.getLogger(__name__)

STEP_BYTES = 16 * MIB  # about 8 ms of zeroing: how long a punch may have to wait


class HostMemory:
    """The memory port of a real daemon (`kvstore.ports.Memory`). Owner thread, but for what says otherwise."""

    def __init__(
        self,
        arenas: int,
        arena_bytes: int,
        *,
        prefault: bool,
        lock: bool,
        punched: Callable[[int], None],
        keeper: Keeper | None = None,
        huge: bool = True,
        placement: Placement | None = None,
    ) -> None:
        """`punched` is called on the memory thread, `keeper` only on the owner thread; `huge`: huge pages, if any."""
        self._keeper: Keeper = NoKeeper() if keeper is None else keeper
        self._arena_bytes = arena_bytes
        self._lock = lock
        self._dram_bytes = arenas * arena_bytes
        self._huge = huge
        self.placement = placement or Placement()
        self._punched = punched
        self.unmapping: Callable[[int], None] = lambda _: None  # `DeviceVerbs`, of an arena's address; memory thread
        self._arenas: dict[int, Region] = {}
        self._tables: dict[str, Region] = {}
        self._kept_arenas: dict[int, Region] = {}
        self._kept_tables: dict[str, Region] = {}
        self._instead_of_spares: set[int] = set()  # kept arenas that a spare need not be made for
        self._cold: deque[tuple[Region, bool]] = deque()  # to be faulted in, and whether that is to be counted
        self._unknown: list[Region] = []  # mapped, and how much of it lies in huge pages only the kernel knows
        self._spare: deque[Region] = deque()
        self._spares_wanted = threading.Semaphore(arenas if prefault else 0)
        self._spares = threading.Lock()  # of the next two
        self._making = False  # a spare, right now
        self._surplus = False  # that spare: an arena was made meanwhile
        self._prefault = prefault
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self.populated_bytes = 0
        self.huge_bytes = 0  # of these, in huge pages; of kept arenas once all of them are mapped
        self.locked_bytes = 0
        self._locking_failed = False  # what is left would fail as well
        self.faults: list[str] = []  # what status warns of
        self.advice = ""  # and of what else, from the start on

    def start(self) -> None:
        """Begin to fault arenas in."""
        self._thread.start()

    def stop(self) -> None:
        """End the memory thread; maps stay until the process ends."""
        self._work.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    # -- kvstore.ports.Memory ------------------------------------------------------------------------------------

    def table(self, name: str, table_bytes: int, *, lasting: bool = True) -> Bytes:
        """See the port. One that was kept, as it was left, if it is of exactly that size; a new one otherwise."""
        assert name not in self._tables, f"table {name} is made twice"
        region = self._kept_tables.pop(name, None)
        if region is not None and region.region_bytes != table_bytes:
            self._give_up(table_name(name), region)
            region = None
        if region is None:
            region = make_region(f"kvstored-{name}", table_bytes)
            if lasting:
                self._keeper.keep(table_name(name), region.fd)
        self._tables[name] = region
        return region.view

    def new_arena(self, arena: int, arena_bytes: int) -> bool:
        """See the port. Takes one that is faulted in already, if there is one."""
        assert arena_bytes == self._arena_bytes
        assert arena not in self._arenas, f"arena {arena} is made twice"
        assert arena not in self._kept_arenas, f"arena {arena} was kept: drop it first"
        if self._spare:
            self._assign(arena, self._spare.popleft())
            return True
        try:
            region = self._make_arena()
        except OSError as error:
            self._fault(f"cannot make an arena: {error}")
            return False
        self._assign(arena, region)
        if self._take_place_of_a_spare():
            self._fault_in_soon(region, counted=True)
        return True

    def _take_place_of_a_spare(self) -> bool:
        """One that was yet to be made, or is being made right now: else there would be an arena more than there may be.

        False without any: where nothing is faulted in ahead of time, or none could be made.
        """
        with self._spares:
            if self._spares_wanted.acquire(blocking=False):
                return True
            if self._making and not self._surplus:
                self._surplus = True
                return True
        if not self._spare:
            return False
        spare = self._spare.popleft()  # finished just now
        self._work.put(lambda: self._drop_spare(spare))
        return True

    def punch_arena(self, arena: int) -> None:
        """See the port. Forgotten first: a successor must not take it back."""
        region = self._arenas[arena]
        self._keeper.forget(arena_name(arena))
        self._work.put(lambda: self._punch(arena, region))

    def held_bytes(self, arena: int) -> int:
        """See the port."""
        return os.fstat(self._arenas[arena].fd).st_blocks * 512

    def close_arena(self, arena: int) -> None:
        """See the port."""
        os.close(self._arenas.pop(arena).fd)

    def _make_arena(self) -> Region:
        """Where it is wanted, if that can be said. Any thread. Raises OSError."""
        region = make_region("kvstored-arena", self._arena_bytes)
        try:
            region.node = self.placement.place(region.address, region.region_bytes)
        except OSError as error:
            self._fault(f"arenas lie wherever the kernel puts them ({error}); see dram.numa")
        return region

    def _assign(self, arena: int, region: Region) -> None:
        self._arenas[arena] = region
        self._keeper.keep(arena_name(arena), region.fd)

    # -- what a predecessor left ---------------------------------------------------------------------------------

    def adopt(self, fds: Mapping[str, int]) -> None:
        """Take kept descriptors over, by their names; what is not as we make it is closed and forgotten.

        Adopted arenas count as populated, and no spare is faulted in in their place. Before `start`.
        """
        assert not self._thread.is_alive()
        inodes: set[int] = set()
        for name, fd in fds.items():
            try:
                inode = os.fstat(fd).st_ino
                if inode in inodes:
                    raise FileExistsError("the same memory is there under another name")
                self._adopt(name, fd)
                inodes.add(inode)
            except OSError as error:
                log.warning("what was kept as %s is not used: %s", name, error)
                self._keeper.forget(name)
                os.close(fd)
        if fds:
            log.info("kept by a predecessor: %d tables, %d arenas", len(self._kept_tables), len(self._kept_arenas))

    def _adopt(self, name: str, fd: int) -> None:
        arena = arena_of(name)
        if arena is None:
            if not name.startswith(TABLE_PREFIX):
                raise FileNotFoundError("no name of ours")
            self._kept_tables[name.removeprefix(TABLE_PREFIX)] = adopt_region(fd)
            return
        region_bytes = os.fstat(fd).st_size
        if region_bytes != self._arena_bytes:
            raise FileNotFoundError(f"an arena has {self._arena_bytes} bytes and not {region_bytes}")
        self._kept_arenas[arena] = adopt_region(fd)
        self.populated_bytes += region_bytes
        if self._spares_wanted.acquire(blocking=False):
            self._instead_of_spares.add(arena)

    def kept_table(self, name: str) -> Bytes | None:
        """A table as a predecessor left it, to look at; gone with `drop_kept`, and with `table` of another size."""
        region = self._kept_tables.get(name)
        return None if region is None else region.view

    def kept_arenas(self) -> frozenset[int]:
        """Arenas that a predecessor left and that have not been taken."""
        return frozenset(self._kept_arenas)

    def take_arena(self, arena: int) -> None:
        """A kept arena serves again, with its bytes and under its id; as if `new_arena` had made it."""
        region = self._kept_arenas.pop(arena)
        self._arenas[arena] = region
        self._instead_of_spares.discard(arena)
        if self._prefault:  # its pages are there, but our map of them is not, nor is the lock
            self._fault_in_soon(region, counted=False)

    def drop_kept(self) -> None:
        """Give up what was kept and has not been taken; spares are made in place of arenas."""
        for name, region in self._kept_tables.items():
            self._give_up(table_name(name), region)
        for arena, region in self._kept_arenas.items():
            self._give_up(arena_name(arena), region)
            self.populated_bytes -= region.region_bytes
        for _ in self._instead_of_spares:
            self._spares_wanted.release()
        self._work.put(lambda: None)  # wakes the thread
        self._instead_of_spares.clear()
        self._kept_tables.clear()
        self._kept_arenas.clear()

    def _give_up(self, name: str, region: Region) -> None:
        self._keeper.forget(name)
        region.unmap()
        os.close(region.fd)

    # -- for the hot server --------------------------------------------------------------------------------------

    def view(self, arena: int) -> Bytes:
        """An arena's bytes, writable."""
        return self._arenas[arena].view

    def open_read_only(self, arena: int) -> int:
        """A new descriptor of an arena for a client: read-only, so that no map made from it can write."""
        return os.open(f"/proc/self/fd/{self._arenas[arena].fd}", os.O_RDONLY | os.O_CLOEXEC)

    def open_writable(self, arena: int) -> int:
        """The same for a client in mode direct: it can write to all of it, and change neither size nor seals."""
        return os.open(f"/proc/self/fd/{self._arenas[arena].fd}", os.O_RDWR | os.O_CLOEXEC)

    def fault_in(self, region: Region) -> None:
        """Have a ring faulted in, in the background."""
        self._work.put(lambda: self._allocate(region))

    def drop(self, region: Region) -> None:
        """Free, unmap and close a ring, after whatever was asked for it before. A client may keep its map."""
        region.gone = True
        self._work.put(lambda: self._close(region))

    def _fault_in_soon(self, region: Region, *, counted: bool) -> None:
        self._cold.append((region, counted))
        self._work.put(lambda: None)  # wakes the thread; the work itself could nest as deep as there are arenas

    # -- memory thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            work = self._next()
            if work is None:
                return
            work()

    def _next(self) -> Callable[[], None] | None:
        """What was asked for; else an arena that is in use already, or a spare one; at last what can only be asked."""
        try:
            return self._work.get_nowait()
        except Empty:
            if self._cold:
                region, counted = self._cold.popleft()
                return lambda: self._fault_in(region, counted=counted)
            with self._spares:
                self._making = self._spares_wanted.acquire(blocking=False)
            if self._making:
                return self._make_spare
            if self._unknown:
                return self._ask_for_huge_pages
            return self._work.get()

    def _make_spare(self) -> None:
        region = None
        try:
            region = self._make_arena()
            self._fault_in(region, counted=True)
        except OSError as error:
            self._fault(f"cannot make an arena ahead of time: {error}")
        with self._spares:
            surplus, self._making, self._surplus = self._surplus, False, False
            if region is not None and not surplus:
                self._spare.append(region)
        if region is not None and surplus:
            self._drop_spare(region)

    def _drop_spare(self, region: Region) -> None:
        """Another arena has taken its place."""
        self.populated_bytes = max(0, self.populated_bytes - region.region_bytes)
        self.locked_bytes = max(0, self.locked_bytes - region.region_bytes)
        self.huge_bytes -= region.huge_bytes
        self.placement.gone(region.node, region.nodes)
        region.unmap()
        os.close(region.fd)

    def _fault_in(self, region: Region, *, counted: bool) -> None:
        try:
            for start in range(0, region.region_bytes, STEP_BYTES):
                self._punch_meanwhile()
                if not region.address:
                    return  # given up before it was ready
                step_bytes = min(STEP_BYTES, region.region_bytes - start)
                if counted and self._huge and step_bytes % libc.HUGE_PAGE_BYTES == 0:
                    huge_bytes = step_bytes if libc.make_huge(region.address + start, step_bytes) else 0
                    region.huge_bytes += huge_bytes
                    self.huge_bytes += huge_bytes
                # The rest, in small pages. Those that are there are mapped sixteen at a time by reading, one by one
                # by writing.
                advice = libc.MADV_POPULATE_WRITE if counted else libc.MADV_POPULATE_READ
                libc.advise(region.address + start, step_bytes, advice)
                self.populated_bytes += step_bytes if counted else 0
        except OSError as error:
            self._fault(f"cannot fault an arena in: {error}")
            return
        region.nodes = self.placement.look(region.address, region.region_bytes)
        self._unknown += [] if counted else [region]
        if self._lock and not self._locking_failed:
            try:
                libc.lock(region.address, region.region_bytes)
                self.locked_bytes += region.region_bytes
            except OSError as error:
                self._locking_failed = True
                self._fault(why_not_locked(self._dram_bytes, error))

    def _ask_for_huge_pages(self) -> None:
        """What a predecessor made of them, for all kept arenas at once: the answer takes as long as there are pages."""
        regions = [region for region in self._unknown if region.address]
        maps = [(region.address, region.region_bytes) for region in regions]
        for region, huge_bytes in zip(regions, huge_bytes_of(maps), strict=True):
            region.huge_bytes = huge_bytes
            self.huge_bytes += huge_bytes
        self._unknown.clear()

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
            for start in range(0, region.region_bytes, STEP_BYTES):
                step_bytes = min(STEP_BYTES, region.region_bytes - start)
                if self._huge and step_bytes % libc.HUGE_PAGE_BYTES == 0:
                    libc.make_huge(region.address + start, step_bytes)
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
        self.unmapping(region.address)
        try:
            region.unmap()
            libc.punch(region.fd, region.region_bytes)
        except OSError as error:
            self._fault(f"cannot give an arena back: {error}")
        self.populated_bytes = max(0, self.populated_bytes - region.region_bytes)
        self.huge_bytes -= region.huge_bytes
        self.placement.gone(region.node, region.nodes)
        self.locked_bytes = max(0, self.locked_bytes - region.region_bytes)
        if self._prefault:
            self._spares_wanted.release()
        self._punched(arena)

    def _fault(self, text: str) -> None:
        if text not in self.faults and len(self.faults) < 16:
            self.faults.append(text)
            log.warning("%s", text)
