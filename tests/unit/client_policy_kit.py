"""A peer that also pins, prefetches and advises, by the book or as it is told."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import kvclient
from kvproto import frames, policy_frames
from kvproto.errors import Code
from kvproto.frames import Head, Verb
from kvproto.policy_frames import Advised, Fetching, Partial, Pin, Pinned, Question
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import client_of, namespace_of

NAMESPACE = 7  # the one that the peer opens
SWAP = Advised(1, 3.0, policy_frames.UNKNOWN, 5.0, 0.1, 4096)  # what it advises


@dataclass
class Policies:
    """What such a peer has heard, and how it answers."""

    room_blocks: int = 1 << 30  # for pins
    a_frame: int = 2  # pins in one PIN_LIST
    advised: Advised = SWAP
    refuse: str = ""  # answer FAILED with this text
    there: int = 0  # of each prefetch

    pins: dict[int, Pin] = field(default_factory=dict)
    asked: list[tuple[int, int, bool]] = field(default_factory=list)  # tier, ttl, refresh of every PIN
    prefetches: list[tuple[int, int, int]] = field(default_factory=list)  # tier, within, keys
    questions: list[Question] = field(default_factory=list)

    def pin(self, peer: Peer, head: Head, frame: bytes) -> None:
        """PINNED."""
        policy_frames.pin_keys(head)
        namespace, tier, ttl_ns = policy_frames.PIN_HEAD.unpack_from(frame, head.body)
        self.asked.append((tier, ttl_ns, bool(head.flags & frames.Flag.REFRESH)))
        if self._refuses(peer, head):
            return
        blocks = min(head.count, self.room_blocks)
        self.room_blocks -= blocks
        partial = Partial.NOTHING if blocks == head.count else Partial.BUDGET
        pinned = Pinned(0, 0, 0, 0, partial)
        if blocks:
            number = len(self.asked)
            expires_ns = time.monotonic_ns() + ttl_ns
            self.pins[number] = Pin(number, 100 * blocks, expires_ns, blocks, namespace)
            pinned = Pinned(number, 100 * blocks, expires_ns, blocks, partial)
        peer.send(frames.build(Verb.PINNED, head.request, policy_frames.PINNED_BODY.pack(*pinned)))

    def unpin(self, peer: Peer, head: Head, frame: bytes) -> None:
        """UNPINNED."""
        ended = sum(self.pins.pop(pin, None) is not None for pin in policy_frames.parse_numbers(frame, head))
        peer.send(frames.build(Verb.UNPINNED, head.request, frames.NUMBER_BODY.pack(ended)))

    def list_pins(self, peer: Peer, head: Head, frame: bytes) -> None:
        """PIN_LIST."""
        (after,) = frames.CLOCK_BODY.unpack_from(frame, frames.require_body(head, 8))
        found = [pin for number, pin in sorted(self.pins.items()) if number > after][: self.a_frame]
        peer.send(policy_frames.build_pin_list(head.request, found))

    def prefetch(self, peer: Peer, head: Head, frame: bytes) -> None:
        """FETCHING."""
        policy_frames.pin_keys(head)
        _, tier, within_ns = policy_frames.PREFETCH_HEAD.unpack_from(frame, head.body)
        self.prefetches.append((tier, within_ns, head.count))
        if self._refuses(peer, head):
            return
        there = min(self.there, head.count)
        fetching = Fetching(len(self.prefetches) if there < head.count else 0, there, head.count - there)
        peer.send(frames.build(Verb.FETCHING, head.request, policy_frames.FETCHING_BODY.pack(*fetching)))

    def advise(self, peer: Peer, head: Head, frame: bytes) -> None:
        """ADVISED."""
        self.questions.append(policy_frames.parse_advise(frame, head))
        if not self._refuses(peer, head):
            peer.send(frames.build(Verb.ADVISED, head.request, policy_frames.ADVISED_BODY.pack(*self.advised)))

    def _refuses(self, peer: Peer, head: Head) -> bool:
        if self.refuse:
            peer.send(frames.build_failure(Verb.FAILED, head.request, Code.BAD_ARGUMENT, self.refuse))
        return bool(self.refuse)


def teach(peer: Peer) -> Policies:
    """Let a peer answer these verbs too."""
    policies = Policies()
    peer.instead |= {
        Verb.PIN: policies.pin,
        Verb.UNPIN: policies.unpin,
        Verb.PINS: policies.list_pins,
        Verb.PREFETCH: policies.prefetch,
        Verb.ADVISE: policies.advise,
    }
    return policies


@contextmanager
def trio(
    directory: Path, timeout_s: float = PATIENCE_S
) -> Iterator[tuple[Peer, Policies, kvclient.Client, kvclient.Namespace]]:
    """A peer with policies, a client, and its namespace."""
    with Peer(directory) as peer:
        policies = teach(peer)
        with client_of(peer, timeout_s) as client:
            yield peer, policies, client, namespace_of(client)
