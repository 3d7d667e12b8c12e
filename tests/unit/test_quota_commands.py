"""Quotas from outside: the configuration, GetQuotas and SetQuota on a store, `kvctl quota` and `kvctl tenants`."""

from pathlib import Path

import pytest

from kvctl import quotas as quota_words
from kvctl.client import Exit
from kvctl.scrub import parse_rate
from kvproto import control_pb2 as pb
from kvproto.limits import GIB, MIB
from kvproto.sizes import UNITS_SAID
from kvstore.quotas import USUAL, Choice, Quota, QuotaError
from kvstore.report_quotas import QuotaReport
from kvstored.admin_quotas import quota_reports, set_quota, wish_of
from kvstored.config import parse_bytes
from tests.core import ARENA_BYTES, Core
from tests.kvctl_line import Run
from tests.unit.test_config import loaded, refusal, written
from tests.unit.test_kvctl import Daemon, ask, daemon, kvctl  # noqa: F401  fixtures

KNOWN = frozenset({"t", "later"})


# -- configuration -----------------------------------------------------------------------------------------------

SIZES = '[dram]\nsize = "16GiB"\narena = "1GiB"\n[disk]\ndirectories = ["/d"]\nsize = "64GiB"\nsegment = "1GiB"\n'


def test_quotas_are_read_with_where_they_stand(tmp_path: Path) -> None:
    text = (
        f'{SIZES}[tenants.a]\nuids = [1]\ndram_guaranteed = "4GiB"\ndram_max = "8 GiB"\ndisk_guaranteed = 1073741824\n'
        'disk_max = "2GiB"\npin_share = 0.25\nin_flight = 4096\n[tenants.b]\nuids = [2]\npin_share = 1\n'
        '[tenants.c]\nuids = [3]\n[tenants.d]\nuids = [4]\npin_1h_ttl = "30m"\npin_1h_share = 0.25\n'
        'pin_5m_ttl = "90s"\npin_tool_share = 0.125\nunused_ttl = "24h"\n'
    )
    file = written(tmp_path, text)
    result = loaded(file=file)
    quotas = {tenant.name: tenant.quota for tenant in result.config.tenants}
    assert quotas["a"] == Quota(4 * GIB, 8 * GIB, GIB, 2 * GIB, 0.25, 4096)
    assert quotas["b"] == Quota(pin_share=1.0)
    assert quotas["c"] == USUAL
    assert quotas["d"] == Quota(
        pin_5m_ttl_s=90.0, pin_1h_ttl_s=1800.0, pin_1h_share=0.25, pin_tool_share=0.125, unused_ttl_s=86400.0
    )
    assert result.config.quotas().keys() == {"a", "b", "d"}
    values = {value.name: (value.value, value.origin) for value in result.values}
    assert values["tenants.a.dram_max"] == ("8GiB", f"file {file}:11")
    assert values["tenants.b.pin_share"] == ("1.0", f"file {file}:18")
    assert "tenants.c.pin_share" not in values


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dram_guaranteed = '17GiB'", "kvstored.toml:10: tenants.a.dram_guaranteed: is more than the tier has left"),
        ("dram_guaranteed = '4GiB'\ndram_max = '3GiB'", "kvstored.toml:11: tenants.a.dram_max: is less than"),
        ("disk_guaranteed = '65GiB'", "kvstored.toml:10: tenants.a.disk_guaranteed: is more than the tier has left"),
        ("disk_max = '1MiB'", "kvstored.toml:10: tenants.a.disk_max: does not hold one segment"),
        ("dram_max = '1 pound'", "kvstored.toml:10: tenants.a.dram_max: 'pound' is not a unit of size"),
        ("dram_max = true", 'kvstored.toml:10: tenants.a.dram_max: must be a size such as "1GiB"'),
        ("pin_share = 1.5", "kvstored.toml:10: tenants.a.pin_share: a share is from 0 to 1"),
        ("pin_share = nan", "kvstored.toml:10: tenants.a.pin_share: a share is from 0 to 1"),
        ("pin_share = 'half'", "kvstored.toml:10: tenants.a.pin_share: must be a share, such as 0.5, not a string"),
        ("in_flight = 0", "kvstored.toml:10: tenants.a.in_flight: 0 is out of range"),
        ("in_flight = -1", "kvstored.toml:10: tenants.a.in_flight: '-1' is not a whole number"),
        ("pin_1h_ttl = '25h'", "kvstored.toml:10: tenants.a.pin_1h_ttl: 90000s is out of range"),
        ("pin_1h_ttl = 30", 'kvstored.toml:10: tenants.a.pin_1h_ttl: must be a duration such as "30s", not an integer'),
        ("unused_ttl = '30s'", "kvstored.toml:10: tenants.a.unused_ttl: 30s is out of range"),
        ("pin_5m_share = 0.3\npin_1h_share = 0.3", "kvstored.toml:11: tenants.a.pin_1h_share: is more than pin_share"),
        ("dram_guarantee = 1", "unknown key tenants.a.dram_guarantee; did you mean tenants.a.dram_guaranteed?"),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(tmp_path: Path, line: str, expected: str) -> None:
    said = refusal(tmp_path, f"{SIZES}[tenants.a]\nuids = [1]\n{line}\n")
    assert expected in said


def test_the_guarantee_that_is_too_much_is_the_one_that_is_named(tmp_path: Path) -> None:
    text = "".join(f"[tenants.{name}]\nuids = [1]\ndram_guaranteed = '6GiB'\n" for name in "abc")
    assert refusal(tmp_path, SIZES + text).startswith("kvstored.toml:16: tenants.c.dram_guaranteed: is more")


def test_without_a_disk_tier_nothing_of_it_can_be_guaranteed(tmp_path: Path) -> None:
    text = "[tenants.a]\nuids = [1]\ndisk_guaranteed = '1GiB'\n"
    assert "there is no disk tier" in refusal(tmp_path, text)


# -- the owner's side --------------------------------------------------------------------------------------------


def core() -> Core:
    """Four arenas, two tenants of which one is there."""
    made = Core(arenas=4, quotas={"t": Quota(dram_guaranteed_bytes=2 * ARENA_BYTES)})
    made.client("t")
    return made


def test_a_change_keeps_what_it_does_not_speak_of() -> None:
    store = core().store
    wish = wish_of(pb.SetQuotaRequest(tenant="t", dram_max_bytes=3 * ARENA_BYTES, pin_share=0.0, in_flight_max=9))
    change = set_quota(store, KNOWN, wish, dry_run=False)
    two, three = 2 * ARENA_BYTES, 3 * ARENA_BYTES
    named = ("dram_max_bytes", "pin_share", "in_flight_max")
    assert change.quota == QuotaReport(
        "t", True, two, two, three, 0, None, None, 0.0, 0, 9, three, None, chosen_fields=named
    )
    assert change.former == QuotaReport("t", False, two, two, None, 0, None, None, 0.5, ARENA_BYTES, None, None, None)
    assert store.quotas.of("t") == Quota(two, three, None, None, 0.0, 9)
    usual = wish_of(pb.SetQuotaRequest(tenant="t", usual=["dram_guaranteed_bytes", "pin_share"]))
    assert set_quota(store, KNOWN, usual, dry_run=False).quota.dram_asked_bytes is None
    assert store.quotas.of("t") == Quota(None, three, None, None, 0.5, 9)


def test_a_reset_goes_back_to_the_configuration_and_changes_from_there() -> None:
    store = core().store
    configured = store.quotas.of("t")
    store.choose_quota("t", {"in_flight": 3})
    set_quota(store, KNOWN, wish_of(pb.SetQuotaRequest(tenant="t", reset=True, pin_share=0.1)), dry_run=False)
    assert store.quotas.of("t") == Quota(configured.dram_guaranteed_bytes, pin_share=0.1)
    change = set_quota(store, KNOWN, wish_of(pb.SetQuotaRequest(tenant="t", reset=True)), dry_run=False)
    assert store.quotas.of("t") == configured
    assert (change.quota.chosen, change.former.chosen) == (False, True)


def test_single_fields_go_back_to_the_configuration_and_others_stay_chosen() -> None:
    store = core().store
    two, three = 2 * ARENA_BYTES, 3 * ARENA_BYTES
    said = pb.SetQuotaRequest(tenant="t", dram_guaranteed_bytes=three, pin_share=0.1, in_flight_max=9)
    set_quota(store, KNOWN, wish_of(said), dry_run=False)
    back = wish_of(pb.SetQuotaRequest(tenant="t", configured=["dram_guaranteed_bytes", "unused_ttl_s"], pin_share=0.2))
    change = set_quota(store, KNOWN, back, dry_run=False)
    assert store.quotas.of("t") == Quota(two, pin_share=0.2, in_flight=9)
    assert change.quota.chosen_fields == ("pin_share", "in_flight_max")
    rest = wish_of(pb.SetQuotaRequest(tenant="t", configured=["pin_share", "in_flight_max"]))
    assert not set_quota(store, KNOWN, rest, dry_run=False).quota.chosen
    assert store.quotas.of("t") == Quota(two)


@pytest.mark.parametrize("chosen", [{}, {"in_flight": 3}])
def test_a_dry_run_says_the_same_and_changes_nothing(chosen: Choice) -> None:
    store = core().store
    if chosen:
        store.choose_quota("t", chosen)
    before, said = store.quotas.of("t"), len(store.registry._everybody())
    wish = wish_of(pb.SetQuotaRequest(tenant="t", dram_guaranteed_bytes=ARENA_BYTES))
    dry = set_quota(store, KNOWN, wish, dry_run=True)
    assert store.quotas.of("t") == store.tenants["t"].quota == before
    assert store.quotas.chosen_of("t") == chosen
    assert len(store.registry._everybody()) == said
    assert set_quota(store, KNOWN, wish, dry_run=False) == dry
    assert store.quotas.of("t") != before


def test_a_dry_run_says_of_which_others_something_falls_and_leaves_the_order_of_choices() -> None:
    store = core().store
    store.choose_quota("t", {"in_flight": 3})
    store.choose_quota("u", {"in_flight": 4})
    change = set_quota(
        store, KNOWN, wish_of(pb.SetQuotaRequest(tenant="t", dram_guaranteed_bytes=4 * ARENA_BYTES)), dry_run=True
    )
    (later,) = change.others
    assert (later.quota.tenant, later.former.dram_guaranteed_bytes) == ("later", 2 * ARENA_BYTES)
    assert later.quota.dram_guaranteed_bytes == later.quota.pin_budget_bytes == 0
    assert [name for name, _ in store.quotas.chosen()] == ["t", "u"]
    less = wish_of(pb.SetQuotaRequest(tenant="t", dram_guaranteed_bytes=ARENA_BYTES))
    assert set_quota(store, KNOWN, less, dry_run=True).others == ()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (pb.Quota(), pb.Quota(hbm_max_bytes=MIB), "hbm_max: what it has of a GPU beyond 1.0 MiB goes"),
        (pb.Quota(hbm_max_bytes=MIB), pb.Quota(), None),
        (pb.Quota(), pb.Quota(hbm_max_bytes=9 * MIB), None),
        (pb.Quota(hbm_sure_bytes=3 * MIB), pb.Quota(hbm_sure_bytes=MIB), "hbm_guaranteed: others may take 2.0 MiB of"),
        (pb.Quota(), pb.Quota(pin_1h_ttl_s=600.0), "pin_1h_ttl: longer pins last 10 min 0 s at most"),
        (pb.Quota(pin_5m_ttl_s=60.0), pb.Quota(pin_5m_ttl_s=90.0), None),
        (pb.Quota(pin_tool_share=0.3), pb.Quota(pin_tool_share=0.1), "pin_tool_share: its other pins may take 20%"),
        (pb.Quota(pin_5m_share=0.3), pb.Quota(), "pin_5m_share: its other pins may take 30%"),
        (pb.Quota(pin_5m_share=0.3), pb.Quota(pin_5m_share=0.4), None),
    ],
)
def test_whatever_becomes_less_is_a_cut(before: pb.Quota, after: pb.Quota, said: str | None) -> None:
    before.tenant = after.tenant = "t"
    change = pb.SetQuotaResponse(quota=after, former=before)
    lines = quota_words.cuts(change, {"t": pb.Tenant(name="t", hbm_assigned_bytes=2 * MIB)}).get("t", [])
    assert len(lines) == (said is not None)
    assert not said or lines[0].startswith(said), lines


def test_what_others_lose_is_said_under_their_names() -> None:
    before = pb.Quota(tenant="b", dram_guaranteed_bytes=32 * MIB, pin_budget_bytes=16 * MIB)
    after = pb.Quota(tenant="b", dram_guaranteed_bytes=4 * MIB, pin_budget_bytes=2 * MIB)
    mine = pb.Quota(tenant="a")
    change = pb.SetQuotaResponse(quota=mine, former=mine, others=[pb.QuotaOfOther(quota=after, former=before)])
    rows = {name: pb.Tenant(name=name, pinned_bytes=12 * MIB) for name in "ab"}
    assert quota_words.cuts(change, rows) == {
        "b": [
            "dram_guaranteed: others may take 28.0 MiB that were promised to it",
            "pins: 10.0 MiB of 12.0 MiB are let go",
        ]
    }


def test_a_tenant_that_is_configured_and_was_never_seen_has_a_quota_and_others_are_unknown() -> None:
    store = core().store
    assert [one.tenant for one in quota_reports(store, KNOWN, None)] == ["later", "t"]
    (later,) = quota_reports(store, KNOWN, "later")
    nothing_said = (None, None, 0.5, ARENA_BYTES, None, None, None)
    assert later == QuotaReport("later", False, 2 * ARENA_BYTES, None, None, 0, *nothing_said)
    with pytest.raises(KeyError, match="no tenant is called nobody"):
        quota_reports(store, KNOWN, "nobody")
    with pytest.raises(KeyError, match="no tenant is called nobody"):
        set_quota(store, KNOWN, wish_of(pb.SetQuotaRequest(tenant="nobody", pin_share=0.1)), dry_run=True)
    wish = wish_of(pb.SetQuotaRequest(tenant="later", dram_guaranteed_bytes=3 * ARENA_BYTES))
    with pytest.raises(QuotaError, match="more than the tier has"):
        set_quota(store, KNOWN, wish, dry_run=True)
    assert not store.quotas.chosen()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.SetQuotaRequest(pin_share=0.5), "name it"),
        (pb.SetQuotaRequest(tenant="t"), "nothing is to be changed"),
        (pb.SetQuotaRequest(tenant="t", usual=["uids"]), "there is no 'uids' in a quota"),
        (pb.SetQuotaRequest(tenant="t", usual=["pin_share"], pin_share=0.5), "cannot be both set and usual"),
        (pb.SetQuotaRequest(tenant="t", configured=["pin_share"], pin_share=0.5), "both set and as configured"),
        (pb.SetQuotaRequest(tenant="t", configured=["uids"]), "there is no 'uids' in a quota"),
        (pb.SetQuotaRequest(tenant="t", pin_share=float("nan")), "pin_share: a share is from 0 to 1"),
        (pb.SetQuotaRequest(tenant="t", pin_share=-0.1), "pin_share: a share is from 0 to 1"),
        (pb.SetQuotaRequest(tenant="t", in_flight_max=0), "in_flight: must be from 1"),
        (pb.SetQuotaRequest(tenant="t", dram_max_bytes=(1 << 64) - 1), "dram_max: must be from 0 to 4194304TiB"),
    ],
)
def test_what_no_daemon_could_do_is_refused_before_the_owner_is_asked(
    request_: pb.SetQuotaRequest, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        wish_of(request_)


# -- kvctl -------------------------------------------------------------------------------------------------------


def rows(text: str) -> list[list[str]]:
    """A table's words."""
    return [line.split() for line in text.splitlines()]


def test_tenants_shows_what_each_has_and_may_have(ask: Run) -> None:  # noqa: F811
    lines = rows(ask("tenants").out)
    web = next(number for number, line in enumerate(lines) if line[:1] == ["web"])
    assert lines[web] == ["web", "1", "2.0", "MiB", "512.0", "MiB", "32.0", "MiB", "2.0", "MiB"]
    assert lines[web + 1] == ["1000,", "1001", "3", "64.0", "MiB", "768.0", "MiB", "64.0", "MiB,", "-", "17"]
    said = {one["name"]: one for one in ask("tenants", "-o", "json").json["tenants"]}
    assert said["web"]["dram_max_bytes"] == 768 * MIB
    assert said["research"]["dram_max_bytes"] is None


def test_quota_set_says_what_holds_and_what_held(ask: Run, daemon: Daemon) -> None:  # noqa: F811
    answer = ask(
        "quota", "--yes", "web", "set", "dram_guaranteed=130MiB", "dram_max=1.5GiB", "pin_share=0.25", "in_flight=9"
    )
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines() == [
        "web has, by kvctl quota set:",
        "  dram_guaranteed: 128.0 MiB, until now an equal share, 512.0 MiB now",
        "  dram_max: 1.5 GiB, until now no maximum",
        "  disk_guaranteed: an equal share, 0 B now",
        "  disk_max: no maximum",
        "  pin_share: 25%, 32.0 MiB now, until now 50%, 256.0 MiB now",
        "  in_flight: 9, until now as many as sessions may have",
        "  by kvctl quota set: dram_guaranteed, dram_max, pin_share, in_flight; the rest ",
        "by the configuration",
        "  dram_guaranteed is 128.0 MiB of the 130.0 MiB asked for: it is in whole arenas",
    ]
    said = {"dram_guaranteed_bytes": 130 * MIB, "dram_max_bytes": 3 * GIB // 2, "pin_share": 0.25, "in_flight": 9}
    assert daemon.port.chosen == {"web": said}
    assert "web, by kvctl quota set: dram_guaranteed, dram_max, pin_share, in_flight; the rest by" in " ".join(
        ask("quota", "web").out.split()
    )
    lines = rows(ask("quota", "web").out)
    assert ["web", "128.0", "MiB", "0", "B", "*", "25%", "9"] in lines
    assert ["kvctl", "quota", "set", "1.5", "GiB", "-", "32.0", "MiB"] in lines
    assert len(ask("quota", "-o", "json").json["quotas"]) == 2
    assert ask("quota", "web", "set", "dram_max=none").code == 0
    assert daemon.port.chosen["web"] == said | {"dram_max_bytes": None}, "none is a choice, too"
    assert ask("quota", "reset", "web", "dram_max", "in_flight", "--yes").code == 0
    del said["dram_max_bytes"], said["in_flight"]
    assert daemon.port.chosen == {"web": said}
    assert ask("quota", "set", "web", "in_flight=9").code == Exit.USAGE, "fewer than as many as one likes: it asks"
    assert ask("quota", "set", "web", "in_flight=9", "--yes").code == 0
    assert daemon.port.chosen == {"web": said | {"in_flight": 9}}
    wrong = ask("quota", "web", "reset", "dram_mx")
    assert (wrong.code, "'dram_mx' is no key; a key is one of" in wrong.err) == (Exit.USAGE, True)
    assert ask("quota", "web", "reset", "-o", "json").json["quota"]["quota"]["chosen"] is False
    assert not daemon.port.chosen


def test_quota_says_what_holds_for_classes_only_where_something_is_said(ask: Run, daemon: Daemon) -> None:  # noqa: F811
    answer = ask("quota", "--yes", "web", "set", "pin_1h_ttl=30m", "pin_5m_share=0.1", "unused_ttl=24h")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines()[-5:-2] == [
        "  pin_5m_share: sure of 10%, until now sure of nothing",
        "  pin_1h_ttl: at most 30 min 0 s, until now as long as they ask for",
        "  unused_ttl: 1 d 0 h, until now never dropped for that",
    ]
    said = {"pin_1h_ttl_s": 1800.0, "pin_5m_share": 0.1, "unused_ttl_s": 86400.0}
    assert daemon.port.chosen == {"web": said}
    assert ask("quota", "web", "set", "pin_1h_ttl=none").code == 0
    assert daemon.port.chosen == {"web": said | {"pin_1h_ttl_s": None}}
    lines = ask("quota", "web").out.splitlines()
    assert "web, pins up to 5m: sure of 10%" in lines
    assert "web, unused: dropped after 1 d 0 h" in lines
    assert not any("longer pins" in line for line in lines)
    for bad, why in (
        ("pin_1h_ttl=30", "'30' is no value of pin_1h_ttl"),
        ("unused_ttl=1s", "must be from 60"),
        ("pin_x_ttl=1h", "a key is one"),
    ):
        refused = ask("quota", "web", "set", bad)
        assert refused.code == Exit.USAGE
        assert why in " ".join(refused.err.split())


@pytest.mark.parametrize(
    ("asked", "held", "told"),
    [
        ("128MiB", "128.0 MiB", ""),
        ("100MB", "64.0 MiB", "dram_max is 64.0 MiB of the 95.4 MiB asked for: it is"),
        ("134217729", "128.0 MiB", "dram_max is 134,217,728 of the 134,217,729 bytes asked for: it is"),
        ("3T", "2.0 GiB", "dram_max is 2.0 GiB of the 3.0 TiB asked for"),
    ],
)
def test_quota_says_what_was_really_set(ask: Run, asked: str, held: str, told: str) -> None:  # noqa: F811
    answer = ask("quota", "web", "set", f"dram_max={asked}")
    assert f"  dram_max: {held}, until now no maximum\n" in answer.out
    said = " ".join(answer.out.split())
    assert told in said
    assert ("asked for" in said) == bool(told)
    assert not told or said.endswith("it is in whole arenas, and no more than there are")


def test_what_a_maximum_comes_to_is_said_beside_what_was_asked() -> None:
    store = core().store
    wanted = wish_of(pb.SetQuotaRequest(tenant="t", dram_max_bytes=3 * ARENA_BYTES + 1))
    quota = set_quota(store, KNOWN, wanted, dry_run=False).quota
    assert (quota.dram_max_bytes, quota.dram_max_asked_bytes) == (3 * ARENA_BYTES, 3 * ARENA_BYTES + 1)
    wanted = wish_of(pb.SetQuotaRequest(tenant="t", dram_max_bytes=9 * ARENA_BYTES))
    quota = set_quota(store, KNOWN, wanted, dry_run=False).quota
    assert (quota.dram_max_bytes, quota.dram_max_asked_bytes) == (4 * ARENA_BYTES, 9 * ARENA_BYTES), "there are four"


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("3", 3),
        ("3B", 3),
        ("3K", 3072),
        ("3KiB", 3072),
        ("3kB", 3000),
        ("3M", 3 * MIB),
        ("3MB", 3 * 10**6),
        ("1.5G", 3 * GIB // 2),
    ],
)
def test_a_size_means_the_same_in_the_configuration_a_quota_and_a_rate(text: str, size_bytes: int) -> None:
    request = quota_words.wish("t", ["set", f"dram_max={text}"], dry_run=False)
    assert request is not None
    assert request.dram_max_bytes == parse_rate(text) == parse_bytes(text) == size_bytes


@pytest.mark.parametrize("command", ["quota", "scrub"])
def test_what_units_mean_is_said_in_the_help(kvctl: Run, command: str) -> None:  # noqa: F811
    said = "".join(part.strip(" \u2502") for part in kvctl(command, "--help").out.split())
    assert UNITS_SAID.replace(" ", "") in said


def test_quota_with_dry_run_changes_nothing(ask: Run, daemon: Daemon) -> None:  # noqa: F811
    answer = ask("quota", "--dry-run", "web", "set", "in_flight=9")
    assert answer.out.startswith("web would have, by kvctl quota set:\n")
    assert not daemon.port.chosen


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("web", "set"), Exit.USAGE, "after the tenant comes"),
        (("web", "reset", "in_flight=1"), Exit.USAGE, "is no key"),
        (("web", "raise"), Exit.USAGE, "after the tenant comes"),
        (("web", "set", "dram"), Exit.USAGE, "'dram' is not KEY=VALUE"),
        (("web", "set", "ram=1GiB"), Exit.USAGE, "a key is one of dram_guaranteed,"),
        (("web", "set", "dram_max=1Gb"), Exit.USAGE, "'1Gb' is no value of dram_max"),
        (("web", "set", "dram_max=-1"), Exit.USAGE, "'-1' is no value of dram_max"),
        (("web", "set", "dram_max=0.3B"), Exit.USAGE, "'0.3B' is no value of dram_max"),
        (("web", "set", "dram_max=" + 18 * "9" + "TiB"), Exit.USAGE, "is no value of dram_max"),
        (("web", "set", "in_flight=-1"), Exit.USAGE, "'-1' is no value of in_flight"),
        (("web", "set", "pin_share=half"), Exit.USAGE, "'half' is no value of pin_share"),
        (("web", "set", "pin_share=2"), Exit.USAGE, "pin_share: a share is from 0 to 1"),
        (("web", "set", "in_flight=1", "in_flight=2"), Exit.USAGE, "in_flight is given twice"),
        (("web", "set", "in_flight=none", "in_flight=2"), Exit.USAGE, "in_flight is given twice"),
        (("set",), Exit.USAGE, "set whose quota?"),
        (("reset", "web", "uids"), Exit.USAGE, "'uids' is no key"),
        (("web", "--dry-run"), Exit.USAGE, "--dry-run goes with set or reset"),
        (("nobody",), Exit.NOT_FOUND, "no tenant is called nobody;"),
        (("nobody", "reset"), Exit.NOT_FOUND, "no tenant is called nobody;"),
        (("web", "set", "dram_guaranteed=2TiB"), Exit.REFUSED, "there is not so much; ask for less"),
        (("",), Exit.USAGE, "tenant must not be empty"),
    ],
)
def test_quota_refuses_what_cannot_be(
    ask: Run, daemon: Daemon, words: tuple[str, ...], code: Exit, sentence: str  # noqa: F811
) -> None:  # fmt: skip
    answer = ask("quota", *words)
    assert answer.code == code
    assert sentence in " ".join(answer.err.split())
    assert not daemon.port.chosen
