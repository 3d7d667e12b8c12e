"""The requests of pins, prefetches and advice; as in calls.py, which says how a request lives."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvclient.calls import Call
from kvclient.results import Partial
from kvproto import frames, policy_frames
from kvproto.errors import ProtocolError
from kvproto.frames import Head, Verb
from kvproto.limits import KEY_BYTES
from kvproto.policy_frames import Advised, Fetching, Pin, Pinned, Question, Tier

if TYPE_CHECKING:
    from kvclient.protocol import Session

NOTHING_PINNED = Pinned(0, 0, 0, 0, 0)
NOTHING_FETCHED = Fetching(0, 0, 0)


class PinCall(Call):
    """PIN -> PINNED."""

    answer = Verb.PINNED

    def __init__(
        self,
        session: "Session",
        namespace: int,
        keys: bytes,
        *,
        tier: Tier,
        ttl_ns: int,
        refresh: bool,
        deadline_ns: int,
    ) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.keys = keys
        self.tier = tier
        self.ttl_ns = ttl_ns
        self.refresh = refresh
        self.pinned = NOTHING_PINNED

    @property
    def partial(self) -> Partial:
        """Why it covers less than all, or nothing."""
        if self.error is not None:
            return Partial.REFUSED
        if self.lost is not None:
            return Partial(self.lost)
        return Partial[policy_frames.Partial(self.pinned.partial).name]

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return policy_frames.build_pin(
            request, self.namespace, self.keys, self.tier, self.ttl_ns, refresh=self.refresh, releases=releases
        )

    def accept(self, frame: bytes, head: Head) -> None:
        pinned = policy_frames.parse_pinned(frame, head)
        if pinned.partial not in policy_frames.Partial._value2member_map_:
            raise ProtocolError(f"PINNED says partial {pinned.partial}")
        if pinned.blocks * KEY_BYTES > len(self.keys) or bool(pinned.pin) != bool(pinned.blocks):
            raise ProtocolError(f"PINNED says {pinned.blocks} blocks, pin {pinned.pin}")
        self.pinned = pinned

    def undo(self) -> None:
        if self.pinned.pin:
            self.session.unpins.append(self.pinned.pin)


class UnpinCall(Call):
    """UNPIN -> UNPINNED."""

    answer = Verb.UNPINNED

    def __init__(self, session: "Session", pins: Sequence[int], deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.pins = pins
        self.ended = 0

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return policy_frames.build_unpin(request, self.pins, releases)

    def accept(self, frame: bytes, head: Head) -> None:
        self.ended = frames.parse_number(frame, head)


class PinsCall(Call):
    """PINS -> PIN_LIST."""

    answer = Verb.PIN_LIST

    def __init__(self, session: "Session", after: int, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.after = after
        self.pins: list[Pin] = []

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return policy_frames.build_pins(request, self.after, releases)

    def accept(self, frame: bytes, head: Head) -> None:
        pins = policy_frames.parse_pin_list(frame, head)
        after = self.after
        for pin in pins:  # upwards, or asking for more would never end
            if pin.pin <= after:
                raise ProtocolError(f"PIN_LIST says pin {pin.pin} after {after}")
            after = pin.pin
        self.pins = pins


class PrefetchCall(Call):
    """PREFETCH -> FETCHING."""

    answer = Verb.FETCHING

    def __init__(
        self, session: "Session", namespace: int, keys: bytes, *, tier: int, within_ns: int, deadline_ns: int
    ) -> None:
        super().__init__(session, deadline_ns)
        self.namespace = namespace
        self.keys = keys
        self.tier = tier
        self.within_ns = within_ns
        self.fetching = NOTHING_FETCHED

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return policy_frames.build_prefetch(request, self.namespace, self.keys, self.tier, self.within_ns, releases)

    def accept(self, frame: bytes, head: Head) -> None:
        fetching = policy_frames.parse_fetching(frame, head)
        if (fetching.there + fetching.coming) * KEY_BYTES > len(self.keys):
            raise ProtocolError("FETCHING says more blocks than were asked for")
        self.fetching = fetching

    def undo(self) -> None:
        if self.fetching.prefetch:
            self.session.cancels.append(self.fetching.prefetch)


class AdviseCall(Call):
    """ADVISE -> ADVISED."""

    answer = Verb.ADVISED

    def __init__(self, session: "Session", question: Question, deadline_ns: int) -> None:
        super().__init__(session, deadline_ns)
        self.question = question
        self.advised: Advised | None = None

    def build(self, request: int, releases: Sequence[int]) -> bytes:
        return policy_frames.build_advise(request, self.question, releases)

    def accept(self, frame: bytes, head: Head) -> None:
        self.advised = policy_frames.parse_advised(frame, head)
