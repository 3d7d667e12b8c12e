"""Where a control socket is, for whom, and how much of the daemon it may take."""

from dataclasses import dataclass
from typing import Final

import grpc

from kvstored.admin_places import CALLS as CALLS_OF_ALL
from kvstored.block_events_stream import WATCHERS, WATCHERS_OF_ONE

CONTROL: Final = "control.sock"
TENANTS: Final = "tenants.sock"
HANDLER_THREADS: Final = 4
# Where connections are counted none is had for nothing. Calls that run are finished, streams too, however long they
# last; what is new goes over another connection, which gRPC's clients open by themselves.
HANDSHAKE_S: Final = 5.0
IDLE_S: Final = 30.0  # without a call
AGE_S: Final = 600.0
QUIET_S, DEAD_S = 60.0, 20.0  # with a call: whether somebody is there yet is asked after, and answered within
CALLS: Final = 64  # at once, watchers of the health service included; one more is told RESOURCE_EXHAUSTED


@dataclass(frozen=True, slots=True)
class Door:
    """One socket. `gate` sees each call first; without one whoever can connect may do everything."""

    name: str = CONTROL
    mode: int = 0o600
    gid: int | None = None  # None: the daemon's own
    threads: int = HANDLER_THREADS
    calls: int = CALLS
    connections: int | None = None  # None: as many as there are descriptors
    health: bool = True  # with the health service and reflection
    watchers_of_one: int = WATCHERS  # of one tenant's blocks at once
    gate: grpc.ServerInterceptor | None = None  # type: ignore[type-arg, unused-ignore]


def for_tenants(gate: grpc.ServerInterceptor) -> Door:  # type: ignore[type-arg, unused-ignore]
    """Everybody may connect: so it has threads, calls and connections of its own, and nobody who acts waits for it.

    As many threads as calls, since each waits in one for its request (`admin_places.py`).
    """
    return Door(
        TENANTS, 0o666, threads=CALLS_OF_ALL, calls=CALLS_OF_ALL, connections=32, health=False,
        watchers_of_one=WATCHERS_OF_ONE, gate=gate,
    )  # fmt: skip


def held(door: Door) -> tuple[tuple[str, int], ...]:
    """gRPC's options for how many connections there are, and for how long."""
    if door.connections is None:
        return ()
    times_s = {
        "server_handshake_timeout": HANDSHAKE_S, "max_connection_idle": IDLE_S, "max_connection_age": AGE_S,
        "keepalive_time": QUIET_S, "keepalive_timeout": DEAD_S,
    }  # fmt: skip
    most = ("grpc.max_allowed_incoming_connections", door.connections)
    return (most, *((f"grpc.{name}_ms", round(time_s * 1000)) for name, time_s in times_s.items()))
