"""Where a control socket is, for whom, and how much of the daemon it may take."""

from dataclasses import dataclass
from typing import Final

import grpc

from kvstored.block_events_stream import WATCHERS, WATCHERS_OF_ONE

CONTROL: Final = "control.sock"
TENANTS: Final = "tenants.sock"
HANDLER_THREADS: Final = 4
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
    """Everybody may connect: so it has threads, calls and connections of its own, and nobody who acts waits for it."""
    return Door(
        TENANTS, 0o666, threads=2, calls=16, connections=32, health=False, watchers_of_one=WATCHERS_OF_ONE, gate=gate
    )
