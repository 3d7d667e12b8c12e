"""The back-end on Mooncake without Mooncake: the daemon's side, its child, and all between, on a stand-in of files.

tests/integration/test_remote_mooncake.py has the real one.
"""

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NoReturn

import numpy as np
import pytest

from kvproto.limits import MIB, PAGE_BYTES
from kvstored.remote_address import parse_remote
from kvstored.remote_mooncake import MooncakeAddress, MooncakeBackend
from kvstored.remote_mooncake_life import way_to
from kvstored.remote_mooncake_memory import Region, Span
from kvstored.remote_port import AbsentError, FullError, RefusedError, RemoteError, TooLargeError, UnreachableError
from tests.node import until

STUB = Path(__file__).parent.parent / "stub" / "mooncake_package"
MASTER = "127.0.0.1:50051"


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MooncakeBackend]:
    """One on the stand-in; its objects lie in `tmp_path`."""
    monkeypatch.setenv("PYTHONPATH", str(STUB))
    monkeypatch.setenv("MOONCAKE_STUB", str(tmp_path))
    made = MooncakeBackend(MooncakeAddress(MASTER), 2.0, region_bytes=16 * MIB, object_bytes=2 * MIB, pause_s=0)
    yield made
    made.close()
    life = made._life
    assert life is None or life.wait(10.0), "it is gone, and so is its process"


def content(size: int, seed: int = 1) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Bytes of no meaning."""
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def test_what_is_written_is_read_in_ranges_and_the_first_writer_wins(backend: MooncakeBackend) -> None:
    whole = content(10_000)
    assert backend.put("v1/a", [whole[:1], whole[1:]])
    assert not backend.put("v1/a", [content(10_000, seed=2)])
    for start, stop in ((0, 10_000), (0, 4096), (17, 9_000), (9_990, 12_000), (11_000, 12_000)):
        part = backend.get_range("v1/a", start, stop)
        assert np.array_equal(part, whole[start:stop])
        assert part.size == 0 or not np.array_equal(part, content(10_000, seed=2)[start:stop])
    assert backend.exists_many(["v1/a", "v1/b"] * 70) == [True, False] * 70
    backend.delete(["v1/a", "v1/b"])
    assert backend.exists_many(["v1/a"]) == [False]
    with pytest.raises(AbsentError):
        backend.get_range("v1/a", 0, 10)


def test_many_are_read_at_once_each_into_its_own_place(backend: MooncakeBackend) -> None:
    names = [f"v1/{number}" for number in range(150)]
    for number, name in enumerate(names):
        if number % 7:
            backend.put(name, [content(1000 + number, seed=number)])
    got = backend.get_many(names, 2000)
    for number, one in enumerate(got):
        assert (one is None) == (number % 7 == 0)
        if one is not None:
            assert np.array_equal(one, content(1000 + number, seed=number))
            assert not np.array_equal(one, content(1000 + number, seed=number + 1)), "the control"
            assert not one.flags.writeable
    backend.put("v1/large", [content(9000)])
    too_large = backend.get_many(["v1/1", "v1/large"], 2000)
    assert [one is not None and one.size for one in too_large] == [1001, 0], "of a size that it should not have"
    life = backend._life
    assert life is not None
    del got, one, too_large
    assert life.region.free_bytes == 16 * MIB
    with pytest.raises(TooLargeError):
        backend.get_many(names, 2 * MIB + 1)
    assert backend.lives == 1


@pytest.mark.parametrize("name", ["dies", "hangs", "fails", "lies", "raises"])
def test_whatever_one_of_many_does_ends_within_its_deadline_and_with_its_process(
    backend: MooncakeBackend, name: str
) -> None:
    backend.put("good", [content(9_000)])
    (held,) = backend.get_many(["good"], 9_000)
    pid = backend.pid
    with pytest.raises(UnreachableError):
        backend.get_many(["good", name, "good"], 9_000)
    assert until(lambda: succeeds(lambda: backend.exists_many(["good"])))
    assert backend.pid not in {0, pid}
    assert held is not None
    assert np.array_equal(held, content(9_000)), "what was lent before stays"
    assert backend.lives == 2


def test_several_batches_at_a_time_are_one_of_mooncakes_and_everybody_gets_his_own(backend: MooncakeBackend) -> None:
    for number in range(60):
        backend.put(f"{number}", [content(500 + number, seed=number)])
    wrong: list[int] = []

    def read(first: int) -> None:
        for _ in range(20):
            numbers = range(first, first + 10)
            got = backend.get_many([f"{number}" for number in numbers], 600)
            wrong.extend(
                number
                for number, one in zip(numbers, got, strict=True)
                if one is None or not np.array_equal(one, content(500 + number, seed=number))
            )

    threads = [threading.Thread(target=read, args=(first,)) for first in range(0, 60, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert backend.lives == 1


@pytest.mark.parametrize("name", ["dies", "hangs", "fails", "lies", "raises"])
def test_whatever_a_read_does_ends_within_its_deadline_and_with_its_process(
    backend: MooncakeBackend, name: str
) -> None:
    """The memory that it may still write to is nobody's any more, and what was lent before stays."""
    backend.put("good", [content(9_000)])
    held = backend.get_range("good", 0, 9_000)
    pid = backend.pid
    with pytest.raises(UnreachableError):
        backend.get_range(name, 0, 5_000)
    assert until(lambda: succeeds(lambda: backend.exists_many(["good"])))
    assert backend.pid not in {0, pid}
    assert np.array_equal(held, content(9_000))
    assert np.array_equal(backend.get_range("good", 0, 9_000), content(9_000))
    assert backend.lives == 2


def test_what_is_full_unanswered_or_too_large_is_said_as_the_port_has_it(backend: MooncakeBackend) -> None:
    """None of it costs a process."""
    with pytest.raises(FullError):
        backend.put("full", [content(100)])
    with pytest.raises(UnreachableError, match="master"):
        backend.exists_many(["unanswered"])
    with pytest.raises(TooLargeError, match="more than"):
        backend.put("large", [content(2 * MIB + 1)])
    assert backend.exists_many(["full"]) == [False]
    assert backend.lives == 1


def test_memory_is_free_again_when_nobody_has_the_bytes(backend: MooncakeBackend) -> None:
    backend.put("a", [content(2 * MIB)])
    life = backend._life
    assert life is not None
    held = [backend.get_range("a", 0, 2 * MIB) for _ in range(6)]
    assert life.region.free_bytes == 8 * MIB, "half of it is lent, the rest are copies"
    assert all(np.array_equal(one, content(2 * MIB)) for one in held)
    for _ in range(20):
        with pytest.raises(AbsentError):
            backend.get_range("absent", 0, 1000)
    del held
    assert life.region.free_bytes == 16 * MIB


def test_without_the_package_or_a_way_it_says_so_and_tries_nothing_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    backend = MooncakeBackend(MooncakeAddress(MASTER), 20.0)
    with pytest.raises(RefusedError, match="mooncake"):
        backend.exists_many(["a"])
    with pytest.raises(RemoteError):
        backend.exists_many(["a"])
    assert backend.lives == 1, "not again within a second"
    backend.close()
    with pytest.raises(UnreachableError, match="no way"):
        way_to("127.0.0.1:none")
    assert way_to("127.0.0.1:1") == "127.0.0.1"


def test_a_name_server_that_does_not_answer_holds_up_neither_start_nor_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def slow(*_: object, **__: object) -> NoReturn:
        answer.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    backend = MooncakeBackend(MooncakeAddress("far.example:50051"), 0.05)
    backend.begin()
    with pytest.raises(UnreachableError, match="set up"):
        backend.exists_many(["a"])
    backend.close()
    assert not answer.is_set()
    life = backend._life
    assert life is not None
    assert not life._over.is_set(), "it still waits"
    answer.set()
    assert life.wait(10)
    assert life.pid == 0


def test_without_descriptors_it_fails_and_another_life_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    backend = MooncakeBackend(MooncakeAddress(MASTER), 5.0, pause_s=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", none)
        with pytest.raises(UnreachableError, match="too many open files"):
            backend.exists_many(["a"])
        with pytest.raises(UnreachableError, match="too many open files"):
            backend.exists_many(["a"])
    assert backend.lives == 2
    backend.close()


def test_a_setup_that_fails_is_told(backend: MooncakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_STUB_SETUP", "-900")
    with pytest.raises(UnreachableError, match="-900"):
        backend.exists_many(["a"])
    monkeypatch.delenv("MOONCAKE_STUB_SETUP")
    assert until(lambda: succeeds(lambda: backend.exists_many(["a"])))


def test_spans_never_overlap_and_come_back_whole() -> None:
    """By a model: which pages somebody has."""
    random, region = Random(5), Region(64 * PAGE_BYTES)
    taken: list[Span] = []
    pages: set[int] = set()
    refused = 0
    for _ in range(3000):
        if random.random() < 0.55:
            span = region.take(random.randint(1, 12 * PAGE_BYTES), time.monotonic())
            if span is None:
                refused += 1
                continue
            mine = set(range(span.at // PAGE_BYTES, (span.at + span.size) // PAGE_BYTES))
            assert not mine & pages
            pages |= mine
            taken.append(span)
        elif taken:
            span = taken.pop(random.randrange(len(taken)))
            pages -= set(range(span.at // PAGE_BYTES, (span.at + span.size) // PAGE_BYTES))
            span.free()
        assert region.free_bytes == (64 - len(pages)) * PAGE_BYTES
    assert refused > 50
    for span in taken:
        span.free()
    whole = region.take(64 * PAGE_BYTES, time.monotonic())
    assert whole is not None, "all of it is one piece again"
    region.close()


@pytest.mark.parametrize("text", ["mooncake://host:50051", "mooncake://10.0.0.1:1", "mooncake://[::1]:50051"])
def test_a_master_is_an_address(text: str) -> None:
    address = parse_remote(text)
    assert address is not None
    assert (address.scheme, address.bucket) == ("mooncake", text.removeprefix("mooncake://"))


@pytest.mark.parametrize(
    "text",
    [
        "mooncake://host", "mooncake://:50051", "mooncake://host:0", "mooncake://host:70000", "mooncake://host:50051/x",
        "mooncake://user@host:50051", "mooncake://host:50051?a=b", "mooncake:host:50051", "moon://host:50051",
    ],
)  # fmt: skip
def test_what_is_no_master_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not off"):
        parse_remote(text)


def succeeds(call: Callable[[], object]) -> bool:
    """Does it end well?"""
    try:
        call()
    except RemoteError:
        return False
    return True
