"""Descriptors that clients send. Closing one may wait for whatever it is: a socket that lingers, a file of a slow disk.

So the owner thread closes none of them: a thread of their own does. Where nobody is to send any, the kernel refuses
them (Linux 6.16); an older one would close what nobody takes on the thread that reads the socket.
"""

import logging
import os
import socket
import threading
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Final

SO_PASSRIGHTS: Final = 83  # Linux 6.16; Python has no name for it yet
CLOSING: Final = 1024  # so many that are not closed yet, and no more are taken
log = logging.getLogger(__name__)


def let_through(at: socket.socket, *, wanted: bool) -> bool:
    """Whether clients can send descriptors to a socket, or to those that a listening one accepts. False if unknown."""
    try:
        at.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, int(wanted))
    except OSError:
        return False
    return True


class Closing:
    """The thread, from the first descriptor on. `put` on the owner thread."""

    def __init__(self) -> None:
        self._line: SimpleQueue[int] = SimpleQueue()
        self._running = False

    @property
    def many(self) -> bool:
        """Are so many not closed yet that no more should come?"""
        return self._line.qsize() > CLOSING

    def put(self, fds: Iterable[int]) -> None:
        """Close these, some time."""
        for fd in fds:
            self._line.put(fd)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="closing", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                os.close(self._line.get())
            except OSError as error:  # it is closed all the same
                log.debug("a descriptor of a client: %s", error)


closing: Final = Closing()
