"""Out of one daemon into another one of this machine, as any client reads and stores; every byte is compared there."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

from kvclient import Namespace
from kvctl.amounts import counted
from kvctl.archive_export import RUN_BLOCKS, RUN_BYTES, connected, namespace_of, read_run
from kvctl.client import ControlClient, Exit, KvctlError, find_socket, printable
from kvctl.program import Globals
from kvproto import control_pb2 as pb
from kvproto.frames import Role
from kvproto.identity import NamespaceIdentity

SPACE_S: Final = 10.0  # for room in the ring
TRIES: Final = 5


def copy(
    chosen: Globals, client: ControlClient, to: Path, tenant: str, digest: str, keys: Sequence[bytes]
) -> int:  # fmt: skip
    """How many of the first blocks the daemon at `to` has now, each byte as it is here. Raises KvctlError."""
    target_socket = find_socket(to, {}, Path("/"))
    if target_socket.parent.resolve() == client.socket_path.parent.resolve():
        raise KvctlError(Exit.USAGE, "--to names the daemon that has them; name another one")
    page = client.walk(pb.WalkBlocksRequest(tenant=tenant, namespace_digest=digest))
    identity = NamespaceIdentity.from_canonical(page.identity)
    with ExitStack() as stack:
        reading = stack.enter_context(connected(client.socket_path.parent, tenant, Role.TOOL, "kvctl move"))
        storing = stack.enter_context(connected(target_socket.parent, tenant, Role.ENGINE, "kvctl move"))
        source, target = namespace_of(reading, identity), namespace_of(storing, identity)
        most = max(1, min(RUN_BLOCKS, RUN_BYTES // identity.block_bytes))
        moved = 0
        try:
            for first, stop in pairwise([*range(0, len(keys), most), len(keys)]):
                came = _copy_run(source, target, keys[first:stop], keys[first - 1] if first else None)
                moved += came
                if came < stop - first:
                    break
        except KvctlError as error:
            before = (
                f"; {counted(moved, 'block')} before it went well, and the other daemon has them now" if moved else ""
            )
            raise KvctlError(error.code, f"{error}{before}") from None
        finally:  # what was stored is stored, whatever came after it
            with ControlClient(target_socket, chosen.timeout_s) as other:
                for one in (client, other):
                    _note(one, tenant, digest, moved, moved * identity.block_bytes)
        return moved


def _copy_run(source: Namespace, target: Namespace, keys: Sequence[bytes], parent: bytes | None) -> int:
    bodies = read_run(source, keys)
    keys = keys[: len(bodies)]
    for _ in range(TRIES if bodies else 0):
        stored = target.store(keys, bodies, parent=parent, wait=True, space_s=SPACE_S)
        if not stored.refused:
            break
    back = read_run(target, keys)
    for number, (body, other) in enumerate(zip(bodies, back, strict=False)):
        if body != other:
            text = f"the other daemon has other bytes for {printable(keys[number].hex()[:16])}"
            raise KvctlError(Exit.REFUSED, f"{text}: whatever it is, it was there before; nothing is evicted here")
    return len(back)


def _note(client: ControlClient, tenant: str, digest: str, blocks: int, moved_bytes: int) -> None:
    """For the audit files. At the other daemon we may have stored what is our own, and not be one of those who act."""
    with suppress(KvctlError):
        client.note_transfer(
            pb.NoteTransferRequest(
                verb="move", tenant=tenant, namespace_digest=digest, blocks=blocks, bytes=moved_bytes
            )
        )
