"""What happens is numbered and remembered by kind, streamed, and what was missed is said."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from kvproto import control_pb2 as pb
from kvproto.policy_frames import Tier
from kvstore.report import DiskReport
from kvstored import events, events_stream
from kvstored.admin_audit import Act
from kvstored.chronicle import Chronicle
from kvstored.events import Events, Kind
from kvstored.events_stream import WATCHERS, Watched
from tests.core import Core, chain, words
from tests.unit.control_fakes import disk_report

SECOND_NS = 10**9


class AbortedError(Exception):
    """The call was ended with this code and text."""


class Context:
    """A call whose caller listens until `gone`."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    def is_active(self) -> bool:
        return not self.gone.is_set()

    def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise AbortedError(code, text)


def watch(said: Events, **words: Any) -> Iterator[pb.Event]:
    context = cast(grpc.ServicerContext, Context())
    return Watched(said).stream(pb.WatchEventsRequest(**words), context)


class TestRings:
    def test_events_are_numbered_in_one_row_and_a_storm_pushes_out_none_of_other_kinds(self) -> None:
        said = Events()
        said.say(Kind.ADMIN, "first", tenant="a", count=3, size_bytes=4)
        for number in range(events.REMEMBERED + 5):
            said.say(Kind.CLIENT, f"client {number}")
        said.say(Kind.FAULT, "last", warning=True)
        found = said.after(0)
        assert [event.number for event in found] == sorted(event.number for event in found)
        assert (found[0].number, found[0].text, found[0].tenant, found[0].count, found[0].bytes) == (
            1,
            "first",
            "a",
            3,
            4,
        )
        assert found[1].number == 2 + 5
        assert (found[-1].number, found[-1].warning) == (events.REMEMBERED + 7, True)
        assert said.after(events.REMEMBERED + 6) == found[-1:]
        assert said.after(events.REMEMBERED + 7) == said.after(10**9) == []

    def test_texts_are_bounded(self) -> None:
        said = Events()
        said.say(Kind.DAEMON, "x" * 10_000)
        assert len(said.after(0)[0].text) == events.TEXT_LETTERS

    def test_who_waits_is_woken_by_news_and_told_of_the_end(self) -> None:
        said = Events()
        woken: list[bool] = []
        waiter = threading.Thread(target=lambda: woken.append(said.wait(0, 30.0)))
        waiter.start()
        said.say(Kind.DAEMON, "news")
        waiter.join(20.0)
        assert woken == [True]
        assert said.wait(1, 0.0)
        said.stop()
        assert not said.wait(1, 30.0)
        assert said.wait(0, 30.0), "there is one still"


class TestStream:
    def test_what_was_forgotten_is_counted(self) -> None:
        said = Events()
        for number in range(events.REMEMBERED + 9):
            said.say(Kind.TRAFFIC, str(number))
        told = list(watch(said))
        assert len(told) == events.REMEMBERED
        assert (told[0].number, told[0].lost) == (10, 9)
        assert sum(event.lost for event in told) == 9
        assert [event.number for event in watch(said, after=events.REMEMBERED + 7)] == [
            events.REMEMBERED + 8, events.REMEMBERED + 9
        ]  # fmt: skip

    def test_only_wanted_kinds_are_told_and_only_the_last(self) -> None:
        said = Events()
        for number in range(6):
            said.say(Kind.PIN if number % 2 else Kind.TIER, str(number))
        assert [event.text for event in watch(said, kinds=["pin"])] == ["1", "3", "5"]
        assert [event.text for event in watch(said, kinds=["pin"], last=2)] == ["3", "5"]
        assert [event.lost for event in watch(said, kinds=["pin"])] == [0, 0, 0], "what was not asked for is not lost"
        with pytest.raises(AbortedError, match="no kind of event"):
            list(watch(said, kinds=["weather"]))

    def test_what_was_forgotten_is_counted_of_what_is_asked_for(self) -> None:
        said = Events()
        for number in range(events.REMEMBERED + 5):
            said.say(Kind.CLIENT, str(number), warning=number % 100 == 3)
        said.say(Kind.FAULT, "damaged", warning=True)
        (fault,) = watch(said, kinds=["fault"])
        assert (fault.text, fault.lost) == ("damaged", 0), "no fault was forgotten"
        warnings = list(watch(said, warnings=True))
        assert [one.text for one in warnings] == [*(str(at) for at in range(103, events.REMEMBERED, 100)), "damaged"]
        assert [one.lost for one in warnings] == [1] + [0] * (len(warnings) - 1)
        for number in range(25):
            said.say(Kind.CLIENT, f"later {number}")
        assert [one.text for one in watch(said, warnings=True, last=1)] == ["damaged"]
        assert [one.text for one in watch(said, kinds=["client"], last=1)] == ["later 24"]

    def test_what_was_forgotten_beyond_a_number_is_counted_as_far_as_it_is_known(self) -> None:
        said = Events()
        said.say(Kind.TIER, "1")
        for number in range(10):
            said.say(Kind.CLIENT, str(number))
        for number in range(events.REMEMBERED):
            said.say(Kind.CLIENT, str(number))
        first = next(watch(said, kinds=["client"], after=1))
        assert (first.lost, first.lost_at_most) == (10, True)
        first = next(watch(said, kinds=["client"], after=6))
        assert (first.number, first.lost, first.lost_at_most) == (12, 5, True)
        first = next(watch(said, kinds=["client"], after=12))
        assert (first.number, first.lost, first.lost_at_most) == (13, 0, False)
        first = next(watch(said, kinds=["client"]))
        assert (first.lost, first.lost_at_most) == (10, False)
        first = next(watch(said, after=6))
        assert (first.number, first.lost, first.lost_at_most) == (12, 5, False), "numbers of all kinds tell"

    def test_who_follows_warnings_hears_of_those_that_went_by(self) -> None:
        said = Events()
        said.say(Kind.CLIENT, "first", warning=True)
        stream = watch(said, follow=True, warnings=True)
        assert next(stream).lost == 0
        for number in range(events.REMEMBERED + 4):
            said.say(Kind.CLIENT, str(number), warning=number % 2 == 1)
        following = next(stream)
        assert (following.text, following.lost) == ("5", 2)

    def test_who_follows_hears_what_happens_then_until_they_go_or_the_daemon_does(self) -> None:
        said = Events()
        said.say(Kind.DAEMON, "before")
        context = Context()
        stream = Watched(said).stream(pb.WatchEventsRequest(follow=True), cast(grpc.ServicerContext, context))
        assert next(stream).text == "before"
        later = threading.Thread(target=lambda: said.say(Kind.DAEMON, "after"))
        later.start()
        assert next(stream).text == "after"
        later.join()
        context.gone.set()
        assert list(stream) == []
        other = watch(said, follow=True)
        assert [next(other).text, next(other).text] == ["before", "after"]
        said.stop()
        assert list(other) == []

    def test_a_slow_listener_is_told_what_went_by(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said = Events()
        said.say(Kind.CLIENT, "first")
        stream = watch(said, follow=True)
        assert next(stream).lost == 0
        for number in range(events.REMEMBERED + 3):
            said.say(Kind.CLIENT, str(number))
        following = next(stream)
        assert (following.text, following.lost) == ("3", 3)

    def test_only_so_many_watch_at_once_and_a_place_comes_back(self) -> None:
        said = Events()
        said.say(Kind.DAEMON, "x")
        watched = Watched(said)

        def begin() -> Iterator[pb.Event]:
            stream = watched.stream(pb.WatchEventsRequest(follow=True), cast(grpc.ServicerContext, Context()))
            assert next(stream).text == "x"
            return stream

        streams = [begin() for _ in range(WATCHERS)]
        with pytest.raises(AbortedError, match=f"{WATCHERS} watch already"):
            begin()
        cast(Any, streams.pop()).close()
        streams.append(begin())
        assert events_stream.LOOK_UP_S <= 1.0


class Scene:
    """A store with a chronicle, and what is wrong with its disk as one likes."""

    def __init__(self) -> None:
        self.core = Core(arenas=1)
        self.said = Events()
        self.report: DiskReport | None = None
        self.warnings: tuple[str, ...] = ()
        self.chronicle = Chronicle(self.core.store, self.said, lambda: self.report, lambda _: self.warnings)
        self.ns = 0
        self.seen = 0

    def look(self, seconds: int = 1) -> list[tuple[str, str, bool]]:
        """What is said after so many seconds."""
        self.ns += seconds * SECOND_NS
        self.chronicle.look(self.ns)
        return self.news()

    def news(self) -> list[tuple[str, str, bool]]:
        found = self.said.after(self.seen)
        self.seen = found[-1].number if found else self.seen
        return [(str(event.kind), event.text, event.warning) for event in found]


class TestChronicle:
    def test_traffic_is_added_up_over_ten_seconds(self) -> None:
        scene = Scene()
        scene.look()
        client = scene.core.client()
        namespace = client.open()
        for name in range(3):
            client.put(namespace, chain(8, name))
        client.release(client.lease(namespace, chain(8, 2)))
        client.ask(namespace, chain(4, "absent"))
        assert scene.look() == []
        (traffic, evicted, *rest) = scene.look(10)
        assert traffic[0] == "traffic"
        assert traffic[1].startswith("24 blocks stored (")
        assert "8 of 12 blocks found" in traffic[1]
        assert evicted == ("evict", "8 blocks evicted from DRAM", False)
        assert [one[0] for one in rest] == ["evict"]
        assert scene.look(10) == []

    def test_faults_are_said_at_once(self) -> None:
        scene = Scene()
        scene.look()
        scene.core.store.disk.tally.damaged += 2
        scene.core.store.disk.commits.faults += 1
        assert scene.look() == [
            ("fault", "2 blocks were not what was stored; they are misses now", True),
            ("fault", "1 commits of the index failed", True),
        ]
        assert scene.look() == []

    def test_pins_that_end_are_said(self) -> None:
        scene = Scene()
        client = scene.core.client()
        namespace = client.open()
        client.put(namespace, chain(3))
        pins = scene.core.store.pinning
        pins.pin(client.session.tenant, namespace, words(chain(3)), 0, 3, 5 * SECOND_NS, Tier.DRAM)
        scene.look(10)
        scene.core.pass_time(6 * SECOND_NS)
        scene.core.settle()
        assert ("pin", "1 pins expired", False) in scene.look()

    def test_states_and_warnings_come_and_go(self) -> None:
        scene = Scene()
        scene.report = disk_report()
        assert scene.look() == []
        scene.core.store.draining = True
        scene.warnings = ("disk /a is full (no space, 3 left); free some",)
        assert scene.look() == [
            ("daemon", "draining: nothing new is stored", True),
            ("tier", "disk /a is full (no space, 3 left); free some", True),
        ]
        scene.warnings = ("disk /a is full (no space, 2 left); free some",)
        assert scene.look() == [], "the same with another number"
        scene.warnings = ()
        scene.core.store.draining = False
        assert scene.look() == [
            ("daemon", "new blocks are taken again", False),
            ("tier", "over: disk /a is full (no space, 2 left)", False),
        ]
        scene.report = replace(disk_report(), state="off", index_state="lost")
        assert scene.look() == [
            ("tier", "the disk tier is off, and was serving", True),
            ("tier", "the index on disk is lost, and was ready", True),
        ]

    def test_clients_and_operators_are_named(self) -> None:
        scene = Scene()
        session = scene.core.client("chat").session
        connection = cast(
            Any,
            SimpleNamespace(session=session, name="engine\n0", role="engine", peer=SimpleNamespace(pid=7, uid=1000)),
        )
        scene.chronicle.came(connection)
        scene.chronicle.went(connection, "")
        scene.chronicle.went(connection, "too many frames were left unread")
        came, left, failed = scene.said.after(0)
        assert came.text == f"client 'engine\\n0' came: session {session.number}, pid 7, uid 1000, engine"
        assert (came.tenant, came.warning, left.warning, failed.warning) == ("chat", False, False, True)
        assert failed.text.endswith(": too many frames were left unread")
        act = Act(1.0, 1000, 9, "", "clear", "namespace abc", 5, 320, "done")
        scene.chronicle.acted(act)
        acted = scene.said.after(3)[0]
        assert (acted.kind, acted.text, acted.count, acted.bytes) == (
            "admin",
            "uid 1000: kvctl clear namespace abc",
            5,
            320,
        )
