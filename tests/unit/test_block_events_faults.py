"""Events of blocks where something goes wrong: clocks, files, what cannot be told, subscribers that read nothing."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
import zmq

from kvstore.announcing import Told
from kvstored import block_events_numbers
from kvstored.block_events import BlockEvents
from kvstored.block_events_address import EventsConfig, endpoints_of
from kvstored.block_events_numbers import AGAIN, FILE, MOST, STRIDE, Numbers
from kvstored.block_log import EventTally
from kvstored.index_marks import write_sealed
from tests.node import until
from tests.unit.test_block_events import (
    PATIENCE_MS,
    PLACE,
    AllBlocksCleared,
    Published,
    heard,
    number_of,
    stored,
    tell,
)

NOON: Final = 1 << 50  # a number of the clock's
HOUR: Final = 3_600_000 << block_events_numbers.BATCHES_BITS


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Callable[..., Published]]:
    with ExitStack() as stack:
        yield lambda **options: Published(tmp_path, stack, **options)


# -- numbers ----------------------------------------------------------------------------------------------------


def test_a_clock_that_is_put_back_brings_no_number_again(tmp_path: Path) -> None:
    former = Numbers(tmp_path, lambda: NOON)
    assert former.begin == NOON
    last = NOON + 3 * STRIDE + 5
    for number in (NOON, NOON + 1, last):
        former.give(number)  # and it is killed
    back = Numbers(tmp_path, lambda: NOON - HOUR)
    assert last < back.begin <= last + STRIDE
    again = Numbers(tmp_path, lambda: NOON - HOUR)
    assert again.begin == back.begin, "the control: a life that gave none uses none up"
    assert Numbers(tmp_path, lambda: NOON + HOUR).begin == NOON + HOUR, "a clock that is ahead of all is believed"
    assert Numbers(None, lambda: NOON - HOUR).begin == NOON - HOUR


def test_what_is_kept_is_written_seldom_and_before_a_number_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def write(path: Path, value: bytes) -> None:
        written.append(len(value))
        write_sealed(path, value)

    monkeypatch.setattr(block_events_numbers, "write_sealed", write)
    numbers = Numbers(tmp_path, lambda: NOON)
    for number in range(NOON, NOON + 5000):
        numbers.give(number)
        if number == NOON:
            assert Numbers(tmp_path, lambda: 0).begin > number
    assert len(written) == 1
    numbers.give(NOON + STRIDE - 1)
    assert len(written) == 1
    numbers.give(NOON + STRIDE)
    assert len(written) == 2
    assert Numbers(tmp_path, lambda: 0).begin > NOON + STRIDE


@pytest.mark.parametrize("damage", ["short", "flipped", "empty", "longer", "pipe", "folder", "link", "beyond"])
def test_a_note_that_is_damaged_leaves_the_clock_and_is_made_good(tmp_path: Path, damage: str) -> None:
    Numbers(tmp_path, lambda: NOON).give(NOON)
    path = tmp_path / FILE
    content = path.read_bytes()
    flipped = content[:9] + bytes([content[9] ^ 1]) + content[10:]
    spoilt = {"short": content[:-1], "flipped": flipped, "empty": b"", "longer": content + content}
    path.unlink()
    if damage in spoilt:
        path.write_bytes(spoilt[damage])
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    elif damage == "link":
        path.symlink_to("elsewhere")
    else:
        write_sealed(path, b"KVEVENT\0" + (MOST + 1).to_bytes(8, "little"))
    numbers = Numbers(tmp_path, lambda: NOON - HOUR)
    assert (numbers.begin, numbers.faults) == (NOON - HOUR, 1)
    if damage != "folder":
        numbers.give(numbers.begin)
        assert (Numbers(tmp_path, lambda: 0).begin, numbers.faults) == (NOON - HOUR + STRIDE, 1)


def test_where_nothing_can_be_kept_numbers_are_given_all_the_same_and_it_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.touch()  # so that it cannot be made
    numbers = Numbers(folder, lambda: NOON)
    faults = numbers.faults
    for number in range(NOON, NOON + AGAIN):
        numbers.give(number)
    assert numbers.faults == faults + 1, "each of them is not a fault of its own"
    folder.unlink()
    numbers.give(NOON + AGAIN)
    assert Numbers(folder, lambda: 0).begin == NOON + AGAIN + STRIDE


def test_after_a_clock_was_put_back_who_asks_from_where_it_was_gets_all_of_the_new_life(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with ExitStack() as stack:
        former = Published(tmp_path, stack, numbers=Numbers(state, lambda: NOON))
        former.events.start()
        subscriber = former.subscriber("one")
        tell(former, PLACE, "a")
        last = heard(subscriber)[1]
        former.events.stop()
        life = Published(tmp_path, stack, numbers=Numbers(state, lambda: NOON - HOUR))
        life.events.start()
        tell(life, PLACE, "b")
        assert until(lambda: len(life.replayed("one", last + 1)) >= 2)
        missed = life.replayed("one", last + 1)
        assert missed[0][0] > last
        assert missed[0][1].events == [AllBlocksCleared()]
        assert heard(subscriber)[1] > last, "what it hears is new to it"


def test_who_asks_for_what_is_beyond_the_end_gets_all_that_is_kept(published: Callable[..., Published]) -> None:
    events = published(begin=NOON)
    events.events.start()
    subscriber = events.subscriber("one")
    tell(events, PLACE, "a")
    last = heard(subscriber)[1]
    whole = [number for number, _ in events.replayed("one", 0)]
    assert whole == list(range(NOON, last + 1))
    assert [number for number, _ in events.replayed("one", last + HOUR)] == whole
    assert events.replayed("one", last + 1) == [], "the control: it has missed nothing"


# -- what cannot be told ----------------------------------------------------------------------------------------


def test_what_cannot_be_told_is_told_anew_and_nobody_is_left_with_a_gap(
    published: Callable[..., Published], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    events = published(anew=asked.append)
    events.events.start()
    subscriber = events.subscriber("one")
    sockets = events.events._sockets
    assert sockets is not None
    real = sockets.encode

    def encode(*what: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(sockets, "encode", encode)
    tell(events, PLACE, "lost")
    assert until(lambda: asked)
    monkeypatch.setattr(sockets, "encode", real)
    assert asked == ["one"]
    assert events.events.tally().faults == 1
    assert len(caplog.records) == 1
    events.events.tell(Told(stored()[:0], {}, cleared="one"))
    tell(events, PLACE, "lost")
    (_, first, cleared), (_, second, again) = heard(subscriber), heard(subscriber)
    assert second == first + 1
    assert cleared.events == [AllBlocksCleared()]
    assert [getattr(event, "block_hashes", None) for event in again.events] == [[number_of("lost")]]
    numbers = [number for number, _ in events.replayed("one", 0)]
    assert numbers == list(range(second + 1)), "a replay ends for its readers where a number is missing"


def test_what_fails_each_time_is_not_told_anew_all_the_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("kvstored.block_events.ANEW_S", 3600.0)
    asked: list[str] = []
    events = BlockEvents(EventsConfig("grpc", runtime_dir=tmp_path), None, lambda: None, anew=asked.append)
    monkeypatch.setattr(events, "_pass_on", lambda _: 1 // 0)
    events.start()
    try:
        for name in range(200):
            events.tell(Told(stored(name), {0: PLACE}))
        assert until(lambda: events.tally().faults == 200)
        assert asked == ["one"]
        monkeypatch.setattr("kvstored.block_events.ANEW_S", 0.001)
        assert until(lambda: len(asked) == 2), "and when it is time it is, though nothing more is told"
        assert len(caplog.records) == 1
    finally:
        events.stop()


# -- subscribers that read nothing ------------------------------------------------------------------------------


def test_a_subscriber_that_takes_nothing_at_an_address_is_cut_off_and_counted_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstored.block_events_zmq.DEAD_S", 3)
    free = socket.socket()
    free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    free.bind(("127.0.0.1", 0))  # and does not listen: so that nobody else is given this port meanwhile
    address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    events = BlockEvents(EventsConfig(address, "one", high_water=4, runtime_dir=tmp_path), None, lambda: None)
    free.close()
    events.start()
    with zmq.Context() as context, context.socket(zmq.SUB) as dead, dead.get_monitor_socket() as monitor:
        dead.setsockopt(zmq.RCVHWM, 1)
        dead.setsockopt(zmq.RCVBUF, 4096)
        dead.setsockopt(zmq.RECONNECT_IVL, -1)  # once it is cut off it stays away
        dead.subscribe(b"")
        dead.connect(endpoints_of(address, tmp_path, "one").publish)
        try:
            assert until(lambda: events.tally().subscribers == 1)

            def told() -> bool:
                events.tell(Told(stored(*range(128)), {0: PLACE}))
                return events.tally().subscribers == 0

            assert until(told), "what waits for it would be kept for ever"
            assert events.tally().overruns >= 1
            assert events.tally() != EventTally(), "the control"
            assert monitor.poll(PATIENCE_MS)
        finally:
            dead.disable_monitor()
            dead.close(0)
            events.stop()
