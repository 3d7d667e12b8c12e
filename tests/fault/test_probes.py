"""Fault 17: a tenant asks, by every verb, for what another tenant has. It is told what it is told of what nobody has.

Stale maps of a recycled arena: test_memory.py.
"""

import math
import random
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.process import DaemonProcess
from kvproto import frames, policy_frames
from kvproto.frames import Verb
from kvproto.policy_frames import Event, Hint, Question, Report
from tests.attached_kit import EMULATED, connected, engine, namespace_of
from tests.fault.test_memory import read, store
from tests.figures import Recorder
from tests.raw import RawClient, key, raw_client, real_daemon

COUNT = 32  # blocks of the victim's chain
ROUNDS = 40
ROUNDS_LONG = 67_000  # of 15 probes, and as many controls beside them: a million of either
PAIRS = 100_000
P_LEAST = 0.01
DRAWS = 3  # a neighbour on the machine may disturb one
SEED = 17
Times = NDArray[np.float64]
SECOND_NS = 10**9
STORED = [key(1 << 100 | number) for number in range(COUNT)]
NOBODYS = [key(1 << 101 | number) for number in range(COUNT)]  # as many, or caches tell few keys from many


@dataclass
class Two:
    """A tenant with blocks, a pin and a lease, and one without anything; both know all names and keys."""

    daemon: DaemonProcess
    victim: RawClient
    thief: RawClient
    namespace: int  # the victim's number
    mine: int  # the thief's, of the same identity
    leases: list[int] = field(default_factory=list)
    pins: list[int] = field(default_factory=list)

    def whole(self) -> bool:
        """Does the victim have all of its blocks, as they were?"""
        leased = self.victim.lease(self.namespace, STORED)
        return [read(self.victim, place) for place in leased.locations] == [b"v" * 4096] * COUNT


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    with ExitStack() as stack:
        daemon = stack.enter_context(real_daemon("--ring", "1MiB", tenants=("victim", "thief")))
        victim = stack.enter_context(raw_client(daemon.runtime_dir, tenant="victim"))
        thief = stack.enter_context(raw_client(daemon.runtime_dir, tenant="thief"))
        made = Two(daemon, victim, thief, victim.open(), thief.open())
        store(victim, made.namespace, STORED, b"v")
        made.leases = [victim.lease(made.namespace, STORED, ttl_s=60).lease]
        victim.send(policy_frames.build_pin(7, made.namespace, b"".join(STORED), policy_frames.Tier.DRAM, 600 * SECOND_NS, refresh=False))  # fmt: skip # noqa: E501
        head, frame, _ = victim.answer(Verb.PINNED)
        made.pins = [policy_frames.parse_pinned(frame, head).pin]
        assert made.pins[0]
        yield made
        assert daemon.process.poll() is None, "the daemon died"


# Each builds a frame that asks for these keys, with numbers that are the victim's or nobody's; and names the answer.
Probe = tuple[Callable[[int, bytes, int, int], bytes], Verb | None]
PROBES: dict[str, Probe] = {
    "MATCH": (lambda ns, keys, lease, pin: frames.build_match(7, ns, keys), Verb.MATCHED),
    "MATCH_ALL": (lambda ns, keys, lease, pin: frames.build_match_all(7, [ns], keys), Verb.MATCHED),
    "LEASE": (lambda ns, keys, lease, pin: frames.build_lease(7, ns, keys, SECOND_NS, 0), Verb.LEASED),
    "RENEW": (lambda ns, keys, lease, pin: frames.build_renew(7, lease, SECOND_NS), Verb.RENEWED),
    "DELETE": (lambda ns, keys, lease, pin: frames.build_delete(7, ns, keys), Verb.DELETED),
    "FLUSH": (lambda ns, keys, lease, pin: frames.build_flush(7, ns, 0), Verb.DURABLE),
    "PIN": (
        lambda ns, keys, lease, pin: policy_frames.build_pin(
            7, ns, keys, policy_frames.Tier.DRAM, SECOND_NS, refresh=True
        ),
        Verb.PINNED,
    ),
    "UNPIN": (lambda ns, keys, lease, pin: policy_frames.build_unpin(7, [pin]), Verb.UNPINNED),
    "PINS": (lambda ns, keys, lease, pin: policy_frames.build_pins(7, 0), Verb.PIN_LIST),
    "PREFETCH": (
        lambda ns, keys, lease, pin: policy_frames.build_prefetch(7, ns, keys, policy_frames.Tier.DRAM, SECOND_NS),
        Verb.FETCHING,
    ),
    "CANCEL": (lambda ns, keys, lease, pin: policy_frames.build_cancel([pin]), None),
    "RELEASE": (lambda ns, keys, lease, pin: frames.build(Verb.RELEASE, 0, releases=[lease]), None),
    "HINT": (
        lambda ns, keys, lease, pin: policy_frames.build_hint(
            Hint(Event.CONTEXT, "p", namespace=ns, version=time.monotonic_ns(), keys=keys)
        ),
        None,
    ),
    "REPORT": (lambda ns, keys, lease, pin: policy_frames.build_report(Report(ns, 0, 16, 16, 0.01)), None),
    "ADVISE": (lambda ns, keys, lease, pin: policy_frames.build_advise(7, Question(ns, *[1.0] * 8)), Verb.ADVISED),
}  # fmt: skip


def told(two: Two, name: str, keys: list[bytes], lease: int, pin: int) -> bytes:
    """What the thief is told, less what is a clock's."""
    build, answer = PROBES[name]
    two.thief.send(build(two.mine, b"".join(keys), lease, pin))
    if answer is None:
        two.thief.ping()
        return b""
    head, frame, fds = two.thief.answer(answer)
    assert not fds
    return struct.pack("<BBH", head.verb, head.flags, head.count) + bytes(frame[head.body :])


def probe(two: Two, rounds: int) -> int:
    chance = random.Random(SEED)
    asked = 0
    for turn in range(rounds):
        begin, end = sorted(chance.sample(range(COUNT + 1), 2))
        nobodys = [key(chance.getrandbits(200) | 1 << 201) for _ in range(begin, end)]
        lease = two.leases[0]
        for name in PROBES:
            theirs = told(two, name, STORED[begin:end], lease, two.pins[0])
            control = told(two, name, nobodys, 1 << 40 | turn, 1 << 40 | turn)
            assert theirs == control, f"{name} of blocks {begin} to {end} tells them from what nobody has"
            asked += 1
    assert two.whole()
    two.victim.send(policy_frames.build_pins(7, 0))
    head, frame, _ = two.victim.answer(Verb.PIN_LIST)
    assert [pin.pin for pin in policy_frames.parse_pin_list(frame, head)] == two.pins
    return asked


def test_what_another_tenant_has_is_told_apart_by_no_verb_from_what_nobody_has(two: Two) -> None:
    assert probe(two, ROUNDS) == ROUNDS * len(PROBES)


def test_the_owner_is_told_something_else_so_the_comparison_can_fail(two: Two) -> None:
    """The control: the same comparison, in the victim's own session."""
    own = Two(two.daemon, two.victim, two.victim, two.namespace, two.namespace)
    for name in ("MATCH", "MATCH_ALL", "PIN"):
        assert told(own, name, STORED, 1, 1) != told(own, name, [key(9)] * COUNT, 1, 1), name
    two.victim.send(policy_frames.build_pins(7, two.pins[0]))
    head, frame, _ = two.victim.answer(Verb.PIN_LIST)
    later = [pin.pin for pin in policy_frames.parse_pin_list(frame, head)]
    two.victim.send(policy_frames.build_unpin(7, later))
    two.victim.answer(Verb.UNPINNED)


def test_every_verb_is_probed_or_named_here() -> None:
    others = {"HELLO", "OPEN", "RESERVE", "COMMIT", "ABORT", "PING", "ARENA_DROPPED"}  # name nothing that is stored;
    # another session's ticket ends the session that names it: test_bad_frames.py
    others |= {"ATTACH", "DETACH", "LOAD", "SAVE", "CANCEL_TRANSFER"}  # of mode daemon alone: the next test
    asked = {verb.name for verb in Verb if verb < Verb.WELCOME} - {"STORE"}
    assert asked == PROBES.keys() | others


def test_what_another_tenant_has_is_loaded_by_nobody_else() -> None:
    keys = [key(number) for number in range(1, 9)]
    with ExitStack() as stack:
        daemon = stack.enter_context(real_daemon(*EMULATED, tenants=("victim", "thief")))
        kv = stack.enter_context(engine())
        victim, thief = (stack.enter_context(connected(daemon, tenant=name)) for name in ("victim", "thief"))
        saved = namespace_of(victim, "of both").save(keys, kv.attach(victim)[range(8)])
        assert saved.accepted == 8, saved
        before = kv.get(range(32, 40)).copy()
        memory = kv.attach(thief)
        assert not namespace_of(thief, "of both").load(keys, memory[range(32, 40)]).blocks
        assert np.array_equal(kv.get(range(32, 40)), before), "and nothing was written there"
        assert namespace_of(victim, "of both").load(keys, kv.attach(victim)[range(40, 48)]).blocks == 8
        assert np.array_equal(kv.get(range(40, 48)), kv.values[:, :8]), "the control"
        assert not np.array_equal(before, kv.values[:, :8]), "these differ, so the comparison can fail"


def test_a_key_that_another_tenant_has_is_granted_as_if_nobody_had_it(two: Two) -> None:
    with raw_client(two.daemon.runtime_dir, tenant="thief") as other:
        namespace = other.open(model="own")
        store(other, namespace, STORED[:4], b"t")
        place = other.lease(namespace, STORED[:4]).locations[0]
        assert read(other, place) == b"t" * 4096
    assert two.whole()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_million_probes(two: Two, record_property: Recorder) -> None:
    asked = probe(two, ROUNDS_LONG)
    record_property("probes", asked)
    assert asked == ROUNDS_LONG * len(PROBES) > 10**6


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_how_long_an_answer_takes_does_not_tell_either(two: Two, record_property: Recorder) -> None:
    """Of what the victim has, and of what nobody has: a rank test of the times of answers, asked in random order.

    Who tries several times has several chances of a large p, so all draws must together look like chance: their
    median, of three. By chance alone that is below 0.01 once in three thousand times.
    """
    found = sorted(rank_p(*times_of(two.thief, two.mine, PAIRS, SEED + draw)) for draw in range(DRAWS))
    for number, p in enumerate(found):
        record_property(f"p_{number}", p)
    assert found[DRAWS // 2] > P_LEAST
    assert rank_p(*times_of(two.victim, two.namespace, PAIRS, SEED)) < P_LEAST, "the control: to the owner it does tell"


def times_of(client: RawClient, namespace: int, pairs: int, seed: int) -> tuple[Times, Times]:
    """Nanoseconds of MATCH of blocks that are stored and of such that nobody has. Nothing else differs here, either."""
    chance = random.Random(seed)
    samples, asked, orders = (np.zeros(pairs), np.zeros(pairs)), (STORED, NOBODYS), ((0, 1), (1, 0))
    for number in range(pairs):
        for which in orders[chance.randrange(2)]:
            frame = frames.build_match(7, namespace, asked[which][chance.randrange(COUNT)])
            client.send(frame)
            began_ns = time.perf_counter_ns()
            client.receive()
            samples[which][number] = time.perf_counter_ns() - began_ns
    return samples


def test_the_rank_test_tells_samples_apart_and_equal_ones_not() -> None:
    generator = np.random.default_rng(SEED)
    one, other = generator.lognormal(size=20_000), generator.lognormal(size=20_000)
    assert rank_p(one, other) > P_LEAST
    assert rank_p(one, other * 1.05) < 1e-3


def rank_p(one: Times, other: Times) -> float:
    """Of Mann and Whitney's test, two-sided, by the normal approximation: times have few ties."""
    both = np.concatenate([one, other])
    _, where, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[where]
    m, n = len(one), len(other)
    u = ranks[:m].sum() - m * (m + 1) / 2
    z = (u - m * n / 2) / math.sqrt(m * n * (m + n + 1) / 12)
    return math.erfc(abs(z) / math.sqrt(2))
