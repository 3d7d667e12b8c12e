"""Pages between plain memory and a real daemon, as the SGLang backend moves them: what needs no SGLang."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import kvclient
from bench.process import DaemonProcess
from kvclient import Role
from kvclient.buffers import Scattered
from kvclient.integrations.sglang_store import PageStore, Parents, Timings
from kvstore.tier.format import HEADER_BYTES
from tests.node import PATIENCE_S, Node
from tests.segments import flip

PAGE_BYTES, PIECES = 8192, 4
LENGTH = PAGE_BYTES // PIECES
Memory = NDArray[np.uint8]


@pytest.fixture
def namespace(client: kvclient.Client, request: pytest.FixtureRequest) -> kvclient.Namespace:
    """One a test."""
    return client.namespace(model=request.node.name, engine="e", layout="l", dtype="d", block_bytes=PAGE_BYTES)


@pytest.fixture
def store(daemon: DaemonProcess, namespace: kvclient.Namespace, request: pytest.FixtureRequest) -> Iterator[PageStore]:
    """Looks up with a client that stores nothing, as the backend does."""
    with kvclient.connect(daemon.runtime_dir, role=Role.TOOL, timeout_s=PATIENCE_S) as lookups:
        assert lookups.wait_connected(10)
        quick = lookups.namespace(model=request.node.name, engine="e", layout="l", dtype="d", block_bytes=PAGE_BYTES)
        yield PageStore(quick, namespace, PAGE_BYTES, disk_wait_s=1.0)


def memory(pages: int, seed: int = -1) -> Memory:
    """Pieces of all pages: piece j of page i is row j, column i. Zeros without a seed."""
    if seed < 0:
        return np.zeros((PIECES, pages, LENGTH), dtype=np.uint8)
    return np.random.default_rng(seed).integers(0, 256, (PIECES, pages, LENGTH), dtype=np.uint8)


def pages_in(whole: Memory) -> Scattered:
    """All of them."""
    addresses = [[whole[piece, page].ctypes.data for piece in range(PIECES)] for page in range(whole.shape[1])]
    return Scattered(addresses, (LENGTH,) * PIECES, whole)


def keys(count: int, first: int = 0) -> list[bytes]:
    """Of a chain."""
    return [number.to_bytes(32, "little") for number in range(1 + first, 1 + first + count)]


def test_pages_come_back_piece_by_piece_as_far_as_they_are_there(store: PageStore) -> None:
    source, other = memory(4, seed=1), memory(4, seed=2)
    assert store.save(keys(4), pages_in(source)) == [True] * 4
    store.flush(10)
    assert store.match(keys(6)) == 4
    target = memory(6)
    assert store.load(keys(6), pages_in(target)) == 4
    assert np.array_equal(target[:, :4], source)
    assert not np.array_equal(target[:, :4], other)
    assert not target[:, 4:].any(), "pages that are not there were written to"
    assert store.load(keys(2, first=4), pages_in(memory(2))) == 0
    assert store.load(keys(0), pages_in(memory(0))) == 0
    assert store.save(keys(0), pages_in(memory(0))) == []


def test_what_is_there_is_stored_already(store: PageStore) -> None:
    first = memory(2, seed=1)
    assert store.save(keys(2), pages_in(first)) == [True, True]
    store.flush(10)
    second = memory(3, seed=2)
    assert store.save(keys(3), pages_in(second)) == [True] * 3
    store.flush(10)
    target = memory(3)
    assert store.load(keys(3), pages_in(target)) == 3
    assert np.array_equal(target[:, :2], first), "the first value of a key wins"
    assert not np.array_equal(first, second[:, :2]), "the control: the second is another"
    assert np.array_equal(target[:, 2:], second[:, 2:]), "and comes where it is the first"


@pytest.mark.parametrize("way", ["said", "saved before", "looked up", "nobody said"])
def test_a_page_is_stored_behind_the_one_before_it(store: PageStore, namespace: kvclient.Namespace, way: str) -> None:
    head, tail = keys(3), keys(2, first=3)
    if way == "looked up":
        assert store.match(head + tail) == 0
    if way == "saved before":
        store.save(head[-1:] + tail, pages_in(memory(3, seed=3)))
        store.flush(10)
        assert namespace.delete(head[-1:]) == 3
    store.save(head, pages_in(memory(3, seed=1)))
    store.save(tail, pages_in(memory(2, seed=2)), before=head[-1] if way == "said" else None)
    store.flush(10)
    assert namespace.delete(head[:1]) == (3 if way == "nobody said" else 5)


def test_pages_without_the_one_before_them_are_stored_all_the_same(store: PageStore) -> None:
    source = memory(2, seed=1)
    assert store.save(keys(2, first=5), pages_in(source), before=keys(1)[0]) == [True, True]
    store.flush(10)
    target = memory(2)
    assert store.load(keys(2, first=5), pages_in(target)) == 2
    assert np.array_equal(target, source)
    assert not np.array_equal(target, memory(2, seed=2)), "the control"


def test_a_page_that_is_damaged_on_disk_ends_what_is_loaded() -> None:
    with Node() as node:
        node.start("--disk-admission", "all")
        namespace = node.namespace(PAGE_BYTES)
        store = PageStore(namespace, namespace, PAGE_BYTES, disk_wait_s=10.0)
        source = memory(4, seed=1)
        assert store.save(keys(4), pages_in(source)) == [True] * 4
        store.flush(30)
        slot = node.slots()[keys(4)[2]]
        node.restart("--disk-admission", "all")
        flip(slot.path, 8 * (slot.offset + HEADER_BYTES))
        node.await_disk(namespace, keys(1))
        assert store.match(keys(4)) == 4, "nobody has looked at it yet"
        target = memory(4)
        assert store.load(keys(4), pages_in(target)) == 2
        assert np.array_equal(target[:, :2], source[:, :2])
        assert not np.array_equal(target[:, 2], source[:, 2]), "the control: the damaged one"


def test_without_a_daemon_everything_is_a_miss(tmp_path: object) -> None:
    with kvclient.connect(f"{tmp_path}/nowhere", timeout_s=0.1) as client:
        nothing = client.namespace(model="m", engine="e", layout="l", dtype="d", block_bytes=PAGE_BYTES)
        store = PageStore(nothing, nothing, PAGE_BYTES, disk_wait_s=1.0)
        assert store.match(keys(2)) == 0
        assert store.load(keys(2), pages_in(memory(2))) == 0
        assert store.save(keys(2), pages_in(memory(2, seed=1))) == [False, False]
        assert (store.loads.take(), store.saves.take()) == (([], []), ([], []))


def test_only_so_many_parents_are_remembered_and_the_latest_stay() -> None:
    parents = Parents(most=3)
    parents.learn(keys(3), before=None)
    assert [parents.of(key) for key in keys(3)] == [None, *keys(2)]
    parents.learn(keys(2, first=3), before=keys(1, first=2)[0])
    assert [parents.of(key) for key in keys(5)] == [None, None, *keys(3, first=1)]


def test_timings_are_told_once() -> None:
    timings = Timings()
    timings.add(2, 10**9, 1.0)
    timings.add(0, 10**9, 1.0)
    assert timings.take() == ([2], [2.0])
    assert timings.take() == ([], [])
