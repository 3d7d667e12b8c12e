"""Which transfer mode a session gets: the first that it offers and may have, and why not those before.

copy     the client copies into its ring, a leaf thread from there to the slot
daemon   the same, and the daemon itself copies between its arenas and memory of a GPU that the client hands it
ring     the same, of a client that keeps a buffer of its own in between
direct   the client copies straight into slots of its own tenant, which it maps writable; only where the operator trusts
         the tenant's processes not to harm each other, and where they can be told apart (`processes.py`)
"""

from dataclasses import dataclass
from typing import Final

from kvproto.frames import Hello, Mode, Role
from kvstore.sessions import Process
from kvstored.peer import Peer
from kvstored.processes import process_of


@dataclass(frozen=True, slots=True)
class Chosen:
    """What WELCOME says of it. `owner`: who writes into slots, in mode direct."""

    mode: Mode
    owner: Process | None
    notes: str


_ALWAYS: Final = (Mode.COPY, Mode.RING)
_NOT_TOLD_APART: Final = (
    "the daemon cannot tell when this process is gone: it is in another pid namespace, or /proc hides it "
    "(before Linux 6.9: kvctl service install --with direct)"
)


def choose_mode(hello: Hello, peer: Peer, tenant: str, *, trusting: bool, no_device: str, emulated: bool) -> Chosen:
    """`trusting`: does the operator say that of this tenant? `no_device`: why this daemon copies for no GPU; empty: it
    does, for an emulation of one if `emulated`. Who offers nothing that can be had is told copy.
    """
    whys: list[str] = []
    for mode in hello.modes:
        if mode in _ALWAYS:
            return Chosen(mode, None, "; ".join(whys))
        if mode is Mode.DAEMON:
            why = no_device if hello.role is Role.ENGINE else "only engines store"
            if not why:
                said = ["the GPU is an emulation in host memory"] if emulated else []
                return Chosen(mode, None, "; ".join([*said, *whys]))
            whys.append(f"daemon: {why}")
            continue
        why, owner = _direct(hello, peer, tenant, trusting=trusting)
        if owner is not None:
            return Chosen(mode, owner, "; ".join(whys))
        whys.append(f"{mode.name.lower()}: {why}")
    return Chosen(Mode.COPY, None, "; ".join(whys))


def _direct(hello: Hello, peer: Peer, tenant: str, *, trusting: bool) -> tuple[str, Process | None]:
    if hello.role is not Role.ENGINE:
        return "only engines store", None
    if not trusting:
        return f"tenant {tenant} is not marked as trusting (tenants.{tenant}.trusting)", None
    owner = process_of(peer)
    return _NOT_TOLD_APART, owner
