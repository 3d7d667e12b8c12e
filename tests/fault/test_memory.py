"""What a client can do to memory it was given, and what it finds there."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys

import pytest

from bench.process import DaemonProcess
from kvkernels import libc
from kvproto import frames
from kvproto.errors import Grant, Outcome
from kvproto.frames import Verb
from kvproto.limits import PAGE_BYTES
from tests.raw import RawClient, key, raw_client, real_daemon

BLOCK = 4096


def store(client: RawClient, namespace: int, keys: list[bytes], fill: bytes) -> None:
    """Store blocks made of one byte each, until visible."""
    ring = mmap.mmap(client.fds[1], 0)
    items = client.reserve(namespace, keys)
    assert all(item.grant == Grant.GRANTED for item in items)
    for item in items:
        ring[item.page * PAGE_BYTES : item.page * PAGE_BYTES + BLOCK] = fill * BLOCK
    assert client.commit([item.ticket for item in items]) == 0
    published(client, len(items))
    ring.close()


def published(client: RawClient, count: int) -> list[int]:
    """Outcomes of that many tickets."""
    outcomes: list[int] = []
    while len(outcomes) < count:
        waiting = [message for message in client.unasked if message[0].verb == Verb.PUBLISHED]
        head, frame, _ = waiting[0] if waiting else client.answer(Verb.PUBLISHED)
        if waiting:
            client.unasked.remove(waiting[0])
        outcomes += [outcome for _, outcome in frames.parse_published(frame, head)]
    return outcomes


def arena_fd(client: RawClient) -> int:
    """The descriptor of the arena that came last."""
    assert any(head.verb == Verb.ARENA for head, _, _ in client.unasked)
    return client.fds[-1]


def read(client: RawClient, location: tuple[int, ...]) -> bytes:
    """A leased block, read through a map of our own."""
    with mmap.mmap(arena_fd(client), 0, prot=mmap.PROT_READ) as arena:
        return arena[location[1] * BLOCK : (location[1] + 1) * BLOCK]


def test_an_arena_cannot_be_mapped_writable_truncated_grown_or_resealed(client: RawClient) -> None:
    namespace = client.open()
    keys = [os.urandom(32)]
    store(client, namespace, keys, b"a")
    leased = client.lease(namespace, keys)
    fd = arena_fd(client)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 0)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        os.ftruncate(fd, 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(OSError, match=r"."):
        os.write(fd, b"x")
    assert read(client, leased.locations[0]) == b"a" * BLOCK


def test_a_map_of_an_arena_cannot_be_made_writable_afterwards(client: RawClient) -> None:
    namespace = client.open()
    keys = [os.urandom(32)]
    store(client, namespace, keys, b"b")
    client.lease(namespace, keys)
    address = libc.map_shared(arena_fd(client), BLOCK, writable=False)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert mprotect(address, BLOCK, libc.PROT_READ | libc.PROT_WRITE) == -1
    assert ctypes.get_errno() == errno.EACCES
    libc.unmap(address, BLOCK)


def test_the_ring_cannot_be_truncated_or_grown(client: RawClient) -> None:
    for size in (0, 64 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(client.fds[1], size)
    client.ping()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_cannot_reopen_an_arena_for_writing(daemon: DaemonProcess) -> None:
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.fault.test_memory import arena_fd, store
from tests.raw import key, raw_client
os.setgroups([]); os.setgid(4242); os.setuid(4242)  # only now: the sources need not be readable to others
with raw_client(Path({str(daemon.runtime_dir)!r})) as client:
    namespace = client.open()
    store(client, namespace, [key(1)], b"c")
    assert len(client.lease(namespace, [key(1)]).locations) == 1
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
        try:
            os.open(f"/proc/self/fd/{{arena_fd(client)}}", flags)
        except PermissionError:
            print("refused")
    print(client.welcome.tenant)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused", "refused", "refused", "uid-4242"], done.stderr


def test_two_tenants_do_not_see_each_others_blocks_under_one_key(daemon: DaemonProcess) -> None:
    with raw_client(daemon.runtime_dir) as first, raw_client(daemon.runtime_dir) as second:
        keys = [os.urandom(32)]
        mine, same, other = first.open(), second.open(), second.open(model="other")
        store(first, mine, keys, b"d")
        assert second.lease(same, keys).lease != 0  # one user, one tenant, one namespace: shared
        assert second.lease(other, keys).lease == 0


def test_what_a_client_writes_into_its_ring_after_commit_never_tears_what_is_stored(client: RawClient) -> None:
    """The stored bytes are whatever the copy saw, and the checksum is of those: both reads agree for ever."""
    namespace = client.open()
    with mmap.mmap(client.fds[1], 0) as ring:
        for attempt in range(20):
            (item,) = client.reserve(namespace, [key(10_000 + attempt)])
            span = slice(item.page * PAGE_BYTES, item.page * PAGE_BYTES + BLOCK)
            ring[span] = b"x" * BLOCK
            client.send(frames.build(Verb.COMMIT, client.request(), commits=[item.ticket]))
            ring[span] = b"y" * BLOCK
            assert published(client, 1) == [Outcome.PUBLISHED]
            ring[span] = b"z" * BLOCK
            (location,) = client.lease(namespace, [key(10_000 + attempt)]).locations
            stored = read(client, location)
            assert b"z" not in stored
            assert set(stored) <= set(b"xy")
            assert stored == read(client, location)


def test_a_client_killed_between_reserve_and_commit_leaves_nothing_behind(daemon: DaemonProcess) -> None:
    keys = [key(20_000 + number) for number in range(8)]
    script = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.raw import key, raw_client
with raw_client(Path({str(daemon.runtime_dir)!r})) as client:
    items = client.reserve(client.open(), [key(20_000 + number) for number in range(8)])
    assert all(item.grant == 0 for item in items), items
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    with raw_client(daemon.runtime_dir) as survivor:
        namespace = survivor.open()
        assert survivor.lease(namespace, keys).lease == 0
        store(survivor, namespace, keys, b"e")  # every key is free again
        assert len(survivor.lease(namespace, keys).locations) == 8


def test_a_lapsed_ticket_is_stale_and_its_key_free() -> None:
    with (
        real_daemon("--ring", "1MiB", "--ticket-ttl", "200ms") as daemon,
        raw_client(daemon.runtime_dir) as client,
        raw_client(daemon.runtime_dir) as other,
    ):
        namespace, theirs = client.open(), other.open()
        keys = [os.urandom(32)]
        (item,) = client.reserve(namespace, keys)
        grants = {Grant.PENDING}
        while Grant.GRANTED not in grants:  # until the ticket has lapsed
            grants |= {Grant(granted.grant) for granted in other.reserve(theirs, keys)}
        assert client.commit([item.ticket]) == 1
        assert published(client, 1) == [Outcome.STALE]


def test_a_full_store_evicts_the_oldest_leaf_first(client: RawClient) -> None:
    """64 MiB hold 16,384 blocks of 4 KiB; two thirds as much again go in, a batch at a time."""
    namespace = client.open(model="many")
    batches = [[key(batch << 32 | number) for number in range(128)] for batch in range(1, 161)]
    for batch in batches:
        store(client, namespace, batch, b"f")
    assert client.lease(namespace, batches[0]).lease == 0
    assert len(client.lease(namespace, batches[-1]).locations) == 128


def test_a_store_larger_than_the_tier_keeps_the_lead_part_and_says_so(daemon: DaemonProcess) -> None:
    with raw_client(daemon.runtime_dir) as client:
        namespace = client.open(block_bytes=5 << 20, model="huge")  # one to an arena of 8 MiB; the ring has 1 MiB
        items = client.reserve(namespace, [os.urandom(32)])
        assert items[0].grant == Grant.QUOTA  # no span will ever be large enough
        client.ping()


def test_a_recycled_arena_reads_zeros_to_who_still_maps_it() -> None:
    """One tenant has both arenas; the poorer one takes its share; the old map shows nothing of the new bytes."""
    with (
        real_daemon("--ring", "1MiB", "--dram", "16MiB", tenants=("rich", "poor")) as daemon,
        raw_client(daemon.runtime_dir, tenant="rich") as rich,
        raw_client(daemon.runtime_dir, tenant="poor") as poor,
    ):
        namespace = rich.open()
        batches = [[key(batch << 32 | number) for number in range(128)] for batch in range(1, 33)]  # 2 x 8 MiB
        for batch in batches:
            store(rich, namespace, batch, b"g")
        given = [rich.lease(namespace, batches[at], ttl_s=0.1).locations[0][0] for at in (0, -1)]
        assert len(set(given)) == 2, "the oldest blocks and the youngest ones are in one arena"
        addresses = [libc.map_shared(fd, 8 << 20, writable=False) for fd in rich.fds[2:]]
        gone = libc.bytes_at(addresses[0], 8 << 20)
        assert (gone == ord("g")).all()
        while not _was_told(rich, given[0]):
            _fill_with_another_size(poor)
            assert not (gone == ord("h")).any(), "another tenant's bytes in a map of who gave way"
            rich.ping()
        _wait_until_zero(rich, gone)
        _fill_with_another_size(poor)
        assert not gone.any(), "another tenant's bytes in a stale map"
        for address in addresses:
            libc.unmap(address, 8 << 20)


def _fill_with_another_size(client: RawClient) -> None:
    """Store as many blocks as an arena holds, so far as there is room."""
    namespace = client.open(block_bytes=512 << 10)
    with mmap.mmap(client.fds[1], 0) as ring:
        for _ in range(16):
            (item,) = client.reserve(namespace, [os.urandom(32)])
            if item.grant == Grant.GRANTED:
                ring[item.page * PAGE_BYTES : item.page * PAGE_BYTES + 4096] = b"h" * 4096
                client.commit([item.ticket])
                published(client, 1)


def _was_told(client: RawClient, arena: int) -> bool:
    told = [frames.parse_number(frame, head) for head, frame, _ in client.unasked if head.verb == Verb.ARENA_GONE]
    return arena in told


def _wait_until_zero(client: RawClient, view: libc.Bytes) -> None:
    while view.any():  # the punch runs on another thread of the daemon
        assert not (view == ord("h")).any(), "another owner's bytes in a stale map"
        client.ping()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_user_that_stands_for_every_unmapped_one_is_refused(daemon: DaemonProcess) -> None:
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.raw import dial
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(dial(Path({str(daemon.runtime_dir)!r})).goodbye()[0].name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "REFUSED", done.stderr


def test_status_says_when_a_client_could_reopen_what_it_was_given(client: RawClient, daemon: DaemonProcess) -> None:
    client.ping()
    command = [sys.executable, "-m", "kvctl", "--runtime-dir", str(daemon.runtime_dir), "-o", "json", "clients"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {one["isolation"] for one in told["clients"]} == {"accident only"}  # it runs as the daemon's own user
