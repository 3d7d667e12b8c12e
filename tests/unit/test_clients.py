"""Sessions of one process that is killed: nothing of them is left, in whatever order their ends are heard of."""

import os
import socket
from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvproto.limits import SESSIONS, SESSIONS_KEPT, SESSIONS_PER_UID, TENANTS
from kvstored.clients import Clients
from kvstored.connection import Connection
from kvstored.peer import Peer
from tests.contract.test_processes import NEEDS_INODES
from tests.core import Client, Core, chain

PID = 4711


class Unwatched:
    """A loop that watches nothing: the test says what is heard."""

    def watch(self, *_: object) -> None:
        pass

    def unwatch(self, *_: object) -> None:
        pass


def connected(clients: Clients, client: Client, pid: int = PID, pidfd: int | None = None) -> Connection:
    """A session of the process, whose other end has hung up."""
    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.close()
    pidfd = os.eventfd(0) if pidfd is None else pidfd  # as an older kernel's: it has no inode of its own
    connection = Connection(ours, Peer(pid, os.geteuid(), os.getegid(), pidfd))
    connection.session = client.session
    clients.connections[ours.fileno()] = connection
    clients.by_session[client.session] = connection
    return connection


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("closed", [0, 1, 2, 3])
def test_a_killed_process_leaves_nothing_though_tickets_are_still_being_ended(
    order: tuple[int, ...], closed: int
) -> None:
    core = Core(slice_steps=1)
    clients = Clients(cast(Any, Unwatched()), cast(Any, None), lambda _connection, _events: None)
    clients.store = core.store
    writer = core.client()
    writer.put(writer.open(), chain(4))
    core.settle()
    of_process = [core.client() for _ in range(3)]
    connections = [connected(clients, client) for client in of_process]
    for number, client in enumerate(of_process):
        namespace = client.open()
        assert client.lease(namespace, chain(4)).blocks == 4
        client.reserve(namespace, chain(8, number))  # tickets that end slice by slice
    arenas = core.store.arenas
    assert any(arenas.holders.values()), "there is something to be left behind"
    for number in order[:closed]:  # first the sockets of some are heard of, then the end of the process
        clients.hang_up(connections[number])
    for number in order:
        clients._on_exit(connections[number])  # what the loop calls
    core.settle()
    clients.look_around(core.clock.ns)
    core.audit()
    sessions = [client.session for client in of_process]
    assert not any(session in holders for holders in arenas.holders.values() for session in sessions)
    assert not any(session in clients.by_session for session in sessions)


def records_of(pids: list[int], pidfds: list[int]) -> int:
    """How many are left of sessions that map arenas and are closed."""
    core = Core()
    clients = Clients(cast(Any, Unwatched()), cast(Any, None), lambda _connection, _events: None)
    clients.store = core.store
    writer = core.client()
    writer.put(writer.open(), chain(4))
    core.settle()
    for pid, pidfd in zip(pids, pidfds, strict=True):
        client = core.client()
        connection = connected(clients, client, pid, pidfd)
        client.release(client.lease(client.open(), chain(4)))
        clients.hang_up(connection)
    core.settle()
    left = list(clients.by_session.values())
    for connection in left:
        clients._on_exit(connection)
    assert not clients.by_session
    assert not clients._elders
    return len(left)


def test_a_process_that_connects_and_closes_again_leaves_one_record() -> None:
    assert records_of([PID, PID, PID], [os.eventfd(0) for _ in range(3)]) == 1
    assert records_of([0, 0, 0], [os.eventfd(0) for _ in range(3)]) == 3, "of another pid namespace each may be another"


@NEEDS_INODES
def test_so_does_one_of_another_pid_namespace() -> None:
    mine, other = os.getpid(), os.getppid()
    assert records_of([0, 0, 0], [os.pidfd_open(pid) for pid in (mine, mine, mine)]) == 1
    assert records_of([0, 0, 0], [os.pidfd_open(pid) for pid in (mine, other, mine)]) == 2


def full_house(*counts: int) -> Clients:
    """So many sessions of uids 1, 2, ..."""
    clients = Clients(cast(Any, Unwatched()), cast(Any, None), lambda _connection, _events: None)
    uids = [uid for uid, count in enumerate(counts, start=1) for _ in range(count)]
    for fd, uid in enumerate(uids):
        clients.connections[fd] = cast(Any, SimpleNamespace(peer=Peer(PID, uid, uid, -1)))
    return clients


def refusal(clients: Clients, uid: int) -> str:
    """What somebody more of a uid is told; empty: come in."""
    return clients._over_limits(Peer(PID, uid, uid, -1))


def test_a_few_users_do_not_keep_all_others_out() -> None:
    clients = full_house(*3 * [SESSIONS_PER_UID])
    assert not refusal(clients, 4), "it has none yet"
    clients = full_house(*3 * [SESSIONS_PER_UID], 1)
    assert "193 sessions are open already, and 64 of 256 are kept for others" in refusal(clients, 4)
    assert not refusal(clients, 5)
    clients = full_house(*3 * [SESSIONS_PER_UID], *[1] * SESSIONS_KEPT)
    assert refusal(clients, 1000)


@pytest.mark.parametrize(("tenants", "each"), [(1, 32), (8, 4), (TENANTS, 1)])
def test_configured_tenants_have_places_whoever_comes_before_them(tenants: int, each: int) -> None:
    clients = full_house()
    clients.uids = tuple((1000 + number, 2000 + number) for number in range(tenants))
    comes = (uid for uid in range(1, SESSIONS + 1) for _ in range(SESSIONS_PER_UID))
    for fd, uid in enumerate(comes):
        if not refusal(clients, uid):
            clients.connections[fd] = cast(Any, SimpleNamespace(peer=Peer(PID, uid, uid, -1)))
    assert len(clients.connections) == SESSIONS - tenants * each
    assert "kept for others" in refusal(clients, SESSIONS + 1)
    for fd in range(tenants * each):
        uid = (1000, 2000)[fd % 2] + fd // each
        assert not refusal(clients, uid)
        clients.connections[-1 - fd] = cast(Any, SimpleNamespace(peer=Peer(PID, uid, uid, -1)))
    assert refusal(clients, 1000)
