"""What a service manager is told while the daemon serves, and which of its words are believed."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvstored import notify
from kvstored.notify import WATCHDOG, Notifier
from kvstored.service import BEATS, HOT_SOCKET, STATUS_NS, Pulse, Service, listen, service_of
from kvstored.units import ConfigError

FIRST = 1600  # where these tests have descriptors passed: 3 and on are pytest's
SECOND_NS = 10**9


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(str(tmp_path / "notify"))
    made.setblocking(False)
    yield made
    made.close()


@pytest.fixture
def notifier(manager: socket.socket) -> Iterator[Notifier]:
    made = Notifier(manager.getsockname())
    yield made
    made.close()


def heard(manager: socket.socket) -> list[str]:
    """All that lies there."""
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


@pytest.fixture
def pass_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Sequence[tuple[str, int]]], dict[str, str]]]:
    """Call it with names and descriptors: the environment of a process that was given them."""
    monkeypatch.setattr(notify, "_FIRST_FD", FIRST)
    count = 0

    def give(passed: Sequence[tuple[str, int]]) -> dict[str, str]:
        nonlocal count
        count = len(passed)
        for number, (_, fd) in enumerate(passed):
            os.dup2(fd, FIRST + number)
        names = ":".join(name for name, _ in passed)
        return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names}

    yield give
    os.closerange(FIRST, FIRST + count)


# The watchdog


@pytest.mark.parametrize(
    ("environ", "watchdog_ns"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30 * SECOND_NS),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30 * SECOND_NS),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
        ({"WATCHDOG_USEC": "-1"}, 0),
        ({"WATCHDOG_USEC": "9" * 20}, 0),
        ({}, 0),
    ],
)
def test_a_watchdog_is_one_that_means_this_process(environ: dict[str, str], watchdog_ns: int) -> None:
    assert service_of(environ, os.getpid(), Path("/run/hot.sock")).watchdog_ns == watchdog_ns


def test_a_watchdog_is_fed_three_times_before_it_bites_and_the_line_is_said_when_it_changes(
    manager: socket.socket, notifier: Notifier
) -> None:
    lines = iter(["a", "a", "b", "b"])
    pulse = Pulse(Service(notifier, watchdog_ns=6 * SECOND_NS), lambda: next(lines))
    now_ns = 5 * SECOND_NS
    pulse.beat(now_ns)
    assert heard(manager) == [WATCHDOG, "STATUS=a"]
    told = []
    while now_ns < 5 * SECOND_NS + 2 * STATUS_NS:
        assert pulse.due_ns - now_ns == 6 * SECOND_NS // BEATS
        now_ns = pulse.due_ns
        pulse.beat(now_ns)
        told += heard(manager)
    assert told == [WATCHDOG] * 10 + ["STATUS=b"]


def test_without_a_watchdog_only_the_line_is_said_and_without_a_manager_nothing_is_due(
    manager: socket.socket, notifier: Notifier
) -> None:
    pulse = Pulse(Service(notifier), lambda: "a")
    pulse.beat(0)
    assert heard(manager) == ["STATUS=a"]
    assert pulse.due_ns == STATUS_NS
    assert Pulse(Service(), lambda: "a").due_ns > 1 << 60


def test_a_manager_that_does_not_read_finds_one_beat_and_not_a_thousand(
    manager: socket.socket, notifier: Notifier
) -> None:
    pulse = Pulse(Service(notifier, watchdog_ns=3 * SECOND_NS), lambda: "a")
    for number in range(1000):
        pulse.beat(number * SECOND_NS)
    assert notifier.pending <= 2
    assert notifier.queue.faults == []
    assert heard(manager)
    notifier.flush()
    assert heard(manager)[-1] == WATCHDOG


# The socket


def test_a_passed_socket_serves_with_what_was_kept_beside_it(
    tmp_path: Path, pass_on: Callable[[Sequence[tuple[str, int]]], dict[str, str]]
) -> None:
    for name in ("hot", "kvstored.socket"):
        path = tmp_path / name / HOT_SOCKET
        path.parent.mkdir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs:
            theirs.bind(str(path))
            theirs.listen()
            memory = os.memfd_create("arena")
            environ = pass_on([("arena-1", memory), (name, theirs.fileno())])
            os.close(memory)
        service = service_of(environ, os.getpid(), path)
        assert service.kept == [("arena-1", FIRST)]
        assert service.listener is not None
        with listen(path, service.listener) as serving, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            assert serving is service.listener
            assert serving.getblocking() is False
            client.connect(str(path))
            serving.accept()[0].close()
        os.close(FIRST)


def test_a_socket_that_clients_would_not_find_is_a_mistake_in_the_configuration(
    tmp_path: Path, pass_on: Callable[[Sequence[tuple[str, int]]], dict[str, str]]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs:
        theirs.bind(str(tmp_path / "elsewhere.sock"))
        theirs.listen()
        environ = pass_on([("hot", theirs.fileno())])
    with pytest.raises(ConfigError, match=r"elsewhere\.sock, and clients look at .*hot\.sock"):
        service_of(environ, os.getpid(), tmp_path / HOT_SOCKET)


def test_without_a_passed_one_a_socket_is_made_in_place_of_what_lies_there(tmp_path: Path) -> None:
    path = tmp_path / HOT_SOCKET
    path.write_text("stale")
    with listen(path, None) as serving:
        assert path.is_socket()
        assert path.stat().st_mode & 0o777 == 0o666
        assert serving.getblocking() is False
