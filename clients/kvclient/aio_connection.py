"""The connection of a client that lives in an event loop. The loop itself is the guard of the session."""

import asyncio
import contextlib
import contextvars
import os
import time
from collections.abc import Callable
from typing import TypeVar

from kvclient.calls import Call, HelloCall
from kvclient.endpoint import RETRY_S_MAX, TICK_S, Endpoint
from kvclient.flows import Commit, Copy, Flow, Step, nanoseconds
from kvclient.ledger import Waiter, Watcher
from kvclient.link import GoneError, Link, dial, take
from kvclient.protocol import Session
from kvclient.results import Reason
from kvproto.errors import ClosedError, KvError, RefusedError, UsageError
from kvproto.frames import Hello

_R = TypeVar("_R")
_clock = time.monotonic_ns


class AsyncConnection(Endpoint):
    """Always usable: while there is no daemon, flows end at once with what counts as a miss."""

    def __init__(self, given_dir: str | os.PathLike[str] | None, hello: Hello, timeout_ns: int) -> None:
        super().__init__(given_dir, hello, timeout_ns)
        self._up = asyncio.Event()
        self._stir = asyncio.Event()
        self._refusal: RefusedError | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that `start` ran in

    async def run(self, flow: Flow[_R]) -> _R:
        """Perform a flow's steps and return what it returns."""
        try:
            while True:
                await self._perform(next(flow))
        except StopIteration as stop:
            result: _R = stop.value
            return result
        finally:
            flow.close()

    async def _perform(self, step: Step) -> None:
        if isinstance(step, Call):
            await self._ask(step)
        elif isinstance(step, Copy):
            await in_thread(step.carry_out)
        elif isinstance(step, Commit):
            await self._commit(step)
        elif isinstance(step, Watcher):
            await self._watch(step)
        else:
            await self._wait(step)

    # -- steps --------------------------------------------------------------------------------------------------

    async def _ask(self, call: Call) -> None:
        session = call.session
        link = self._link
        if link is None or link.session is not session or session.silent:
            call.lose(Reason.UNREACHABLE)
            return
        await self._ask_on(link, call)

    async def _ask_on(self, link: Link, call: Call) -> None:
        frame = link.session.submit(call, _clock())
        try:
            await self._send(link, frame, call.deadline_ns)
            await self._wait(call)
        finally:
            link.session.abandon(call)  # does nothing if it is done

    async def _commit(self, step: Commit) -> None:
        link = self._link
        if link is None or link.session is not step.session:
            return
        frame = step.session.commit(step.tickets, step.ledger)
        step.sent = True
        await self._send(link, frame, step.deadline_ns)

    async def _watch(self, step: Watcher) -> None:
        step.watch()
        try:
            await self._wait(step)
        finally:
            step.leave()

    async def _wait(self, waiter: Waiter) -> None:
        if waiter.done:
            return
        came = asyncio.Event()
        waiter.wake = came.set
        try:
            async with asyncio.timeout(max(0, waiter.deadline_ns - _clock()) / 1e9):
                await came.wait()
        except TimeoutError:
            pass
        finally:
            waiter.wake = None

    async def _send(self, link: Link, frame: bytes, deadline_ns: int) -> None:
        """Send one message, waiting for room until the deadline; past that the link is given up.

        Of a caller that is cancelled meanwhile it is sent yet: what rides on it counts as said.
        """
        try:
            while not (self._sent_backlog(link) and link.try_send(frame)):
                if _clock() >= deadline_ns:
                    self._drop(link, "the daemon does not read its socket")
                    return
                await asyncio.sleep(0.001)  # rare: some thousand frames are queued
        except GoneError as gone:
            self._drop(link, str(gone))
        except asyncio.CancelledError:
            link.backlog.append(frame)
            raise

    def _sent_backlog(self, link: Link) -> bool:
        """Send what waits for room, as far as there is some; whether that was all. Raises GoneError."""
        while link.backlog and link.try_send(link.backlog[0]):
            del link.backlog[0]
        return not link.backlog

    def _readable(self, link: Link) -> None:
        try:
            while (message := link.try_receive()) is not None:
                take(link, *message)
        except RefusedError as error:
            self._refusal = error
            self._drop(link, str(error))
        except (GoneError, KvError) as error:
            self._drop(link, link.session.goodbye or str(error))
        except BaseException:  # out of a signal handler: what was not taken is lost, and the next would be taken for it
            self._drop(link, "interrupted in the middle of a frame")
            raise
        if link.session.unmapped:
            self._send_chores(link)

    # -- coming and going ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Try to connect once, then keep trying in the background. Raises RefusedError if the daemon says no."""
        self._loop = asyncio.get_running_loop()
        await self._connect()
        if self._refusal is not None:
            raise self._refusal
        self._task = asyncio.create_task(self._tick_forever())

    async def wait_connected(self, timeout_s: float) -> bool:
        """Whether there is a session, waiting up to `timeout_s` for one."""
        self.check()
        try:
            async with asyncio.timeout(nanoseconds("timeout_s", timeout_s) / 1e9):
                return await self._up.wait()
        except TimeoutError:
            return False

    async def close(self) -> None:
        """End the session. Does nothing in a forked child.

        From another loop only once the first one is closed. Raises UsageError.
        """
        if self._dead is not None:
            return
        if self._loop not in (None, asyncio.get_running_loop()):
            if not self._loop.is_closed():
                raise UsageError("close() belongs into the loop that connect ran in, which is not closed")
            self._stir, self._task = asyncio.Event(), None  # with that loop all ended who waited for them
        self._dead = ClosedError
        if self._link is not None:
            self._send_chores(self._link)
            self._drop(self._link, "closed")
        self._stir.set()
        if self._task is not None:
            await asyncio.wait([self._task])  # it may have been cancelled, and this was not

    async def _connect(self) -> None:
        self._retry_in(min(2 * self._retry_s, RETRY_S_MAX))
        self._refusal = None
        try:
            link = Link(dial(self._directory()), Session(self.memory, self.refusals))
        except GoneError as gone:
            self._why_not = str(gone)
            return
        asyncio.get_running_loop().add_reader(link.sock, self._readable, link)
        call = HelloCall(link.session, self.hello, _clock() + self.timeout_ns)
        self._why_not = "the daemon does not answer HELLO"
        try:
            await self._ask_on(link, call)
        except BaseException:
            self._drop(link, "cancelled")
            raise
        if link.session.welcome is not None and not link.session.over and self._dead is None:
            self._link = link
            self._why_not = ""
            self._up.set()
            return
        if isinstance(call.error, RefusedError):
            self._refusal = call.error
        refusal = call.error or self._refusal or link.session.goodbye
        self._why_not = str(refusal or self._why_not)
        self._drop(link, self._why_not)

    def guard(self) -> contextlib.AbstractContextManager[object]:
        """See `Endpoint`."""
        return contextlib.nullcontext()

    def catch_up(self) -> None:
        """See `Endpoint`."""
        if (link := self._link) is not None:
            self._readable(link)

    def distrust(self, session: Session, why: str) -> None:
        """See `Endpoint`."""
        if self._link is not None and self._link.session is session:
            self._drop(self._link, f"the daemon broke the protocol: {why}")

    def _drop(self, link: Link, why: str) -> None:
        if not link.session.over:
            asyncio.get_running_loop().remove_reader(link.sock)
        link.session.end()
        if self._link is link:
            self._up.clear()
        self._lost(link, why)
        link.shut()
        self._stir.set()

    async def _tick_forever(self) -> None:
        while self._dead is None:
            self.refusals.log(_clock())
            link = self._link
            pause_s = TICK_S
            if link is not None:
                if link.session.silent and self._probe_is_due():
                    link.backlog.append(link.session.probe(_clock()))
                if link.session.has_chores or link.backlog:
                    self._send_chores(link)
                if link.session.hopeless:
                    self._drop(link, "the daemon leaves requests unanswered")
            elif self._retry_left_s() <= 0:
                await self._connect()
            else:
                pause_s = min(TICK_S, self._retry_left_s())
            self._stir.clear()
            try:
                async with asyncio.timeout(pause_s):
                    await self._stir.wait()
            except TimeoutError:
                pass

    def _send_chores(self, link: Link) -> None:
        try:
            link.backlog.extend(link.session.chores())
            link.backlog.extend(link.session.renewals(_clock()))
            self._sent_backlog(link)
        except GoneError as gone:
            self._drop(link, str(gone))


async def in_thread(copying_verb: Callable[[], None]) -> None:
    """Copy without holding up the loop. Cancelling waits for the copy: nothing may write to a target afterwards."""
    # No task: whoever cancels all of them, as `asyncio.run` does at its end, would end it before its thread.
    loop = asyncio.get_running_loop()
    copying = loop.run_in_executor(None, contextvars.copy_context().run, copying_verb)
    try:
        await asyncio.shield(copying)
    except asyncio.CancelledError:
        while not copying.done():
            try:
                await asyncio.wait([copying])
            except asyncio.CancelledError:
                continue
        raise
