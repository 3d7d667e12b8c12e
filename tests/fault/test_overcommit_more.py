"""Fault 14, the bounds that are not in test_overcommit.py: more is refused, and who keeps to them goes on."""

import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from bench.process import DaemonProcess
from kvproto import device_frames, frames
from kvproto.device_frames import Attach, Opens, Piece, SharedHandle, State
from kvproto.errors import Code
from kvproto.frames import Mode, Verb
from kvproto.limits import (
    DISK_POOLS_PER_TENANT,
    HANDLES_PER_UID,
    OUTBOX_FRAMES,
    PAGE_BYTES,
    POOLS_PER_TENANT,
    TRANSFERS_PER_SESSION,
)
from kvstore.tier import flushing
from tests.attached_kit import PAGES, PIECE, Engine, Gate, engine, gated_daemon
from tests.core import SECOND, chain
from tests.fault.test_memory import store
from tests.fault.test_overcommit import TIMES, anonymous_bytes, descriptors
from tests.node import until
from tests.raw import RawClient, identity, key, raw_client, real_daemon
from tests.unit.test_disk import make

ALLOCATIONS = 250  # of an ATTACH: a message carries 253 descriptors
MANY = 1 << 20  # frames
UNREAD_BYTES = 8 << 20  # far above what 256 small frames and the buffers of a socket take


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """Instead of the folder's: what is used up here lasts."""
    with real_daemon() as process:
        yield process
        assert process.process.poll() is None, "the daemon died"


def opened(client: RawClient, block_bytes: int) -> Code | None:
    """What OPEN is refused with."""
    client.send(frames.build(Verb.OPEN, client.request(), identity(block_bytes, model="sizes").canonical()))
    message = client.receive()
    assert message is not None, "hung up"
    head, frame, _ = message
    return None if head.verb == Verb.OPENED else frames.parse_failure(frame, head)[0]


def test_slot_sizes_of_a_tenant(daemon: DaemonProcess) -> None:
    with raw_client(daemon.runtime_dir) as client:
        told = Counter(opened(client, number * PAGE_BYTES) for number in range(1, TIMES * POOLS_PER_TENANT + 1))
        assert told == {None: POOLS_PER_TENANT, Code.LIMIT: (TIMES - 1) * POOLS_PER_TENANT}
        assert opened(client, PAGE_BYTES) is None, "the control: a size that there is"


def test_slot_sizes_of_a_tenant_on_disk() -> None:
    core = make()
    segments, tenant = core.store.disk.segments, core.client().session.tenant
    sizes = [number * PAGE_BYTES for number in range(2, 2 + TIMES * DISK_POOLS_PER_TENANT)]
    segments.segment_bytes = 2 * sizes[-1]
    pools = [segments.pool(tenant, slot_bytes) for slot_bytes in sizes]
    assert [pool is not None for pool in pools] == [True] * DISK_POOLS_PER_TENANT + [False] * (
        (TIMES - 1) * DISK_POOLS_PER_TENANT
    )
    assert segments.pool(tenant, sizes[0]) is pools[0]


def pings_until_it_is_stopped(client: RawClient) -> int:
    """How many went."""
    ping = frames.build(Verb.PING, 7, bytes(8))
    for sent in range(MANY):
        try:
            client.send(ping)
        except (BrokenPipeError, ConnectionResetError):
            return sent
    return MANY


def test_answers_that_a_client_does_not_read(daemon: DaemonProcess) -> None:
    """It asks on and reads nothing: it is told to go, and what waited for it is given back."""
    with raw_client(daemon.runtime_dir) as bystander:
        bystander.ping()
        fds, memory = descriptors(daemon), anonymous_bytes(daemon)
        for _ in range(TIMES):
            with raw_client(daemon.runtime_dir) as client:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PAGE_BYTES)
                client.socket.settimeout(20.0)
                sent = pings_until_it_is_stopped(client)
                assert OUTBOX_FRAMES <= sent < MANY, "nobody stopped it"
            bystander.ping()
        less = fds + TIMES  # the daemon may have opened one for itself meanwhile
        assert until(lambda: descriptors(daemon) < less), "descriptors of who was sent away"
        assert anonymous_bytes(daemon) < memory + UNREAD_BYTES
        with raw_client(daemon.runtime_dir) as reader:  # the control: as many, and each is read
            for _ in range(4 * OUTBOX_FRAMES):
                reader.ping()


def test_blocks_that_a_flush_can_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond, none is remembered by name: they count as failed, and the next FLUSH speaks of its own again."""
    monkeypatch.setattr(flushing, "STORED_PER_SESSION", 4)
    core = make()
    client = core.client()
    namespace = client.open()
    for number in range(3 * TIMES):
        client.put(namespace, chain(1, f"chain-{number}"))
        core.settle()
        stored = client.session.stored[namespace.number]
        assert len(stored.rows) == len(stored.generations) <= 4
    assert (len(stored.rows), stored.lost) == (4, 8)
    answer = core.store.flush(client.session, namespace, 7, 10 * SECOND)
    core.settle()
    counts = answer or core.outbox.flushed[-1][2]
    assert counts == (4, 0, 8, 0)
    client.put(namespace, chain(1, "later"))
    core.settle()
    answer = core.store.flush(client.session, namespace, 8, 10 * SECOND)
    core.settle()
    assert (answer or core.outbox.flushed[-1][2]) == (1, 0, 0, 0)


# -- mode daemon ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated() -> Iterator[tuple[DaemonProcess, Gate]]:
    with gated_daemon("--policy-dram", "lru") as made:
        yield made
        assert made[0].process.poll() is None, "the daemon died"


@pytest.fixture
def kv() -> Iterator[Engine]:
    with engine() as made:
        yield made


def attach(raw: RawClient, kv: Engine, allocations: int) -> tuple[Verb, int]:
    """A layer's memory so many times over; the answer."""
    whole = int(kv.layers[0].array.nbytes)
    handle = kv.device.export(kv.layers[0].data_ptr(), whole)
    fds = [handle.fd, *(os.dup(handle.fd) for _ in range(allocations - 1))]
    handles = [SharedHandle(whole, Opens.DESCRIPTOR)] * allocations
    identity_of_device = bytes.fromhex(kv.device.properties.identity)
    asked = Attach(identity_of_device, handles, [Piece(0, 0, PIECE)], PIECE, PAGES)
    raw.send(device_frames.build_attach(raw.request(), asked), fds)
    for fd in fds:
        os.close(fd)
    return answered(raw)


def answered(raw: RawClient) -> tuple[Verb, int]:
    """The verb of the next answer, and the number in it; what comes unasked is kept."""
    while True:
        message = raw.receive()
        assert message is not None, "hung up"
        head, frame, _ = message
        if head.request:
            return Verb(head.verb), 0 if head.verb == Verb.FAILED else frames.parse_number(frame, head)
        raw.unasked.append(message)


def loaded(raw: RawClient) -> set[int]:
    """Which transfers have ended, of those heard of."""
    said = [device_frames.parse_loaded(frame, head) for head, frame, _ in raw.unasked if head.verb == Verb.LOADED]
    return {each.transfer for each in said if each.state is not State.MOVING}


def test_transfers_of_a_session(gated: tuple[DaemonProcess, Gate], kv: Engine) -> None:
    daemon, gate = gated
    with raw_client(daemon.runtime_dir) as writer:
        store(writer, writer.open(PIECE, model="transfers"), [key(1)], b"a")
    with raw_client(daemon.runtime_dir, modes=(Mode.DAEMON,)) as raw:
        namespace, (_, memory) = raw.open(PIECE, model="transfers"), attach(raw, kv, 1)

        def load(page: int) -> None:
            frame = device_frames.build_load(raw.request(), namespace, memory, [page], key(1), wait_ns=0, groups=1)
            raw.send(frame)

        gate.shut()
        try:
            for number in range(TIMES * TRANSFERS_PER_SESSION):
                load(number % PAGES)
            told = Counter(answered(raw)[0] for _ in range(TIMES * TRANSFERS_PER_SESSION))
        finally:
            gate.open()
        assert told == {Verb.MOVING: TRANSFERS_PER_SESSION, Verb.FAILED: (TIMES - 1) * TRANSFERS_PER_SESSION}
        while len(loaded(raw)) < TRANSFERS_PER_SESSION:
            raw.ping()
        load(0)
        assert answered(raw)[0] is Verb.MOVING, "the control: there is room again"


def test_allocations_of_a_user(gated: tuple[DaemonProcess, Gate], kv: Engine) -> None:
    daemon, _ = gated
    before, most = descriptors(daemon), HANDLES_PER_UID // ALLOCATIONS
    with ExitStack() as stack:
        told = []
        for _ in range(TIMES * most):
            raw = stack.enter_context(raw_client(daemon.runtime_dir, modes=(Mode.DAEMON,)))
            told.append(attach(raw, kv, ALLOCATIONS)[0])
        assert told == [Verb.ATTACHED] * most + [Verb.FAILED] * (TIMES - 1) * most
        raw.ping()
    lingering = TIMES * most  # a descriptor of each session's process, which lives
    assert until(lambda: descriptors(daemon) <= before + lingering), "they are closed with their sessions"
