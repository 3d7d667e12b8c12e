"""Pins over the control socket, as kvctl shows and ends them."""

import pytest
from typer.testing import CliRunner

import kvclient
from kvctl import pins
from kvctl.cli import app, globals_first
from kvctl.client import ControlClient, Exit, KvctlError
from kvproto import control_pb2 as pb
from kvproto.ids import BlockKey, NamespaceDigest
from kvproto.policy_frames import Partial, Pinned, Tier
from kvstore.report_pins import PINS_LISTED, pins_report
from kvstored.admin import Admin
from kvstored.admin_pins import PrefixWish, Unpinned, pin, prefetch, prefix_wish_of, unpin
from kvstored.control_port import AmbiguousError
from tests.core import SECOND, Core, chain, words
from tests.unit.control_fakes import MIB, MemoryPort
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
    assert counts == [*range(11, 22), 22 * MIB, 23 * MIB, 24 * MIB, 25]
    text = shown(pins.pins(report))
    for part in ("program:agent-1", "a client", "64.0 MiB", "128.0 MiB", "and 598 more", "in vain"):
        assert part in text
    assert "nothing is pinned" in shown(pins.pins(pb.ListPinsResponse()))
    evil = pb.ListPinsResponse(pins=[pb.ListedPin(pin=1, tenant="a\x1b[2J", owner="b\x1b[2J")])
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
    result = CliRunner().invoke(app, globals_first(["unpin", "--yes", *arguments]))
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
    assert unpin(core.store, "other", [late.pin]) == Unpinned(0, (late.pin,))
    assert unpin(core.store, "t", [late.pin, 1, late.pin]) == Unpinned(1, (1,))
    assert unpin(core.store, "t", ()) == Unpinned(1, ())
    assert pins_report(core.store, "t").pins_total == 0
    assert PINS_LISTED > 1


def run(client: ControlClient, *arguments: str) -> tuple[int, str]:
    """A command line against the fixture's daemon: exit code and output."""
    result = CliRunner().invoke(
        app, globals_first(["--runtime-dir", str(client.socket_path.parent), *arguments]), catch_exceptions=False
    )
    return result.exit_code, result.output


def test_a_prefix_is_kept_and_fetched_by_keys(client: ControlClient) -> None:
    keys = [bytes([number]) * 32 for number in range(5)]
    code, text = run(client, "pin", *(key.hex() for key in keys), "--ttl", "5m", "--refresh", "--tenant", "research")
    assert code == Exit.OK, text
    for part in ("4 blocks", "pin 17", "the chain ends there"):
        assert part in text
    code, text = run(client, "prefetch", *(key.hex() for key in keys), "--within", "2.5")
    assert code == Exit.OK, text
    assert "5 blocks are in memory, 3 are to come" in text


def test_wishes_arrive_as_they_were_said() -> None:
    keys = (BlockKey(b"\1" * 32), BlockKey(b"\2" * 32))
    prefix = pb.Prefix(tenant="t", namespace_digest="AB" * 32, keys=keys)
    wish = prefix_wish_of(prefix, 1.5, 10**10, tier=Tier.DISK, refresh=True)
    assert wish == PrefixWish("t", NamespaceDigest(b"\xab" * 32), keys, 1_500_000_000, Tier.DISK, True)
    assert prefix_wish_of(pb.Prefix(keys=keys), 10.0, 10**10) == PrefixWish(None, None, keys, 10**10)
    for bad, seconds in (
        (pb.Prefix(), 1.0), (pb.Prefix(keys=[b"short"]), 1.0), (pb.Prefix(keys=keys * 513), 1.0),
        (pb.Prefix(tenant="", keys=keys), 1.0), (prefix, 0.0), (prefix, -1.0), (prefix, 10.1), (prefix, float("nan")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"must|prefix|key"):
            prefix_wish_of(bad, seconds, 10**10)


def test_the_owner_keeps_what_an_operator_names() -> None:
    core = Core()
    client = core.client("t")
    namespace = client.open()
    client.put(namespace, chain(4))
    wish = PrefixWish(None, None, tuple(map(BlockKey, chain(6))), 9 * SECOND)
    pinned = pin(core.store, wish)
    assert (pinned.blocks, pinned.partial) == (4, Partial.ABSENT)
    assert core.store.pinning.pins[pinned.pin].owner == "operator"
    assert prefetch(core.store, wish) == (0, 4, 0)
    for other in (PrefixWish("nobody", None, wish.keys, 1), PrefixWish(None, NamespaceDigest(bytes(32)), wish.keys, 1)):
        with pytest.raises(KeyError):
            pin(core.store, other)
    client.open(5000)
    admin = Admin.__new__(Admin)
    admin._store = core.store
    for asked in (pin, prefetch):
        with pytest.raises(ValueError, match=r"2 namespaces could be meant.*`kvctl namespaces`"):
            asked(core.store, wish)
    for refused in (admin.pin, admin.prefetch):  # that is no unknown name: there are too many
        with pytest.raises(AmbiguousError, match=r"2 namespaces could be meant.*`kvctl namespaces`"):
            refused(wish)
        with pytest.raises(KeyError, match="no such namespace"):
            refused(PrefixWish("nobody", None, wish.keys, 1))
    assert pin(core.store, PrefixWish("t", namespace.digest, wish.keys, 1)).blocks == 4


def test_what_could_not_be_pinned_is_an_error_to_a_script(
    client: ControlClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryPort, "pin", lambda *_: Pinned(0, 0, 0, 0, Partial.ABSENT))
    code, text = run(client, "pin", "01" * 32)
    assert (code, "nothing was pinned" in text) == (Exit.REFUSED, True)


def test_operators_and_clients_mean_the_same_times() -> None:
    assert pins.Retention is kvclient.Retention
    assert {one.value: one.seconds for one in pins.Retention} == {"5m": 300.0, "1h": 3600.0}


def test_why_a_pin_is_short_is_said_in_the_same_words_everywhere() -> None:
    words = {partial.name.lower() for partial in Partial if partial is not Partial.NOTHING}
    assert words == set(pins._WHY)
    assert words <= {partial.value for partial in kvclient.Partial}
