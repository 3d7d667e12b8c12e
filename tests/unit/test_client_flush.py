"""`flush` with a disk behind the daemon, and what a store says of its blocks' worth."""

import time
from pathlib import Path

import pytest

from kvclient import flows
from kvclient.results import FlushResult
from kvproto.errors import UsageError
from kvproto.frames import RECOMPUTE_US_MAX, Durable, Verb
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import Stopwatch, blocks_of, client_of, keys_of, namespace_of, pair, within

SHORT_S = 0.1
SLACK_S = 15.0
KEYS, BLOCKS = keys_of(4), blocks_of(4)


def test_flush_says_what_became_of_the_blocks_on_disk_since_the_last_one(tmp_path: Path) -> None:
    with pair(tmp_path) as (peer, ns):
        peer.durables = [Durable(durable=2, failed=1, evicted=1, pending=0), Durable(1, 0, 0, 0)]
        ns.store(KEYS, BLOCKS)
        assert ns.flush(PATIENCE_S) == FlushResult(visible=4, durable=2, failed=1, pending=0, evicted=1)
        ns.store(keys_of(1, seed=2), BLOCKS[:1])
        assert ns.flush(PATIENCE_S) == FlushResult(visible=1, durable=1, failed=0, pending=0)
        assert ns.flush(PATIENCE_S) == FlushResult(visible=0, durable=0, failed=0, pending=0)


def test_flush_gives_the_disk_the_time_that_is_left(tmp_path: Path) -> None:
    with pair(tmp_path) as (peer, ns):
        ns.store(KEYS, BLOCKS)
        ns.flush(60)
        ns.flush(0)
        first_ns, second_ns = peer.flush_waits_ns
        assert 0 < first_ns <= 60 * 10**9
        assert second_ns == 0


def test_blocks_that_are_not_durable_in_time_are_pending_and_counted_by_the_next_flush(tmp_path: Path) -> None:
    with pair(tmp_path) as (peer, ns):
        peer.durables = [Durable(1, 0, 0, 3), Durable(3, 0, 0, 0)]
        ns.store(KEYS, BLOCKS)
        with Stopwatch(SLACK_S):
            assert ns.flush(PATIENCE_S) == FlushResult(visible=4, durable=1, failed=0, pending=3)
        assert ns.flush(PATIENCE_S) == FlushResult(visible=0, durable=3, failed=0, pending=0)
        assert peer.seen.count(Verb.FLUSH) == 2


def test_a_flush_that_may_take_longer_than_one_frame_may_wait_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "LEASE_WAIT_NS_MAX", 10**6)
    with pair(tmp_path) as (peer, ns):
        ns.store(KEYS, BLOCKS)
        peer.durables = [Durable(1, 0, 0, 3), Durable(1, 1, 0, 1), Durable(0, 0, 1, 0)]
        answer = Peer.flush

        def answer_after_the_wait(peer: Peer, head: object, frame: bytes) -> None:
            asked_ns = time.monotonic_ns()
            while time.monotonic_ns() < asked_ns + 10**6:
                pass
            answer(peer, head, frame)  # type: ignore[arg-type]

        peer.instead[Verb.FLUSH] = answer_after_the_wait
        assert ns.flush(PATIENCE_S) == FlushResult(visible=4, durable=2, failed=1, pending=0, evicted=1)
        assert peer.flush_waits_ns == [10**6] * 3


def test_a_flush_without_an_answer_ends_with_everything_pending(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        peer.publishing = True
        assert ns.store(KEYS, BLOCKS, wait=True).accepted == 4
        within(SHORT_S, client, ns)
        peer.mute(Verb.FLUSH)
        with Stopwatch(SLACK_S):
            assert ns.flush(SHORT_S) == FlushResult(visible=4, durable=0, failed=0, pending=4)
        peer.answer_held()


def test_a_daemon_that_dies_during_a_flush_leaves_nothing_durable_and_nothing_pending(tmp_path: Path) -> None:
    with pair(tmp_path) as (peer, ns):
        ns.store(KEYS, BLOCKS)
        peer.instead[Verb.FLUSH] = lambda peer, head, frame: peer._hang_up()
        with Stopwatch(SLACK_S):
            assert ns.flush(PATIENCE_S) == FlushResult(visible=4, durable=0, failed=0, pending=0)


def test_who_stored_nothing_asks_nothing(tmp_path: Path) -> None:
    with pair(tmp_path) as (peer, ns):
        assert ns.flush(PATIENCE_S) == FlushResult(0, 0, 0, 0)
        assert Verb.FLUSH not in peer.seen


def test_blocks_that_never_became_visible_and_those_the_disk_refused_have_both_failed(tmp_path: Path) -> None:
    from kvproto.errors import Outcome

    with pair(tmp_path) as (peer, ns):
        peer.outcomes = [Outcome.PUBLISHED, Outcome.PUBLISHED, Outcome.STALE, Outcome.DISCARDED]
        peer.durables = [Durable(1, 1, 0, 0)]
        ns.store(KEYS, BLOCKS)
        assert ns.flush(PATIENCE_S) == FlushResult(visible=2, durable=1, failed=3, pending=0)


@pytest.mark.parametrize(
    ("recompute_s", "us"), [(None, 0), (0.25, 250_000), (0, 1), (1e-9, 1), (1e6, RECOMPUTE_US_MAX)], ids=str
)
def test_what_a_block_costs_to_compute_goes_with_every_reserve(
    tmp_path: Path, recompute_s: float | None, us: int
) -> None:
    with pair(tmp_path) as (peer, ns):
        assert ns.store(KEYS, BLOCKS, recompute_s=recompute_s).accepted == 4
        assert peer.recompute_us == [us]


@pytest.mark.parametrize("recompute_s", [-1, float("nan"), "1"], ids=str)
def test_a_cost_that_is_no_duration_is_a_usage_error(tmp_path: Path, recompute_s: float) -> None:
    with pair(tmp_path) as (peer, ns):
        with pytest.raises(UsageError, match="recompute_s"):
            ns.store(KEYS, BLOCKS, recompute_s=recompute_s)
        assert Verb.RESERVE not in peer.seen
