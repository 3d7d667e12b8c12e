"""The connection of a client that uses threads: who reads the socket, and coming back after the daemon went away.

There is no reader thread on the hot path. A caller that waits for an answer takes the reading lock and reads frames
for everybody until its own answer has come (the leader); callers that find the lock taken sleep (followers) and are
woken when their answer has come or when it is their turn to lead. So an undisturbed request costs one send and one
recvmsg, both in the thread that made it.

An exception in the middle of that (^C, or whatever else a signal handler raises) ends the session: a frame that nobody
took may be lost, and the next one would be taken for it; one that was being sent may be sent or not.

One background thread ticks: it takes frames that nobody waits for, sends what found no frame to ride on, reconnects.

    lock        guards                                   held while
    _reading    receiving from the socket                a frame is awaited, at most until the leader's deadline
    _mutex      the session, the followers, the link     something is looked up or built; nothing blocks under it
"""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from kvclient.calls import Call
from kvclient.endpoint import RETRY_S_MAX, TICK_S, Endpoint
from kvclient.flows import Commit, Copy, Flow, Step, nanoseconds
from kvclient.ledger import Waiter, Watcher
from kvclient.link import GoneError, Link, dial, greet, take
from kvclient.protocol import Session
from kvclient.results import Reason
from kvproto.errors import ClosedError, ForkError, KvError, RefusedError
from kvproto.frames import Hello

_R = TypeVar("_R")
_INTERRUPTED: Final = "interrupted in the middle of a frame"

_clock = time.monotonic_ns


class Connection(Endpoint):
    """Always usable: while there is no daemon, flows end at once with what counts as a miss. Any thread."""

    def __init__(self, given_dir: str | os.PathLike[str] | None, hello: Hello, timeout_ns: int) -> None:
        super().__init__(given_dir, hello, timeout_ns)
        self._mutex = threading.Lock()
        self._reading = threading.Lock()
        self._followers: list[Waiter] = []
        self._up = threading.Event()
        self._stir = threading.Event()  # wakes the background thread before its time
        self._thread: threading.Thread | None = None

    # -- for the verbs ------------------------------------------------------------------------------------------

    def run(self, flow: Flow[_R]) -> _R:
        """Perform a flow's steps, blocking, and return what it returns."""
        try:
            while True:
                self._perform(next(flow))
        except StopIteration as stop:
            result: _R = stop.value
            return result
        finally:
            flow.close()

    def run_later(self, flow: Flow[_R]) -> Callable[[], _R]:
        """Send a flow's first request, and wait for nothing. What is returned does the rest, as `run`: call it once."""
        try:
            first = next(flow)
        except StopIteration as stop:
            return partial(_same, stop.value)
        link = self._send(first) if isinstance(first, Call) else None
        return partial(self._finish, flow, first, link)

    def _finish(self, flow: Flow[_R], first: Step, link: Link | None) -> _R:
        if not isinstance(first, Call):
            self._perform(first)
        elif link is not None:
            self._hear(link, first)
        return self.run(flow)

    def _perform(self, step: Step) -> None:
        if isinstance(step, Call):
            self._ask(step)
        elif isinstance(step, Copy):
            step.carry_out()
        elif isinstance(step, Commit):
            self._commit(step)
        elif isinstance(step, Watcher):
            self._watch(step)
        elif self._link is not None:
            self._wait(self._link, step)

    # -- steps --------------------------------------------------------------------------------------------------

    def _ask(self, call: Call) -> None:
        link = self._send(call)
        if link is not None:
            self._hear(link, call)

    def _send(self, call: Call) -> Link | None:
        """Where its answer will come from; None if it is lost."""
        session = call.session
        link = self._link
        if link is None or link.session is not session or not self._listens(link):
            call.lose(Reason.UNREACHABLE)
            return None
        with self._mutex:
            if session.over:
                call.lose(Reason.UNREACHABLE)
                return None
            frame = session.submit(call, _clock())
        try:
            link.send(frame, call.deadline_ns, call.fds)
        except GoneError as gone:
            self._drop(link, str(gone))
        except BaseException:
            self._drop(link, _INTERRUPTED)
            raise
        return link

    def _hear(self, link: Link, call: Call) -> None:
        """Until its answer has come, or its deadline has passed."""
        try:
            self._wait(link, call)
        finally:
            self._leave(call)

    def _leave(self, call: Call) -> None:
        if not call.done:
            with self._mutex:
                call.session.abandon(call)

    def _commit(self, step: Commit) -> None:
        link = self._link
        with self._mutex:
            if link is None or link.session is not step.session or step.session.over:
                return
            frame = step.session.commit(step.tickets, step.ledger)
        step.sent = True
        try:
            link.send(frame, step.deadline_ns)
        except GoneError as gone:
            self._drop(link, str(gone))
        except BaseException:
            self._drop(link, _INTERRUPTED)
            raise

    def _watch(self, step: Watcher) -> None:
        link = self._link
        with self._mutex:
            step.watch()
        try:
            if link is not None:
                self._wait(link, step)
        finally:
            with self._mutex:
                step.leave()

    # -- leader and followers -----------------------------------------------------------------------------------

    def _wait(self, link: Link, waiter: Waiter) -> None:
        """Until the waiter is done, its deadline has passed, or the link is gone."""
        deadline_ns = waiter.deadline_ns
        session = link.session
        while not waiter.done and not session.over and _clock() < deadline_ns:
            if self._reading.acquire(blocking=False):
                try:
                    self._lead(link, waiter)
                finally:
                    self._reading.release()
            else:
                self._follow(waiter)
        if self._followers:
            self._hand_on()

    def _lead(self, link: Link, waiter: Waiter) -> None:
        deadline_ns = waiter.deadline_ns
        try:
            while not waiter.done:
                message = link.receive(deadline_ns)
                if message is not None:
                    self._take(link, *message)
                elif link.session.over or _clock() >= deadline_ns:
                    return
        except GoneError as gone:
            self._drop(link, str(gone))
        except BaseException:
            self._drop(link, _INTERRUPTED)
            raise

    def _follow(self, waiter: Waiter) -> None:
        turn = threading.Lock()
        turn.acquire()
        with self._mutex:
            if waiter.done:
                return
            waiter.wake = turn.release
            self._followers.append(waiter)
        try:
            # The leader releases the lock first and looks for followers then; this is the other order.
            if self._reading.locked():
                turn.acquire(timeout=max(0, waiter.deadline_ns - _clock()) / 1e9)
        finally:
            with self._mutex:
                waiter.wake = None
                self._followers.remove(waiter)

    def _hand_on(self) -> None:
        """Wake a follower to lead, unless somebody does already."""
        if self._reading.locked():
            return
        with self._mutex:
            for follower in self._followers:
                if not follower.done and follower.wake is not None:
                    follower.nudge()
                    return

    def _take(self, link: Link, frame: bytes, fds: Sequence[int]) -> None:
        try:
            with self._mutex:
                take(link, frame, fds)
        except KvError as error:
            raise GoneError(link.session.goodbye or f"the daemon broke the protocol: {error}") from error
        if link.session.unmapped:
            self._send_chores(link)

    def _drain(self, link: Link) -> None:
        """Take the frames that are there, unless somebody else is reading."""
        if not self._reading.acquire(blocking=False):
            return
        try:
            while (message := link.try_receive()) is not None:
                self._take(link, *message)
        except GoneError as gone:
            self._drop(link, str(gone))
        except BaseException:
            self._drop(link, _INTERRUPTED)
            raise
        finally:
            self._reading.release()
            if self._followers:
                self._hand_on()

    def _listens(self, link: Link) -> bool:
        if link.session.silent:
            self._drain(link)  # unless it has spoken again
        return not link.session.silent

    # -- coming and going ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Try to connect once, then keep trying in the background. Raises RefusedError if the daemon says no."""
        self._connect()
        self._thread = threading.Thread(
            target=_tick_forever, args=(weakref.ref(self), self._stir), name="kvclient-tick", daemon=True
        )
        self._thread.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """Whether there is a session, waiting up to `timeout_s` for one."""
        self.check()
        return self._up.wait(nanoseconds("timeout_s", timeout_s) / 1e9)

    def close(self) -> None:
        """End the session. Leases stay good until their deadlines, for copies under way. Does nothing in a child."""
        if self._dead is not None:
            return
        with self._mutex:  # a link that is just being made either sees this or is seen
            self._dead = ClosedError
            link = self._link
        if link is not None:
            with self._mutex:
                link.session.let_go()
            self._send_chores(link)
            self._drop(link, "closed")
        self._stir.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self.timeout_ns / 1e9)

    def guard(self) -> contextlib.AbstractContextManager[object]:
        """See `Endpoint`."""
        return self._mutex if self._dead is not ForkError else contextlib.nullcontext()  # may be held for ever there

    def catch_up(self) -> None:
        """See `Endpoint`."""
        if (link := self._link) is not None:
            self._drain(link)

    def distrust(self, session: Session, why: str) -> None:
        """See `Endpoint`."""
        link = self._link
        if link is not None and link.session is session:
            self._drop(link, f"the daemon broke the protocol: {why}")

    def _drop(self, link: Link, why: str) -> None:
        """The link is over: every call on it is lost. Any thread, any number of times."""
        with self._mutex:
            link.shut()  # first: whoever finds the session over may ask the next one what has become of it
            link.session.end()
            if self._link is link:
                self._up.clear()
            self._lost(link, why)
        self._stir.set()

    def _connect(self) -> None:
        """One attempt. Raises RefusedError; other trouble is left in the status."""
        self._retry_in(min(2 * self._retry_s, RETRY_S_MAX))
        try:
            link = Link(dial(self._directory()), Session(self.memory, self.refusals))
        except GoneError as gone:
            self._why_not = str(gone)
            return
        try:
            greet(link, self.hello, _clock() + self.timeout_ns)
        except (GoneError, KvError) as error:
            link.shut()
            self._why_not = link.session.goodbye or str(error)
            if isinstance(error, RefusedError):
                raise
            return
        with self._mutex:
            if self._dead is None:
                self._link = link
                self._why_not = ""
                self._up.set()
                return
        link.shut()

    # -- the background thread ----------------------------------------------------------------------------------

    def tick(self) -> float:
        """What nobody waits for; seconds until it is worth doing again. One thread at a time."""
        self.refusals.log(_clock())
        link = self._link
        if link is not None:
            self._drain(link)
            if link.session.has_chores or link.backlog:
                self._send_chores(link)
            if link.session.silent:
                self._probe(link)
            if link.session.hopeless:
                self._drop(link, "the daemon leaves requests unanswered")
            return TICK_S
        if _clock() >= self._retry_ns:
            with contextlib.suppress(RefusedError):  # the status says so; another daemon may come
                self._connect()
        return min(TICK_S, self._retry_left_s())

    @property
    def is_dead(self) -> bool:
        """Closed, or in a forked child."""
        return self._dead is not None

    def _send_chores(self, link: Link) -> None:
        try:
            with self._mutex:
                link.backlog.extend(link.session.chores())
                link.backlog.extend(link.session.renewals(_clock()))
                while link.backlog and link.try_send(link.backlog[0]):
                    del link.backlog[0]
        except GoneError as gone:
            self._drop(link, str(gone))

    def _probe(self, link: Link) -> None:
        """Ask a daemon that missed a deadline whether it is there again. Any frame from it will do as an answer."""
        if not self._probe_is_due():
            return
        with self._mutex:
            if not link.session.over:
                link.backlog.append(link.session.probe(_clock()))
        self._send_chores(link)


def _same(value: _R) -> _R:
    return value


def _tick_forever(connection: "weakref.ref[Connection]", stir: threading.Event) -> None:
    # Holds no strong reference while it sleeps: a client that is dropped without `close` ends this thread too.
    pause_s = 0.0
    while True:
        stir.wait(pause_s)
        stir.clear()
        alive = connection()
        if alive is None or alive.is_dead:
            return
        pause_s = alive.tick()
        del alive
