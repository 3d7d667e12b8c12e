"""The event loop of the owner thread: descriptors, one timer, and questions from other threads."""

import os
import select
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Handler = Callable[[int], None]

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
CLOSED = select.EPOLLHUP | select.EPOLLERR


class Loop:
    """epoll with handlers. Everything but `wake`, `call`, `ask` and `stop` belongs to the owner thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls: deque[Callable[[], None]] = deque()
        self._stopping = False
        self.watch(self._wake_fd, READABLE, self._on_wake)

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler(events)` when a descriptor is ready."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def rewatch(self, fd: int, events: int) -> None:
        """Change what is waited for."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor, before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def run(self, turn: Callable[[], int]) -> None:
        """Serve until `stop`. `turn` runs after each batch of events and says when to run again at the latest."""
        handlers = self._handlers
        poll = self._epoll.poll
        tick_ns = turn()
        while not self._stopping:
            for fd, events in poll(max(0, tick_ns - time.monotonic_ns()) / 1e9):
                handler = handlers.get(fd)
                if handler is not None:
                    handler(events)
            tick_ns = turn()

    def close(self) -> None:
        """Give the descriptors back."""
        self._epoll.close()
        os.close(self._wake_fd)

    # -- any thread ----------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Make the loop turn once. Any thread, and signal handlers."""
        os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """Leave `run` after this turn. Any thread, and signal handlers."""
        self._stopping = True
        self.wake()

    def call(self, function: Callable[[], None]) -> None:
        """Have something run on the owner thread, without waiting for it. Any thread."""
        self._calls.append(function)
        self.wake()

    def ask(self, question: Callable[[], T], timeout_s: float) -> T:
        """Run a question on the owner thread and wait for its answer. Raises TimeoutError, or what it raised."""
        answer: Future[T] = Future()

        def run() -> None:
            if answer.set_running_or_notify_cancel():
                _settle(answer, question)

        self.call(run)
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            answer.cancel()
            raise

    def _on_wake(self, _events: int) -> None:
        os.eventfd_read(self._wake_fd)
        for _ in range(len(self._calls)):  # what they add runs in the next turn
            self._calls.popleft()()


def _settle(answer: "Future[Any]", question: Callable[[], Any]) -> None:
    try:
        answer.set_result(question())
    except Exception as error:  # noqa: BLE001  it is raised again in the thread that asked
        answer.set_exception(error)
