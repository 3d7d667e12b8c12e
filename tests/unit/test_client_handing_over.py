"""A client that hands over and follows, against a peer that is too old for it, or is gone; and the frames of it."""

import os
import signal
from pathlib import Path

import pytest

from kvclient.following import Following, follow
from kvclient.handing_over import HandOver, take_over
from kvproto import policy_frames
from kvproto.errors import ClosedError, ProtocolError, UsageError
from kvproto.frames import Verb
from kvproto.limits import KEYS_PER_FRAME, PROTOCOL_VERSION
from kvproto.policy_frames import REMOTE, Tier
from tests.core import SECOND, Core, chain
from tests.peer import PATIENCE_S
from tests.unit.client_kit import keys_of
from tests.unit.client_policy_kit import trio
from tests.unit.test_hot_policy import Wire

KEYS = keys_of(5)


def test_a_daemon_that_is_too_old_is_not_asked_for_the_remote_tier(tmp_path: Path) -> None:
    with trio(tmp_path) as (peer, policies, client, ns):
        policies.there = 5
        assert ns.prefetch(KEYS, tier="remote").there == 5, "the control"
        assert [tier for tier, _, _ in policies.prefetches] == [REMOTE]
        peer.version = PROTOCOL_VERSION - 1
        peer.hang_up()
        peer.wait_for(lambda: peer.hellos == 2)
        assert client.wait_connected(30)
        asked = ns.prefetch(KEYS, tier="remote")
        assert (asked.there, asked.coming, len(policies.prefetches)) == (0, 0, 1)
        assert ns.prefetch(KEYS).there == 5, "everything else goes on"


def test_a_long_chain_is_handed_over_frame_by_frame(tmp_path: Path) -> None:
    with trio(tmp_path) as (peer, policies, _, ns):
        keys = keys_of(KEYS_PER_FRAME + 5)
        for key in keys:
            peer.put(key, bytes(ns.block_bytes))
        policies.there = KEYS_PER_FRAME
        done = HandOver(ns, None, far=True).finish(keys, 30.0)
        assert (done.blocks, done.why) == (len(keys), "")
        assert [count for _, _, count in policies.prefetches if count > 5] == [KEYS_PER_FRAME]


def test_what_is_not_here_or_not_over_there_any_more_does_not_count(tmp_path: Path) -> None:
    with trio(tmp_path) as (peer, policies, _, ns):
        for key in KEYS:
            peer.put(key, bytes(ns.block_bytes))
        policies.there = 5
        moving = HandOver(ns, None, far=True)
        assert moving.copy(KEYS, 30.0).blocks == 5
        policies.there = 0
        gone = moving.finish(KEYS, 0.01)
        assert (gone.blocks, gone.rounds[-1].blocks, bool(gone.why)) == (0, 0, True)
        policies.there = 5
        assert moving.copy(KEYS, 30.0).blocks == 5
        del peer.blocks[KEYS[3]]
        gone = moving.finish(KEYS, 0.01)
        assert (gone.blocks, gone.rounds[-1].blocks, bool(gone.why)) == (3, 0, True)


def test_who_follows_is_over_when_the_client_is_closed_and_who_asks_nonsense_is_told(tmp_path: Path) -> None:
    with trio(tmp_path) as (_, _, client, ns):
        with pytest.raises(UsageError):
            follow(ns, [b"short"])
        with pytest.raises(UsageError):
            follow(ns, KEYS, -1.0)
        assert follow(ns, []).over
        following = follow(ns, KEYS, 600.0)
        client.close()
        assert following.wait() == 0
        assert following.over
        with pytest.raises(ClosedError):
            take_over(ns, KEYS, wait_s=0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_that_follows_does_not_wait_for_a_thread_that_it_has_not(tmp_path: Path) -> None:
    with trio(tmp_path) as (_, _, _, ns):
        following = follow(ns, KEYS, 600.0)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(PATIENCE_S))
            os._exit(follow(ns, KEYS, 600.0).wait())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not following.over, "the parent's goes on"
        following.cancel()


def test_nobody_waits_past_the_time_even_if_nobody_looks(tmp_path: Path) -> None:
    with trio(tmp_path) as (_, _, _, ns):
        following = Following(ns, KEYS, 0.01)
        assert following.wait() == 0
        assert following.over
        patient = Following(ns, KEYS, 600.0)
        assert patient.wait(1, 0.01) == 0
        assert not patient.over, "the control: only this wait is over"


def test_only_a_prefetch_is_of_the_remote_tier(tmp_path: Path) -> None:
    wire = Wire(Core(4).client())
    number, keys = wire.client.open().number, b"".join(chain(4))
    wire.say(policy_frames.build_prefetch(9, number, keys, REMOTE, SECOND))
    head, frame = wire.answer(Verb.FETCHING)
    assert policy_frames.parse_fetching(frame, head) == (0, 0, 0), "there is none"
    with pytest.raises(ProtocolError, match="tier 3"):
        wire.say(policy_frames.build_pin(9, number, keys, REMOTE, SECOND, refresh=False))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="tier 4"):
        wire.say(policy_frames.build_prefetch(9, number, keys, REMOTE + 1, SECOND))
    assert REMOTE not in list(Tier)
    with trio(tmp_path) as (_, _, _, ns), pytest.raises(UsageError):
        ns.pin(KEYS, 1.0, tier="remote")
