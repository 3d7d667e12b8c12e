"""The remote tier on a real Mooncake Store: a master and a store of their own, killed, stopped and lied to."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from bench.engines.mooncake import Mooncake, environment, find_mooncake, why_not
from kvproto.limits import KIB, MIB
from kvstore.tier.remote_format import HEADER_BYTES, Place, name_of, tenant_digest
from kvstored.remote_mooncake import OBJECT_BYTES, MooncakeAddress, MooncakeBackend
from kvstored.remote_port import AbsentError, FullError, RefusedError, RemoteError, UnreachableError
from tests.node import Node, assert_blocks, chain, fetch, put, until, values

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

BLOCK_BYTES = 64 * KIB
DEADLINE_S = 15.0  # where nothing is to hang: a busy host may stand still for a while
FORGOTTEN_S = 10  # after so long the master takes a store that is silent for dead, and what it has for lost
STORE_BYTES = 256 * MIB


@pytest.fixture(scope="module")
def python() -> Path:
    """Of the environment with Mooncake."""
    found = find_mooncake()
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(why_not())
    if found is None:
        pytest.skip(why_not())
    return found


@pytest.fixture(scope="module")
def mooncake(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mooncake]:
    """One for all tests of this module, which have names of their own."""
    log_file = tmp_path_factory.mktemp("mooncake") / "log"
    with (
        Mooncake(python, log_file=log_file, store_bytes=STORE_BYTES, client_ttl_s=FORGOTTEN_S) as serving,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, text in environment().items():
            patch.setenv(name, text)
        yield serving


@contextmanager
def backend_on(mooncake: Mooncake, python: Path, deadline_s: float = DEADLINE_S) -> Iterator[MooncakeBackend]:
    """A back-end whose client is connected."""
    backend = MooncakeBackend(MooncakeAddress(mooncake.address, python=str(python)), deadline_s)
    try:
        assert until(lambda: answers(backend)), "its client is not set up"
        yield backend
    finally:
        backend.close()


@pytest.fixture(scope="module")
def backend(mooncake: Mooncake, python: Path) -> Iterator[MooncakeBackend]:
    """One for those tests that leave it as it is."""
    with backend_on(mooncake, python) as made:
        yield made


def answers(backend: MooncakeBackend) -> bool:
    """Does it answer at all?"""
    try:
        return backend.exists_many(["nothing"]) == [False]
    except UnreachableError:
        return False


def takes(backend: MooncakeBackend, name: str) -> bool:
    """Can something be written, and read back?"""
    try:
        backend.put(name, [content(name, 1000)])
        return bool((backend.get_range(name, 0, 1000) == content(name, 1000)).all())
    except RemoteError:
        return False


def content(name: str, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Bytes that follow from a name."""
    return np.random.default_rng(list(name.encode())).integers(0, 256, size, dtype=np.uint8)


# -- the port --------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_whole_and_in_parts(backend: MooncakeBackend) -> None:
    whole = content("whole", 2 * MIB + 5000)
    assert backend.put("whole", [whole[:4096], whole[4096:]])
    for start, stop in ((0, whole.size), (0, 4096), (4096, whole.size), (5000, 5010), (whole.size - 3, whole.size + 9)):
        part = backend.get_range("whole", start, stop)
        assert np.array_equal(part, whole[start:stop]), (start, stop)
        assert not np.array_equal(part, content("other", whole.size)[start:stop])
        assert not part.flags.writeable
    assert backend.get_range("whole", whole.size + 1, whole.size + 9).size == 0


def test_the_first_writer_of_a_name_wins(backend: MooncakeBackend) -> None:
    assert backend.put("first", [content("first", 5000)])
    assert not backend.put("first", [content("second", 5000)])
    assert np.array_equal(backend.get_range("first", 0, 5000), content("first", 5000))


def test_names_that_are_not_there_are_absent_and_deleting_them_is_no_error(backend: MooncakeBackend) -> None:
    names = [f"there/{number}" for number in range(150)]
    for name in names[::2]:
        backend.put(name, [content(name, 100)])
    assert backend.exists_many(names) == [number % 2 == 0 for number in range(150)]
    with pytest.raises(AbsentError):
        backend.get_range(names[1], 0, 100)
    backend.delete(names)
    assert backend.exists_many(names) == [False] * 150
    with pytest.raises(UnreachableError):
        backend.listing("there/", 10)


def test_bytes_that_were_lent_stay_as_they_are_until_nobody_has_them(backend: MooncakeBackend) -> None:
    """And the memory is free again then; with too much of it lent, copies are."""
    size = 48 * MIB
    backend.put("large", [content("large", size)])
    life = backend._life
    assert life is not None
    free_bytes = life.region.free_bytes
    held = [backend.get_range("large", 0, size) for _ in range(7)]
    assert life.region.free_bytes == free_bytes - 5 * size, "two of them are copies"
    wanted = content("large", size)
    backend.put("small", [content("small", 9000)])
    for _ in range(3):
        assert np.array_equal(backend.get_range("small", 0, 9000), content("small", 9000))
    assert all(np.array_equal(one, wanted) for one in held)
    view = held[0][4096:8192]
    del held
    assert life.region.free_bytes == free_bytes - size, "a view of it is held"
    assert np.array_equal(view, wanted[4096:8192])
    del view
    assert life.region.free_bytes == free_bytes


def test_many_threads_read_what_they_asked_for(backend: MooncakeBackend) -> None:
    names = [f"thread/{number}" for number in range(40)]
    for name in names:
        backend.put(name, [content(name, 50_000)])
    wrong: list[str] = []

    def read(own: Sequence[str]) -> None:
        got = {name: backend.get_range(name, 0, 50_000) for name in own}
        wrong.extend(name for name, part in got.items() if not np.array_equal(part, content(name, 50_000)))

    threads = [threading.Thread(target=read, args=(names[first::12] * 3,)) for first in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_store_that_is_full_says_so(backend: MooncakeBackend) -> None:
    """Mooncake evicts by itself what nobody has asked about lately; here nothing of it is old enough."""
    with pytest.raises(RemoteError, match="more than an object may have"):
        backend.put("too large", [np.zeros(OBJECT_BYTES + 1, dtype=np.uint8)])
    names = [f"full/{number}" for number in range(12)]

    def fill() -> None:
        for name in names:
            backend.put(name, [np.zeros(40 * MIB, dtype=np.uint8)])
            backend.exists_many(names)

    def is_full() -> bool:
        try:
            fill()
        except FullError:
            return True
        return False  # a put took longer than what was asked about before is held, and some of that gave way

    assert until(is_full)
    backend.delete([*names, "large"])
    assert until(lambda: takes(backend, "after full"))


# -- what the other side does ----------------------------------------------------------------------------------------


def test_a_client_that_is_killed_is_started_anew_and_what_it_lent_stays_good(mooncake: Mooncake, python: Path) -> None:
    def is_started_anew(backend: MooncakeBackend) -> bool:
        backend.put("killed", [content("killed", 3 * MIB)])
        try:
            held = backend.get_range("killed", 0, 3 * MIB)
            first = backend.pid
            os.kill(first, signal.SIGKILL)
            assert until(lambda: answers(backend))
            assert backend.pid not in {0, first}
            assert np.array_equal(held, content("killed", 3 * MIB))
            assert np.array_equal(backend.get_range("killed", 0, 3 * MIB), content("killed", 3 * MIB))
        except AbsentError:
            return False  # a store that was full has taken it for what is to give way
        return True

    with backend_on(mooncake, python) as backend:
        assert until(lambda: is_started_anew(backend))


def test_a_client_ends_with_who_started_it(mooncake: Mooncake, python: Path) -> None:
    with backend_on(mooncake, python) as backend:
        pid = backend.pid
        assert Path(f"/proc/{pid}").exists()
    assert until(lambda: not Path(f"/proc/{pid}").exists())
    with pytest.raises(UnreachableError):
        backend.exists_many(["closed"])


def test_a_client_that_hangs_is_ended_by_the_deadline(mooncake: Mooncake, python: Path) -> None:
    with backend_on(mooncake, python, deadline_s=3.0) as backend:
        backend.put("hangs", [content("hangs", 1000)])
        pid = backend.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(UnreachableError, match="deadline"):
            backend.get_range("hangs", 0, 1000)
        assert until(lambda: answers(backend))
        assert backend.pid != pid
        assert np.array_equal(backend.get_range("hangs", 0, 1000), content("hangs", 1000))


def test_without_the_package_it_is_refused(mooncake: Mooncake) -> None:
    backend = MooncakeBackend(MooncakeAddress(mooncake.address, python="/usr/bin/env"), DEADLINE_S)
    with pytest.raises(UnreachableError):
        backend.exists_many(["a"])
    backend.close()
    backend = MooncakeBackend(MooncakeAddress(mooncake.address), 30.0)  # this interpreter has no Mooncake
    with pytest.raises(RefusedError, match="mooncake"):
        backend.exists_many(["a"])
    backend.close()


def test_a_master_and_a_store_that_die_or_hang_are_told_from_each_other_by_nobody_and_both_heal(
    mooncake: Mooncake, python: Path
) -> None:
    """Calls end within their deadline and some; what comes back afterwards is what was written, or nothing."""
    with backend_on(mooncake, python, deadline_s=2.0) as backend:
        for verb, process, heal in (
            ("store stops", mooncake.store, "cont"), ("master stops", mooncake.master, "cont"),
            ("store dies", mooncake.store, "store"), ("master dies", mooncake.master, "master"),
        ):  # fmt: skip
            assert until(lambda verb=verb: takes(backend, f"before {verb}"), 60.0), verb  # type: ignore[misc]
            assert process is not None
            if heal == "cont":
                mooncake.stop(process)
            else:
                process.kill()
                process.wait()
            begun = time.monotonic()
            assert not takes(backend, f"while {verb}")
            assert time.monotonic() - begun < 30.0, "a deadline of two seconds, on a host however busy"
            if heal == "cont":
                mooncake.go_on(process)
            elif heal == "store":
                mooncake.start_store()
            else:
                mooncake.start_master()
            assert until(lambda verb=verb: takes(backend, f"after {verb}"), 60.0), verb  # type: ignore[misc]
            try:
                got = backend.get_range(f"before {verb}", 0, 1000)
            except RemoteError:
                continue
            assert np.array_equal(got, content(f"before {verb}", 1000))


# -- daemons ---------------------------------------------------------------------------------------------------------


@contextmanager
def host(mooncake: Mooncake, python: Path, *arguments: str) -> Iterator[Node]:
    """A host without a disk, whose daemon serves."""
    with Node(disks=0) as node:
        remote = ("--remote", f"mooncake://{mooncake.address}", "--remote-python", str(python), "--remote-size", "1GiB")
        node.start(*remote, "--remote-deadline", "2s", *arguments)
        yield node


@pytest.fixture(scope="module")
def writer(mooncake: Mooncake, python: Path) -> Iterator[Node]:
    """A host that stores and fetches, so that what it has is written."""
    with host(mooncake, python) as node:
        yield node


@pytest.fixture(scope="module")
def reader(mooncake: Mooncake, python: Path) -> Iterator[Node]:
    """A host that has nothing but what it finds there."""
    with host(mooncake, python) as node:
        yield node


def names_of(node: Node, keys: Sequence[bytes]) -> list[str]:
    """What its blocks are called over there."""
    place = Place(tenant_digest(f"uid-{os.geteuid()}"), bytes(node.namespace(BLOCK_BYTES).identity.digest()))
    return [name_of(place, [key]) for key in keys]


def keep(node: Node, backend: MooncakeBackend, name: str, count: int) -> list[bytes]:
    """Store a chain and use it once, until all of it is over there."""
    assert until(lambda: answers(backend))
    ns, keys = node.namespace(BLOCK_BYTES), chain(name, count)
    put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
    names = names_of(node, keys)

    def written() -> bool:
        assert len(fetch(ns, keys).blocks) == count
        return backend.exists_many(names) == [True] * count

    assert until(written, 60.0), node.log()[-2000:]
    return keys


def test_what_one_host_wrote_another_one_misses_once_and_then_has(
    writer: Node, reader: Node, backend: MooncakeBackend
) -> None:
    keys = keep(writer, backend, "shared", 100)
    ns = reader.namespace(BLOCK_BYTES)
    assert ns.match(keys).blocks == 0, "a look-up waits for nobody"
    assert until(lambda: ns.match(keys).blocks == 100), reader.log()[-3000:]
    assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
    assert ns.match(chain("never", 3)).blocks == 0


@pytest.mark.parametrize("where", ["header", "first", "last"])
def test_a_flipped_bit_is_a_miss_and_what_comes_before_it_a_hit(
    writer: Node, reader: Node, backend: MooncakeBackend, where: str
) -> None:
    keys = keep(writer, backend, f"flipped {where}", 6)
    name = names_of(writer, keys)[4]
    size = HEADER_BYTES + BLOCK_BYTES
    whole = backend.get_range(name, 0, size).copy()
    whole[{"header": 100, "first": HEADER_BYTES, "last": size - 1}[where]] ^= 1
    backend.delete([name])
    assert backend.put(name, [whole])
    ns = reader.namespace(BLOCK_BYTES)
    assert until(lambda: ns.match(keys).blocks == 4), reader.log()[-2000:]
    assert until(lambda: name in reader.log()), "it says which one is damaged"
    assert_blocks(fetch(ns, keys).blocks, values(keys[:4], BLOCK_BYTES))
    assert ns.match(keys).blocks == 4
    put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
    assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))


def test_what_was_deleted_is_gone_over_there(writer: Node, reader: Node, backend: MooncakeBackend) -> None:
    keys = keep(writer, backend, "deleted", 4)
    names = names_of(writer, keys)
    writer.namespace(BLOCK_BYTES).delete(keys[1:2])
    assert until(lambda: backend.exists_many(names)[:2] == [True, False]), writer.log()[-2000:]
    ns = reader.namespace(BLOCK_BYTES)
    assert until(lambda: ns.match(keys).blocks == 1), reader.log()[-2000:]


def test_a_master_that_is_gone_disturbs_nobody_and_heals_by_itself(
    mooncake: Mooncake, writer: Node, reader: Node, backend: MooncakeBackend
) -> None:
    """The daemon never notices; what a new master does not know is a miss, and is written anew."""
    keys = keep(writer, backend, "before", 6)
    mooncake.kill_master()
    ns = reader.namespace(BLOCK_BYTES)
    for number in range(8):
        own = chain(f"while gone {number}", 4)
        assert ns.match(own).blocks == 0
        put(ns, own, values(own, BLOCK_BYTES), durable=False)
        assert_blocks(fetch(ns, own).blocks, values(own, BLOCK_BYTES))
    assert ns.match(keys).blocks == 0
    mooncake.start_master()
    assert until(lambda: takes(backend, "a new master"), 60.0)
    later = keep(writer, backend, "later", 6)
    assert until(lambda: ns.match(later).blocks == 6, 60.0), reader.log()[-3000:]
    assert_blocks(fetch(ns, later).blocks, values(later, BLOCK_BYTES))
    reader.assert_alive()
    writer.assert_alive()


def test_a_daemons_client_that_is_killed_costs_misses_and_is_started_anew(
    writer: Node, reader: Node, backend: MooncakeBackend
) -> None:
    keys = keep(writer, backend, "client", 8)
    assert reader.daemon is not None
    ns, pid = reader.namespace(BLOCK_BYTES), reader.daemon.process.pid
    assert until(lambda: ns.match(chain("nobody's", 1)).blocks == 0 and child_of(pid)), "it has one while it asks"
    client = child_of(pid)
    assert client
    os.kill(client, signal.SIGKILL)
    assert until(lambda: ns.match(keys).blocks == 8), reader.log()[-3000:]
    assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
    assert child_of(pid) != client


def test_a_client_does_not_outlive_its_daemon(mooncake: Mooncake, python: Path) -> None:
    with host(mooncake, python) as node:
        assert node.daemon is not None
        pid = node.daemon.process.pid
        assert until(lambda: child_of(pid))
        client = child_of(pid)
        node.kill()
        assert until(lambda: not Path(f"/proc/{client}").exists())


def child_of(pid: int) -> int:
    """The process that has a daemon's Mooncake; 0: there is none."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):  # one that ends meanwhile
                if b"remote_mooncake_child" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
    return 0
