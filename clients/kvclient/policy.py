"""Pins, prefetches, timings and advice on chains of a namespace: arguments checked, as flows (policy_flows.py).

Both flavours of a namespace have these. What is said one way (timings) is the same in both, since it never waits.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from kvclient import flows, policy_flows
from kvclient.checks import (
    amount,
    duration,
    expectation_of,
    hinted_keys,
    name_of,
    pin_ttl_ns,
    prefetch_tier_of,
    tier_of,
    whole,
)
from kvclient.endpoint import Endpoint
from kvclient.ledger import Ledger
from kvclient.results import Advice, PinInfo, PinResult
from kvproto import policy_frames
from kvproto.errors import UsageError
from kvproto.identity import NamespaceIdentity
from kvproto.limits import PREFETCH_NS_MAX
from kvproto.policy_frames import UNKNOWN, Event, Fetching, Hint, Kind, Question, Report
from kvproto.retention import Retention

if TYPE_CHECKING:
    from kvclient.protocol import Session

_clock = time.monotonic_ns


class Prefetch:
    """What a `prefetch` will do: of the chain's first blocks, how many are `there` already, and how many are `coming`.

    No promise: what finds no room, or no time before the deadline, does not come.
    """

    def __init__(self, endpoint: Endpoint, session: "Session | None", asked: Sequence[Fetching]) -> None:
        self._endpoint = endpoint
        self._session = session
        self._prefetches = [fetching.prefetch for fetching in asked if fetching.prefetch]
        self.there = sum(fetching.there for fetching in asked)
        self.coming = sum(fetching.coming for fetching in asked)

    def __repr__(self) -> str:
        return f"Prefetch(there={self.there}, coming={self.coming})"

    def cancel(self) -> None:
        """These blocks are not wanted here any more: reads that have not begun are not made, unless somebody else in
        the tenant wants them. Never waits.

        Any thread; of an asyncio client, only that of its loop.
        """
        prefetches, self._prefetches = self._prefetches, []
        if prefetches:
            self._endpoint.say(self._session, policy_frames.build_cancel(prefetches))


class PolicyVerbs:
    """What a client knows or wishes of a namespace's blocks beyond storing and fetching them."""

    def __init__(self, endpoint: Endpoint, identity: NamespaceIdentity) -> None:
        self.identity = identity
        self.block_bytes = identity.block_bytes  # of one block as callers have it; with a codec it is stored in fewer
        self._endpoint = endpoint
        self._timeout_ns = endpoint.timeout_ns
        self._target = flows.Target(identity.canonical(), identity.block_bytes)
        self._tally = Ledger()  # of all that is stored through this object

    def report_prefill(self, cached: int, new: int, seconds: float) -> None:
        """A prefill took `seconds`: `new` tokens computed behind `cached` ones that were there. Never waits.

        From such reports the daemon learns what computing anew costs in this namespace. Dropped where the namespace is
        not open: before the first verb on it, or the first one after a reconnect. Raises UsageError.
        """
        before, computed = whole("cached", cached), whole("new", new, least=1)
        self._report(Report(0, Kind.PREFILL, before, computed, duration("seconds", seconds)))

    def report_load(self, tier: str, load_bytes: int, seconds: float) -> None:
        """Loading so many bytes from a tier ("dram", "disk") took `seconds`. Never waits; else as `report_prefill`.

        Of the copies of leases of 1 MiB and more one in 16 reports itself, unless it reads an arena that is new to this
        process. This is for engines that read a lease's views into a device.
        """
        size = whole("load_bytes", load_bytes, least=1)
        self._report(Report(0, Kind.LOAD, tier_of(tier), size, duration("seconds", seconds)))

    def report_queue(self, seconds: float) -> None:
        """A request whose context had been evicted waited `seconds` in the engine's queue before it was computed anew.

        Never waits; else as `report_prefill`. What an eviction costs beyond computing: pins around tools weigh it.
        """
        self._report(Report(0, Kind.QUEUE, 0, 0, duration("seconds", seconds)))

    def naming(self, endpoint: Endpoint, say: "Callable[[Session, int], object]") -> flows.Flow[None]:
        """Open this namespace in the session of a client, if need be, and `say` something of it by its number there."""
        session = endpoint.session()
        number = yield from policy_flows.number_of(session, self._target, _clock() + self._timeout_ns)
        if session is None or number is None:
            endpoint.drop_hint()
        else:
            say(session, number)

    def _expecting(self, keys: Sequence[bytes], seconds: float | str | None, source: str) -> flows.Flow[None]:
        expectation, expected_s = expectation_of(seconds)
        hint = Hint(
            Event.EXPECT, name_of("source", source), seconds=expected_s, expectation=expectation, keys=hinted_keys(keys)
        )

        def say(session: "Session", number: int) -> None:
            self._endpoint.say(session, policy_frames.build_hint(dataclasses.replace(hint, namespace=number)))

        return self.naming(self._endpoint, say) if hint.keys else flows.nothing()

    def _report(self, report: Report) -> None:
        session = self._endpoint.session()
        opened = session.namespaces.get(self._target.canonical) if session is not None else None
        if opened is None:
            self._endpoint.drop_hint()
        else:
            self._endpoint.say(session, policy_frames.build_report(report._replace(namespace=opened.number)))

    # -- flows --------------------------------------------------------------------------------------------------

    def _pinning(
        self,
        session: "Session | None",
        keys: Sequence[bytes],
        ttl_s: float | None,
        tier: str,
        *,
        refresh: bool,
        retention: "Retention | str | None",
    ) -> flows.Flow[PinResult]:
        return policy_flows.pin(
            session, self._target, self._tally, flows.join_keys(keys),
            tier=tier_of(tier), ttl_ns=pin_ttl_ns(ttl_s, retention), refresh=bool(refresh),
            deadline_ns=_clock() + self._timeout_ns,
        )  # fmt: skip

    def _unpinning(self, session: "Session | None", pins: "PinResult | Iterable[int]") -> flows.Flow[int]:
        if not isinstance(pins, PinResult | Iterable):
            raise UsageError(f"unpin what `pin` gave, or several numbers of pins, not {pins!r:.200}")
        numbers = pins.pins if isinstance(pins, PinResult) else tuple(whole("a pin", pin) for pin in pins)
        return policy_flows.unpin(session, numbers, _clock() + self._timeout_ns)

    def _listing(self, session: "Session | None") -> flows.Flow[list[PinInfo]]:
        return policy_flows.list_pins(session, self._target, _clock() + self._timeout_ns)

    def _prefetching(
        self, session: "Session | None", keys: Sequence[bytes], tier: str, deadline_s: float
    ) -> flows.Flow[Prefetch]:
        joined, wanted = flows.join_keys(keys), prefetch_tier_of(tier)
        within_ns = flows.nanoseconds("deadline_s", deadline_s, least_ns=1)
        if within_ns > PREFETCH_NS_MAX:
            raise UsageError(f"deadline_s must be at most {PREFETCH_NS_MAX // 10**9}, not {deadline_s}")
        return self._asking(session, joined, wanted, within_ns)

    def _asking(self, session: "Session | None", keys: bytes, tier: int, within_ns: int) -> flows.Flow[Prefetch]:
        asked = yield from policy_flows.prefetch(
            session, _clock, self._target, keys, tier=tier, within_ns=within_ns, timeout_ns=self._timeout_ns
        )
        return Prefetch(self._endpoint, session, asked)

    def _advising(
        self,
        session: "Session | None",
        tokens: int,
        elapsed_s: float,
        running: int,
        *,
        token_bytes: float | None,
        expected_s: float | None,
        forward_s: float | None,
        batch_tokens: int,
        chunk_tokens: int,
    ) -> flows.Flow[Advice | None]:
        of_a_token = self.block_bytes / self.identity.block_tokens if token_bytes is None else token_bytes
        question = Question(
            0,
            tokens=whole("tokens", tokens),
            token_bytes=amount("token_bytes", of_a_token),
            running_tokens=whole("running", running),
            elapsed_s=amount("elapsed_s", elapsed_s),
            expected_s=UNKNOWN if expected_s is None else amount("expected_s", expected_s),
            forward_s=UNKNOWN if forward_s is None else amount("forward_s", forward_s),
            batch_tokens=whole("batch_tokens", batch_tokens),
            chunk_tokens=whole("chunk_tokens", chunk_tokens),
        )
        return policy_flows.advise(
            session, self._target, lambda number: question._replace(namespace=number), _clock() + self._timeout_ns
        )
