"""Pins over the control socket, as kvctl shows and ends them."""

import pytest
from typer.testing import CliRunner

from kvctl import pins
from kvctl.cli import app, globals_first
from kvctl.client import ControlClient, Exit, KvctlError
from kvproto import control_pb2 as pb
from kvproto.policy_frames import Tier
from kvstore.report_pins import PINS_LISTED, pins_report
from kvstored.admin_pins import unpin
from tests.core import SECOND, Core, chain, words
from tests.unit.control_fakes import MIB
from tests.unit.test_kvctl_hints import client, shown

__all__ = ["client"]  # the fixture


def test_pins_come_over_the_socket_field_by_field(client: ControlClient) -> None:
    report = client.pins(pb.ListPinsRequest())
    first, second = report.pins
    assert (first.pin, first.tenant, first.blocks, first.left_s) == (7, "research", 40, 12.5)
    assert (first.refresh, first.owner, second.refresh, second.owner) == (True, "program:agent-1", False, "")
    (budget,) = report.budgets
    assert (budget.pins, budget.used_bytes, budget.budget_bytes) == (600, 64 * MIB, 128 * MIB)
    counts = [getattr(report.counters, field.name) for field in pb.PinCounters.DESCRIPTOR.fields]
    assert counts == [*range(11, 22), 22 * MIB, 23 * MIB, 24 * MIB]
    text = shown(pins.pins(report))
    for part in ("program:agent-1", "a client", "64.0 MiB", "128.0 MiB", "and 598 more", "in vain"):
        assert part in text
    assert "nothing is pinned" in shown(pins.pins(pb.ListPinsResponse()))
    evil = pb.ListPinsResponse(pins=[pb.Pin(pin=1, tenant="a\x1b[2J", owner="b\x1b[2J")])
    assert "\x1b" not in shown(pins.pins(evil))


def test_unpin_ends_those_that_are_named_or_all(client: ControlClient) -> None:
    assert client.unpin(pb.UnpinRequest(tenant="research", pins=[7, 9])).ended == 2
    assert client.unpin(pb.UnpinRequest(tenant="research")).ended == 600
    for tenant, code in (("nobody", Exit.NOT_FOUND), ("", Exit.USAGE)):
        with pytest.raises(KvctlError) as caught:
            client.unpin(pb.UnpinRequest(tenant=tenant))
        assert caught.value.code is code


@pytest.mark.parametrize("arguments", [["t"], ["t", "--all", "7"], ["t", "0"], ["t", str(1 << 64)]])
def test_unpin_takes_numbers_or_all(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, globals_first(["unpin", *arguments]))
    assert result.exit_code == Exit.USAGE


def test_the_owner_reports_what_is_pinned_and_ends_it() -> None:
    core = Core()
    client = core.client("t")
    namespace = client.open()
    client.put(namespace, chain(4))
    pinning = core.store.pinning
    late = pinning.pin(client.session.tenant, namespace, words(chain(4)), 0, 4, 90 * SECOND, Tier.DRAM, owner="x")
    early = pinning.pin(client.session.tenant, namespace, words(chain(2)), 0, 2, 30 * SECOND, Tier.DRAM, refresh=False)
    report = pins_report(core.store, None)
    assert [(pin.pin, pin.blocks, pin.left_s, pin.refresh, pin.owner) for pin in report.pins] == [
        (early.pin, 2, 30.0, False, ""), (late.pin, 4, 90.0, True, "x"),
    ]  # fmt: skip
    (budget,) = report.budgets
    assert (budget.tenant, budget.pins, budget.used_bytes) == ("t", 2, 4 * namespace.slot_bytes)
    assert budget.budget_bytes == core.store.quotas.pin_budget_bytes(client.session.tenant)
    assert report.pins_total == report.counters.pinned == 2
    core.client("other")
    assert pins_report(core.store, "other").pins == ()
    for ask in (lambda: pins_report(core.store, "nobody"), lambda: unpin(core.store, "nobody", ())):
        with pytest.raises(KeyError):
            ask()
    assert unpin(core.store, "other", [late.pin]) == 0
    assert unpin(core.store, "t", [late.pin]) == 1
    assert unpin(core.store, "t", ()) == 1
    assert pins_report(core.store, "t").pins_total == 0
    assert PINS_LISTED > 1
