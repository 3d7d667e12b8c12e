"""Memory that outlives its process: in a stand-in for systemd's descriptor store, and in the fd-keeper."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from kvstored import fd_keeper, keep
from kvstored.keep import FdKeeper, NoKeeper, kept_descriptors, notifier_of
from tests.node import opened_by, until
from tests.systemd import ServiceManager

PROGRAM = str(Path(__file__).with_name("kept_program.py"))
ROOT = Path(__file__).parents[2]
WAIT_S = 30.0
LONG_S = "600"

Start = Callable[..., "Program"]
Report = dict[str, Any]


class Program:
    """A running `kept_program`, and what it reported."""

    def __init__(self, runtime_dir: Path, arenas: int, wish: str, patience_s: str) -> None:
        command = [sys.executable, PROGRAM, str(runtime_dir), str(arenas), wish, patience_s]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True
        )
        assert self.process.stdout is not None
        self.report: Report = json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Held:
    """A connection to a keeper that says anything."""

    def __init__(self, runtime_dir: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(WAIT_S)
        try:
            self.socket.connect(str(runtime_dir / fd_keeper.SOCKET_NAME))
        except OSError:
            self.socket.close()
            raise
        self.pid, _ = fd_keeper.credentials(self.socket)

    def say(self, text: str | bytes, *fds: int) -> None:
        fd_keeper.send(self.socket, text.encode() if isinstance(text, str) else text, list(fds))

    def names(self) -> list[str]:
        """All that is held, asked for as a successor does."""
        names: list[str] = []
        while True:
            self.say(f"TAKE {len(names)}")
            record, fds, _ = fd_keeper.receive(self.socket, fd_keeper.FDS_PER_RECORD, wait=True)
            for fd in fds:
                os.close(fd)
            words = record.decode().split(" ")
            assert words[0] == "HELD"
            assert len(words) == 3 + len(fds)
            names += words[3:]
            if len(names) == int(words[1]):
                return names

    def memory(self) -> int:
        """How many descriptors are held, without asking."""
        return sum("memfd:" in file for file in opened_by(self.pid))

    def ask_for_ever(self) -> None:
        while True:
            self.socket.send(b"TAKE 0")

    def is_closed(self) -> bool:
        try:
            return self.socket.recv(100) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Iterator[Path]:
    """A runtime directory; a keeper that is left there is told to quit."""
    yield tmp_path
    quit_keeper(tmp_path)


@pytest.fixture
def start(runtime_dir: Path, stack: ExitStack) -> Start:
    def make(arenas: int = 4, wish: str = "keep", patience_s: str = LONG_S) -> Program:
        program = Program(runtime_dir, arenas, wish, patience_s)
        stack.callback(program.kill)
        return program

    return make


@pytest.fixture
def dial(runtime_dir: Path, stack: ExitStack) -> Callable[[], Held]:
    def make() -> Held:
        held = Held(runtime_dir)
        stack.callback(held.socket.close)
        return held

    return make


@pytest.fixture
def manage(tmp_path: Path, stack: ExitStack) -> Callable[..., ServiceManager]:
    def make(arenas: int, **options: Any) -> ServiceManager:
        command = [sys.executable, PROGRAM, str(tmp_path), str(arenas), "systemd", LONG_S]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        manager = ServiceManager(command, environ, tmp_path, log_file=tmp_path / "log", **options)
        return stack.enter_context(manager)

    return make


def quit_keeper(runtime_dir: Path) -> None:
    keeper = FdKeeper(runtime_dir, 1.0)
    try:
        keeper.connect()
    except OSError:
        return
    keeper.quit()


def run_keeper(runtime_dir: Path, patience_s: str = LONG_S) -> int:
    command = [sys.executable, "-m", "kvstored.fd_keeper", str(runtime_dir), "--patience", patience_s]
    return subprocess.run(command, check=False, timeout=WAIT_S).returncode


def brief_keeper(runtime_dir: Path, stack: ExitStack) -> int:
    """One of half a second's patience that somebody has connected to; a descriptor of its process."""
    while True:
        assert run_keeper(runtime_dir, "0.5") == 0
        with suppress(OSError):  # we stood still, and it is gone: another one
            held = Held(runtime_dir)
            stack.callback(held.socket.close)
            return os.pidfd_open(held.pid)


def wait_exit(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(WAIT_S * 1000), "the keeper does not exit"
    os.close(pidfd)


def flushed(keeper: keep.Keeper) -> bool:
    keeper.flush()
    return not keeper.pending


def memory_fd(stack: ExitStack) -> int:
    fd = os.memfd_create("test")
    stack.callback(os.close, fd)
    return fd


def reported(manager: ServiceManager) -> Report:
    manager.wait_ready()
    (line,) = [line for line in manager.said if line.startswith("STATUS=")]
    report: Report = json.loads(line.removeprefix("STATUS="))
    return report


def good(report: Report, lives: int, arenas: int) -> bool:
    found = (report["warm"], report["lives"], report["found"], report["arenas"])
    return found == (lives > 1, lives, True, arenas if lives > 1 else 0) and not (report["wrong"] or report["faults"])


# systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_brings_every_byte_back_after_each_kill(manage: Callable[..., ServiceManager], abstract: bool) -> None:
    manager = manage(8, abstract=abstract)
    manager.start()
    for lives in range(1, 7):
        assert good(report := reported(manager), lives, 8), report
        assert not any(stored.polled for stored in manager.stored)
        manager.restart()
    assert sorted(manager.fds) == sorted(["table-book", *(f"arena-{arena}" for arena in range(6, 14))])
    assert manager.refused == 0


def test_a_stop_keeps_as_much_as_a_kill(manage: Callable[..., ServiceManager]) -> None:
    manager = manage(4)
    for lives in range(1, 4):
        manager.start()
        assert good(report := reported(manager), lives, 4), report
        assert manager.stop() == -signal.SIGTERM


@pytest.mark.slow
def test_systemd_keeps_1024_arenas(manage: Callable[..., ServiceManager]) -> None:
    manager = manage(1024)
    manager.start()
    for lives in (1, 2):
        assert good(report := reported(manager), lives, 1024), report
        manager.restart()
    assert good(report := reported(manager), 3, 1024), report


def test_a_systemd_without_a_store_costs_a_cold_start(manage: Callable[..., ServiceManager]) -> None:
    manager = manage(4, fds_max=0)
    manager.start()
    for _ in range(2):
        report = reported(manager)
        assert (report["warm"], report["lives"], report["faults"]) == (False, 1, [])
        manager.restart()


def test_a_store_that_is_too_small_is_said_and_gives_back_what_it_took(manage: Callable[..., ServiceManager]) -> None:
    manager = manage(8, fds_max=5)
    manager.start()
    assert "FileDescriptorStoreMax=5" in reported(manager)["faults"][0]
    manager.restart()
    report = reported(manager)
    assert (report["warm"], report["lives"], report["arenas"], report["wrong"]) == (True, 2, 4, [])
    assert manager.refused == 0


# The fd-keeper, seen from the daemon


def test_the_keeper_brings_every_byte_back_after_each_kill(start: Start) -> None:
    for lives in range(1, 7):
        program = start(8)
        assert good(program.report, lives, 8), program.report
        program.kill()


def test_the_keeper_keeps_1024_arenas(start: Start) -> None:
    for lives in (1, 2):
        program = start(1024)
        assert good(program.report, lives, 1024), program.report
        program.kill()


def test_adopted_memory_counts_as_populated_and_needs_no_spares(start: Start) -> None:
    start(8).kill()
    program = start(8)
    assert 0 <= program.report["populated"] - 7 * (64 << 10) <= 2 * (64 << 10)  # one is recycled, one made


def test_a_successor_killed_while_it_takes_over_loses_nothing(start: Start, runtime_dir: Path) -> None:
    start(1024).kill()
    script = f"""
import socket, sys
sys.path.insert(0, {str(ROOT / "daemon")!r})
from kvstored import fd_keeper
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({str(runtime_dir / fd_keeper.SOCKET_NAME)!r})
for start in (0, 253):
    connection.send(b"TAKE %d" % start)
    assert len(fd_keeper.receive(connection, 253, wait=True)[1]) == 253
connection.send(b"TAKE 506")
print("half", flush=True)
sys.stdin.read()
"""
    for _ in range(3):
        command = [sys.executable, "-c", script]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as half:
            assert half.stdout is not None
            assert half.stdout.readline() == b"half\n"
            half.kill()
    program = start(1024)
    assert good(program.report, 2, 1024), program.report


def test_the_keeper_is_a_process_apart(start: Start, dial: Callable[[], Held]) -> None:
    program = start(4)
    keeper = dial()
    deadline = time.monotonic() + WAIT_S
    while keeper.memory() < 5:  # what the program has sent may still lie in the socket
        assert time.monotonic() < deadline
    folder = Path(f"/proc/{keeper.pid}")
    links = [str(link.readlink()) for link in (folder / "fd").iterdir()]
    assert {link for link in links if link.startswith(("/dev", "pipe", "/tmp"))} == {"/dev/null"}
    assert not any("pipe:" in link for link in links)
    assert "memfd:" not in (folder / "maps").read_text()
    assert os.getsid(keeper.pid) == keeper.pid != os.getsid(program.process.pid)
    socket_file = Path(keeper.socket.getpeername())
    assert socket_file.stat().st_mode & 0o777 == 0o600
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(keeper.pid, number)
    os.killpg(program.process.pid, signal.SIGTERM)
    program.process.communicate(timeout=WAIT_S)  # ends: nobody else holds its pipe
    assert len(keeper.names()) == 5


def test_a_keeper_that_died_is_replaced_and_told_everything(start: Start, dial: Callable[[], Held]) -> None:
    program = start(4)
    first = dial()
    os.kill(first.pid, signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    held = 0
    while held < 5 and time.monotonic() < deadline:
        with suppress(OSError):  # not there yet
            second = dial()
            held = second.memory() if second.pid != first.pid else 0  # the first may take a moment to die
            second.socket.close()
    assert held == 5
    program.kill()
    program = start(4)
    assert good(program.report, 2, 4), program.report


@pytest.mark.slow
def test_a_keeper_that_stood_still_at_a_start_is_replaced_once_it_goes_on(
    start: Start, runtime_dir: Path, dial: Callable[[], Held], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts were killed meanwhile. The memory of the life before is gone: a life without it lies between."""
    program = start(4)
    first = dial()
    os.kill(first.pid, signal.SIGSTOP)
    pidfd = os.pidfd_open(first.pid)
    program.kill()
    for _ in range(2):
        killed = dial()
        killed.say("TAKE 0")
        killed.socket.close()
    monkeypatch.setattr(keep, "ANSWER_S", 0.2)
    kept, keeper = kept_descriptors(runtime_dir, {}, notifier_of({}), keep=True, patience_s=600.0)
    assert kept == {}
    assert "no fd-keeper" in keeper.faults[0]
    keeper.keep("arena-7", memory_fd(stack))
    assert until(lambda: flushed(keeper))
    assert "no fd-keeper" in keeper.faults[0], "it has not answered yet"
    os.kill(first.pid, signal.SIGCONT)
    wait_exit(pidfd)

    def held() -> int:
        keeper.flush()
        with suppress(OSError):  # not there yet
            second = dial()
            assert second.pid != first.pid
            return second.memory()
        return 0

    assert until(held)
    assert not any("no fd-keeper" in fault for fault in keeper.faults)
    assert isinstance(keeper, FdKeeper)
    keeper.close()
    assert dial().names() == ["arena-7"]


def test_starts_killed_while_the_keeper_stood_still_lose_nothing(start: Start, dial: Callable[[], Held]) -> None:
    program = start(4)
    keeper = dial()
    os.kill(keeper.pid, signal.SIGSTOP)
    program.kill()
    for _ in range(3):
        killed = dial()
        killed.say("TAKE 0")
        killed.socket.close()
    os.kill(keeper.pid, signal.SIGCONT)
    program = start(4)
    assert good(program.report, 2, 4), program.report


def test_what_a_living_daemon_uses_is_given_to_nobody_else(start: Start, dial: Callable[[], Held]) -> None:
    """However a second one came to be: the lock of the directory is a file that somebody may remove."""
    program = start(4)
    for turn in range(2):  # having asked makes nobody a daemon
        second = dial()
        second.say("TAKE 0")
        assert second.socket.recv(100) == b"SERVED %d" % program.process.pid, turn
        assert second.is_closed()
    program.process.kill()
    program.process.communicate()
    assert sorted(dial().names()) == ["arena-1", "arena-2", "arena-3", "arena-4", "table-book"]


def test_a_daemon_without_the_wish_ends_a_keeper_of_earlier_times(start: Start, dial: Callable[[], Held]) -> None:
    start(4).kill()
    pidfd = os.pidfd_open(dial().pid)
    program = start(4, "nobody")
    wait_exit(pidfd)
    assert not program.report["warm"]


# The fd-keeper, seen from its socket


def test_the_keeper_exits_when_no_daemon_ever_comes(runtime_dir: Path, stack: ExitStack) -> None:
    wait_exit(brief_keeper(runtime_dir, stack))
    assert not (runtime_dir / fd_keeper.SOCKET_NAME).exists()


def test_the_keeper_waits_for_its_patience_after_the_daemon_is_gone(
    start: Start, dial: Callable[[], Held], tmp_path: Path, stack: ExitStack
) -> None:
    program = start(4, patience_s="0.5")
    keeper = dial()
    other_dir = tmp_path / "other"
    other_dir.mkdir()
    wait_exit(brief_keeper(other_dir, stack))  # a patience of 0.5 s has passed
    pidfd = os.pidfd_open(keeper.pid)
    assert not select.select([pidfd], [], [], 0)[0], "it does not wait for a successor while there is a daemon"
    before = time.monotonic()
    program.kill()
    wait_exit(pidfd)
    assert time.monotonic() - before >= 0.4
    assert keeper.is_closed()
    assert not (tmp_path / fd_keeper.SOCKET_NAME).exists()


def test_who_only_connects_is_not_a_daemon(runtime_dir: Path, stack: ExitStack) -> None:
    wait_exit(brief_keeper(runtime_dir, stack))


BAD = [
    b"", b"\xff", b"KEEP", b"KEEP ", b"KEEP a", b"KEEP a b", b"KEEP a:b", b"KEEP " + b"a" * 256, b"FORGET",
    b"FORGET a/b", b"TAKE", b"TAKE -1", b"TAKE 99999", b"TAKE x", b"TAKE 1 2", b"PATIENCE", b"PATIENCE nan",
    b"PATIENCE 1e9", b"PATIENCE 0", b"QUIT now", b"CLEAR all", b"HELD 0 0", b"\0", b"keep a", b"A" * 100_000,
]  # fmt: skip


def test_a_peer_that_says_something_else_is_hung_up_on_and_nothing_is_lost(
    runtime_dir: Path, dial: Callable[[], Held], stack: ExitStack
) -> None:
    assert run_keeper(runtime_dir) == 0
    fd = memory_fd(stack)
    daemon = dial()
    daemon.say("KEEP arena-1", fd)
    for record in BAD:
        peer = dial()
        peer.say(record)
        assert peer.is_closed(), record
    for record, fds in ((b"KEEP a", [fd, fd]), (b"KEEP a", [fd] * 9), (b"FORGET arena-1", [fd]), (b"TAKE 0", [fd])):
        peer = dial()
        peer.say(record, *fds)
        assert peer.is_closed(), record
    for other in (os.open("/dev/null", os.O_RDWR), os.open("/", os.O_RDONLY), os.eventfd(0)):
        peer = dial()
        peer.say("KEEP arena-1", other)
        os.close(other)
        assert peer.is_closed()
    assert daemon.names() == ["arena-1"]
    assert sum("memfd:test" in file for file in opened_by(daemon.pid)) == 1


def test_a_peer_that_never_reads_is_hung_up_on(runtime_dir: Path, dial: Callable[[], Held], stack: ExitStack) -> None:
    assert run_keeper(runtime_dir) == 0
    fd = memory_fd(stack)
    daemon, deaf = dial(), dial()
    for number in range(1, 300):
        daemon.say(f"KEEP arena-{number}", fd)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        deaf.ask_for_ever()
    assert len(daemon.names()) == 299


def test_more_connections_than_anybody_needs_are_hung_up_on(runtime_dir: Path, dial: Callable[[], Held]) -> None:
    assert run_keeper(runtime_dir) == 0
    peers = [dial() for _ in range(fd_keeper.CONNECTIONS_MAX)]
    assert peers[-1].names() == []
    assert dial().is_closed()
    peers[0].socket.close()
    peers[1].say("TAKE 0")  # answered after the close was seen, or before it: either way there is room soon
    assert peers[1].names() == []


def test_the_last_descriptor_under_a_name_replaces_and_the_number_is_bounded(
    runtime_dir: Path, dial: Callable[[], Held], stack: ExitStack
) -> None:
    assert run_keeper(runtime_dir) == 0
    fd = memory_fd(stack)
    daemon = dial()
    daemon.socket.setblocking(True)
    for number in range(1, fd_keeper.HELD_MAX + 2):
        socket.send_fds(daemon.socket, [f"KEEP arena-{number}".encode()], [fd])
    assert daemon.socket.recv(100) == f"REFUSED arena-{fd_keeper.HELD_MAX + 1}".encode()
    socket.send_fds(daemon.socket, [b"KEEP arena-7"], [fd])
    names = daemon.names()
    assert len(names) == fd_keeper.HELD_MAX
    assert (names[0], names[-1]) == ("arena-1", "arena-7")


def test_what_a_daemon_said_before_it_died_counts_before_its_successor_takes(
    runtime_dir: Path, dial: Callable[[], Held], stack: ExitStack
) -> None:
    """The keeper stands still meanwhile, so that all of it lies there when it looks."""
    assert run_keeper(runtime_dir) == 0
    fd = memory_fd(stack)
    predecessor = dial()
    assert predecessor.names() == []
    os.kill(predecessor.pid, signal.SIGSTOP)
    stack.callback(os.kill, predecessor.pid, signal.SIGCONT)
    late, successor = dial(), dial()
    successor.say("TAKE 0")
    for number in range(1, 61):
        predecessor.say(f"KEEP arena-{number}", fd)
    predecessor.say("FORGET arena-50")
    predecessor.say("TAKE 0")
    predecessor.socket.close()
    late.say("KEEP table-a", fd)
    late.socket.close()
    os.kill(successor.pid, signal.SIGCONT)
    record, fds, _ = fd_keeper.receive(successor.socket, 253, wait=True)
    for taken in fds:
        os.close(taken)
    assert record.startswith(b"HELD 60 0 arena-1 ")
    assert successor.names().count("arena-50") == 0


def test_a_socket_that_nobody_answers_any_more_is_replaced(runtime_dir: Path, dial: Callable[[], Held]) -> None:
    assert run_keeper(runtime_dir) == 0
    first = dial()
    pidfd = os.pidfd_open(first.pid)
    os.kill(first.pid, signal.SIGKILL)
    wait_exit(pidfd)
    assert (runtime_dir / fd_keeper.SOCKET_NAME).exists()
    assert run_keeper(runtime_dir) == 0
    assert dial().names() == []


def test_there_is_one_keeper_to_a_directory(runtime_dir: Path, dial: Callable[[], Held]) -> None:
    assert run_keeper(runtime_dir) == 0
    assert run_keeper(runtime_dir) == fd_keeper.EX_TEMPFAIL
    assert dial().names() == []


@pytest.mark.parametrize("verb", ["QUIT", "SIGTERM"])
def test_a_keeper_that_is_told_to_end_takes_its_socket_with_it(
    runtime_dir: Path, dial: Callable[[], Held], verb: str
) -> None:
    assert run_keeper(runtime_dir) == 0
    keeper = dial()
    pidfd = os.pidfd_open(keeper.pid)
    if verb == "QUIT":
        keeper.say("QUIT")
    else:
        os.kill(keeper.pid, signal.SIGTERM)
    wait_exit(pidfd)
    assert not (runtime_dir / fd_keeper.SOCKET_NAME).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_the_keeper_refuses_another_user(stack: ExitStack) -> None:
    folder = Path(tempfile.mkdtemp(prefix="kvstored-keep-"))  # one that another user can reach
    stack.callback(shutil.rmtree, folder)
    stack.callback(quit_keeper, folder)
    folder.chmod(0o755)
    assert run_keeper(folder) == 0
    script = """
import os, socket, sys
os.setgroups([]); os.setgid(4242); os.setuid(4242)
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.settimeout(30)
try:
    connection.connect(sys.argv[1])
except PermissionError:
    print("kept out")
    sys.exit()
try:
    connection.send(b"TAKE 0")
    print(connection.recv(100))
except (BrokenPipeError, ConnectionResetError):
    print("hung up")
"""
    path = folder / fd_keeper.SOCKET_NAME
    command = [sys.executable, "-I", "-S", "-c", script, str(path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "kept out\n"
    path.chmod(0o666)
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout in {"hung up\n", "b''\n"}


def test_a_limit_of_descriptors_that_is_too_low_starts_cold_and_says_why(
    start: Start, runtime_dir: Path, stack: ExitStack, dial: Callable[[], Held]
) -> None:
    import resource

    start(256).kill()
    pid = dial().pid
    pidfd = os.pidfd_open(pid)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    kept, keeper = kept_descriptors(runtime_dir, {}, notifier_of({}), keep=True, patience_s=600.0)
    assert kept == {}
    assert not isinstance(keeper, NoKeeper)  # a new one, with nothing in it
    wait_exit(pidfd)
    assert isinstance(keeper, FdKeeper)
    keeper.close()
