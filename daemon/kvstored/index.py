"""The daemon's side of the index: a child process has the file, one thread talks to it (`index_wire`).

    STARTING ---LOADED---> READY <--late answer--> HUNG      (no answer in time; the daemon goes on without)
       |  ^                  |
       |  +-- REBUILDING     +--child dies--> LOST           (doubtful: the next start believes the headers; the child
       |                                                      ends itself if it finds the index damaged, or gone)
       +--child dies: again, from headers; three times--> LOST
       +--it cannot read: once more a moment later, five times--> LOST

The tables in memory are the truth; the index only makes the next start fast.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np

from kvstore.tier.format import RECORD, seal_chunk
from kvstore.tier.orders import Commit, Found
from kvstored import index_wire
from kvstored.index_loaded import Loaded, parse_loaded
from kvstored.index_marks import (
    MAP_BYTES,
    UNSEEN,
    DamagedError,
    VersionError,
    mark_doubtful,
    pack_name,
    read_next,
    write_next,
)
from kvstored.index_scan import Scan, scan, scan_names
from kvstored.index_wire import CHUNK_KEY, EXIT_DAMAGED, NAME_KEY, Change, Kind, Message
from kvstored.mounts import Mounts
from kvstored.owed import note_life, read_owed

log = logging.getLogger(__name__)

REBUILDS: Final = 3  # attempts after a child that died
# What a drive may say that answers rightly a moment later. So often, and so long after each time, it is asked again.
PASSING: Final = frozenset({errno.EIO, errno.ENOSPC, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
PASSING_TRIES: Final = 5
PASSING_S: Final = 0.5
ANSWER_S: Final = 30.0
STOP_S: Final = 5.0  # for a commit in progress


class State(Enum):
    """Where the index stands."""

    STARTING = "starting"
    REBUILDING = "rebuilding"
    READY = "ready"
    HUNG = "hung"
    LOST = "lost"
    STOPPED = "stopped"


class _End(Enum):
    """How a child's life ended that had not loaded."""

    DIED = "died"
    PASSING = "passing"  # it said why, and that may be over soon
    FINAL = "final"  # it said why


class DirectoryHeldError(Exception):
    """Another daemon, or a check, has this directory."""


@contextmanager
def hold_directory(directory: Path) -> Iterator[None]:
    """Keep every other daemon and every check out of a disk directory, which is made if missing.

    Raises DirectoryHeldError, OSError.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "r+b", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryHeldError(f"another daemon serves {directory}") from None
        yield


class Child:
    """An index child and the link to it. It dies with the thread that made it."""

    def __init__(
        self, directories: Sequence[Path], *, rebuild: str = "", look: bool = False, map_bytes: int,
        owed: Path | None = None, absent: Mapping[Path, str] | None = None,
    ) -> None:  # fmt: skip
        """`rebuild`: why not to believe the index. `look`: read it, change nothing, end. `owed`: the file of what is to
        be left out. `absent`: directories to stay out of, with the reason; not the first. Raises OSError.
        """
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "fd": theirs.fileno(), "parent": os.getpid(), "directories": [str(each) for each in directories],
            "rebuild": rebuild, "look": look, "map_bytes": map_bytes, "owed": str(owed or ""),
            "absent": {str(each): why for each, why in (absent or {}).items()},
        }  # fmt: skip
        try:
            self.process = subprocess.Popen(  # noqa: S603  this program
                [sys.executable, "-P", "-m", "kvstored.index_child", json.dumps(request)],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError:
            self.link.close()
            raise
        finally:
            theirs.close()

    def why_gone(self) -> str:
        """After its end of the link is closed."""
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return "the index child hung up"
        if code < 0 or code > 128:
            return f"the index child was killed by signal {-code if code < 0 else code - 128}"
        return f"the index child ended with code {code}"

    def end(self, wait_s: float) -> None:
        """Let it finish what it does, for so long, and kill it. One that the kernel holds is left behind."""
        self.link.close()
        for patience_s in (wait_s, 1.0):
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
            else:
                return


class Index:
    """`start` and `stop` on the owner thread, as `take_loaded` and `progress`; `commit` on one other."""

    def __init__(
        self, directories: Sequence[Path], wake: Callable[[], None], *,
        answer_s: float = ANSWER_S, commit_s: float = ANSWER_S, map_bytes: int = MAP_BYTES, owed: Path | None = None,
        mounts: Mounts | None = None,
    ) -> None:  # fmt: skip
        """`wake` is called on other threads whenever there is something to take. The first directory has the index: if
        that is absent, there is none in this life, and nothing on disk is used. `owed`: see `owed.py`.

        A child that says nothing for `answer_s` before it has loaded counts as hung.
        """
        self._directories = list(directories)
        self._wake = wake
        self._answer_s = answer_s
        self._commit_s = commit_s
        self._map_bytes = map_bytes
        self._owed = owed
        self.mounts = mounts or Mounts()
        self._thread = threading.Thread(target=self._run, name="index", daemon=True)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._changed = threading.Condition()  # guards what follows
        self._state = State.STARTING
        self._reason = ""
        self._child: Child | None = None
        self._loaded: Loaded | None = None
        self._was_loaded = False
        self._progress: tuple[int, int] | None = None
        self._asked = 0  # sequence of the last commit
        self._answered = 0
        self._accepted = 0  # the last that is durable
        self._marked = False  # the next start believes the headers
        self._noted = 0  # while the index is lost: below it all numbers of segments are noted

    @property
    def state(self) -> State:
        """Any thread."""
        return self._state

    @property
    def reason(self) -> str:
        """What is wrong, for status; empty if nothing is. Any thread."""
        return self._reason

    @property
    def child_pid(self) -> int:
        """0 if there is none. Any thread."""
        child = self._child
        return child.process.pid if child else 0

    def start(self) -> None:
        """Start the child; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End the child, after the commit that it is at. Bounded."""
        with self._changed:
            self._state = State.STOPPED
            self._changed.notify_all()
        os.eventfd_write(self._stop_fd, 1)
        if self._thread.ident is not None:
            self._thread.join(STOP_S + 5.0)
        if not self._thread.is_alive():
            os.close(self._stop_fd)

    def take_loaded(self) -> Loaded | None:
        """What the child has found, once."""
        with self._changed:
            loaded, self._loaded = self._loaded, None
        return loaded

    def progress(self) -> tuple[int, int] | None:
        """Slots read of all slots while the index is rebuilt; otherwise None."""
        return self._progress if self._state is State.REBUILDING else None

    def commit(self, order: Commit) -> bool:
        """Write chunks, names and dropped segments in one transaction; True once it is durable.

        Blocks for `commit_s` at most. False: all, or nothing, of it is in the index; ask again with the chunks as they
        are then. False in state LOST: for good; see `headers_will_do`.
        """
        change = _change(order)
        if self._state is State.LOST:
            self._do_without(change)
        with self._changed:
            if self._state is not State.READY:
                return False
            self._asked += 1
            asked = self._asked
            if not self._send(change, asked):
                return False
            over = (State.LOST, State.STOPPED)
            if not self._changed.wait_for(lambda: self._answered >= asked or self._state in over, self._commit_s):
                self._state = State.HUNG
                self._reason = f"a commit has had no answer for {self._commit_s:g} s"
                log.warning("index hung: %s", self._reason)
                self._wake()
            return self._accepted == asked

    def _send(self, change: Change, asked: int) -> bool:
        """Whether to wait. Also if the child is dead: its thread will notice, and leave its mark before that ends."""
        try:
            fd, packed_bytes = change.into_memfd()
        except OSError as error:
            self._reason = str(error)
            return False
        try:
            if self._child:
                index_wire.send(self._child.link, Message(Kind.COMMIT, asked, packed_bytes, fd=fd))
        except OSError as error:
            log.info("index commit not sent: %s", error)
        finally:
            os.close(fd)
        return True

    # -- index thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if find_spec("lmdb") is None:  # every child would say so at length, and end
            self._lose("the package lmdb is not installed; it comes with kvstored[daemon]")
            return
        if self._directories[0] in self.mounts.absent:
            self._lose(f"{self._directories[0]}: {self.mounts.absent[self._directories[0]]}")
            return
        reason, died, passing = "", 0, 0
        while died <= REBUILDS:
            try:
                child = Child(
                    self._directories, rebuild=reason, map_bytes=self._map_bytes, owed=self._owed,
                    absent=self.mounts.absent,
                )  # fmt: skip
            except OSError as error:
                reason, died = f"no index child can be started: {error}", died + 1
                continue
            with self._changed:
                self._child = child
            end = self._converse(child)
            with self._changed:  # nobody sends on a link that is being closed
                self._child = None
            child.end(STOP_S if self._was_loaded else 0.0)
            if end is None:
                return
            kind, said = end
            log.warning("index: %s", said)
            if kind is _End.PASSING and passing < PASSING_TRIES and not self._was_loaded:
                passing += 1
                if self._stopped_within(PASSING_S):
                    return
                continue
            reason, died = said, died + 1
            if kind is not _End.DIED or self._was_loaded:
                break
        self._lose(reason)

    def _stopped_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._stop_fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _converse(self, child: Child) -> tuple[_End, str] | None:
        """Until the child is gone: why, and of what kind that is. None: `stop` was called."""
        poll = select.poll()
        poll.register(self._stop_fd, select.POLLIN)
        poll.register(child.link, select.POLLIN)
        patience_ms: float | None = self._answer_s * 1000
        while True:
            ready = poll.poll(patience_ms)
            if self._state is State.STOPPED:
                return None
            if not ready:
                self._set(State.HUNG, f"the index child has said nothing for {self._answer_s:g} s")
                patience_ms = None
                continue
            message = index_wire.receive(child.link)
            if message is None:
                return _End.DIED, self._why_gone(child)
            if message.kind is Kind.FAILED:
                return _End.PASSING if message.first in PASSING else _End.FINAL, message.text
            try:
                self._hear(message)
            except OSError as error:
                return _End.FINAL, f"what the index child has read cannot be mapped: {error}"
            patience_ms = None if self._was_loaded else self._answer_s * 1000

    def _why_gone(self, child: Child) -> str:
        why = child.why_gone()
        return self._reason or why if child.process.returncode == EXIT_DAMAGED else why

    def _hear(self, message: Message) -> None:
        if message.kind is Kind.PROGRESS:
            self._progress = (message.first, message.second)
            self._set(State.REBUILDING, "")
        elif message.kind is Kind.LOADED:
            loaded, unwritten = parse_loaded(message)
            if loaded.aside:
                log.warning(
                    "index: files=%d do not count: others of this store have their numbers. They are kept, under names "
                    "such as %s",
                    len(loaded.aside), loaded.aside[0],
                )  # fmt: skip
            self._loaded = loaded
            self._was_loaded = True
            self._set(State.READY, unwritten)
        else:
            assert message.kind in {Kind.DONE, Kind.REFUSED}
            with self._changed:
                self._answered = message.first
                if message.kind is Kind.DONE:
                    self._accepted = message.first
                self._reason = message.text
                healed = self._state is State.HUNG
                if healed:
                    self._state = State.READY
                self._changed.notify_all()
            if healed:
                self._wake()

    def _set(self, state: State, reason: str) -> None:
        with self._changed:
            if self._state is State.STOPPED:
                return
            before, self._state, self._reason = self._state, state, reason
        if state is State.HUNG or reason:
            log.warning("index %s: %s", state.value, reason)
        if before is not state:
            self._wake()

    @property
    def headers_will_do(self) -> bool:
        """Is this index lost, and will the next start know? Then what is synced is durable without it. Any thread."""
        return self._state is State.LOST and self._marked

    def _do_without(self, change: Change) -> None:
        """Have the next start believe the headers, and know the numbers of segments that are gone by then."""
        if not self._marked:
            self._mark()  # whatever kept it from that may be over
        if self._marked and change.next_segment > self._noted:
            with suppress(DamagedError, OSError):  # nothing but their blocks is lost, should they be given twice
                write_next(self._directories[0], change.next_segment, first=True)
                self._noted = change.next_segment

    def _mark(self) -> None:
        if why := self.mounts.why_absent(self._directories[0]):
            log.warning("index: cannot be marked doubtful: %s", why)
            return
        try:
            mark_doubtful(self._directories[0])
            self._marked = True
        except OSError as error:
            log.warning("index: cannot be marked doubtful: %s", error)

    def _lose(self, reason: str) -> None:
        if self._was_loaded:
            self._mark()
        else:
            nothing = self._nothing()
            if nothing.store and not self._note_life(nothing.next_segment):
                nothing = replace(nothing, store=b"", segments=[])
            if nothing.store:  # of another version: not even a mark
                self._mark()
            self._loaded = nothing
        self._set(State.LOST, reason)
        with self._changed:
            self._changed.notify_all()

    def _note_life(self, next_segment: int) -> bool:
        """What is stored now is not what somebody deleted before. If nobody can say so, nothing is to be stored."""
        if self._owed is not None:
            try:
                note_life(self._owed, next_segment)
            except DamagedError:
                pass  # nothing is taken over until somebody has looked
            except OSError as error:
                log.warning("index: nothing is made on disk, since the next start would remove it: %s", error)
                return False
        return True

    def _nothing(self) -> Loaded:
        """Start empty, past every number that a file has, and past every generation that there can be. What lies in
        segments of ours nobody knows, but whose they are: the next start may read them.
        """
        absent = self.mounts.absent
        try:
            found = Scan() if self._directories[0] in absent else scan(self._directories, absent)
        except (VersionError, OSError):
            found = scan_names(self._directories, absent)
        for double in found.doubles:
            found.hide_double(double, "another file has its number")
        if self._directories[0] not in absent:
            there = [directory for directory in self._directories if directory not in absent]
            found.next_segment = max(found.next_segment, read_next(there))
        if absent or found.unreadable:
            found.next_segment += UNSEEN
        if self._owed is not None:
            with suppress(DamagedError, OSError):  # as good as can be: nothing on disk is used in this life
                found.next_segment = max(found.next_segment, read_owed(self._owed).beyond(found.store))
        ours = [file.superblock for file in found.segments.values()]
        return Loaded(
            store=found.store or b"",
            segments=[Found(one.segment, one.slot_bytes, one.slots, one.tenant, None) for one in ours],
            directories={number: file.directory for number, file in found.segments.items()},
            key_ids={one.segment: one.key_id for one in ours},
            names=[],
            next_generation=time.time_ns() // 1000,
            next_segment=found.next_segment,
            foreign=found.foreign,
            unreadable=found.unreadable,
            rebuilt="",
            dropped=0,
            closed=frozenset(found.segments),
            looked=frozenset(found.looked),
            unread=found.unread,
        )


def _change(order: Commit) -> Change:
    change = Change(dropped=list(order.dropped))
    for segment, chunk, packed in order.chunks:
        records = np.frombuffer(packed, RECORD)
        change.highest = max(change.highest, int(records["generation"].max()), int(records["parent_generation"].max()))
        if segment not in order.failed:  # what was written there may be gone, and the kernel will not say so again
            change.chunks.append((CHUNK_KEY.pack(segment, chunk), seal_chunk(packed)))
    for name in order.names:
        if name.canonical:  # without, it came from the index
            digest = hashlib.sha256(name.canonical).digest()
            change.names.append((NAME_KEY.pack(name.number), pack_name(name.tenant, digest, name.canonical)))
    return change
