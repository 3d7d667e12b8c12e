"""Sessions of one process that is killed: nothing of them is left, in whatever order their ends are heard of."""

import os
import socket
from itertools import permutations
from typing import Any, cast

import pytest

from kvstored.clients import Clients
from kvstored.connection import Connection
from kvstored.peer import Peer
from tests.core import Client, Core, chain

PID = 4711


class Unwatched:
    """A loop that watches nothing: the test says what is heard."""

    def watch(self, *_: object) -> None:
        pass

    def unwatch(self, *_: object) -> None:
        pass


def connected(clients: Clients, client: Client) -> Connection:
    """A session of the process, whose other end has hung up."""
    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.close()
    connection = Connection(ours, Peer(PID, os.geteuid(), os.getegid(), os.open(os.devnull, os.O_RDONLY)))
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
