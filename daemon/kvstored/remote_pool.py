"""Threads that make requests, and how many bytes may be on their way. The threads end with the process."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

from kvstored.leaf import NICE
from kvstored.niceness import be_nice

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """A few threads that carry out calls. `concurrent.futures` has one, which holds up the end of the process."""

    def __init__(self, threads: int, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """They end when they have done what was submitted. Does not wait for that."""
        for _ in self._threads:
            self._calls.put(None)

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Have a call made."""
        future: Future[T] = Future()

        def make() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001  whoever waits for the future gets it
                future.set_exception(error)

        self._calls.put(make)
        return future

    def _run(self) -> None:
        be_nice(NICE)
        while (call := self._calls.get()) is not None:
            call()
            del call  # it would keep what was read


class Budget:
    """Bytes that may be on their way at a time. Any thread."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._used = 0
        self._freed = threading.Condition()
        self._closed = False

    def take(self, count: int, *, wait: bool) -> bool:
        """True once there is room; one that is larger than all of it goes alone."""
        with self._freed:
            while self._used and self._used + count > self._most and not self._closed:
                if not wait:
                    return False
                self._freed.wait()
            if self._closed:
                return False
            self._used += count
            return True

    def give(self, count: int) -> None:
        """These are gone."""
        with self._freed:
            self._used -= count
            self._freed.notify_all()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._freed:
            self._closed = True
            self._freed.notify_all()
