"""Fault 14: four times what each limit allows, and memory that is not there. It is said, and nothing grows."""

import os
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.process import DaemonProcess
from kvproto import frames, policy_frames
from kvproto.errors import Code, Grant
from kvproto.frames import Verb
from kvproto.limits import (
    KEYS_PER_FRAME,
    LEASES_PER_SESSION,
    NAMESPACES_PER_SESSION,
    PAGE_BYTES,
    PINS_PER_TENANT,
    SESSIONS_PER_UID,
    TICKETS_PER_SESSION,
)
from kvproto.policy_frames import Partial
from tests.fault.test_memory import store
from tests.raw import RawClient, dial, key, raw_client, real_daemon

TIMES = 4
MIB = 1 << 20
RING_BYTES = 64 * MIB  # 16,384 spans: it is not what bounds tickets
GROWTH_BYTES = 4 * MIB  # a leak would be more: sessions alone have 192 sockets, 3,072 leases are refused
REPEATS = 4  # code is compiled and loaded meanwhile, once


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """Instead of the folder's: some of this lasts."""
    with real_daemon("--ring", f"{RING_BYTES}") as process:
        with raw_client(process.runtime_dir) as first:
            store(first, first.open(), [key(1)], b"a")
        yield process
        assert process.process.poll() is None, "the daemon died"


def anonymous_bytes(daemon: DaemonProcess) -> int:
    """What the daemon has for itself; arenas and rings are not in it."""
    lines = Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def descriptors(daemon: DaemonProcess) -> int:
    return sum(1 for _ in Path(f"/proc/{daemon.process.pid}/fd").iterdir())


def serves(daemon: DaemonProcess, client: RawClient) -> None:
    """A session in good standing, and a newcomer's."""
    client.ping()
    with raw_client(daemon.runtime_dir) as newcomer:
        assert newcomer.lease(newcomer.open(), [key(1)]).lease


def test_sessions_of_a_user(daemon: DaemonProcess) -> None:
    with raw_client(daemon.runtime_dir) as first:
        before = descriptors(daemon)
        others, refused = [], 0
        for _ in range(TIMES * SESSIONS_PER_UID):
            client = dial(daemon.runtime_dir)
            try:
                client.hello()
                others.append(client)
            except (AssertionError, OSError):
                refused += 1
                client.close()
        assert len(others) == SESSIONS_PER_UID - 1
        assert refused == TIMES * SESSIONS_PER_UID - len(others)
        late = dial(daemon.runtime_dir)
        code, text = late.goodbye()
        assert (code, str(SESSIONS_PER_UID) in text) == (Code.REFUSED, True), text
        late.close()
        for client in others:
            client.close()
        while descriptors(daemon) > before + 16:
            first.ping()
        serves(daemon, first)


def test_namespaces_of_a_session(daemon: DaemonProcess) -> None:
    with raw_client(daemon.runtime_dir) as bystander, raw_client(daemon.runtime_dir) as client:
        for number in range(NAMESPACES_PER_SESSION):
            client.open(model=f"model-{number}")
        for number in range((TIMES - 1) * NAMESPACES_PER_SESSION):
            form = frames.build(Verb.OPEN, 7, identity_of(number))
            client.send(form)
            head, frame, _ = client.answer(Verb.FAILED)
            assert frames.parse_failure(frame, head)[0] is Code.LIMIT
        serves(daemon, bystander)


def identity_of(number: int) -> bytes:
    from tests.raw import identity

    return identity(model=f"beyond-{number}").canonical()


def test_tickets_of_a_session(daemon: DaemonProcess) -> None:
    with raw_client(daemon.runtime_dir) as bystander, raw_client(daemon.runtime_dir) as client:
        namespace = client.open(model="tickets", block_bytes=1)
        grants: Counter[Grant] = Counter()
        for turn in range(TIMES * TICKETS_PER_SESSION // KEYS_PER_FRAME):
            keys = [key((turn + 1) << 64 | number) for number in range(KEYS_PER_FRAME)]
            grants.update(Grant(item.grant) for item in client.reserve(namespace, keys))
        assert grants[Grant.GRANTED] == TICKETS_PER_SESSION
        assert grants.keys() <= {Grant.GRANTED, Grant.BUSY, Grant.QUOTA, Grant.NO_PARENT, Grant.FULL}, grants
        serves(daemon, bystander)
    with raw_client(daemon.runtime_dir) as survivor:  # all of it is free again
        again = Grant.BUSY
        namespace = survivor.open(model="tickets", block_bytes=1)
        while again is Grant.BUSY:
            again = Grant(survivor.reserve(namespace, [key(1 << 64)])[0].grant)
        assert again is Grant.GRANTED


def test_leases_of_a_session(daemon: DaemonProcess) -> None:
    with raw_client(daemon.runtime_dir) as bystander, raw_client(daemon.runtime_dir) as client:
        namespace = client.open()
        leases = [client.lease(namespace, [key(1)], ttl_s=60).lease for _ in range(TIMES * LEASES_PER_SESSION)]
        assert all(leases[:LEASES_PER_SESSION])
        assert not any(leases[LEASES_PER_SESSION:]), "a miss is what is told"
        serves(daemon, bystander)
        client.send(frames.build(Verb.RELEASE, 0, releases=leases[:1000]))
        assert client.lease(namespace, [key(1)]).lease, "the control: it hits again once there is room"


def test_all_that_again_takes_no_more(daemon: DaemonProcess) -> None:
    grown = []
    for _ in range(REPEATS):
        before = anonymous_bytes(daemon)
        test_sessions_of_a_user(daemon)
        test_tickets_of_a_session(daemon)
        test_leases_of_a_session(daemon)
        grown.append(anonymous_bytes(daemon) - before)
        if grown[-1] < GROWTH_BYTES:
            return
    raise AssertionError(f"it grows each time: {grown}")


def test_pins_of_a_tenant(daemon: DaemonProcess) -> None:
    """A quarter beyond; four times as many take two seconds."""
    pin_beyond(daemon, PINS_PER_TENANT // 4)


@pytest.mark.long
def test_four_times_the_pins_of_a_tenant(daemon: DaemonProcess) -> None:
    pin_beyond(daemon, (TIMES - 1) * PINS_PER_TENANT)


def pin_beyond(daemon: DaemonProcess, more: int) -> None:
    with raw_client(daemon.runtime_dir) as client:
        namespace = client.open()
        told: Counter[Partial] = Counter()
        pins = []
        frame = policy_frames.build_pin(7, namespace, key(1), policy_frames.Tier.DRAM, 60 * 10**9, refresh=False)
        for _ in range(PINS_PER_TENANT + more):
            client.send(frame)
            head, answer, _ = client.answer(Verb.PINNED)
            pinned = policy_frames.parse_pinned(answer, head)
            told[Partial(pinned.partial)] += 1
            pins += [pinned.pin] if pinned.pin else []
        assert told == {Partial.NOTHING: PINS_PER_TENANT, Partial.TOO_MANY: more}
        assert len(pins) == PINS_PER_TENANT
        for at in range(0, len(pins), 1024):
            client.send(policy_frames.build_unpin(7, pins[at : at + 1024]))
            client.answer(Verb.UNPINNED)
        serves(daemon, client)


def test_blocks_larger_than_memory_and_more_of_them_than_fit(daemon: DaemonProcess) -> None:
    """256 MiB into a pool of 64, all leased: FULL is said, and what was leased stays as it was."""
    with raw_client(daemon.runtime_dir) as bystander, raw_client(daemon.runtime_dir) as client:
        block_bytes = 2 * MIB
        namespace = client.open(model="full", block_bytes=block_bytes)
        grants: Counter[Grant] = Counter()
        leased = 0
        for number in range(TIMES * 64 * MIB // block_bytes):
            grant = Grant.BUSY
            while grant is Grant.BUSY:  # an arena is on its way
                (item,) = client.reserve(namespace, [key(1 << 80 | number)])
                grant = Grant(item.grant)
            grants[grant] += 1
            if grant is Grant.GRANTED:
                client.commit([item.ticket])
                leased += bool(client.lease(namespace, [key(1 << 80 | number)], ttl_s=60, wait_s=15).lease)
        assert grants.keys() <= {Grant.GRANTED, Grant.FULL}
        assert 20 <= leased == grants[Grant.GRANTED] < 32
        bystander.ping()


def test_memory_that_the_system_refuses_costs_a_newcomer_and_nobody_else() -> None:
    """No address space is left for another ring: who comes is told, who is there goes on, and later there is room."""
    with real_daemon("--ring", "512MiB") as daemon, raw_client(daemon.runtime_dir) as early:
        namespace = early.open()
        store(early, namespace, [key(1)], b"a")
        pid, limits = daemon.process.pid, resource.prlimit(daemon.process.pid, resource.RLIMIT_AS)
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * PAGE_BYTES + 128 * MIB, limits[1]))
        late = dial(daemon.runtime_dir)
        code, text = hello_refused(late)
        assert code in {Code.REFUSED, Code.LIMIT, Code.SHUTTING_DOWN}, text
        late.close()
        for _ in range(20):
            assert early.lease(namespace, [key(1)]).lease
            early.ping()
        resource.prlimit(pid, resource.RLIMIT_AS, limits)
        with raw_client(daemon.runtime_dir) as later:
            assert later.lease(later.open(), [key(1)]).lease
        assert daemon.process.poll() is None


def hello_refused(client: RawClient) -> tuple[Code, str]:
    """Say HELLO, and be told to go."""
    client.send(frames.build_hello(1, frames.Hello(name="late")))
    return client.goodbye()


def test_a_disk_or_memory_that_is_larger_than_the_machine_is_refused_at_the_start(tmp_path: Path) -> None:
    from kvstored.cli import main

    file = tmp_path / "kvstored.toml"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    file.write_text(f'[daemon]\nruntime_dir = "{tmp_path}"\n[dram]\nsize = {TIMES * memory // MIB * MIB}\n')
    assert main(["config", "check", str(file)]) == 78
