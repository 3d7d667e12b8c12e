"""What an import has room for: whole arenas and segments, maxima, and nothing promised that others have."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from kvctl import archive_room
from kvctl.archive_room import Free, Gate, Room, room_of
from kvctl.client import Exit, KvctlError
from kvproto import control_pb2 as pb
from kvproto.limits import KIB, MIB

ARENA = 4 * MIB
SLOT = 64 * KIB
EACH = ARENA // SLOT


class Daemon:
    """What a control client is told; `acts`: to those who may see all."""

    def __init__(self, *, acts: bool = True) -> None:
        self.acts = acts
        self.dram = pb.Tier(name="dram", capacity_bytes=8 * ARENA, assigned_bytes=5 * ARENA, arena_bytes=ARENA)
        self.disk: pb.Tier | None = None
        self.disk_state = "serving"
        self.of = [
            pb.Tenant(name="a", assigned_bytes=2 * ARENA, used_bytes=ARENA, dram_guaranteed_bytes=4 * ARENA),
            pb.Tenant(name="b", assigned_bytes=3 * ARENA, used_bytes=SLOT, dram_guaranteed_bytes=ARENA),
        ]
        self.sizes = [("a", SLOT), ("b", SLOT)]
        self.looks = 0

    def tenants(self) -> Any:
        return SimpleNamespace(tenants=self.of)

    def namespaces(self) -> Any:
        return SimpleNamespace(
            namespaces=[pb.Namespace(tenant=name, slot_bytes=slot, blocks=1) for name, slot in self.sizes]
        )

    def status(self) -> Any:
        self.looks += 1
        if not self.acts:
            raise KvctlError(Exit.REFUSED, "for those who act")
        tiers = [self.dram] if self.disk is None else [self.dram, self.disk]
        return pb.GetStatusResponse(tiers=tiers, disk=pb.Disk(state=self.disk_state))

    def pins(self, _: object) -> Any:
        raise KvctlError(Exit.REFUSED, "nobody sees them")

    @property
    def room(self) -> Room:
        return room_of(self)  # type: ignore[arg-type]


def test_whole_arenas_count_and_of_the_others_only_what_is_surely_ours() -> None:
    daemon = Daemon()
    assert daemon.room.has({("a", SLOT): 4 * EACH}), "three that nobody has, and one half of two"
    assert not daemon.room.has({("a", SLOT): 4 * EACH + 1})
    assert daemon.room.has({("a", 2 * SLOT): 3 * EACH // 2})
    assert not daemon.room.has({("a", 2 * SLOT): 3 * EACH // 2 + 1}), "what blocks of another size have is not ours"
    assert not daemon.room.has({("c", SLOT): 3 * EACH + 1}), "nor what another tenant has"
    assert not daemon.room.has({("a", SLOT): 3 * EACH, ("c", SLOT): 2 * EACH + 1})
    daemon.sizes.append(("a", 2 * SLOT))
    assert not daemon.room.has({("a", SLOT): 3 * EACH + 1}), "whose arenas they are cannot be told"


def test_arenas_are_not_filled_to_their_last_byte() -> None:
    room = Daemon().room
    large = ARENA // 2 + 4 * KIB
    assert room.has({("a", large): 3})
    assert not room.has({("a", large): 4}), "one in each arena"
    small = {("c", (index + 1) * 4 * KIB): 1 for index in range(3)}
    assert room.has(small)
    assert not room.has({**small, ("c", 64 * KIB): 1}), "each size wants one of its own"


def test_empty_arenas_are_anybodys_and_what_clients_still_hold_is_nobodys() -> None:
    daemon = Daemon()
    daemon.of[1].used_bytes = 0
    assert daemon.room.has({("a", SLOT): 7 * EACH})
    daemon.dram.stale_bytes = 2 * ARENA
    assert not daemon.room.has({("a", SLOT): 5 * EACH + 1})


def test_a_maximum_holds_for_the_tenant_that_has_it() -> None:
    daemon = Daemon()
    daemon.of[0].dram_max_bytes = 3 * ARENA
    assert daemon.room.has({("a", SLOT): 2 * EACH, ("b", SLOT): 2 * EACH})
    assert not daemon.room.has({("a", SLOT): 2 * EACH + 1})
    assert daemon.room.dram.bytes(["a"]) == 2 * ARENA


def test_room_on_disk_is_never_room_in_memory_and_is_wanted_beside_it() -> None:
    daemon = Daemon()
    segment = 8 * MIB
    daemon.disk = pb.Tier(name="disk", capacity_bytes=100 * segment, arena_bytes=segment)
    assert not daemon.room.has({("a", SLOT): 4 * EACH + 1})
    each = (segment - 4 * KIB) // (SLOT + 4 * KIB)
    daemon.disk.assigned_bytes, daemon.disk.used_bytes = 99 * segment, 1
    assert daemon.room.has({("a", SLOT): each})
    assert not daemon.room.has({("a", SLOT): each + 1})
    daemon.of[0].disk_assigned_bytes = daemon.of[0].disk_max_bytes = 5 * segment
    assert not daemon.room.has({("a", SLOT): 1})
    assert daemon.room.has({("b", SLOT): each})
    daemon.disk_state = "opening"
    assert not daemon.room.has({("b", SLOT): 1}), "what is there is not known yet"
    daemon.disk_state = "off"
    assert daemon.room.disk is None


def test_who_may_not_see_the_host_has_what_is_guaranteed() -> None:
    daemon = Daemon(acts=False)
    assert daemon.room.has({("a", SLOT): 2 * EACH})
    assert not daemon.room.has({("a", SLOT): 2 * EACH + 1})
    assert not daemon.room.has({("b", SLOT): 1}), "it has more than that"
    assert daemon.room.dram.bytes(["b"]) == 0
    assert daemon.room.disk is None


def gate(daemon: Daemon, planned: tuple[int, int]) -> Gate:
    reader = SimpleNamespace(planned_blocks=planned[0], planned_bytes=planned[1])
    return Gate(daemon, daemon.room, reader, None, lambda: None)  # type: ignore[arg-type]


def test_it_is_looked_again_as_others_store_and_then_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_room, "LOOK_BYTES", ARENA)
    daemon, stored, pool = Daemon(), Counter[tuple[str, int]](), ("a", SLOT)
    opened = gate(daemon, (4 * EACH, 4 * ARENA))
    opened(stored, pool, 0)
    for _ in range(EACH // 16):
        opened(stored, pool, 16)
        stored[pool] += 16
    daemon.dram.assigned_bytes, daemon.of[0].used_bytes = 8 * ARENA, 2 * ARENA
    with pytest.raises(KvctlError, match=f"{EACH} blocks are stored; for more 0 B are free") as raised:
        opened(stored, pool, 16)
    assert raised.value.code == Exit.REFUSED
    assert "--yes" in str(raised.value)


def test_what_became_free_meanwhile_is_used_and_nobody_is_asked() -> None:
    daemon, stored, pool = Daemon(), Counter[tuple[str, int]](), ("a", SLOT)
    opened = gate(daemon, (1, SLOT))
    opened(stored, pool, 0)
    stored[pool] += 4 * EACH
    daemon.of[0].used_bytes += ARENA
    daemon.of[0].assigned_bytes = daemon.of[0].used_bytes
    daemon.dram.assigned_bytes = 5 * ARENA
    opened(stored, pool, EACH)


def test_what_is_said_names_what_is_short() -> None:
    free, none = Free(ARENA, 3, {}), Free(ARENA, 0, {})
    needs = {("a", SLOT): EACH}
    assert Room(none, None).short(needs, would="is") == "0 B are free, and for the rest what is there is evicted"
    both = Room(none, free).short(needs, would="is")
    assert both.endswith("evicted: what of it is on disk too stays there, the rest is gone")
    assert Room(free, none).short(needs, would="is").startswith("on disk 0 B are free")
    assert "; on disk 0 B are free" in Room(none, none).short(needs, would="is")
