"""Mode daemon when things break: copies that hang, clients that die, sessions that break, a daemon that is killed.

Until the daemon has said that nothing is under way, or is gone, pages are nobody's; blocks that are read stay what they
are meanwhile, whatever becomes of their lease.
"""

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient.attached import AttachedMemory
from kvclient.results import Reason
from kvctl.client import ControlClient
from kvproto import device_frames, frames
from kvproto.device_frames import Attach, Fate, Opens, Piece, SharedHandle, State
from kvproto.errors import AttachError, Code, LimitError, UsageError
from kvproto.frames import Mode, Verb
from kvproto.limits import MEMORIES_PER_SESSION
from tests.attached_kit import (
    BLOCK_BYTES,
    LAYERS,
    PIECE,
    Engine,
    Gate,
    connected,
    engine,
    gated_daemon,
    hurried,
    maps_of,
    namespace_of,
    other_engine,
)
from tests.node import until
from tests.raw import RawClient, dial, key, raw_client

COUNT = 8
FROM, TO = list(range(COUNT)), list(range(32, 32 + COUNT))
LEASE_S = 0.4
TIMES_S = (0.5, 5.0, 20.0)  # the next one where a machine is so busy that the last one shows nothing


@pytest.fixture(scope="module")
def gated() -> Iterator[tuple[DaemonProcess, Gate]]:
    with gated_daemon("--lease-ttl-max", f"{LEASE_S}s", "--policy-dram", "lru") as made:
        yield made
        assert made[0].process.poll() is None, "the daemon died"


@pytest.fixture(autouse=True)
def gate_is_open_afterwards(gated: tuple[DaemonProcess, Gate]) -> Iterator[None]:
    yield
    gated[1].open()


@pytest.fixture
def kv() -> Iterator[Engine]:
    with engine() as made:
        yield made


def keys_of(namespace: kvclient.Namespace) -> list[bytes]:
    return list(namespace.keys(list(range(4 * COUNT))))


def saved(client: kvclient.Client, kv: Engine, model: str) -> tuple[kvclient.Namespace, list[bytes]]:
    """A chain in the store, of what is in `FROM`."""
    namespace = namespace_of(client, model)
    keys = keys_of(namespace)
    blocks = kv.values[:, :COUNT].transpose(1, 0, 2).reshape(COUNT, BLOCK_BYTES).copy()
    assert namespace.store(keys, blocks, wait=True).accepted == COUNT
    return namespace, keys


def pids_of_clients(daemon: DaemonProcess) -> set[int]:
    with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as control:
        return {each.pid for each in control.clients().clients}


def crowd_out(client: kvclient.Client) -> None:
    """Put more of others' blocks into DRAM than it holds: what nobody holds is gone, and its slots are theirs."""
    other = namespace_of(client, "others")
    rubbish = np.full((1000, BLOCK_BYTES), 0xEE, dtype=np.uint8)
    for number in range(1, 6):  # 80 MiB
        other.store([key(1000 * number + block) for block in range(1000)], rubbish, wait=True)


def test_a_copy_that_hangs_keeps_its_pages_until_it_has_ended(gated: tuple[DaemonProcess, Gate], kv: Engine) -> None:
    daemon, gate = gated
    with connected(daemon) as client:
        namespace, keys = saved(client, kv, "hangs")
        memory = kv.attach(client)
        gate.shut()
        with hurried(client, namespace):
            for timeout_s in TIMES_S:
                found = namespace.load(keys, memory[TO], timeout_s=timeout_s)
                if gate.holds:  # else it was cancelled before it began
                    break
                assert memory.settle(20.0)
            assert found == kvclient.LoadResult(0, settled=False, reason=Reason.TIMED_OUT)
            assert memory.unsettled() == TO
            with pytest.raises(UsageError, match="may still be written"):
                namespace.load(keys[:1], memory[TO[:1]])
            with pytest.raises(UsageError, match="may still be written"):
                namespace.save(keys[:1], memory[TO[:1]])
            assert not memory.settle(0.1)
        assert client.ping() is not None  # nobody else waits for it
        gate.open()
        assert memory.settle(20.0)
        assert namespace.load(keys, memory[TO], timeout_s=20.0) == kvclient.LoadResult(COUNT)
        assert np.array_equal(kv.get(TO), kv.values[:, :COUNT])


def test_blocks_that_are_being_loaded_stay_what_they_are(gated: tuple[DaemonProcess, Gate], kv: Engine) -> None:
    """Whatever becomes of their lease: deleted, crowded out, and later than any lease lasts."""
    daemon, gate = gated
    with connected(daemon) as client:
        namespace, keys = saved(client, kv, "held")
        control, its_keys = saved(client, kv, "not-held")
        memory = kv.attach(client)
        gate.shut()
        loading = namespace.start_load(keys, memory[TO], groups=2)
        assert until(lambda: gate.holds and not loading.wait(1, 0.01) and loading.blocks == COUNT)
        late = time.monotonic() + 2 * LEASE_S
        namespace.delete(keys)
        crowd_out(client)
        assert until(lambda: time.monotonic() > late)
        assert control.match(its_keys).blocks == 0
        assert namespace.match(keys).blocks == 0
        gate.open()
        assert loading.result(20.0) == kvclient.LoadResult(COUNT)
        assert np.array_equal(kv.get(TO), kv.values[:, :COUNT])


def test_a_group_is_there_when_it_is_said_and_the_next_one_is_not(
    gated: tuple[DaemonProcess, Gate], kv: Engine
) -> None:
    daemon, gate = gated
    with connected(daemon) as client:
        namespace, keys = saved(client, kv, "groups")
        memory = kv.attach(client)
        before = kv.get(TO)
        gate.shut(after=2)
        loading = namespace.start_load(keys, memory[TO], groups=LAYERS)
        assert loading.wait(2, 20.0)
        assert np.array_equal(kv.get(TO)[:2], kv.values[:2, :COUNT])
        assert not loading.wait(3, 0.05)
        assert np.array_equal(kv.get(TO)[2:], before[2:])
        gate.open()
        assert loading.wait(3, 20.0)
        assert loading.result(20.0).blocks == COUNT


@pytest.mark.parametrize("verb", ["load", "save"])
def test_an_engine_that_dies_while_it_is_copied(gated: tuple[DaemonProcess, Gate], kv: Engine, verb: str) -> None:
    daemon, gate = gated
    model = f"dies-{verb}"
    with connected(daemon) as client:
        namespace = namespace_of(client, model)
        if verb == "load":
            saved(client, kv, model)
        assert until(lambda: maps_of(daemon) == 0)
        gate.shut()
        with other_engine(daemon, verb, model) as process:
            assert until(lambda: gate.holds)
            process.kill()
            process.wait()
        assert until(lambda: process.pid not in pids_of_clients(daemon))
        assert maps_of(daemon) == LAYERS  # it is not closed under a copy
        gate.open()
        assert until(lambda: maps_of(daemon) == 0)
        matched = namespace.match(keys_of(namespace))
        assert (matched.blocks, matched.pending) == (COUNT if verb == "load" else 0, 0)


def test_a_session_that_breaks_is_settled_by_attaching_anew(gated: tuple[DaemonProcess, Gate], kv: Engine) -> None:
    daemon, gate = gated
    with connected(daemon) as client:
        namespace, keys = saved(client, kv, "breaks")
        memory = kv.attach(client)
        gate.shut()
        loading = namespace.start_load(keys, memory[TO])
        assert until(lambda: gate.holds and not loading.wait(1, 0.01) and loading.blocks == COUNT)
        link = client._connection._link
        assert link is not None
        link.shut()
        with hurried(client, namespace):
            found = loading.result(5.0)
            assert found == kvclient.LoadResult(0, settled=False, reason=Reason.UNREACHABLE)
            assert client.wait_connected(20.0)
            assert not memory.settle(0.5)  # the daemon does not say ATTACHED while it may still write
        assert memory.unsettled() == TO
        gate.open()
        assert memory.settle(20.0)
        kv.put(TO, np.zeros_like(kv.get(TO)))
        assert namespace.load(keys, memory[TO], timeout_s=20.0).blocks == COUNT
        assert np.array_equal(kv.get(TO), kv.values[:, :COUNT])


@contextmanager
def broken_while_it_hangs(
    gated: tuple[DaemonProcess, Gate], client: kvclient.Client, kv: Engine, model: str
) -> Iterator[tuple[kvclient.Namespace, list[bytes], AttachedMemory]]:
    """A LOAD whose session has ended, and whose copy has not before the block ends."""
    _, gate = gated
    namespace, keys = saved(client, kv, model)
    memory = kv.attach(client)
    gate.shut()
    loading = namespace.start_load(keys, memory[TO])
    assert until(lambda: gate.holds and not loading.wait(1, 0.01) and loading.blocks == COUNT)
    link = client._connection._link
    assert link is not None
    link.shut()
    assert until(lambda: client._connection.session() not in {None, link.session})
    assert loading.broken
    with hurried(client, namespace):
        yield namespace, keys, memory
    gate.open()


def test_who_attaches_again_and_again_while_a_copy_hangs_asks_once(
    gated: tuple[DaemonProcess, Gate], kv: Engine
) -> None:
    """The daemon keeps what it has not answered, and takes so many of a session."""
    with connected(gated[0]) as client:
        with broken_while_it_hangs(gated, client, kv, "again") as (namespace, keys, memory):
            for _ in range(2 * MEMORIES_PER_SESSION):
                assert memory.attach() is None
                assert namespace.load(keys, memory[TO]).reason is Reason.UNREACHABLE
            assert not memory.settle(0.5)
            assert memory.unsettled() == TO
        assert memory.settle(20.0)
        assert namespace.load(keys, memory[TO], timeout_s=20.0) == kvclient.LoadResult(COUNT)
        assert np.array_equal(kv.get(TO), kv.values[:, :COUNT])


def test_what_was_under_way_when_it_was_taken_back_is_settled_so_too(
    gated: tuple[DaemonProcess, Gate], kv: Engine
) -> None:
    with connected(gated[0]) as client:
        assert until(lambda: maps_of(gated[0]) == 0)
        with broken_while_it_hangs(gated, client, kv, "taken-back") as (_, _, memory):
            unanswered = kv.attach(client)
            assert not unanswered.detach()
            assert not memory.detach()
            assert memory.unsettled() == TO
        assert until(unanswered.detach)
        assert memory.settle(20.0)
        assert memory.attach() is None
        assert until(lambda: maps_of(gated[0]) == 0)  # what was attached for the answer is not kept


def test_what_was_too_much_once_may_be_attached_later(gated: tuple[DaemonProcess, Gate], kv: Engine) -> None:
    with connected(gated[0]) as client:
        first, *_ = [kv.attach(client) for _ in range(MEMORIES_PER_SESSION)]
        late = AttachedMemory(client._connection, kv.device, kv.pages)
        for _ in range(2):
            with pytest.raises(LimitError):
                late.attach()
        assert first.detach()
        assert late.attach() is not None


def test_nobody_waits_for_who_is_attaching_longer_than_he_may(gated: tuple[DaemonProcess, Gate], kv: Engine) -> None:
    with connected(gated[0]) as client:
        memory = kv.attach(client)
        with memory._attaching:
            assert memory.attach(time.monotonic_ns()) is None
        assert memory.attach(time.monotonic_ns()) is not None


def test_pages_that_are_read_are_settled_so_too(gated: tuple[DaemonProcess, Gate], kv: Engine) -> None:
    daemon, gate = gated
    with connected(daemon) as client, ThreadPoolExecutor(1) as thread:
        namespace = namespace_of(client, "breaks-save")
        keys = keys_of(namespace)
        memory = kv.attach(client)
        gate.shut()
        saving = thread.submit(namespace.save, keys, memory[FROM], timeout_s=30.0)
        assert until(lambda: gate.holds)  # before that, a cancelled copy is one that never began
        link = client._connection._link
        assert link is not None
        with hurried(client, namespace):
            link.shut()
            assert saving.result(30.0).reasons == {Reason.UNREACHABLE: COUNT}
            assert client.wait_connected(20.0)
            assert not memory.settle(0.5)
        assert memory.unsettled() == FROM
        gate.open()
        assert memory.settle(20.0)
        assert namespace.match(keys).blocks == 0  # whoever saved it is gone
        assert namespace.save(keys, memory[FROM], timeout_s=20.0).accepted == COUNT


def test_a_daemon_that_stands_still_is_a_miss_and_its_pages_are_not_free(
    gated: tuple[DaemonProcess, Gate], kv: Engine
) -> None:
    daemon, _ = gated
    with connected(daemon) as client:
        namespace, keys = saved(client, kv, "stopped")
        memory = kv.attach(client)
        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            with hurried(client, namespace):
                found = namespace.load(keys, memory[TO], timeout_s=0.1)
                assert (found.blocks, found.settled) == (0, False)
                assert namespace.save(keys, memory[FROM]).accepted == 0
        finally:
            os.kill(daemon.process.pid, signal.SIGCONT)
        assert memory.settle(20.0)
        assert until(lambda: namespace.load(keys, memory[TO], timeout_s=5.0).blocks == COUNT)


def test_what_a_daemon_that_stood_still_reads_too_late_is_not_stored(
    gated: tuple[DaemonProcess, Gate], kv: Engine
) -> None:
    """The SAVE lies in its socket when the caller gives up, and the engine's pages are the next request's."""
    daemon, _ = gated
    with connected(daemon) as client:
        namespace = namespace_of(client, "stopped-save")
        keys = keys_of(namespace)
        memory = kv.attach(client)
        assert namespace.save(keys[:1], memory[FROM[:1]], timeout_s=20.0).accepted == 1
        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            with hurried(client, namespace):
                found = namespace.save(keys[1:], memory[FROM[1:]], parent=keys[0], timeout_s=0.5)
        finally:
            kv.put(FROM, np.full_like(kv.get(FROM), 0xAA))
            os.kill(daemon.process.pid, signal.SIGCONT)
        assert (found.reasons, found.settled) == ({Reason.TIMED_OUT: COUNT - 1}, False)
        assert memory.settle(20.0)
        assert namespace.match(keys).blocks == 1
        found = namespace.save(keys[1:], memory[FROM[1:]], parent=keys[0], timeout_s=20.0)  # the control: it could be
        assert (found.accepted, found.settled) == (COUNT - 1, True)


def test_a_copy_that_ends_too_late_is_not_stored(gated: tuple[DaemonProcess, Gate], kv: Engine) -> None:
    daemon, gate = gated
    with connected(daemon) as client:
        namespace = namespace_of(client, "late-save")
        keys = keys_of(namespace)
        memory = kv.attach(client)
        assert namespace.match(keys).blocks == 0
        gate.shut()
        with hurried(client, namespace):
            for timeout_s in TIMES_S:
                found = namespace.save(keys, memory[FROM], timeout_s=timeout_s)
                if gate.holds:  # else it was cancelled before it began
                    break
                assert memory.settle(20.0)
        assert gate.holds
        assert (found.reasons, found.settled) == ({Reason.TIMED_OUT: COUNT}, False)
        assert memory.unsettled() == FROM
        kv.put(FROM, np.full_like(kv.get(FROM), 0xAA))
        gate.open()
        assert memory.settle(20.0)
        assert namespace.match(keys).blocks == 0
        assert namespace.save(keys, memory[FROM], timeout_s=20.0).accepted == COUNT  # the control


def test_a_daemon_that_is_killed_leaves_pages_to_their_owner(kv: Engine) -> None:
    with gated_daemon() as (daemon, gate), connected(daemon) as client:
        namespace, keys = saved(client, kv, "killed")
        memory = kv.attach(client)
        gate.shut()
        loading = namespace.start_load(keys, memory[TO])
        daemon.kill()
        assert loading.result(20.0) == kvclient.LoadResult(0, settled=True, reason=Reason.UNREACHABLE)
        assert memory.unsettled() == []
        assert namespace.load(keys, memory[TO]).reason is Reason.UNREACHABLE
        assert namespace.save(keys, memory[FROM]).reasons == {Reason.UNREACHABLE: COUNT}


def test_a_device_that_is_lost_ends_mode_daemon_and_nothing_else(kv: Engine) -> None:
    with gated_daemon("--gpu-hbm", "16MiB") as (daemon, gate), connected(daemon) as client:
        namespace, keys = saved(client, kv, "lost")
        memory = kv.attach(client)
        assert namespace.load(keys, memory[TO]).blocks == COUNT
        assert namespace.pin(keys, ttl_s=60.0, tier="hbm").blocks == COUNT
        assert until(lambda: namespace.match(keys).tiers.hbm == COUNT)
        gate.lose()
        assert namespace.load(keys, memory[TO]) == kvclient.LoadResult(0, settled=True, reason=Reason.DEVICE)
        assert namespace.save(list(namespace.keys([1, 2, 3, 4])), memory[FROM[:1]]).reasons == {Reason.DEVICE: 1}
        with pytest.raises(AttachError, match="lost"):
            kv.attach(client)
        assert namespace.match(keys).tiers == kvclient.Tiers(dram=COUNT), "the tier is off, its blocks are not gone"
        assert namespace.prefetch(keys, tier="hbm").there == COUNT
        with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as control:
            (gpu,) = control.status().devices
            assert (gpu.lost, gpu.hbm_bytes, gpu.hbm_blocks) == (True, 0, 0)
        on_host = np.zeros((COUNT, BLOCK_BYTES), dtype=np.uint8)
        with namespace.fetch(keys) as lease:
            assert lease.copy_to(on_host)
        assert np.array_equal(on_host.reshape(COUNT, LAYERS, PIECE).transpose(1, 0, 2), kv.values[:, :COUNT])
        assert np.array_equal(kv.get(FROM), kv.values[:, :COUNT])
        with connected(daemon) as later:
            assert later.status.mode == "copy"
            assert "fell off" in later.status.notes


# -- what a client may say --------------------------------------------------------------------------------------------


@pytest.fixture
def raw(gated: tuple[DaemonProcess, Gate]) -> Iterator[RawClient]:
    with raw_client(gated[0].runtime_dir, modes=(Mode.DAEMON,)) as made:
        yield made


def attach_frame(
    kv: Engine, *, pieces: Sequence[Piece], blocks: int = 64, handles: Sequence[SharedHandle] = ()
) -> bytes:
    whole = SharedHandle(int(kv.layers[0].array.nbytes), Opens.DESCRIPTOR)
    identity = bytes.fromhex(kv.device.properties.identity)
    return device_frames.build_attach(7, Attach(identity, handles or [whole], pieces, PIECE, blocks))


def attached(raw: RawClient, kv: Engine) -> int:
    handle = kv.device.export(kv.layers[0].data_ptr(), int(kv.layers[0].array.nbytes))
    raw.send(attach_frame(kv, pieces=[Piece(0, 0, PIECE)]), [handle.fd])
    os.close(handle.fd)
    head, frame, _ = raw.answer(Verb.ATTACHED)
    return frames.parse_number(frame, head)


def failed(raw: RawClient) -> tuple[Code, str]:
    head, frame, _ = raw.answer(Verb.FAILED)
    return frames.parse_failure(frame, head)


@pytest.mark.parametrize(
    ("piece", "blocks"),
    [(Piece(0, 0, PIECE), 65), (Piece(0, PIECE, PIECE), 64), (Piece(1, 0, PIECE), 64), (Piece(0, 1 << 60, PIECE), 64),
     (Piece(0, 0, 16), 2), (Piece(0, 8, PIECE), 2), (Piece(0, 0, (1 << 64) - PIECE), 2), (Piece(0, 0, PIECE), 0)],
)  # fmt: skip
def test_pages_beyond_what_the_handle_opens_are_refused(raw: RawClient, kv: Engine, piece: Piece, blocks: int) -> None:
    handle = kv.device.export(kv.layers[0].data_ptr(), int(kv.layers[0].array.nbytes))
    raw.send(attach_frame(kv, pieces=[piece], blocks=blocks), [handle.fd])
    os.close(handle.fd)
    assert failed(raw)[0] is Code.DEVICE
    assert attached(raw, kv)  # the same without the mistake


def test_a_descriptor_of_something_else_is_refused(
    raw: RawClient, kv: Engine, gated: tuple[DaemonProcess, Gate]
) -> None:
    """Above all an arena's, which the client may only read: nothing may be copied into it this way."""
    whole = int(kv.layers[0].array.nbytes)
    namespace = raw.open(4096)
    grants = raw.reserve(namespace, [key(1)])
    raw.commit([grants[0].ticket])
    assert raw.lease(namespace, [key(1)], wait_s=15.0).locations
    arena = raw.fds[-1]
    arena_bytes = os.fstat(arena).st_size
    unsealed = os.memfd_create("unsealed")
    os.truncate(unsealed, whole)
    before = len(os.listdir(f"/proc/{gated[0].process.pid}/fd"))  # noqa: PTH208
    for fd, length in 8 * ((arena, arena_bytes), (unsealed, whole), (raw.socket.fileno(), whole)):
        handles = [SharedHandle(length, Opens.DESCRIPTOR)]
        raw.send(attach_frame(kv, pieces=[Piece(0, 0, PIECE)], handles=handles), [fd])
        assert failed(raw)[0] is Code.DEVICE
    pid, number = gated[0].process.pid, 5
    raw.send(
        attach_frame(
            kv, pieces=[Piece(0, 0, PIECE)], handles=[SharedHandle(arena_bytes, Opens.IPC, f"{pid}:{number}".encode())]
        )
    )
    assert failed(raw)[0] is Code.DEVICE
    os.close(unsealed)
    # Fewer where what former tests left behind was being closed yet; 24 kept ones would be more.
    assert until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before)  # noqa: PTH208


def test_too_much_is_refused_and_the_session_goes_on(raw: RawClient, kv: Engine) -> None:
    raw.send(attach_frame(kv, pieces=[Piece(0, 0, PIECE)], handles=[SharedHandle(1 << 50, Opens.IPC, b"1:1")]))
    assert failed(raw)[0] is Code.LIMIT
    many = [SharedHandle(1 << 20, Opens.IPC, b"1:1")] * 257
    raw.send(attach_frame(kv, pieces=[Piece(0, 0, PIECE)], handles=many))
    assert failed(raw)[0] is Code.LIMIT
    raw.ping()


def test_a_load_is_held_to_what_is_attached(raw: RawClient, kv: Engine) -> None:
    memory, namespace, large = attached(raw, kv), raw.open(PIECE), raw.open(2 * PIECE)
    for number, of, pages, groups in (
        (memory + 1, namespace, [1], 1), (memory, large, [1], 1), (memory, namespace, [64], 1),
        (memory, namespace, [3, 3], 1),
        (memory, namespace, [(1 << 32) - 1], 1), (memory, namespace, [1], 2),
    ):  # fmt: skip
        keys = b"".join(key(page) for page in pages)
        raw.send(device_frames.build_load(9, of, number, pages, keys, wait_ns=0, groups=groups))
        assert failed(raw)[0] is Code.BAD_ARGUMENT
        if groups == 1 and len({*pages}) == len(pages):
            raw.send(device_frames.build_save(9, of, number, pages, keys, parent=None))
            assert failed(raw)[0] is Code.BAD_ARGUMENT
    raw.send(device_frames.build_load(9, namespace, memory, [1], key(404), wait_ns=0, groups=1))
    raw.answer(Verb.MOVING)
    head, frame, _ = raw.answer(Verb.LOADED)
    assert device_frames.parse_loaded(frame, head)[1:] == (0, 1, State.DONE)
    raw.send(device_frames.build_transfer(Verb.CANCEL_TRANSFER, 10, 404))  # of what is over, or never was
    raw.answer(Verb.CANCELLED)
    raw.send(frames.build(Verb.DETACH, 11, frames.NUMBER_BODY.pack(memory)))
    raw.answer(Verb.DETACHED)
    raw.send(frames.build(Verb.DETACH, 11, frames.NUMBER_BODY.pack(memory)))
    assert failed(raw)[0] is Code.BAD_ARGUMENT


def saved_by(raw: RawClient, namespace: int, memory: int, of: bytes, until_ns: int) -> list[Fate]:
    raw.send(device_frames.build_save(9, namespace, memory, [1], of, parent=None, until_ns=until_ns))
    raw.answer(Verb.MOVING)
    head, frame, _ = raw.answer(Verb.SAVED)
    return device_frames.parse_saved(frame, head)[1]


def test_a_save_is_good_until_it_says(raw: RawClient, kv: Engine) -> None:
    memory, namespace = attached(raw, kv), raw.open(PIECE, model="until")
    assert saved_by(raw, namespace, memory, key(1), time.monotonic_ns()) == [Fate.CANCELLED]
    assert saved_by(raw, namespace, memory, key(1), time.monotonic_ns() + 60 * 10**9) == [Fate.SAVED]
    assert saved_by(raw, namespace, memory, key(2), device_frames.NO_END) == [Fate.SAVED]


@pytest.mark.parametrize(("leaves", "fate"), [(True, Fate.CANCELLED), (False, Fate.SAVED)])
def test_a_save_whose_client_has_hung_up_is_not_begun(
    gated: tuple[DaemonProcess, Gate], raw: RawClient, kv: Engine, *, leaves: bool, fate: Fate
) -> None:
    memory, namespace = attached(raw, kv), raw.open(PIECE, model=f"leaves-{leaves}")
    os.kill(gated[0].process.pid, signal.SIGSTOP)
    try:
        raw.send(device_frames.build_save(9, namespace, memory, [1], key(1), parent=None))
        if leaves:
            raw.socket.shutdown(socket.SHUT_WR)
    finally:
        os.kill(gated[0].process.pid, signal.SIGCONT)
    head, frame, _ = raw.answer(Verb.SAVED)
    assert device_frames.parse_saved(frame, head)[1] == [fate]


@pytest.mark.parametrize(
    "frame",
    [
        device_frames.build_load(9, 1, 1, [1], key(1), wait_ns=1 << 60, groups=1),
        device_frames.build_load(9, 1, 1, [1], key(1), wait_ns=0, groups=0),
        device_frames.build_load(9, 1, 1, [1, 2], key(1), wait_ns=0, groups=1),
        device_frames.build_load(9, 77, 1, [1], key(1), wait_ns=0, groups=1),
        device_frames.build_save(9, 1, 1, [], b"", parent=None),
        frames.build(Verb.ATTACH, 9, b"short"),
        frames.build(Verb.ATTACH, 9, device_frames.ATTACH_HEAD.pack(bytes(16), 1 << 30, 1 << 30, 1, 0, 16)),
        frames.build(Verb.CANCEL_TRANSFER, 9, b"four"),
        frames.build(Verb.DETACH, 9),
    ],
)
def test_what_no_client_says_ends_the_session(raw: RawClient, frame: bytes) -> None:
    raw.send(frame)
    assert raw.goodbye()[0] in {Code.BAD_FRAME, Code.LIMIT, Code.BAD_NAMESPACE}


def test_verbs_of_mode_daemon_are_for_sessions_in_it(gated: tuple[DaemonProcess, Gate]) -> None:
    with raw_client(gated[0].runtime_dir) as copying:
        copying.send(device_frames.build_transfer(Verb.CANCEL_TRANSFER, 1, 1))
        assert copying.goodbye()[0] is Code.BAD_FRAME


def test_frames_that_a_session_left_unread_do_not_come_behind_the_fence(
    gated: tuple[DaemonProcess, Gate], kv: Engine
) -> None:
    """Else LOAD writes to pages that their owner was told are his."""
    daemon, _ = gated
    with raw_client(daemon.runtime_dir) as writer:
        namespace = writer.open(PIECE, model="unread")
        writer.commit([writer.reserve(namespace, [key(1)])[0].ticket])
        assert writer.lease(namespace, [key(1)], wait_s=15.0).locations
    first, second = dial(daemon.runtime_dir), dial(daemon.runtime_dir)
    try:
        first.hello(modes=(Mode.DAEMON,))
        memory, namespace = attached(first, kv), first.open(PIECE, model="unread")
        second.hello(modes=(Mode.DAEMON,))
        kv.put([5], np.full((LAYERS, 1, PIECE), 7, dtype=np.uint8))
        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            for _ in range(40):
                first.send(frames.build(Verb.RELEASE, 0))  # one a turn; who answers would find the socket closed
            first.send(device_frames.build_load(9, namespace, memory, [5], key(1), wait_ns=0, groups=1))
            first.socket.shutdown(socket.SHUT_RDWR)
            handle = kv.device.export(kv.layers[0].data_ptr(), int(kv.layers[0].array.nbytes))
            second.send(attach_frame(kv, pieces=[Piece(0, 0, PIECE)]), [handle.fd])
            os.close(handle.fd)
        finally:
            os.kill(daemon.process.pid, signal.SIGCONT)
        second.answer(Verb.ATTACHED)
        kv.put([5], np.full((LAYERS, 1, PIECE), 8, dtype=np.uint8))
        for _ in range(100):
            second.ping()
        assert np.all(kv.get([5]) == 8)
        again, namespace = attached(second, kv), second.open(PIECE, model="unread")
        second.send(device_frames.build_load(9, namespace, again, [5], key(1), wait_ns=0, groups=1))
        second.answer(Verb.LOADED)
        assert until(lambda: not np.all(kv.get([5])[0] == 8))  # the control: such a LOAD does write
    finally:
        first.close()
        second.close()


@contextmanager
def lingering() -> Iterator[socket.socket]:
    """A socket that cannot send what it holds, and waits for that when it is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        full = socket.create_connection(server.getsockname())
        silent, _ = server.accept()
    with full, silent:
        full.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                full.send(bytes(1 << 16))
        full.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
        yield full


@pytest.mark.parametrize("mode", [Mode.DAEMON, Mode.COPY])
@pytest.mark.parametrize("verb", [Verb.PING, Verb.ATTACH])
def test_nobody_waits_for_a_descriptor_that_does_not_close(
    gated: tuple[DaemonProcess, Gate], kv: Engine, mode: Mode, verb: Verb
) -> None:
    """Longer than a test lasts: whoever answers does not close it."""
    frame = frames.build(Verb.PING, 1, bytes(8))
    if verb is Verb.ATTACH:
        frame = attach_frame(kv, pieces=[Piece(0, 0, PIECE)])
    run = gated[0].runtime_dir
    with lingering() as full, raw_client(run, modes=(mode,)) as raw, raw_client(run) as other:
        os.kill(gated[0].process.pid, signal.SIGSTOP)  # so that its descriptor is the last one
        try:
            raw.send(frame, [full.fileno()])
        except PermissionError:  # a kernel that can refuse it
            assert mode is Mode.COPY
            full.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        finally:
            full.close()
            os.kill(gated[0].process.pid, signal.SIGCONT)
        other.ping()
        if mode is Mode.DAEMON:
            raw.ping()
            assert attached(raw, kv)
