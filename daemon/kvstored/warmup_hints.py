"""The part of warming up that says something of blocks."""

from kvproto.policy_frames import Event, Hint
from kvstore.blocks import U8
from kvstore.policies import Chosen, Tier
from kvstore.policy import Rule
from kvstore.sessions import Namespace, Session
from kvstore.store import Store


def expect(store: Store, session: Session, namespace: Namespace, keys: U8) -> None:
    """A chain of four blocks that are there is needed soon, whatever rule holds. The store goes by LRU afterwards."""
    for rule in (Rule.DENSITY, Rule.LRU):
        store.choose_rule(Chosen(Tier.DRAM, None, rule))
        hint = Hint(Event.EXPECT, "warm-up", namespace=namespace.number, expectation=1, keys=keys.tobytes())
        assert store.guiding.hear(session, hint) is None, "hints do not work"
    assert store.guiding.tally.said_blocks == 8, "words on blocks do not work"
