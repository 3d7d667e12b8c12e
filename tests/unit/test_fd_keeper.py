"""The fd-keeper finds, when it looks at last, what several daemons said before they died."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstored import fd_keeper
from kvstored.fd_keeper import FDS_PER_RECORD, Holder

WAIT_S = 30.0
DEAD_MAX = fd_keeper.CONNECTIONS_MAX - 2  # room for one that keeps and one that asks


class Frozen:
    """A keeper that has stood still so far: what is said to it lies there until `thaw`."""

    def __init__(self, folder: Path) -> None:
        umask = os.umask(0)
        try:
            self.listener = fd_keeper.listen(folder / fd_keeper.SOCKET_NAME)
        finally:
            os.umask(umask)
        self.holder = Holder(folder / fd_keeper.SOCKET_NAME, self.listener, WAIT_S)
        self.ended = ""
        self._path = str(folder / fd_keeper.SOCKET_NAME)
        self._thread = threading.Thread(target=self._serve)
        self._peers: list[socket.socket] = []

    def dial(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._peers.append(peer)
        peer.settimeout(WAIT_S)
        peer.connect(self._path)
        return peer

    def dead(self, *records: str) -> None:
        """Somebody who said this, and has died. KEEP hands memory over."""
        peer = self.dial()
        for record in records:
            fds = [os.memfd_create("kept")] if record.startswith("KEEP") else []
            fd_keeper.send(peer, record.encode(), fds)
            for fd in fds:
                os.close(fd)
        peer.close()

    def thaw(self) -> None:
        self._thread.start()

    def wait_end(self) -> str:
        """Why it ended; empty as it should."""
        self._thread.join(WAIT_S)
        return "it does not end" if self._thread.is_alive() else self.ended

    def close(self) -> None:
        """Without regard to how it fares."""
        if self._thread.ident is None:
            self.thaw()
        if self._thread.is_alive():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
                peer.connect(self._path)
                peer.send(b"QUIT")
                self.wait_end()
        for peer in self._peers:
            peer.close()
        for pidfd in self.holder._daemons.values():  # as the end of a process does
            os.close(pidfd)
        self.holder._epoll.close()

    def _serve(self) -> None:
        try:
            self.holder.serve()
        except (ArithmeticError, LookupError, OSError, RuntimeError) as error:  # it would have taken everything along
            self.ended = repr(error)
            self.holder._leave()


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Frozen]:
    made = Frozen(tmp_path)
    yield made
    made.close()


def answer(peer: socket.socket) -> bytes:
    """What it says; nothing if it hangs up."""
    try:
        record, fds, _ = fd_keeper.receive(peer, FDS_PER_RECORD, wait=True)
    except ConnectionResetError:
        return b""
    for fd in fds:
        os.close(fd)
    return record


def asked(frozen: Frozen) -> socket.socket:
    peer = frozen.dial()
    peer.send(b"TAKE 0")
    return peer


@pytest.mark.parametrize("dead", range(1, DEAD_MAX + 1))
def test_starts_that_were_killed_while_they_asked_take_nothing_along(frozen: Frozen, dead: int) -> None:
    frozen.dead("KEEP arena-1", "KEEP table-a")
    for _ in range(dead):
        frozen.dead("TAKE 0")
    successor = asked(frozen)
    frozen.thaw()
    assert answer(successor) == b"HELD 2 0 arena-1 table-a", frozen.ended


def test_however_often_they_asked(frozen: Frozen) -> None:
    """Answering one on the way to another, and so on, would be deeper than Python goes."""
    frozen.dead("KEEP arena-1")
    for _ in range(DEAD_MAX):
        frozen.dead(*["TAKE 0"] * 60)
    for _ in range(DEAD_MAX + 1):
        frozen.holder._accept()  # before it stood still, all of them
    successor = asked(frozen)
    frozen.thaw()
    assert answer(successor) == b"HELD 1 0 arena-1", frozen.ended


def test_what_was_said_after_an_answer_that_nobody_reads_counts(
    frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that was forgotten at the end must not come back."""
    monkeypatch.setattr(frozen.holder, "_held_max", 2)
    frozen.dead("KEEP arena-1", "KEEP arena-2", "TAKE 0", "KEEP arena-3", "FORGET arena-1")
    successor = asked(frozen)
    frozen.thaw()
    assert answer(successor) == b"HELD 1 0 arena-2", frozen.ended


@pytest.mark.parametrize("ask", [True, False])
def test_a_daemon_that_gave_up_asking_and_served_without_leaves_nothing_of_the_life_before(
    frozen: Frozen, *, ask: bool
) -> None:
    frozen.dead("KEEP arena-1")
    frozen.dead("TAKE 0", "QUIT")
    successor = asked(frozen) if ask else None
    frozen.thaw()
    if successor is not None:
        assert answer(successor) in {b"HELD 0 0", b""}
    assert frozen.wait_end() == ""


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.sampled_from(["TAKE 0", "TAKE 253", "KEEP a", "KEEP b", "FORGET a", "CLEAR", "PATIENCE 30", "?"])),
        max_size=DEAD_MAX,
    )
)
def test_whatever_the_dead_have_said_the_living_gets_an_answer(
    tmp_path_factory: pytest.TempPathFactory, said: list[list[str]]
) -> None:
    frozen = Frozen(tmp_path_factory.mktemp("keeper"))
    try:
        for records in said:
            frozen.dead(*records)
        successor = asked(frozen)
        frozen.thaw()
        assert answer(successor).startswith(b"HELD "), frozen.ended
    finally:
        frozen.close()
    assert frozen.wait_end() == ""
