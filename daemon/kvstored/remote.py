"""The threads of the remote tier: `kvstore.tier.remote_orders.RemoteWorkers` of a real daemon.

    owner thread            submit --> queues -------------> seekers (4) --ask--> readers, as many as connections
    (nothing here waits)                                     writers (4), one that looks again,
                                                         one that notes what was dropped,
                                                         one that removes it; the noting one reads the ledger first, and
                                                         nothing is read or written over there until it has
                            finish <-- one deque, a wake <--'

Whatever the far side does, they are the only ones to wait for it.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

from kvproto.limits import MIB
from kvstore.sessions import Copy
from kvstore.store import Store
from kvstore.tier.remote_orders import Bytes, Forget, ForgetAll, Keep, Look, Piece, RemoteOrder, Seek
from kvstore.tier.remote_writing import KEEPS
from kvstored.leaf import NICE, LeafThreads, Move
from kvstored.niceness import be_nice
from kvstored.remote_calls import FarSide
from kvstored.remote_jobs import Jobs
from kvstored.remote_ledger import Ledger
from kvstored.remote_looking import UNREAD
from kvstored.remote_pool import Budget, Pool
from kvstored.remote_port import Backend, RemoteError
from kvstored.remote_removals import Removal

log = logging.getLogger(__name__)

SEEKERS: Final = 4
WRITERS: Final = KEEPS  # one each, so that no block waits in DRAM for another one's upload
BATCH_BYTES: Final = 8 * MIB  # what a leaf thread copies before it reports
BUDGET_BYTES: Final = 128 * MIB  # read, and not in DRAM yet
STOP_S: Final = 2.0
FINISH_S: Final = 0.002  # of the owner thread in one turn
CHANGES_LOGGED: Final = 256  # one of so many
TURN: Final = 1024  # objects that are deleted before it is the turn of others
NAMES_TOLD: Final = 8  # of objects that are gone, in one word: 0.5 ms


@dataclass(frozen=True, slots=True)
class RemoteLimits:
    """What it may use."""

    quota_bytes: int
    connections: int
    state_dir: Path | None = None  # of the ledger


class RemoteThreads:
    """Owner thread, but for what says otherwise."""

    def __init__(
        self, backend: Backend, limits: RemoteLimits, view: Callable[[int], Bytes], leaf: LeafThreads,
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        """`view`: an arena's bytes, any thread. `wake` is called on any thread."""
        self.far = FarSide(backend)
        self.ledger = Ledger(limits.state_dir)
        self.limits = limits
        self._leaf = leaf
        self._wake = wake
        self._budget = Budget(BUDGET_BYTES)
        self._readers = Pool(limits.connections, "remote-read")
        self.jobs = Jobs(
            self.far, self.ledger, view, self._readers, window=limits.connections, budget=self._budget,
            quota_bytes=limits.quota_bytes,
        )  # fmt: skip
        self.uses = self.jobs.holdings.uses
        self._seeks: SimpleQueue[Seek | None] = SimpleQueue()
        self._keeps: SimpleQueue[Keep | None] = SimpleQueue()
        self._looks: SimpleQueue[Look | None] = SimpleQueue()
        self._forgets: SimpleQueue[Forget | ForgetAll | None] = SimpleQueue()
        self._removals = self.jobs.holdings.removals
        self.jobs.holdings.gone = self._gone
        self._remembers = False  # the ledger is read: what was deleted is known
        self._changed = 0  # blocks, after they had been compared
        self._ended: deque[Callable[[Store], None]] = deque()
        self._stopping = threading.Event()
        self._threads = [
            *(self._thread(f"remote-seek-{number}", self._seek) for number in range(SEEKERS)),
            *(self._thread(f"remote-write-{number}", self._keep) for number in range(WRITERS)),
            self._thread("remote-look", self._look),
            self._thread("remote-note", self._note),
            self._thread("remote-remove", self._remove),
        ]

    def _thread(self, name: str, run: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=run, name=name, daemon=True)

    # -- kvstore.tier.remote_orders.RemoteWorkers ----------------------------------------------------------------

    def submit(self, order: RemoteOrder) -> bool:
        """See the port."""
        if isinstance(order, Seek):
            if not self.reading():
                return False
            self._seeks.put(order)
        elif isinstance(order, Keep):
            if not self.writing():
                return False
            self.jobs.begin_keep(order)
            self._keeps.put(order)
        else:
            self.jobs.announce(order)
            self._forgets.put(order)
        return True

    def look(self, order: Look) -> bool:
        """See the port."""
        if self.reading():
            self._looks.put(order)
            return True
        return False

    def reading(self) -> bool:
        """See the port."""
        return self._remembers and self.far.can_read()

    def writing(self) -> bool:
        """See the port."""
        # Who writes looks first what is there.
        return self.reading() and self.far.can_write() and self.jobs.keeping.has_room()

    def room_again(self, object_bytes: int) -> bool:
        """See the port."""
        return self.jobs.keeping.has_room_again(object_bytes)

    def carry(self, copies: list[tuple[Copy, Bytes]]) -> None:
        """See the port."""
        batch: list[Move] = []
        batch_bytes = 0
        for copy, source in copies:
            target = self.jobs.keeping.view(copy.arena)[copy.target_offset : copy.target_offset + copy.block_bytes]
            batch.append(Move(copy.ticket, source, target))
            batch_bytes += copy.block_bytes
            if batch_bytes >= BATCH_BYTES:
                self._leaf.submit(batch)
                batch, batch_bytes = [], 0
        if batch:
            self._leaf.submit(batch)

    def landed(self, piece: Piece) -> None:
        """See the port."""
        self._budget.give(piece.taken_bytes)
        piece.taken_bytes = 0

    def changed(self) -> None:
        """See the port."""
        if not self._changed % CHANGES_LOGGED:
            log.warning("remote: blocks changed after they had been read and compared: the engine writes late")
        self._changed += 1

    def objects(self, below: ForgetAll) -> int:
        """See the port."""
        return self.ledger.noted([one for one in self.ledger.namespaces() if below.covers(one)])

    # -- for the daemon ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads."""
        self._readers.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; what has begun is waited for a little, and no longer."""
        self._stopping.set()
        self._budget.close()
        for _ in range(SEEKERS):
            self._seeks.put(None)
        for _ in range(WRITERS):
            self._keeps.put(None)
        self._looks.put(None)
        self._forgets.put(None)
        self._removals.close()
        self._readers.stop()
        deadline_s = time.monotonic() + STOP_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - time.monotonic()))
        self.far.close()

    def finish(self, store: Store) -> None:
        """Hand back to the store what has come; the rest in the next turn if it is much."""
        until_s = time.monotonic() + FINISH_S if self._ended else 0.0
        while self._ended:
            self._ended.popleft()(store)
            if self._ended and time.monotonic() > until_s:
                self._wake()
                return

    def _gone(self, names: Sequence[str]) -> None:
        """These objects are there no more. Any thread."""
        for at in range(0, len(names), NAMES_TOLD):
            some = names[at : at + NAMES_TOLD]
            self._say(lambda store, some=some: store.remote.gone(some))  # type: ignore[misc]

    def _say(self, what: Callable[[Store], None]) -> None:
        """Any thread."""
        self._ended.append(what)
        self._wake()

    # -- threads -------------------------------------------------------------------------------------------------

    def _seek(self) -> None:
        be_nice(NICE)
        while (seek := self._seeks.get()) is not None:
            if not self._stopping.is_set():
                try:
                    self.jobs.seek(seek, lambda piece: self._say(lambda store: store.remote.land(piece)))
                except Exception:  # a chain that is not brought is a miss, and the thread is needed for others
                    log.exception("remote: a chain was not brought")
            self._say(lambda store, seek=seek: store.remote.sought(seek))  # type: ignore[misc]

    def _look(self) -> None:
        be_nice(NICE)
        while (look := self._looks.get()) is not None:
            if not self._stopping.is_set():
                try:
                    self.jobs.look(look)
                except Exception:  # nobody relies on what was not read back, and the thread is needed for others
                    log.exception("remote: what lies over there was not looked at")
                    look.why = UNREAD
            self._say(lambda store, look=look: store.remote.looking.looked(look))  # type: ignore[misc]

    def _keep(self) -> None:
        be_nice(NICE)
        while (keep := self._keeps.get()) is not None:
            if self._stopping.is_set():
                continue
            try:
                self.jobs.keep(keep, lambda keep: self._say(lambda store: store.remote.writing.copied(keep)))
            except Exception as error:  # blocks that are not written are written when they are used again
                log.exception("remote: a run was not written")
                keep.failed = type(error).__name__
            self._say(lambda store, keep=keep: store.remote.kept(keep))  # type: ignore[misc]

    def _note(self) -> None:
        """What was dropped is noted at once, in order: this waits for a file, and for no far side."""
        be_nice(NICE)
        for early in self._remember():
            self._forget(early)
        while (order := self._forgets.get()) is not None:
            self._forget(order)

    def _forget(self, order: Forget | ForgetAll) -> None:
        try:
            if isinstance(order, Forget):
                self.jobs.begin_forget(order)
            else:
                self.jobs.begin_forget_all(order)
        except Exception:  # then nothing of it is asked for any more
            log.exception("remote: what was dropped is not noted")
            return
        self._say(lambda store: store.remote.forgot(order))

    def _remember(self) -> list[Forget | ForgetAll]:
        """Read what former lives have noted, and go on removing what they have not finished.

        Returns what was dropped meanwhile: it is in the file already, and nowhere else yet.
        """
        ahead: list[Forget | ForgetAll] = []
        with self.jobs.holdings.lock:  # whoever reports waits for no lock
            try:
                self.ledger.read(lambda: self._note_ahead(ahead))
            except Exception:  # what was noted up to there is known, and the thread is needed for others
                log.exception("remote: the ledger was not read")
        self.jobs.resume()
        self._remembers = True
        return ahead

    def _note_ahead(self, ahead: list[Forget | ForgetAll]) -> None:
        """A daemon that is killed while it reads must have noted what it has answered, too."""
        while True:
            try:
                order = self._forgets.get_nowait()
            except Empty:
                return
            if order is None:
                self._forgets.put(None)
                return
            self.jobs.note_ahead(order)
            ahead.append(order)

    def _remove(self) -> None:
        """What lies over there goes when the far side can be written."""
        be_nice(NICE)
        while (order := self._removals.next()) is not None:
            try:
                if not self.jobs.remove(order, TURN) and isinstance(order, Removal):
                    self._removals.goes_on(order)
            except RemoteError as error:
                log.debug("remote: not deleted yet: %s", error)
                self._removals.again(order)
            except Exception:  # whatever it is, the thread is needed for others
                log.exception("remote: not deleted yet")
                self._removals.again(order)
