"""What a store has learned is written while time passes, so that `kill -9` costs the last minute of it at most."""

from kvstore.learned import ROUND_NS
from kvstore.sessions import Namespace
from tests.core import SECOND, Core, chain
from tests.unit.test_restart import successor

THINGS = 16  # more than there are to write: a tick writes one


def taught(core: Core, model: str) -> Namespace:
    """A namespace with a block in it and a profile."""
    client = core.client()
    namespace = client.open(model=model)
    client.put(namespace, chain(1, model))
    teach(core, namespace)
    return namespace


def teach(core: Core, namespace: Namespace) -> None:
    """More of the same."""
    for cached in range(0, 4096, 512):
        assert core.store.costing.report_prefill(namespace, cached, 512, 0.05 + cached * 1e-5) is None


def known(core: Core) -> dict[str, int]:
    """Reports of prefills that a successor, after `kill -9`, knows of, by model."""
    store = successor(core).store
    assert store.kept.warm
    spaces = store.namespaces.values()
    return {one.identity.model: one.profile.reports for one in spaces if one.profile is not None}


def ticks(core: Core) -> None:
    """As often as a round needs."""
    for _ in range(THINGS):
        core.pass_time(1)


def test_what_was_learned_is_written_once_a_minute_and_not_before() -> None:
    core = Core(arenas=2)
    first = taught(core, "first")
    ticks(core)
    core.pass_time(ROUND_NS - SECOND)
    ticks(core)
    assert known(core) == {}, "the control"
    core.pass_time(SECOND)
    ticks(core)
    assert known(core) == {"first": 8}
    teach(core, first)
    taught(core, "second")
    ticks(core)
    assert known(core) == {"first": 8}, "the next round is due in a minute"
    core.pass_time(ROUND_NS)
    ticks(core)
    assert known(core) == {"first": 16, "second": 8}
