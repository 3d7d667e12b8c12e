"""What loads take, over a warm restart."""

import numpy as np
import pytest

from kvproto.policy_frames import Tier
from kvstore.cost import Bandwidth
from kvstore.sessions import Namespace
from kvstore.tier.format import FormatError
from tests.core import Core
from tests.unit.test_restart import successor


def measured(count: int, byte_s: float, call_s: float = 1e-4) -> Bandwidth:
    """A way of which so many loads were timed, each a little off."""
    way, random = Bandwidth(), np.random.default_rng(1)
    for number in range(count):
        load_bytes = int(random.integers(1 << 12, 1 << 24))
        assert way.took(load_bytes, (call_s + byte_s * load_bytes) * (1 + 0.1 * (number % 3))) is None
    way.settle()
    return way


@pytest.mark.parametrize("count", [1, 2, 40, 1000])
def test_a_way_is_read_as_it_was_written(count: int) -> None:
    way = measured(count, 1e-9)
    back = Bandwidth.from_bytes(way.to_bytes())
    assert back.reports == way.reports == count
    for load_bytes in (1 << 12, 1 << 20, 1 << 24):
        assert back.load_seconds(load_bytes) == pytest.approx(way.load_seconds(load_bytes), rel=1e-3)
    assert back.load_seconds(1 << 20) != pytest.approx(measured(count, 2e-9).load_seconds(1 << 20), rel=1e-3)
    for both in (way, back):
        for _ in range(200):
            both.took(1 << 20, 0.5)
    assert back.load_seconds(1 << 20) == pytest.approx(way.load_seconds(1 << 20), rel=1e-3), "and goes on as it would"


def test_no_byte_of_it_can_be_bent() -> None:
    content = measured(50, 1e-9).to_bytes()
    for at in range(len(content)):
        with pytest.raises(FormatError):
            Bandwidth.from_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(FormatError):
            Bandwidth.from_bytes(content[:at])
    with pytest.raises(FormatError):
        Bandwidth.from_bytes(content + b"\0")
    with pytest.raises(FormatError):
        Bandwidth.from_bytes(Bandwidth().to_bytes())


def timed(core: Core, tenant: str) -> Namespace:
    """A tenant that has reported loads; and what the daemon has read itself."""
    namespace = core.client(tenant).open()
    for _ in range(20):
        assert core.store.costing.report_load(namespace, Tier.DRAM, 1 << 20, 0.001) is None
        core.store.costing.read(4 << 20, 0.01)
    return namespace


def test_a_successor_goes_on_with_what_was_measured_and_learns_more() -> None:
    core = Core(arenas=2)
    timed(core, "a/b")  # a name with what names are joined by
    core.client("other").open()
    core.store.learned.save()
    later = successor(core)
    costing, tenants = later.store.costing, later.store.tenants
    assert costing.heard
    assert costing.disk.reports == 20
    assert costing.disk.load_seconds(4 << 20) == pytest.approx(0.01, rel=0.01)
    assert costing.way(tenants["a/b"], Tier.DRAM).load_seconds(1 << 20) == pytest.approx(0.001, rel=0.01)
    assert costing.way(tenants["other"], Tier.DRAM).load_seconds(1 << 20) is None
    timed(later, "a/b")
    assert (costing.disk.reports, costing.way(tenants["a/b"], Tier.DRAM).reports) == (40, 40)


def test_what_this_life_has_measured_is_not_taken_from_another() -> None:
    core = Core(arenas=2)
    namespace = timed(core, "a")
    assert not core.store.costing.take_over_way(namespace.tenant, Tier.DRAM, measured(5, 1e-9))
    assert not core.store.costing.take_over_way(None, Tier.DISK, measured(5, 1e-9))
    assert core.store.costing.disk.reports == 20


@pytest.mark.parametrize("name", ["way/9/a", "way/1/nobody", "way/1", "way/"])
def test_ways_of_nobody_are_refused(name: str) -> None:
    core = Core(arenas=2)
    core.client("a").open()
    assert core.store.lessons.take_over({name: measured(5, 1e-9).to_bytes()}) == 0
    assert core.store.lessons.take_over({"way/1/a": b"bent"}) == 0
    assert core.store.lessons.take_over({"way/1/a": measured(5, 1e-9).to_bytes()}) == 1
