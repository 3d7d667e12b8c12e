"""Why a block is not there: each way in which it can have left, told by what is left of it."""

import random
from typing import Any

import numpy as np
import pytest

from kvproto.errors import Grant
from kvproto.ids import BlockKey
from kvproto.limits import PAGE_BYTES
from kvproto.policy_frames import Tier as PinTier
from kvstore import blocks, registry
from kvstore.insight import explain as explaining
from kvstore.insight.departures import LOOKS, Turns
from kvstore.insight.explain import Explanation, MissQuestion, explain
from kvstore.insight.reasons import Cause, Place
from kvstore.report import ClearReport, ClearScope
from kvstore.rules import Chosen, Rule, Tier
from kvstore.sessions import Namespace
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from tests.core import MS, SECOND, Client, Core, chain, key_of, words

SLOTS = 16  # of an arena of `Core`
DISK = DiskLimits(1 << 20, 1 << 18, Admission.ALL)


def ask(core: Core, namespace: Namespace, keys: list[bytes]) -> Explanation:
    """Of a chain in a namespace."""
    question = MissQuestion(namespace.tenant.name, namespace.digest, tuple(map(BlockKey, keys)))
    return explain(core.store, question)


def lru(*arguments: int, **others: Any) -> Core:
    """A store that evicts in the order of use, whatever is usual."""
    core = Core(*arguments, **others)
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.LRU))
    return core


def flood(core: Core, client: Client, namespace: Namespace, blocks: int, name: str = "flood") -> None:
    """Store blocks, one a second, each a chain of its own."""
    for number in range(blocks):
        core.clock.advance(SECOND)
        client.put(namespace, [key_of(f"{name}/{number}")])


class TestThere:
    def test_a_chain_that_is_there_has_nothing_to_explain(self) -> None:
        core = lru()
        client = core.client()
        namespace = client.open()
        client.put(namespace, chain(5))
        said = ask(core, namespace, chain(5))
        assert (said.state, said.found, said.cause, said.key) == ("hit", 5, "", "")

    def test_a_block_that_is_being_written_is_said_to_be(self) -> None:
        core = lru()
        client = core.client()
        namespace = client.open()
        client.put(namespace, chain(2))
        client.begin(namespace, chain(3)[2:], parent=chain(2)[1])
        said = ask(core, namespace, chain(3))
        assert (said.state, said.found, said.key) == ("writing", 2, chain(3)[2].hex())

    def test_looking_touches_nothing(self) -> None:
        core = lru()
        client = core.client()
        namespace = client.open()
        client.put(namespace, chain(5))
        before = [core.store.tables.blocks.copy(), core.store.tables.ranks.copy(), core.store.tables.ghosts.copy()]
        core.clock.advance(SECOND)
        ask(core, namespace, chain(7))
        after = [core.store.tables.blocks, core.store.tables.ranks, core.store.tables.ghosts]
        assert all((one == other).all() for one, other in zip(before, after, strict=True))
        client.fetch(namespace, chain(5))
        assert not (core.store.tables.blocks == before[0]).all()

    def test_what_lies_on_disk_is_there(self) -> None:
        core = lru(1, disk=DISK)
        client = core.client()
        namespace = client.open()
        client.put(namespace, chain(4))
        core.work_all()
        flood(core, client, namespace, SLOTS)
        core.work_all()
        said = ask(core, namespace, chain(4))
        assert (said.state, said.found) == ("hit", 4)
        assert said.on_disk > 0


class TestEvicted:
    def test_by_which_rule_from_where_and_when(self) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        client.put(namespace, [key_of("old")])
        flood(core, client, namespace, SLOTS + 4)  # it goes with the last but four
        flood(core, client, namespace, 20, "later")
        said = ask(core, namespace, [key_of("old")])
        assert (said.state, said.cause, said.tier, said.rule) == ("miss", "evicted", "dram", "lru")
        assert said.age_s == pytest.approx(20 + 4, abs=2)
        assert said.sentences[1] == f"Evicted from DRAM by lru, about {said.age_s:.0f} s ago."

    def test_the_rule_of_that_time_is_named_and_not_the_one_of_now(self) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.LFU))
        client.put(namespace, [key_of("old")])
        flood(core, client, namespace, SLOTS + 4)
        core.clock.advance(SECOND)
        core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.ARC))
        client.put(namespace, [key_of("young")])
        flood(core, client, namespace, 2 * SLOTS, "later")
        gone = [key_of("old"), key_of("young")]
        assert [ask(core, namespace, [key]).rule for key in gone] == ["lfu", "arc"]

    def test_from_disk_once_it_has_left_that_too(self) -> None:
        core = lru(1, disk=DiskLimits(2 << 18, 1 << 18, Admission.ALL))
        client = core.client()
        namespace = client.open()
        client.put(namespace, [key_of("old")])
        core.work_all()
        for number in range(1000):
            if not core.row(namespace, key_of("old")):
                break
            core.clock.advance(100 * MS)
            client.put(namespace, [key_of(number)])
            core.work_all()
        said = ask(core, namespace, [key_of("old")])
        assert (said.cause, said.tier) == ("evicted", "disk")

    def test_a_pin_that_had_ended_is_told(self) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        for name in ("pinned", "free"):
            client.put(namespace, [key_of(name)])
        pinned = core.store.pinning.pin(
            client.session.tenant, namespace, words([key_of("pinned")]), 0, 1, SECOND, PinTier.DRAM
        )
        assert pinned.blocks == 1
        core.pass_time(2 * SECOND)
        flood(core, client, namespace, 2 * SLOTS)
        causes = [ask(core, namespace, [key_of(name)]).cause for name in ("pinned", "free")]
        assert causes == ["pin_expired", "evicted"]

    def test_a_pin_that_had_ended_before_it_was_used_again_or_came_anew_is_not_told(self) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        client.put(namespace, [key_of("pinned")])
        pinning, tenant = core.store.pinning, client.session.tenant
        pinning.pin(tenant, namespace, words([key_of("pinned")]), 0, 1, SECOND, PinTier.DRAM, refresh=False)
        core.pass_time(2 * SECOND)
        assert not pinning.pins
        for _ in range(10):
            core.pass_time(60 * SECOND)
            assert client.fetch(namespace, [key_of("pinned")]) == 1
        flood(core, client, namespace, 2 * SLOTS)
        said = ask(core, namespace, [key_of("pinned")])
        assert (said.cause, said.tier, said.rule) == ("evicted", "dram", "lru")
        assert not any("pin" in sentence for sentence in said.sentences)
        client.put(namespace, [key_of("pinned")])
        flood(core, client, namespace, 2 * SLOTS, "later")
        assert ask(core, namespace, [key_of("pinned")]).cause == "evicted"

    def test_memory_that_went_to_another_tenant_is_told(self) -> None:
        core = lru(2)
        greedy, late = core.client("greedy"), core.client("late")
        mine, others = greedy.open(), late.open()
        flood(core, greedy, mine, 2 * SLOTS)
        for _ in range(3):
            core.clock.advance(SECOND)
            late.put(others, chain(SLOTS, "late"))
            core.settle()
        flood(core, late, others, 2, "more")
        gone = [key for key in (key_of(f"flood/{number}") for number in range(2 * SLOTS)) if not core.row(mine, key)]
        assert len(gone) == SLOTS
        assert {ask(core, mine, [key]).cause for key in gone} == {"quota"}

    def test_after_a_month_too_what_the_rule_evicted_a_moment_before_is_told_from_it(self) -> None:
        core = lru(2)
        greedy, late = core.client("greedy"), core.client("late")
        mine, others = greedy.open(), late.open()
        live_for_a_month(core)
        flood(core, greedy, mine, 2 * SLOTS + 8)
        core.clock.advance(30 * SECOND)
        for _ in range(3):
            core.clock.advance(SECOND)
            late.put(others, chain(SLOTS, "late"))
            core.settle()
        flood(core, late, others, 2, "more")
        keys = [key_of(f"flood/{number}") for number in range(2 * SLOTS + 8)]
        said = [ask(core, mine, [key]) for key in keys if not core.row(mine, key)]
        assert len(said) == 8 + SLOTS
        assert {one.cause for one in said[8:]} == {"quota"}
        assert {one.cause for one in said[:7]} == {"evicted"}, "all but the last, which what went counts as"
        assert [one.age_s for one in said[:7]] == pytest.approx([30 + 3 + 2 + 8 - number for number in range(7)], abs=2)


def live_for_a_month(core: Core) -> None:
    """Evictions have been going on for that long, and were counted."""
    turns, began_ns, counts = core.store.watching.departures.turns, core.clock.ns, 26_000
    for count in range(1, counts + 1):
        turns.look(count, began_ns + 100 * count * SECOND)
    core.store.tables.book[blocks.TURN] = counts
    core.clock.advance(100 * counts * SECOND)


class TestDropped:
    def test_by_a_client(self) -> None:
        core = lru()
        client = core.client()
        namespace = client.open()
        client.put(namespace, chain(6))
        core.store.delete(namespace, words(chain(6)[3:4]), 0, 1, lambda _: None)
        core.settle()
        said = ask(core, namespace, chain(6))
        assert (said.found, said.cause, said.key) == (3, "deleted", chain(6)[3].hex())
        assert ask(core, namespace, chain(6)[4:]).cause == "deleted", "what continued it went with it"
        alone = ask(core, namespace, [key_of("other")])
        assert alone.cause == "never"
        assert any("that may have been it" in sentence for sentence in alone.sentences)

    @pytest.mark.parametrize("whole", [True, False])
    def test_by_an_operator(self, *, whole: bool) -> None:
        core = lru()
        client = core.client()
        namespace, other = client.open(), client.open(model="other")
        for one in (namespace, other):
            client.put(one, chain(4))
        keys = () if whole else (BlockKey(chain(4)[1]),)
        reports: list[ClearReport] = []
        core.store.clear(ClearScope(digest=namespace.digest, keys=keys), reports.append, dry_run=True)
        assert core.store.watching.departures.cleared_ns(namespace.number) == 0  # nothing happened yet
        core.store.clear(ClearScope(digest=namespace.digest, keys=keys), reports.append, dry_run=False)
        core.settle()
        said = ask(core, namespace, chain(4))
        assert said.found == (0 if whole else 1)
        assert said.cause == ("never" if whole else "cleared")
        assert any("clear" in sentence for sentence in said.sentences)
        missing = ask(core, other, [key_of("nothing")])
        assert not any("clear" in sentence for sentence in missing.sentences)

    def test_because_it_was_damaged(self) -> None:
        core = lru(1, disk=DISK)
        client = core.client()
        namespace = client.open()
        client.put(namespace, [key_of("old")])
        core.work_all()
        flood(core, client, namespace, SLOTS)
        core.work_all()
        row = core.store.tables.blocks[core.row(namespace, key_of("old"))]
        shift = int(core.store.tables.book[3])
        position, slot = int(row["disk"]) >> shift, int(row["disk"]) & (1 << shift) - 1
        segment = int(core.store.tables.arenas[position]["id"])
        core.drive.flip(random.Random(1), segment, slot, core.drive.slot_bytes(segment))
        locations = np.zeros(2, dtype=np.uint32)
        core.store.lease(
            client.session, namespace, 1, words([key_of("old")]), 0, 1, SECOND, SECOND, locations, 0
        )  # fmt: skip
        core.work_all()
        said = ask(core, namespace, [key_of("old")])
        assert (said.cause, said.tier) == ("corrupt", "disk")

    def test_the_latest_thing_that_happened_to_it_counts(self) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        client.put(namespace, [key_of("old")])
        flood(core, client, namespace, 2 * SLOTS)
        assert ask(core, namespace, [key_of("old")]).cause == "evicted"
        core.clock.advance(60 * SECOND)
        client.put(namespace, [key_of("old")])
        core.store.delete(namespace, words([key_of("old")]), 0, 1, lambda _: None)
        core.settle()
        assert ask(core, namespace, [key_of("old")]).cause == "deleted"
        core.clock.advance(60 * SECOND)
        client.put(namespace, [key_of("old")])
        flood(core, client, namespace, 2 * SLOTS, "later")
        assert ask(core, namespace, [key_of("old")]).cause == "evicted"

    @pytest.mark.parametrize("at_s", range(0, 9, 2))
    def test_what_came_back_after_a_delete_and_was_evicted_within_seconds_was_evicted(self, at_s: int) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        core.pass_time(at_s * SECOND)
        client.put(namespace, [key_of("old")])
        client.delete(namespace, [key_of("old")])
        core.settle()
        core.pass_time(SECOND // 2)
        assert ask(core, namespace, [key_of("old")]).cause == "deleted"
        client.put(namespace, [key_of("old")])
        core.pass_time(SECOND // 2)
        client.put(namespace, [key_of("young")])
        for number in range(2 * SLOTS):
            client.put(namespace, [key_of(f"at once/{number}")])
        core.pass_time(SECOND)
        said = ask(core, namespace, [key_of("old")])
        assert (said.cause, said.tier, said.rule) == ("evicted", "dram", "lru")
        client.put(namespace, [key_of("old")])
        core.pass_time(SECOND // 2)
        client.delete(namespace, [key_of("old")])
        core.settle()
        core.pass_time(SECOND)
        assert ask(core, namespace, [key_of("old")]).cause == "deleted"
        for number in range(2 * SLOTS):
            client.put(namespace, [key_of(f"thereafter/{number}")])
        assert ask(core, namespace, [key_of("old")]).cause == "deleted"

    def test_a_clear_that_came_after_a_delete_is_told_since_it_may_have_been_that(self) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        for name in ("old", "other"):
            client.put(namespace, [key_of(name)])
            client.delete(namespace, [key_of(name)])
            core.settle()
            core.pass_time(60 * SECOND)
            client.put(namespace, [key_of("old")])
            core.store.clear(ClearScope(digest=namespace.digest), lambda _report: None, dry_run=False)
            core.settle()
            core.pass_time(60 * SECOND)
        said = {name: ask(core, namespace, [key_of(name)]) for name in ("old", "other")}
        assert {one.cause for one in said.values()} == {"deleted"}
        told = "All of its namespace was cleared after that, 60 s ago: if it had come again, that was it."
        assert all(told in one.sentences for one in said.values())
        client.put(namespace, [key_of("other")])
        client.delete(namespace, [key_of("other")])
        core.settle()
        assert told.split(",", maxsplit=1)[0] not in " ".join(ask(core, namespace, [key_of("other")]).sentences)

    def test_what_was_damaged_on_disk_alone_and_evicted_later_was_evicted(self) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        client.put(namespace, [key_of("old")])
        core.store.watching.departures.row_left(core.row(namespace, key_of("old")), Cause.CORRUPT, Place.DISK)
        core.pass_time(60 * SECOND)
        flood(core, client, namespace, 2 * SLOTS)
        assert ask(core, namespace, [key_of("old")]).cause == "evicted"

    def test_what_is_refused_within_seconds_after_it_was_evicted_was_refused(self) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        client.put(namespace, [key_of("old")])
        for number in range(2 * SLOTS):
            client.put(namespace, [key_of(f"at once/{number}")])
        core.pass_time(SECOND)
        core.store.draining = True
        assert client.put(namespace, [key_of("old")]) == [Grant.DRAINING]
        assert ask(core, namespace, [key_of("old")]).cause == "draining"

    def test_what_is_deleted_long_after_it_was_evicted_here_is_deleted_wherever_else_it_was(self) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        client.put(namespace, [key_of("old")])
        flood(core, client, namespace, 2 * SLOTS)
        client.delete(namespace, [key_of("old")])
        core.settle()
        assert ask(core, namespace, [key_of("old")]).cause == "deleted"


class TestNeverThere:
    def test_of_what_never_came_it_is_said_how_far_back_that_is_known(self) -> None:
        core = lru()
        client = core.client()
        namespace = client.open()
        core.clock.advance(90 * SECOND)
        said = ask(core, namespace, [key_of("nothing")])
        assert (said.cause, said.age_s) == ("never", -1.0)
        assert said.known_s == pytest.approx(90.0)
        assert said.sentences[-1] == "The daemon began 90 s ago, and its memory was empty: nothing was kept."

    def test_an_eviction_within_the_time_that_is_said_to_be_known_is_known(self) -> None:
        core = lru(1)
        client = core.client()
        namespace = client.open()
        stored = 12 * SLOTS
        flood(core, client, namespace, stored)
        for number in range(0, stored, 7):  # some come back, and leave places among what is remembered
            core.clock.advance(SECOND)
            client.put(namespace, [key_of(f"flood/{number}")])
        flood(core, client, namespace, SLOTS, "more")
        passed_s = (core.clock.ns - core.store.watching.departures.began_ns) / SECOND
        said = {number: ask(core, namespace, [key_of(f"flood/{number}")]) for number in range(stored) if number % 7}
        forgotten = {number: one for number, one in said.items() if one.cause == "never"}
        assert 10 < len(forgotten) < len(said) - 10
        for number, one in forgotten.items():
            gone_s = number + 1 + SLOTS  # after the start: when as many had come after it as there is room for
            assert one.known_s <= passed_s - gone_s + 2, number

    def test_nothing_being_forgotten_yet_the_whole_life_is_known(self) -> None:
        core = lru(4)
        client = core.client()
        namespace = client.open()
        flood(core, client, namespace, 4 * SLOTS + 4)
        assert ask(core, namespace, [key_of("nothing")]).known_s == 4 * SLOTS + 4

    def test_refused_for_want_of_room(self) -> None:
        core = lru(1)
        client = core.client(ring_pages=64)
        namespace = client.open()
        client.put(namespace, chain(SLOTS, "held"))
        locations = np.zeros(2 * SLOTS, dtype=np.uint32)
        core.store.lease(
            client.session, namespace, 1, words(chain(SLOTS, "held")), 0, SLOTS, 60 * SECOND, 0, locations, 0
        )  # fmt: skip
        assert client.put(namespace, [key_of("late")]) == [Grant.FULL]
        assert ask(core, namespace, [key_of("late")]).cause == "refused"
        assert ask(core, namespace, [key_of("later")]).cause == "never"

    def test_refused_while_draining_and_for_a_small_ring(self) -> None:
        core = lru()
        small = core.client(ring_pages=1)
        large = small.open(block_bytes=3 * PAGE_BYTES)
        assert small.put(large, [key_of("large")]) == [Grant.QUOTA]
        core.store.draining = True
        client = core.client()
        namespace = client.open()
        assert client.put(namespace, [key_of("late")]) == [Grant.DRAINING]
        assert ask(core, large, [key_of("large")]).cause == "limit"
        assert ask(core, namespace, [key_of("late")]).cause == "draining"

    def test_never_whole_because_its_writer_was_too_slow(self) -> None:
        core = lru(ticket_ttl_ns=SECOND)
        client = core.client()
        namespace = client.open()
        client.begin(namespace, [key_of("slow")])
        core.pass_time(2 * SECOND)
        assert ask(core, namespace, [key_of("slow")]).cause == "abandoned"


class TestElsewhere:
    def test_another_namespace_has_it_and_the_field_is_named(self) -> None:
        core = lru()
        client, stranger = core.client("here"), core.client("there")
        namespace, other, foreign = client.open(model="m"), client.open(model="n"), stranger.open(model="m")
        client.put(other, chain(2))
        stranger.put(foreign, chain(2))
        said = ask(core, namespace, chain(2))
        assert said.cause == "never"
        assert [(one.tenant, one.differs) for one in said.elsewhere] == [
            ("here", ("model: m / n",)),
            ("there", ("tenant: here / there",)),
        ]
        assert ask(core, namespace, [key_of("nothing")]).elsewhere == ()

    def test_a_tenants_own_namespaces_are_looked_over_however_many_others_have(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(explaining, "LISTED", 2)
        core = lru()
        many, late = core.client("many"), core.client("late")
        for number in range(3):
            many.put(many.open(model=f"m{number}"), chain(1, number))
        namespace, other = late.open(), late.open(model="other")
        late.put(other, chain(2))
        keys = tuple(map(BlockKey, chain(2)))
        assert explain(core.store, MissQuestion("late", None, keys)).digest == other.digest.hex()
        with pytest.raises(ValueError, match=r"2 namespaces could be meant.*`kvctl namespaces`"):
            explain(core.store, MissQuestion(None, None, keys))  # nobody is named: the first two of all
        said = ask(core, namespace, chain(2))
        assert [one.digest for one in said.elsewhere] == [other.digest.hex()]
        assert any("more namespaces than were searched" in sentence for sentence in said.sentences)

    @pytest.mark.parametrize("whole", [True, False])
    def test_what_was_dropped_of_a_namespace_is_not_said_of_the_next_one_of_that_number(
        self, monkeypatch: pytest.MonkeyPatch, *, whole: bool
    ) -> None:
        monkeypatch.setattr(registry, "NAMESPACES_PER_TENANT", 2)
        core = lru()
        client = core.client()
        gone, stays = client.open(model="gone"), client.open(model="stays")
        client.put(gone, chain(2))
        client.put(stays, chain(2))
        core.store.delete(gone, words(chain(2)), 0, 2, lambda _: None)
        for digest, keys in ((gone.digest, ()), (stays.digest, () if whole else (BlockKey(chain(2)[0]),))):
            core.store.clear(ClearScope(digest=digest, keys=keys), lambda _: None, dry_run=False)
            core.settle()
        core.store.detach(client.session)
        client = core.client()
        assert client.open(model="stays") is stays
        heir = client.open(model="heir")
        assert heir.number == gone.number
        assert core.store.registry.of(heir.tenant) == [stays, heir]
        departures = core.store.watching.departures
        assert (departures.cleared_ns(heir.number), departures.dropped_ns(heir.number)) == (0, 0)
        assert (departures.cleared_ns if whole else departures.dropped_ns)(stays.number) > 0
        said = ask(core, heir, [key_of("nothing")])
        assert not any("may have been it" in sentence for sentence in said.sentences)

    def test_of_namespaces_that_have_nothing_of_it_the_one_that_lost_it_last_is_meant(self) -> None:
        core = lru()
        client = core.client()
        first, last, never = (client.open(model=model) for model in ("first", "last", "never"))
        for namespace in (first, last):
            client.put(namespace, chain(2))
            core.pass_time(20 * SECOND)
            client.delete(namespace, chain(2)[:1])
            core.finish_all()
            core.pass_time(20 * SECOND)
        keys = tuple(map(BlockKey, chain(2)))
        said = explain(core.store, MissQuestion(None, None, keys))
        assert (said.digest, said.cause) == (last.digest.hex(), "deleted")
        with pytest.raises(ValueError, match=f"For example: {first.digest.hex()} .*, first"):
            explain(core.store, MissQuestion(None, None, (BlockKey(key_of("nothing")),)))
        assert explain(core.store, MissQuestion(None, never.digest, keys)).cause == "never"

    def test_the_namespace_need_not_be_named_where_it_is_plain(self) -> None:
        core = lru()
        client = core.client("t")
        keys = tuple(map(BlockKey, chain(3)))
        with pytest.raises(KeyError, match="no namespace was opened"):
            explain(core.store, MissQuestion(None, None, keys))
        namespace = client.open()
        assert explain(core.store, MissQuestion(None, None, keys)).digest == namespace.digest.hex()
        other = client.open(model="other")
        with pytest.raises(ValueError, match=r"2 namespaces could be meant.*`kvctl namespaces`"):
            explain(core.store, MissQuestion(None, None, keys))
        client.put(other, chain(2))
        assert explain(core.store, MissQuestion("t", None, keys)).digest == other.digest.hex()
        with pytest.raises(KeyError, match="no tenant is called u"):
            explain(core.store, MissQuestion("u", None, keys))
        with pytest.raises(KeyError, match="was never opened here"):
            explain(core.store, MissQuestion("t", type(other.digest)(bytes(32)), keys))


class TestTurns:
    def test_a_turn_lies_between_the_looks_around_it_however_many_there_were(self) -> None:
        turns, looks = Turns(0), 20 * LOOKS
        for second in range(1, looks):
            assert turns.look(10 * second, second * SECOND) == (second + 1) * SECOND, "always again in a second"
        for turn in (15, 10 * LOOKS, 10 * looks - 12_345, 10 * looks - 15):
            ago_s = looks - turn / 10
            found_ns = turns.time_of(turn, looks * SECOND)
            assert found_ns == pytest.approx(turn / 10 * SECOND, abs=(1 + ago_s / 50) * SECOND)
            assert turns.latest_of(turn, looks * SECOND) >= turn / 10 * SECOND
        assert len(turns.to_bytes()) <= 24 * LOOKS, "or a successor would not take them"

    def test_a_pause_in_which_nothing_was_evicted_is_known_as_one(self) -> None:
        turns = Turns(0)
        turns.look(5, 10 * SECOND)
        for second in range(11, 1000):
            turns.look(5, second * SECOND)
        turns.look(6, 1000 * SECOND)
        assert turns.time_of(5, 2000 * SECOND) <= 10 * SECOND
        assert turns.time_of(6, 2000 * SECOND) >= 999 * SECOND
