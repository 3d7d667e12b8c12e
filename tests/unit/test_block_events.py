"""Events of blocks on their way to subscribers: their form, their numbers, what can be had again and what cannot."""

import dataclasses
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest
import zmq

from kvstore.announcing import CHANGE, IN_DRAM, IN_REMOTE, ON_DISK, Changes, Place, Told
from kvstored.block_events import BATCH_CHANGES, BlockEvents
from kvstored.block_events_address import (
    FORMS,
    EventsConfig,
    check_events,
    endpoints_of,
    events_listen_kind,
    topic_kind,
    topic_of,
)
from kvstored.block_events_numbers import Numbers, begin_now
from kvstored.block_events_schema import Encoder
from kvstored.block_log import BlockLog, EventTally
from kvstored.units import ConfigError
from tests.core import key_of
from tests.node import until

PLACE: Final = Place("one", "ab" * 32, "org/model@7", "", 4096)
OTHER: Final = Place("two", "ab" * 32, "org/model@7", "", 4096)
PATIENCE_MS: Final = 10_000
ATTEMPTS: Final = 10
SILENT: Final = 8


# As vLLM's documentation shows consumers to write them.
class Event(msgspec.Struct, omit_defaults=True, gc=False, tag=True):  # type: ignore[call-arg, unused-ignore]
    """One of three."""


class BlockStored(Event):
    """Came."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None


class BlockRemoved(Event):
    """Went."""

    block_hashes: list[int | bytes]
    medium: str | None


class AllBlocksCleared(Event):
    """All of them."""


class Batch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):  # type: ignore[call-arg, unused-ignore]
    """A message."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


DECODER: Final = msgspec.msgpack.Decoder(Batch)


def changes(*rows: tuple[object, int, int]) -> Changes:
    """(Name of a key, was, now)."""
    made: Changes = np.zeros(len(rows), dtype=CHANGE)
    for one, (name, was, now) in zip(made, rows, strict=True):
        one["key"], one["was"], one["now"] = np.frombuffer(key_of(name), dtype=np.uint64), was, now
        one["usable_was"], one["usable_now"] = was, now
    return made


def stored(*names: object) -> Changes:
    return changes(*((name, 0, int(IN_DRAM)) for name in names))


def number_of(name: object) -> int:
    return int.from_bytes(key_of(name)[-8:], "big")


# -- the form ---------------------------------------------------------------------------------------------------


def test_a_block_that_is_stored_moved_and_dropped_is_told_with_its_media() -> None:
    dram, disk = int(IN_DRAM), int(ON_DISK)
    moves = changes(
        ("a", 0, dram), ("b", dram, dram | disk), ("c", dram | disk, disk), ("d", disk, 0), ("e", dram, disk)
    )
    events = DECODER.decode(Encoder("maps", "int").encode(moves, PLACE)).events
    assert events == [
        BlockStored([number_of("a")], None, [], 0, None, "CPU", None),
        BlockStored([number_of("b")], None, [], 0, None, "STORAGE", None),
        BlockRemoved([number_of("c")], "CPU"),
        BlockRemoved([number_of("d")], "STORAGE"),
        BlockStored([number_of("e")], None, [], 0, None, "STORAGE", None),
        BlockRemoved([number_of("e")], "CPU"),
    ]
    assert number_of("a") != number_of("b"), "the control"


def test_what_lies_beyond_the_host_has_a_medium_of_its_own() -> None:
    dram, remote = int(IN_DRAM), int(IN_REMOTE)
    moves = changes(("a", dram, dram | remote), ("a", dram | remote, remote), ("a", remote, 0))
    events = DECODER.decode(Encoder("maps", "int").encode(moves, PLACE)).events
    assert events == [
        BlockStored([number_of("a")], None, [], 0, None, "EXTERNAL", None),
        BlockRemoved([number_of("a")], "CPU"),
        BlockRemoved([number_of("a")], "EXTERNAL"),
    ]


def test_each_stored_block_has_its_own_event_and_what_left_together_goes_together() -> None:
    dram = int(IN_DRAM)
    encoder = Encoder("maps", "bytes")
    came = DECODER.decode(encoder.encode(stored("a", "b"), PLACE)).events
    assert [getattr(event, "block_hashes", None) for event in came] == [[key_of("a")], [key_of("b")]]
    left = DECODER.decode(encoder.encode(changes(("a", dram, 0), ("b", dram, 0)), PLACE)).events
    assert [getattr(event, "block_hashes", None) for event in left] == [[key_of("a"), key_of("b")]]


def test_what_consumers_read_by_position_has_its_name_first() -> None:
    raw = msgspec.msgpack.decode(Encoder("arrays", "int").encode(changes(("a", 0, 1), ("b", 1, 0)), PLACE))
    assert raw[1] == [
        ["BlockStored", [number_of("a")], None, [], 0, None, "CPU", None], ["BlockRemoved", [number_of("b")], "CPU"]
    ]  # fmt: skip
    assert raw[2] == 0
    assert msgspec.msgpack.decode(Encoder("arrays", "int").cleared())[1] == [["AllBlocksCleared"]]


def test_an_adapter_is_named() -> None:
    place = Place("one", "ab" * 32, "m", "lora-7", 4096)
    (event,) = DECODER.decode(Encoder(FORMS[0], "int").encode(stored("a"), place)).events
    assert isinstance(event, BlockStored)
    assert event.lora_name == "lora-7"


# -- the log ----------------------------------------------------------------------------------------------------


def test_a_log_remembers_so_many_and_says_what_is_forgotten() -> None:
    log = BlockLog("one", 3)
    for name in range(5):
        log.add(stored(name), PLACE)
    assert (log.first, log.next) == (2, 5)
    after = log.after(3)
    assert after is not None
    assert [batch.number for batch in after] == [3, 4]
    assert log.after(5) == []
    assert log.after(1) is None, "forgotten"
    assert log.after(6) is None, "of another life"
    assert log.wait(4, 0.0)
    log.stop()
    assert not log.wait(5, PATIENCE_MS)


def test_a_log_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstored.block_log.REMEMBERED_BYTES", 4000)
    log = BlockLog("one", 1000)
    for _ in range(9):
        log.add(stored("a"), PLACE, b"", bytes(1000))
    assert log.next - log.first == 3


def test_all_logs_together_are_bounded_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvstored.block_events.REMEMBERED_BYTES_OF_ALL", 4000)
    events = BlockEvents(EventsConfig("grpc", runtime_dir=tmp_path), None, lambda: None)
    log = events.log_of("one")
    for _ in range(9):
        log.add(stored("a"), PLACE, b"", bytes(1000))
    assert log.next - log.first == 3
    with events.log_for("two"):
        assert log.next - log.first == 1, "half of it"
    log.add(stored("a"), PLACE, b"", bytes(1000))
    log.add(stored("a"), PLACE, b"", bytes(1000))
    assert log.next - log.first == 3, "who is not there takes nothing"


# -- addresses --------------------------------------------------------------------------------------------------


def test_numbers_of_a_former_life_are_forgotten_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    log = BlockLog("one", 3, begin=1000)
    assert (log.begun, log.first, log.next) == (False, 1000, 1000)
    assert log.after(999) is None
    assert [batch.number for batch in (log.add(stored("a"), PLACE), log.add(stored("b"), PLACE))] == [1000, 1001]
    assert log.begun
    assert log.after(1001) is not None, "the control"
    second_ns = 10**9
    monkeypatch.setattr("kvstored.block_events_numbers.time.time_ns", lambda: 1_795_000_000 * second_ns)
    former = begin_now()
    monkeypatch.setattr(
        "kvstored.block_events_numbers.time.time_ns", lambda: 1_795_000_000 * second_ns + second_ns // 4
    )
    assert former + 1_000_000 < begin_now() < 1 << 53, "a daemon may be back a quarter of a second later"


def test_a_log_keeps_no_memory_of_what_others_were_told_with_it(tmp_path: Path) -> None:
    events = BlockEvents(EventsConfig("grpc", runtime_dir=tmp_path), None, lambda: None)
    events.start()
    try:
        mixed = stored(*range(100))
        mixed["namespace"][99] = 1
        events.tell(Told(mixed, {0: PLACE, 1: OTHER}))
        log = events.log_of(OTHER.tenant)
        assert log.wait(1, PATIENCE_MS / 1000)
        batches = log.after(1)
        assert batches is not None
        (batch,) = batches
        assert batch.changes.size == 1
        assert batch.changes.base is None
    finally:
        events.stop()


def test_addresses_are_read_and_what_is_none_is_refused() -> None:
    parse = events_listen_kind().parse
    good = ("off", "grpc", "ipc", "tcp://127.0.0.1:5557", "tcp://[::1]:5557", "tcp://192.0.2.7:1")
    assert [parse(text) for text in good] == list(good)
    for text in (
        "",
        "tcp://",
        "tcp://*:5557",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65535",
        "127.0.0.1:5557",
        "tcp://h:1",
    ):
        with pytest.raises(ValueError, match="is not"):
            parse(text)
    assert endpoints_of("tcp://[::1]:5557", Path("/run"), "one").replay == "tcp://[::1]:5558"
    with pytest.raises(ValueError, match="socket"):
        endpoints_of("ipc", Path("/run"), "../two")
    with pytest.raises(ValueError, match="socket"):
        endpoints_of("ipc", Path("/" + "r" * 90), "one")


def test_an_address_is_of_one_tenant_and_of_this_host_unless_allowed() -> None:
    away = EventsConfig("tcp://192.0.2.7:5557", tenant="one")
    with pytest.raises(ConfigError, match="routable"):
        check_events(away, "here", routable=False)
    check_events(away, "here", routable=True)
    check_events(EventsConfig("tcp://127.0.0.1:5557", tenant="one"), "here", routable=False)
    with pytest.raises(ConfigError, match=r"events\.tenant"):
        check_events(EventsConfig("tcp://127.0.0.1:5557"), "here", routable=False)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstored.block_events_address.PACKAGES", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"no_such_package is missing: pip install 'kvstored\[events\]'"):
        check_events(EventsConfig("ipc"), "here", routable=False)
    check_events(EventsConfig("grpc"), "here", routable=False)


def test_topics_are_templates() -> None:
    parse = topic_kind().parse
    template = parse("kv@{host}@{model}")
    assert topic_of(template, {"host": "h", "model": "org/m@7", "tenant": "t", "namespace": "n"}) == "kv@h@org/m_7"
    for text in ("{nobody}", "{", "{host!r}", "{host.__class__}", "{0}", "a\n", "x" * 513):
        with pytest.raises(ValueError, match="is no text"):
            parse(text)


# -- sockets ----------------------------------------------------------------------------------------------------


class Published:
    """Events of a directory, and subscribers to them."""

    def __init__(
        self,
        home: Path,
        stack: ExitStack,
        begin: int = 0,
        numbers: Numbers | None = None,
        anew: Callable[[str], None] = lambda _: None,
        **options: Any,
    ) -> None:
        self.home = home
        self.room = threading.Event()
        config = EventsConfig("ipc", runtime_dir=home, **options)
        self.events = BlockEvents(config, None, self.room.set, numbers or Numbers(now=lambda: begin), anew)
        stack.callback(self.events.stop)
        self._context = zmq.Context()
        self._open: list[zmq.Socket[bytes]] = []
        stack.callback(self._close)

    def _close(self) -> None:
        for one in self._open:
            one.close(0)
        self._context.term()

    def socket(self, kind: int) -> "zmq.Socket[bytes]":
        self._open.append(self._context.socket(kind))
        return self._open[-1]

    def subscriber(self, tenant: str, high_water: int = 1000) -> "zmq.Socket[bytes]":
        """One that hears everything from now on: something is told again and again until it has heard of it."""
        socket = self.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, high_water)
        socket.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
        socket.subscribe(b"kv@")
        socket.connect(endpoints_of("ipc", self.home, tenant).publish)
        place = Place(tenant, "ab" * 32, "probe", "", 4096)
        for _ in range(PATIENCE_MS):
            self.events.tell(Told(stored("probe"), {0: place}))
            if socket.poll(1):
                break
        # Probes may have filled the sockets, which then pass over what ends them, too.
        for attempt in range(ATTEMPTS):
            end = f"end {attempt}"
            self.events.tell(Told(stored(end), {0: place}))
            while socket.poll(PATIENCE_MS // ATTEMPTS):
                if [getattr(one, "block_hashes", None) for one in heard(socket)[2].events] == [[number_of(end)]]:
                    return socket
        raise AssertionError(f"nothing was heard in {PATIENCE_MS / 1000} s")

    def replayed(self, tenant: str, start: int) -> list[tuple[int, Batch]]:
        """As llm-d asks."""
        socket = self.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
        socket.connect(endpoints_of("ipc", self.home, tenant).replay)
        socket.send_multipart((b"", start.to_bytes(8, "big")))
        found: list[tuple[int, Batch]] = []
        while True:
            _, topic, number, payload = socket.recv_multipart()
            if number == (-1).to_bytes(8, "big", signed=True):
                assert (topic, payload) == (b"", b"")
                return found
            found.append((int.from_bytes(number, "big"), DECODER.decode(payload)))


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Callable[..., Published]]:
    with ExitStack() as stack:
        yield lambda **options: Published(tmp_path, stack, **options)


def heard(socket: "zmq.Socket[bytes]") -> tuple[bytes, int, Batch]:
    topic, number, payload = socket.recv_multipart()
    return topic, int.from_bytes(number, "big"), DECODER.decode(payload)


def tell(to: Published, place: Place, *names: object) -> bool:
    return to.events.tell(Told(stored(*names), {0: place}))


def test_a_subscriber_hears_what_is_told_numbered_in_one_row_by_topic(published: Callable[..., Published]) -> None:
    events = published(topic="kv@host-7@{model}")
    events.events.start()
    subscriber = events.subscriber("one")
    tell(events, PLACE, "a")
    tell(events, PLACE, "b", "c")
    first, second = heard(subscriber), heard(subscriber)
    assert first[0] == b"kv@host-7@org/model_7"
    assert second[1] == first[1] + 1
    assert [len(batch.events) for _, _, batch in (first, second)] == [1, 2]
    assert first[2].ts > 1.7e9
    assert first[2].data_parallel_rank == 0


def test_what_was_missed_is_replayed_as_it_was_and_begins_with_cleared(published: Callable[..., Published]) -> None:
    events = published()
    events.events.start()
    subscriber = events.subscriber("one")
    tell(events, PLACE, "a")
    _, number, batch = heard(subscriber)
    whole = events.replayed("one", 0)
    assert [at for at, _ in whole] == list(range(number + 1)), "without a gap"
    assert whole[0][1].events == [AllBlocksCleared()]
    assert whole[number][1] == batch
    assert events.replayed("one", number) == [(number, batch)]
    assert events.replayed("one", number + 1) == []


def test_of_what_is_forgotten_a_replay_begins_later_so_that_the_gap_shows(published: Callable[..., Published]) -> None:
    events = published(replay=2)
    events.events.start()
    subscriber = events.subscriber("one")
    for name in range(4):
        tell(events, PLACE, name)
    last = [heard(subscriber)[1] for _ in range(4)][-1]
    assert [at for at, _ in events.replayed("one", 0)] == [last - 1, last]


def test_a_slow_subscriber_misses_what_nobody_waits_for_and_can_have_it_again(
    published: Callable[..., Published],
) -> None:
    events = published(high_water=2)
    events.events.start()
    slow = events.subscriber("one", high_water=2)
    already = events.events.tally().overruns
    log = events.events.log_of("one")
    before, many = log.next, stored(*range(BATCH_CHANGES))
    for _ in range(400):  # more than sockets hold for who does not read
        events.events.tell(Told(many, {0: PLACE}))
    log.wait(before + 399, PATIENCE_MS / 1000)
    assert log.next == before + 400, "the thread has passed on all of it"
    seen = []
    while slow.poll(200):
        seen.append(heard(slow)[1])
    assert seen == sorted(set(seen))
    assert len(seen) < 400, "the control: it missed some"
    assert events.events.tally().overruns > already, "that it fell behind is counted"
    missing = set(range(before, before + 400)) - set(seen)
    assert missing <= {at for at, _ in events.replayed("one", min(missing))}


def test_who_listens_and_what_was_told_is_counted(published: Callable[..., Published]) -> None:
    events = published()
    events.events.start()
    assert events.events.tally() == EventTally()
    one, two = events.subscriber("one"), events.subscriber("two")
    assert until(lambda: events.events.tally().subscribers == 2)
    before = events.events.tally()
    tell(events, PLACE, "a", "b", "c")
    heard(one)
    tally = events.events.tally()
    assert (tally.batches - before.batches, tally.changes - before.changes) == (1, 3)
    assert (tally.overruns, tally.waiting, tally.replays, tally.watchers) == (0, 0, 0, 0)
    assert len(events.replayed("one", 0)) == events.events.tally().replayed
    assert events.events.tally().replays == 1
    two.close(0)
    assert until(lambda: events.events.tally().subscribers == 1)
    with events.events.watched():
        assert events.events.tally().watchers == 1
    assert events.events.tally().watchers == 0


def test_a_tenant_has_sockets_of_its_own_and_hears_nothing_of_others(published: Callable[..., Published]) -> None:
    events = published()
    events.events.start()
    one, two = events.subscriber("one"), events.subscriber("two")
    events.events.tell(Told(stored("mine"), {0: PLACE}))
    events.events.tell(Told(stored("theirs"), {0: OTHER}))
    mine, theirs = heard(one)[2].events, heard(two)[2].events
    assert isinstance(mine[0], BlockStored)
    assert isinstance(theirs[0], BlockStored)
    assert (mine[0].block_hashes, theirs[0].block_hashes) == ([number_of("mine")], [number_of("theirs")])
    said = [event for _, batch in events.replayed("one", 0) for event in batch.events if isinstance(event, BlockStored)]
    numbers = {number for event in said for number in event.block_hashes}
    assert number_of("mine") in numbers
    assert number_of("theirs") not in numbers
    assert not one.poll(0)


def test_sockets_are_for_the_user_of_the_daemon_alone(published: Callable[..., Published]) -> None:
    events = published()
    folder = events.home / "events"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_malformed_requests_for_replay_are_ignored(
    published: Callable[..., Published], caplog: pytest.LogCaptureFixture
) -> None:
    events = published()
    events.events.start()
    events.subscriber("one")
    bad = events.socket(zmq.DEALER)
    bad.connect(endpoints_of("ipc", events.home, "one").replay)
    for _ in range(10):
        for frames in ((b"",), (b"", b"short"), (b"x", bytes(8)), (b"", bytes(8), b"")):
            bad.send_multipart(frames)
    bad.send_multipart((b"", bytes(2000)))
    assert events.replayed("one", 0), "and others are answered"
    assert not bad.poll(0)
    assert until(lambda: events.events._sockets is not None and events.events._sockets._malformed >= 39)
    assert len(caplog.records) == 1, "and told once"


def test_who_asks_for_replay_and_reads_nothing_costs_little(published: Callable[..., Published]) -> None:
    events = published()
    events.events.start()
    events.subscriber("one")
    assert until(lambda: not events.events.tally().waiting)
    log = events.events.log_of("one")
    begin = log.next  # probes are small: sockets would take many of them, and nobody knows how many there were
    for name in range(400):
        events.events.tell(Told(stored(*range(name, name + BATCH_CHANGES)), {0: PLACE}))
    assert until(lambda: log.next >= begin + 400 and not events.events.tally().waiting)
    remembered = log.after(begin)
    assert remembered is not None
    silent = []
    for _ in range(SILENT):
        one = events.socket(zmq.DEALER)
        one.setsockopt(zmq.RCVHWM, 1)
        one.connect(endpoints_of("ipc", events.home, "one").replay)
        for _ in range(2):
            one.send_multipart((b"", begin.to_bytes(8, "big")))
        silent.append(one)
    assert until(lambda: events.events.tally().replays == 2 * SILENT)
    assert len(events.replayed("one", begin)) == len(remembered), "and who reads has all of it"
    passed = events.events.tally().replayed - len(remembered)
    largest = max(batch.size_bytes for batch in remembered)
    assert largest < 32 << 10
    # What waits in the daemon, and what the system and the peer itself have taken: not 800 for each.
    assert SILENT <= passed < SILENT * 200
    # What it asked for is still there for who begins to read: both answers, one after the other.
    numbers: list[int] = []
    while numbers.count(-1) < 2:
        assert silent[0].poll(PATIENCE_MS)
        numbers.append(int.from_bytes(silent[0].recv_multipart()[2], "big", signed=True))
    every = [batch.number for batch in remembered]
    assert numbers == [*every, -1, *every, -1]


def test_a_replay_that_stalls_gives_its_place_up(
    published: Callable[..., Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstored.block_events_zmq.REPLAYS_MOST", 2)
    monkeypatch.setattr("kvstored.block_events_zmq.STALLED_S", 0.2)
    events = published()
    events.events.start()
    events.subscriber("one")
    for name in range(400):
        events.events.tell(Told(stored(*range(name, name + BATCH_CHANGES)), {0: PLACE}))
    for _ in range(2):
        one = events.socket(zmq.DEALER)
        one.setsockopt(zmq.RCVHWM, 1)
        one.connect(endpoints_of("ipc", events.home, "one").replay)
        one.send_multipart((b"", bytes(8)))
    assert until(lambda: events.events.tally().replays == 2)
    assert len(events.replayed("one", 0)) >= 400
    assert events.events.tally().replays == 3


def test_who_listened_to_a_former_life_hears_that_it_is_over_though_nothing_happens(tmp_path: Path) -> None:
    with ExitStack() as stack:
        former = Published(tmp_path, stack, begin=7)
        former.events.start()
        subscriber = former.subscriber("one")
        left = former.home / "events" / "one.pub"
        while subscriber.poll(0):
            heard(subscriber)
        former.events.stop()
        assert left.exists(), "nobody listens there now, and the next life knows of it"
        first = Published(tmp_path, stack, begin=1 << 20)
        first.events.start()
        _, number, batch = heard(subscriber)
        assert (number >= 1 << 20, batch.events) == (True, [AllBlocksCleared()])
        tell(first, PLACE, "a")
        while not heard(subscriber)[2].events:
            pass
        first.events.stop()
        second = Published(tmp_path, stack, begin=1 << 30)
        tell(second, PLACE, "b")
        second.events.start()  # and has told of something before anybody could hear it
        _, number, batch = heard(subscriber)
        assert batch.events == []
        missed = second.replayed("one", 0)
        assert [at for at, _ in missed][:3] == [1 << 30, (1 << 30) + 1, number]
        assert missed[0][1].events == [AllBlocksCleared()]
        tell(second, PLACE, "c")
        (event,) = heard(subscriber)[2].events
        assert isinstance(event, BlockStored), "what others know to be there is not cleared"


def test_who_subscribes_again_and_again_fills_no_log(published: Callable[..., Published]) -> None:
    events = published()
    events.events.start()
    subscriber = events.subscriber("one")
    log = events.events.log_of("one")
    before = log.next
    for name in range(2000):
        subscriber.subscribe(f"kv@{name}".encode())
    tell(events, PLACE, "last")
    while not heard(subscriber)[2].events:
        pass
    assert log.next - before < 20


def test_who_tells_hears_that_there_is_no_room_and_then_that_there_is(
    published: Callable[..., Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstored.block_events.QUEUED_MOST", 4)
    events = published()
    assert tell(events, PLACE, "a", "b")
    assert not tell(events, PLACE, "c", "d")
    assert not events.room.is_set()
    events.events.start()
    assert events.room.wait(PATIENCE_MS / 1000)
    assert tell(events, PLACE, "e")


def test_without_zeromq_the_log_has_everything(tmp_path: Path) -> None:
    events = BlockEvents(EventsConfig("grpc", runtime_dir=tmp_path), None, lambda: None)
    events.start()
    try:
        events.tell(Told(stored("a"), {0: PLACE}))
        log = events.log_of("one")
        assert log.wait(1, PATIENCE_MS / 1000)
        batches = log.after(0)
        assert batches is not None
        assert [batch.place for batch in batches] == [None, PLACE]
        assert not (tmp_path / "events").exists()
    finally:
        events.stop()


def test_an_address_that_is_taken_is_told_at_the_start(tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.PUB) as taken:
        port = taken.bind_to_random_port("tcp://127.0.0.1", 40_000, 60_000)
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            BlockEvents(EventsConfig(f"tcp://127.0.0.1:{port}", "one", runtime_dir=tmp_path), None, lambda: None)


def test_a_topic_without_end_is_not_taken(published: Callable[..., Published]) -> None:
    events = published()
    events.events.start()
    events.subscriber("one")
    greedy = events.socket(zmq.SUB)
    with greedy.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
        greedy.connect(endpoints_of("ipc", events.home, "one").publish)
        greedy.subscribe(bytes(512))
        went_at_once = monitor.poll(100)
        greedy.subscribe(bytes(2000))
        went = monitor.poll(PATIENCE_MS)
        greedy.disable_monitor()
    assert went
    assert not went_at_once, "the control: this long it may be"


def test_sockets_lie_in_their_directory_whatever_a_tenant_is_called_and_those_of_a_dead_daemon_do_not(
    tmp_path: Path, published: Callable[..., Published]
) -> None:
    for tenant in (".", "..", "one"):
        for endpoint in dataclasses.astuple(endpoints_of("ipc", tmp_path, tenant)):
            assert os.path.normpath(endpoint.removeprefix("ipc://")).startswith(f"{tmp_path}/events/")
    left = tmp_path / "events" / "gone.pub"
    left.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    (left.parent / "note").touch()
    (left.parent / "no tenant.replay").touch()
    published()
    names = sorted(path.name for path in left.parent.iterdir())
    assert names == ["gone.pub", "gone.replay", "note"], "who listened to that tenant can come back"
    assert (left.parent / "gone.pub").is_socket()


def test_who_asks_for_replay_waits_for_what_is_told_and_not_the_other_way_round(
    published: Callable[..., Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = published()
    for name in range(50):
        tell(events, PLACE, name)
    left: list[int] = []
    monkeypatch.setattr(events.events._sockets, "replay", lambda _: left.append(len(events.events._told)))
    events.events.start()
    assert events.events.log_of("one").wait(50, PATIENCE_MS / 1000)
    events.events.stop()
    assert left[0] == 0


def test_where_topics_tell_namespaces_apart_each_is_told_by_itself_and_else_what_all_ranks_have() -> None:
    dram = int(IN_DRAM)
    moves = changes(("a", 0, dram), ("b", 0, dram), ("c", dram, 0))
    moves["usable_now"][0] = 0  # another rank lacks it
    whole = DECODER.decode(Encoder("maps", "int").encode(moves, PLACE)).events
    assert whole == [
        BlockStored([number_of("b")], None, [], 0, None, "CPU", None),
        BlockRemoved([number_of("c")], "CPU"),
    ]
    apart = DECODER.decode(Encoder("maps", "int", apart=True).encode(moves, PLACE)).events
    assert [getattr(event, "block_hashes", None) for event in apart] == [[number_of(name)] for name in "abc"]
    assert EventsConfig("ipc", topic="kv@{host}@{model}@{namespace}").has("namespace")
    assert not EventsConfig("ipc", topic="kv@{{namespace}}@{model}").has("namespace")
