"""What both kinds of connection have: where the daemon is, the link to it, whether it may be used, when to retry, and
what is said one way: `say` sends now or never.
"""

import dataclasses
import os
import threading
import time
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from kvclient.link import GoneError, Link
from kvclient.mapping import HostMemory
from kvclient.paths import runtime_dir
from kvclient.protocol import Session
from kvclient.refusals import Refusals
from kvclient.results import Status
from kvproto.errors import ClosedError, ForkError, KvError
from kvproto.frames import Hello

TICK_S: Final = 0.05
RETRY_S: Final = 0.02
RETRY_S_MAX: Final = 0.25  # an attempt takes microseconds, and service resumes within this after a restart
LASTED_S: Final = 1.0  # a session that lasted so long was a good one
PROBE_NS: Final = 10**9


class Endpoint:
    """The daemon as one client sees it. `_link` is None while there is no session."""

    def __init__(self, given_dir: str | os.PathLike[str] | None, hello: Hello, timeout_ns: int) -> None:
        self.hello = hello
        self.timeout_ns = timeout_ns
        self._given_dir = given_dir
        self.memory = HostMemory()
        self._link: Link | None = None
        self._why_not = "not connected yet"
        self._dead: type[KvError] | None = None
        self._retry_s = RETRY_S
        self._retry_ns = 0  # when to try again
        self._probe_ns = 0  # when to ask a silent daemon again
        self.refusals = Refusals()  # over all sessions
        self.hints_dropped = 0  # one-way frames that were never sent
        self.mode_wished = ""  # set by whoever connects
        self.large_copies = 0  # by leases; now and then one is timed
        self.telling = threading.Lock()  # held while hints are said in an order that matters; never waited under
        _endpoints.add(self)

    def session(self) -> Session | None:
        """The session right now. Raises ForkError or ClosedError."""
        if self._dead is not None:
            self.check()
        link = self._link
        return link.session if link is not None else None

    @property
    def connected(self) -> bool:
        """Whether there is a session right now. Raises ForkError."""
        self.check_fork()
        return self._link is not None

    def check(self) -> None:
        """Raises ForkError in a forked child, ClosedError after `close`."""
        self.check_fork()
        if self._dead is not None:
            raise ClosedError("this client is closed")

    def check_fork(self) -> None:
        """Raises ForkError in a forked child, where nothing that was mapped exists."""
        if self._dead is ForkError:
            raise ForkError("this client belongs to the parent process; connect anew after a fork")

    def status(self) -> Status:
        """Where this stands."""
        directory = str(self._directory())
        link = self._link
        if link is None or link.session.welcome is None:
            status = Status(connected=False, why_not=self._why_not, runtime_dir=directory)
        else:
            status = link.session.status(directory, link.peer_pid())
        return dataclasses.replace(
            status, hints_dropped=self.hints_dropped, hints_refused=self.refusals.count, mode_wished=self.mode_wished
        )

    def say(self, session: Session | None, frame: bytes) -> bool:
        """Send a frame that nobody answers, if there is room for it right now; else it is dropped and counted.

        Whether it was sent. Never waits, whatever the daemon does.
        """
        link = self._link
        if link is not None and link.session is session and not session.over and self._listens(link):
            try:
                if link.try_send(frame):
                    return True
            except GoneError as gone:
                self._drop(link, str(gone))
        self.drop_hint()
        return False

    def drop_hint(self) -> None:
        """Something one way is not said after all: count it."""
        with self.guard():
            self.hints_dropped += 1

    def forget(self) -> None:
        """In a forked child: let go of what belongs to the parent. No lock is touched: any may be held for ever."""
        self._dead = ForkError
        self._why_not = "forked"
        link, self._link = self._link, None
        if link is not None:
            link.sock.close()

    def guard(self) -> AbstractContextManager[object]:
        """What guards the session: nothing blocks under it."""
        raise NotImplementedError

    def catch_up(self) -> None:
        """Take the frames that are there; never waits."""
        raise NotImplementedError

    def distrust(self, session: Session, why: str) -> None:
        """End a session whose daemon said what no daemon should."""
        raise NotImplementedError

    def _drop(self, link: Link, why: str) -> None:
        """The link is over: every call on it is lost."""
        raise NotImplementedError

    def _listens(self, link: Link) -> bool:
        """Whether the daemon is there, as far as is known. Never waits."""
        return not link.session.silent

    def _directory(self) -> Path:
        return runtime_dir(self._given_dir)

    def _lost(self, link: Link, why: str) -> None:
        """The link has ended. A session that lasted is worth a quick retry; one that did not, an ever slower one."""
        if self._link is link:
            self._link = None
            self._why_not = why
            lasted = time.monotonic_ns() - link.since_ns > LASTED_S * 1e9
            self._retry_in(RETRY_S if lasted else min(2 * self._retry_s, RETRY_S_MAX))

    def _retry_in(self, retry_s: float) -> None:
        self._retry_s = retry_s
        self._retry_ns = time.monotonic_ns() + int(retry_s * 1e9)

    def _retry_left_s(self) -> float:
        return max(0.0, (self._retry_ns - time.monotonic_ns()) / 1e9)

    def _probe_is_due(self) -> bool:
        now_ns = time.monotonic_ns()
        if now_ns < self._probe_ns:
            return False
        self._probe_ns = now_ns + PROBE_NS
        return True


_endpoints: "weakref.WeakSet[Endpoint]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for endpoint in list(_endpoints):
        endpoint.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
