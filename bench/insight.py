"""What self-knowledge costs: sampling a lease's keys, taking in what was sampled, noting why a block left.

`room_*` are of the room that the daemon has (kvstore/watching.py), called as LEASE calls it and ticked as the daemon
ticks it: 5,000 leases of 100 keys a second by 32 tenants, in time on a core, once all streams have settled. `curves_*`
are of the curves in it alone, without shadows and without the store around them.
"""

import time
from statistics import median
from typing import Final

import numpy as np

from bench.harness import Results, say
from kvproto.identity import NamespaceIdentity
from kvproto.limits import MIB
from kvstore.blocks import U8, Number, compiled
from kvstore.insight import curves as curve
from kvstore.insight import reasons
from kvstore.insight.curves import SECOND_NS, Curves
from kvstore.insight.reasons import Cause, Place, cause_word
from kvstore.insight.tap import TAKE_AT, Tap, sample, threshold_of
from kvstore.sessions import Namespace
from kvstore.store import Limits, Store
from kvstore.watching import Watching
from kvstored.warmup_world import Clock, Memory, Outbox, Randomness

SEED: Final = tuple(int(word) for word in np.random.default_rng(0).integers(0, 1 << 63, 5))
LEASES_PER_S: Final = 5000
KEYS_PER_LEASE: Final = 100
TENANTS: Final = 32


def run(*, quick: bool) -> Results:
    """All figures of `insight`. Needs 300 MiB of memory, less with `quick`."""
    chains = 2000 if quick else 20_000
    keys = keys_of(chains * KEYS_PER_LEASE)
    results = measure_sample(keys, 20 if quick else 100)
    results |= measure_room(keys, chains, seconds=10 if quick else 40)
    results |= measure_curves(keys, chains, seconds=4 if quick else 20)
    results |= measure_reasons(100_000 if quick else 1_000_000)
    return results


def keys_of(count: int) -> U8:
    """So many keys, one after another."""
    return np.random.default_rng(1).integers(0, 1 << 64, 4 * count, dtype=np.uint64)


@compiled
def _sample_leases(keys: U8, starts: U8, first: Number, namespaces: Number, tap: U8) -> Number:
    """Leases until enough wait or there are no more; how many were done."""
    for lease in range(first, starts.size):
        at = np.int64(starts[lease])
        namespace = 1 + (at // 400) % namespaces
        if sample(keys, at, 100, namespace, 0, 0, tap) >= TAKE_AT:
            return lease + 1
    return starts.size


def measure_sample(keys: U8, rounds: int) -> Results:
    """One lease at a rate of 1 %, from compiled code and from Python."""
    tap = Tap(SEED, 2)
    tap.open(1, 1, MIB)
    tap.set_threshold(0, threshold_of(0.01))
    starts = np.random.default_rng(2).integers(0, keys.size // 400, 2000).astype(np.uint64) * np.uint64(400)
    inside, called, sampled = [], [], 0
    for _ in range(rounds + 1):
        begun = time.thread_time()
        _sample_leases(keys, starts, 0, 1, tap.words)
        inside.append((time.thread_time() - begun) / starts.size)
        sampled = tap.take().size
        begun = time.thread_time()
        for at in starts[:500].tolist():
            sample(keys, at, KEYS_PER_LEASE, 1, 0, 0, tap.words)
        called.append((time.thread_time() - begun) / 500)
        tap.take()
    return {
        "sample_100_keys_us": 1e6 * median(inside[1:]),
        "sample_100_keys_from_python_us": 1e6 * median(called[1:]),
        "sampled_share": sampled / starts.size / KEYS_PER_LEASE,
    }


def measure_room(keys: U8, chains: int, seconds: int) -> Results:
    """Leases of chains by Zipf through `Watching`; of half of the seconds, the other half is to settle in.

    A second of the store's clock holds as many leases as a real one; how long they take here decides nothing.
    """
    clock = Clock()
    store = Store(Limits(64 * MIB, MIB), clock, Randomness(), Memory(), Outbox())
    watching = store.watching
    namespaces = [_namespace(store, f"t{tenant}") for tenant in range(TENANTS)]
    shares = 1 / np.arange(1, chains + 1)
    generator = np.random.default_rng(4)
    leases, ticks, worst = [], [], []
    for second in range(seconds):
        picked = generator.choice(chains, LEASES_PER_S, p=shares / shares.sum()).tolist()
        spent_s, slices = _room_second(watching, clock, keys, namespaces, picked)
        if second >= seconds // 2:
            leases.append(spent_s)
            ticks.append(sum(slices))
            worst.append(max(slices, default=0.0))
    say(f"room: {watching.curves.tap.lost} lost, {1e6 * median(leases) / LEASES_PER_S:.2f} us a lease")
    return {
        "room_lease_us": 1e6 * median(leases) / LEASES_PER_S,
        "room_core_share_at_5000_leases": median(leases) + median(ticks),
        "room_tick_share": median(ticks),
        "room_slice_worst_ms": 1e3 * median(worst),
        "room_slice_worst_of_all_ms": 1e3 * max(worst),
        "room_mib": watching.held_bytes / MIB,
        "room_mib_64_tenants": (
            watching.held_bytes + curve.Limits().held_bytes(64) - curve.Limits().held_bytes(TENANTS)
        )
        / MIB,
        "room_lost": watching.curves.tap.lost,
    }


def _namespace(store: Store, tenant: str) -> Namespace:
    session = store.attach(tenant, MIB)
    return store.open(session, NamespaceIdentity("bench", "-", "-", "-", 16, MIB))


def _room_second(
    watching: Watching, clock: Clock, keys: U8, namespaces: list[Namespace], picked: list[int]
) -> tuple[float, list[float]]:
    """Seconds of telling the room of these leases, and of each of its ticks."""
    step_ns, spent_s, slices = SECOND_NS // len(picked), 0.0, []
    for start in range(0, len(picked), 10):
        begun = time.thread_time()
        for chain in picked[start : start + 10]:
            watching.asked(namespaces[chain % TENANTS], keys, 4 * KEYS_PER_LEASE * chain, KEYS_PER_LEASE, 0)
        spent_s += time.thread_time() - begun
        clock.ns += 10 * step_ns
        due_ns = watching.next_ns()
        if due_ns is not None and due_ns <= clock.ns:
            begun = time.thread_time()
            watching.tick(clock.ns)
            slices.append(time.thread_time() - begun)
    return spent_s, slices


def measure_curves(keys: U8, chains: int, seconds: int) -> Results:
    """Leases of chains by Zipf, a second's worth at a time, each drained; half of the seconds to settle."""
    curves = Curves(SEED, TENANTS, 0, curve.Limits())
    for tenant in range(1, TENANTS + 1):
        curves.open(tenant, tenant, MIB)
        curves.tap.price(tenant, 0.01, 1e-5)
    shares = 1 / np.arange(1, chains + 1)
    generator = np.random.default_rng(3)
    inside, called, drains = [], [], []
    for second in range(1, seconds + 1):
        picked = generator.choice(chains, LEASES_PER_S, p=shares / shares.sum())
        starts = picked.astype(np.uint64) * np.uint64(4 * KEYS_PER_LEASE)
        spent_s, drained_s = one_second(curves, keys, starts, 2 * second * SECOND_NS)
        if second > seconds // 2:
            inside.append(spent_s)
            drains.append(drained_s)
            called.append(called_second(curves, keys, starts, (2 * second + 1) * SECOND_NS))
    settled = curves.curve(0, (2 * seconds + 1) * SECOND_NS)
    say(f"rate {settled.rate:.5f}, {settled.keys} keys, lost {curves.tap.lost}")
    return {
        "curves_core_share_at_5000_leases": median(inside),
        "curves_core_share_from_python": median(called),
        "curves_drain_share": median(drains),
        "curves_rate": settled.rate,
        "curves_mib": curves.held_bytes / MIB,
        "curves_mib_64_tenants": (curve.Limits().held_bytes(64) + curves.tap.held_bytes) / MIB,
    }


def one_second(curves: Curves, keys: U8, starts: U8, now_ns: int) -> tuple[float, float]:
    """Seconds spent on these leases, sampled from compiled code; and those of them spent on draining."""
    begun, drained_s, done = time.thread_time(), 0.0, 0
    while done < starts.size:
        done = _sample_leases(keys, starts, done, TENANTS, curves.tap.words)
        drain_begun = time.thread_time()
        curves.drain(now_ns)
        drained_s += time.thread_time() - drain_begun
    return time.thread_time() - begun, drained_s


def called_second(curves: Curves, keys: U8, starts: U8, now_ns: int) -> float:
    """Likewise, with a call from Python for each lease."""
    offsets = starts.tolist()
    tap = curves.tap.words
    begun = time.thread_time()
    for at in offsets:
        if sample(keys, at, KEYS_PER_LEASE, 1 + (at // 400) % TENANTS, 0, 0, tap) >= TAKE_AT:
            curves.drain(now_ns)
    curves.drain(now_ns)
    return time.thread_time() - begun


@compiled
def _note_all(table: U8, keys: U8, word: Number, now_ns: Number) -> None:
    for at in range(0, keys.size, 4):
        reasons.note(table, keys[at], keys[at + 1], keys[at + 2], keys[at + 3], 1, word, now_ns)


def measure_reasons(blocks: int) -> Results:
    """Noting departures into a table for four times as many entries as blocks, and looking from Python."""
    table = np.zeros(reasons.words_for(4 * blocks), dtype=np.uint64)
    reasons.begin(table, SEED, 0, cold=True)
    keys = keys_of(blocks)
    word = cause_word(Cause.EVICTED, Place.DRAM)
    times = []
    for turn in range(5):
        begun = time.thread_time()
        _note_all(table, keys, word, turn << 34)
        times.append((time.thread_time() - begun) / blocks)
    sampled = keys[: 4 * 10_000].reshape(-1, 4)
    begun = time.thread_time()
    known = sum(reasons.departure(table, key, 1, 9 << 34).cause is Cause.EVICTED for key in sampled)
    look_s = (time.thread_time() - begun) / len(sampled)
    return {
        "note_ns": 1e9 * median(times[1:]),
        "look_us": 1e6 * look_s,
        "remembered_share": known / len(sampled),
        "reasons_bytes_per_block": table.nbytes / blocks,
    }
