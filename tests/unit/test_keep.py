"""What is said to systemd and to the fd-keeper, and what is believed of what they say."""

import array
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from kvstored import fd_keeper, keep, notify
from kvstored.keep import FdKeeper, NoKeeper, arena_name, arena_of, kept_descriptors, table_name
from kvstored.lock import AlreadyRunningError
from kvstored.notify import Notifier, SystemdKeeper, inherited, notifier_of
from tests.node import until

FIRST = 1500  # where these tests have descriptors passed: 3 and on are pytest's
WAIT_S = 10.0


class Manager:
    """The socket of a service manager that reads when told to."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)

    def read(self) -> list[tuple[str, int]]:
        """Messages, each with how many descriptors came with it."""
        heard: list[tuple[str, int]] = []
        while True:
            try:
                text, fds, _, _ = socket.recv_fds(self.socket, 4096, 16)
            except BlockingIOError:
                return heard
            for fd in fds:
                os.close(fd)
            heard.append((text.decode(), len(fds)))


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify") if request.param == "path" else f"@kvstored-unit-{os.getpid()}")
    yield made
    made.socket.close()


@pytest.fixture
def memory_fd() -> Iterator[int]:
    fd = os.memfd_create("kept")
    yield fd
    os.close(fd)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Call it with a number: so many descriptors are passed to this process."""
    monkeypatch.setattr(notify, "_FIRST_FD", FIRST)

    def make(count: int) -> None:
        for fd in range(FIRST, FIRST + count):
            made = os.memfd_create("passed")
            os.dup2(made, fd)
            os.close(made)

    yield make
    os.closerange(FIRST, FIRST + 16)


def environ(pid: int | str, fds: int | str, *names: str) -> dict[str, str]:
    return {"LISTEN_PID": str(pid), "LISTEN_FDS": str(fds), "LISTEN_FDNAMES": ":".join(names), "HOME": "/"}


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").exists()


def copies_of(fd: int) -> int:
    """How many descriptors of this process are of the same memory."""
    status = os.fstat(fd)
    return sum(link.exists() and os.path.samestat(link.stat(), status) for link in Path("/proc/self/fd").iterdir())


def store_text(name: str) -> tuple[str, int]:
    return f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", 1


def remove_text(name: str) -> tuple[str, int]:
    return f"FDSTOREREMOVE=1\nFDNAME={name}", 0


# Names


def test_names_tell_arenas_from_tables_and_from_what_is_not_ours() -> None:
    assert arena_of(arena_name(4_294_967_295)) == 4_294_967_295
    assert all(keep.is_ours(name) for name in (arena_name(1), table_name("blocks"), table_name("index-0")))
    for name in (
        "arena-0",
        "arena-01",
        "arena-",
        "arena-1\n",
        "arena-\u0663",
        "arena-99999999999",
        "table-",
        "table-a:b",
    ):
        assert arena_of(name) is None
        assert not keep.is_ours(name)


@pytest.mark.parametrize("name", ["", "a:b", "a b", "a\n", "ä", "a" * 256])
def test_nothing_is_kept_under_a_name_that_would_break_a_message(manager: Manager, name: str, memory_fd: int) -> None:
    notifier = Notifier(manager.address)
    with pytest.raises(AssertionError, match="not a name"):
        SystemdKeeper(notifier, []).keep(name, memory_fd)
    notifier.close()


# What the service manager passes on


def test_passed_descriptors_come_with_their_names_closed_on_exec_and_the_variables_go(
    passed: Callable[[int], None],
) -> None:
    passed(2)
    variables = environ(os.getpid(), 2, "arena-1", "table-a")
    assert inherited(variables, os.getpid()) == [("arena-1", FIRST), ("table-a", FIRST + 1)]
    assert not os.get_inheritable(FIRST)
    assert variables == {"HOME": "/"}


def test_descriptors_of_another_process_are_left_alone(passed: Callable[[int], None]) -> None:
    passed(1)
    variables = environ(os.getpid() + 1, 1, "arena-1")
    assert inherited(variables, os.getpid()) == []
    assert is_open(FIRST)
    assert variables == {"HOME": "/"}


@pytest.mark.parametrize("count", ["", "x", "-1", "1e3", "9999", "99999999999", "\u0661", " 1"])
def test_what_is_not_a_number_of_descriptors_touches_none(passed: Callable[[int], None], count: str) -> None:
    passed(1)
    assert inherited(environ(os.getpid(), count, "arena-1"), os.getpid()) == []
    assert is_open(FIRST)


@pytest.mark.parametrize("names", [(), ("arena-1",), ("arena-1", "arena-2", "arena-3")])
def test_names_that_do_not_match_make_all_descriptors_doubtful(
    passed: Callable[[int], None], names: tuple[str, ...]
) -> None:
    passed(2)
    assert inherited(environ(os.getpid(), 2, *names), os.getpid()) == [(name, -1) for name in names]
    assert not is_open(FIRST)
    assert not is_open(FIRST + 1)


def test_a_descriptor_that_did_not_come_makes_the_others_doubtful(passed: Callable[[int], None]) -> None:
    passed(1)
    assert inherited(environ(os.getpid(), 2, "arena-1", "arena-2"), os.getpid()) == [("arena-1", -1), ("arena-2", -1)]
    assert not is_open(FIRST)


# What the service manager is told


def test_messages_reach_the_service_manager_in_order(manager: Manager) -> None:
    notifier = notifier_of({"NOTIFY_SOCKET": manager.address})
    notifier.notify("READY=1")
    notifier.status("two\nlines")
    notifier.notify("STOPPING=1")
    assert manager.read() == [("READY=1", 0), ("STATUS=two lines", 0), ("STOPPING=1", 0)]
    notifier.close()


def test_a_service_manager_that_does_not_read_holds_nothing_up_and_gets_all_later(
    manager: Manager, memory_fd: int
) -> None:
    notifier = Notifier(manager.address)
    keeper = SystemdKeeper(notifier, [])
    names = [arena_name(number) for number in range(1, 1025)]
    for name in names:
        keeper.keep(name, memory_fd)
    assert keeper.pending > 0
    notifier.status("one")
    notifier.status("two")
    heard = manager.read()
    while keeper.pending:
        keeper.flush()
        heard += manager.read()
    assert heard == [*map(store_text, names), ("STATUS=two", 0)]
    assert keeper.faults == []
    notifier.close()


def test_what_is_forgotten_before_it_was_sent_never_is(manager: Manager, memory_fd: int) -> None:
    notifier = Notifier(manager.address)
    keeper = SystemdKeeper(notifier, [])
    sent = 0
    while not keeper.pending:
        sent += 1
        keeper.keep(arena_name(sent), memory_fd)
    keeper.forget(arena_name(sent))
    manager.read()
    keeper.flush()
    assert manager.read() == [remove_text(arena_name(sent))]
    notifier.close()


def test_a_name_is_cleared_before_it_is_used_again(manager: Manager, memory_fd: int) -> None:
    notifier = Notifier(manager.address)
    keeper = SystemdKeeper(notifier, ["table-a"])
    keeper.keep("table-a", memory_fd)
    keeper.keep("table-a", memory_fd)
    keeper.forget("table-a")
    keeper.forget("table-a")
    keeper.forget("table-b")
    once = [remove_text("table-a"), store_text("table-a")]
    assert manager.read() == [*once, *once, remove_text("table-a")]
    notifier.close()


def test_more_than_the_store_takes_is_said_and_not_sent(manager: Manager, memory_fd: int) -> None:
    notifier = Notifier(manager.address)
    keeper = SystemdKeeper(notifier, ["table-a"], fds_max=2)
    keeper.keep("arena-1", memory_fd)
    keeper.keep("arena-2", memory_fd)
    assert manager.read() == [store_text("arena-1")]
    assert "FileDescriptorStoreMax=2" in keeper.faults[0]
    notifier.close()


def test_a_service_manager_that_comes_late_gets_what_waited(tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "late"))
    notifier.notify("READY=1")
    assert notifier.pending == 1
    late = Manager(str(tmp_path / "late"))
    notifier.flush(WAIT_S)
    assert late.read() == [("READY=1", 0)]
    late.socket.close()
    notifier.close()


def test_what_waits_is_bounded(tmp_path: Path, memory_fd: int) -> None:
    notifier = Notifier(str(tmp_path / "never"))
    keeper = SystemdKeeper(notifier, [])
    for number in range(1, 300):
        keeper.keep(arena_name(number), memory_fd)
        keeper.forget(arena_name(number))
    assert keeper.pending <= 300
    for _ in range(notify.QUEUE_MAX):
        notifier.notify("READY=1")
    assert keeper.pending == notify.QUEUE_MAX
    assert "takes no messages" in keeper.faults[0]
    notifier.close()


@pytest.mark.parametrize("address", ["vsock:2:1", "relative", "/" + "a" * 200])
def test_an_address_of_another_kind_is_said_and_not_used(address: str) -> None:
    notifier = Notifier(address)
    notifier.notify("READY=1")
    assert not notifier.present
    assert notifier.pending == 0
    assert "NOTIFY_SOCKET" in notifier.queue.faults[0]


def test_without_a_service_manager_nothing_is_said() -> None:
    notifier = notifier_of({})
    notifier.notify("READY=1")
    notifier.status("fine")
    notifier.flush()
    assert (notifier.present, notifier.pending, notifier.queue.faults) == (False, 0, [])


# Who keeps


def test_systemd_keeps_where_it_offers_to_and_doubtful_names_are_let_go_of(
    manager: Manager, passed: Callable[[int], None], tmp_path: Path
) -> None:
    passed(5)
    variables = environ(os.getpid(), 5, "arena-7", "stored", "table-a", "arena-7", "table-b")
    variables["FDSTORE"] = "9"
    notifier = Notifier(manager.address)
    kept, keeper = kept_descriptors(tmp_path, variables, notifier, keep=True, patience_s=60.0)
    assert isinstance(keeper, SystemdKeeper)
    assert kept == {"table-a": FIRST + 2, "table-b": FIRST + 4}
    assert [is_open(FIRST + number) for number in range(5)] == [False, False, True, False, True]
    assert sorted(manager.read()) == [remove_text("arena-7"), remove_text("stored")]
    assert list(tmp_path.glob("keep.sock")) == []
    notifier.close()


@pytest.mark.parametrize("variables", [{}, {"FDSTORE": "0"}, {"FDSTORE": "many"}])
def test_nobody_keeps_where_nobody_offers_to(manager: Manager, variables: dict[str, str], tmp_path: Path) -> None:
    notifier = Notifier(manager.address)
    kept, keeper = kept_descriptors(tmp_path, variables, notifier, keep=False, patience_s=60.0)
    assert (kept, type(keeper), keeper.faults) == ({}, NoKeeper, [])
    notifier.close()


def test_a_wish_is_enough_for_a_systemd_that_does_not_say_whether_it_keeps(manager: Manager, tmp_path: Path) -> None:
    notifier = Notifier(manager.address)
    _, keeper = kept_descriptors(tmp_path, {}, notifier, keep=True, patience_s=60.0)
    assert isinstance(keeper, SystemdKeeper)
    notifier.close()


# A keeper that is not what it should be


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[socket.socket]:
    """Listens where a keeper would."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / fd_keeper.SOCKET_NAME))
        listener.listen(4)
        listener.settimeout(WAIT_S)
        yield listener


@pytest.mark.parametrize(
    ("answer", "fds"),
    [
        (b"", 0),
        (b"\xff\xfe", 1),
        (b"HELD", 0),
        (b"HELD 1 0", 0),
        (b"HELD 1 0 arena-1", 0),
        (b"HELD 1 0", 1),
        (b"HELD 2 0 arena-1 arena-1", 2),
        (b"HELD 1 5 arena-1", 1),
        (b"HELD -1 0 arena-1", 1),
        (b"REFUSED arena-1", 1),
        (b"HELD 1 0 arena-1 arena-2 arena-3", 2),
    ],
)
def test_what_no_keeper_would_answer_is_refused_and_its_descriptors_closed(
    impostor: socket.socket, tmp_path: Path, memory_fd: int, answer: bytes, fds: int
) -> None:
    def serve() -> None:
        connection, _ = impostor.accept()
        with connection:
            connection.recv(100)
            rights = array.array("i", [memory_fd] * fds)
            connection.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else [])

    thread = threading.Thread(target=serve)
    thread.start()
    keeper = FdKeeper(tmp_path, 60.0)
    with pytest.raises(OSError, match=r"."):
        keeper.take()
    keeper.close()
    thread.join(WAIT_S)
    assert copies_of(memory_fd) == 1


def test_a_daemon_ends_where_the_keeper_knows_of_another_that_lives(
    impostor: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never tells the keeper to let go."""
    monkeypatch.setattr(keep, "EXIT_S", 0.0)
    heard: list[bytes] = []

    def serve() -> None:
        connection, _ = impostor.accept()
        with connection:
            heard.append(connection.recv(100))
            connection.send(b"SERVED 4711")
            heard.append(connection.recv(100))

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(AlreadyRunningError, match="process 4711 still uses the memory"):
        kept_descriptors(tmp_path, {}, notifier_of({}), keep=True, patience_s=60.0)
    thread.join(WAIT_S)
    assert heard == [b"TAKE 0", b""]


def test_a_daemon_waits_for_its_predecessor_to_be_gone(impostor: socket.socket, tmp_path: Path) -> None:
    def serve() -> None:
        for answer in (b"SERVED 4711", b"HELD 0 0"):
            connection, _ = impostor.accept()
            with connection:
                connection.recv(100)
                connection.send(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    keeper = FdKeeper(tmp_path, 60.0)
    assert keeper.take() == {}
    keeper.close()
    thread.join(WAIT_S)


def test_a_keeper_of_another_user_is_not_believed(
    impostor: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    kept, keeper = kept_descriptors(tmp_path, {}, notifier_of({}), keep=True, patience_s=60.0)
    assert kept == {}
    assert keeper.faults[0].startswith("memory does not survive a restart: no fd-keeper")
    assert f"is served by uid {own}" in keeper.faults[0]


class Clock:
    """Stands in for `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(keep, "time", made)
    return made


def test_a_socket_that_cannot_be_made_costs_the_next_restart_and_not_this_start(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, memory_fd: int
) -> None:
    """It is tried again, ever less often, and once it can be made, memory is kept."""
    path = tmp_path / fd_keeper.SOCKET_NAME
    path.mkdir()
    kept, keeper = kept_descriptors(tmp_path, {}, notifier_of({}), keep=True, patience_s=60.0)
    assert kept == {}
    assert keeper.faults[0].startswith("memory does not survive a restart: no fd-keeper")
    keeper.keep("arena-1", memory_fd)
    attempts: list[float] = []
    real = subprocess.Popen

    def spawn(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
        attempts.append(clock.now_s)
        return real(["false"], **options)  # type: ignore[call-overload, no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", spawn)
        eager_s = 0
        for _ in range(600):
            clock.now_s += 1.0
            keeper.flush()
            assert until(lambda: not starting(keeper)), "a program that does nothing ends"
            eager_s += bool(keeper.pending)
    pauses = [after - before for before, after in pairwise(attempts)]
    assert pauses[:5] == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert set(pauses[5:]) == {60.0}
    assert eager_s <= len(attempts), "between attempts nothing turns 200 times a second"
    assert len(keeper.faults) == 1
    path.rmdir()
    clock.now_s += 60.0
    assert until(lambda: not starting(keeper) and not keeper.faults)
    assert isinstance(keeper, FdKeeper)
    keeper.flush()
    assert keeper.quit()


def starting(keeper: keep.Keeper) -> bool:
    """After a flush: is a process still being started?"""
    assert isinstance(keeper, FdKeeper)
    keeper.flush()
    return keeper._starting is not None


def test_a_keeper_that_stands_still_at_the_start_is_told_everything_when_it_goes_on(
    impostor: socket.socket, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, memory_fd: int
) -> None:
    monkeypatch.setattr(keep, "ANSWER_S", 0.05)
    kept, keeper = kept_descriptors(tmp_path, {}, notifier_of({}), keep=True, patience_s=60.0)
    assert kept == {}
    assert keeper.faults == ["memory does not survive a restart: no fd-keeper (timed out)"]
    for arena in (1, 2):
        keeper.keep(arena_name(arena), memory_fd)
    keeper.forget(arena_name(1))
    for _ in range(300):
        clock.now_s += 1.0
        keeper.flush()
    assert (keeper.pending, len(keeper.faults)) == (0, 1)
    first, _ = impostor.accept()
    with first:
        assert [first.recv(100) for _ in range(3)] == [b"TAKE 0", b"QUIT", b""]
    second, _ = impostor.accept()
    with second:
        assert second.recv(100) == b"TAKE 4096"
        second.send(b"HELD 0 4096")
        keeper.flush()
        assert keeper.faults == []
        heard = [fd_keeper.receive(second, 2, wait=False) for _ in range(3)]
        assert [record for record, _, _ in heard] == [b"CLEAR", b"PATIENCE 60.000000", b"KEEP arena-2"]
        for fd in heard[2][1]:
            os.close(fd)
        impostor.setblocking(False)
        with pytest.raises(BlockingIOError):
            impostor.accept()
    assert isinstance(keeper, FdKeeper)
    keeper.close()


def test_what_changes_while_there_is_no_keeper_does_not_pile_up(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, memory_fd: int
) -> None:
    monkeypatch.setattr(keep, "START_S", 0.0)
    (tmp_path / fd_keeper.SOCKET_NAME).mkdir()
    _, keeper = kept_descriptors(tmp_path, {}, notifier_of({}), keep=True, patience_s=60.0)
    clock.now_s += 0.5
    for number in range(1, notify.QUEUE_MAX):
        keeper.keep(arena_name(number), memory_fd)
        keeper.forget(arena_name(number))
    assert len(keeper.faults) == 1
    assert isinstance(keeper, FdKeeper)
    assert len(keeper._queue) == 0


@pytest.mark.parametrize("text", ["", "0", "0.0", "-1", "1e9", "nan", "604801", "\u0663", "1 "])
def test_a_patience_without_end_or_sense_is_refused(text: str) -> None:
    assert fd_keeper.patience_s("600.000000") == 600.0
    with pytest.raises(fd_keeper.BadRecordError):
        fd_keeper.patience_s(text)
