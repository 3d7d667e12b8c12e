"""`kvctl scrub --wait` on a real disk whose bits have flipped: it says how many, and nobody is served one of them."""

from random import Random

from kvctl.client import Exit
from kvproto.limits import KIB
from kvstore.tier.format import HEADER_BYTES
from tests.fault.test_rebuild import status
from tests.integration.test_kvctl_acting import kvctl
from tests.node import Node, census, fetch, put_roots, roots, until, value
from tests.segments import flip

SEED = 20_261_122
BLOCK_BYTES = 60 * KIB - 100  # at the end of a slot are bytes that do not count
KEYS = roots("scrubbed", 60)
DISK = ("--disk-admission", "all", "--disk-codec", "raw", "--keep", "false")


def damage(node: Node, keys: list[bytes]) -> None:
    """Flip one bit of each of these blocks' payloads."""
    random, slots = Random(SEED), node.slots()
    for key in keys:
        slot = slots[key]
        flip(slot.path, 8 * (slot.offset + HEADER_BYTES) + random.randrange(8 * slot.header.stored_bytes))


def test_a_scrub_finds_flipped_bits_and_says_so() -> None:
    print("seed", SEED)
    lost, in_dram = KEYS[10:40:10], KEYS[50]
    with Node(segment="8MiB", dram="32MiB") as node:
        node.start(*DISK)
        put_roots(node.namespace(BLOCK_BYTES), KEYS)
        node.stop()
        node.start(*DISK)
        ns = node.namespace(BLOCK_BYTES)
        assert until(lambda: all(ns.match([key]).tiers.disk for key in KEYS)), "nothing of it lies in DRAM"

        # The control: all is sound, but for bits that do not count.
        before = node.slots()
        slot = before[KEYS[0]]
        flip(slot.path, 8 * (slot.offset + HEADER_BYTES + slot.header.stored_bytes))
        code, out, err = kvctl(node, "scrub", "--wait", "--rate", "0")
        assert (code, err) == (Exit.OK, "")
        assert "60 of 60 blocks" in out
        assert out.endswith("none damaged\n")

        assert len(fetch(ns, [in_dram]).blocks) == 1, "this one lies in DRAM too, and is to be written anew"
        damage(node, [*lost, in_dram])
        code, out, err = kvctl(node, "scrub", "--wait", "--rate", "0")
        assert (code, err) == (Exit.REFUSED, "")
        assert "4 damaged: they are misses now, and their place on disk is not used again" in out
        assert status(node)["drives"][0]["damaged"] == 4
        assert [ns.match([key]).blocks for key in lost] == [0] * 3, "before anybody reads them"
        told = census(ns, KEYS)
        assert told.misses == set(lost)
        assert told.hits == set(KEYS) - set(lost)

        # What it found is not found again, and what was lost can be stored anew, elsewhere.
        assert until(lambda: status(node)["counters"]["saved"] == 1), "it is not written anew"
        assert intact(node, in_dram)
        code, out, err = kvctl(node, "scrub", "--wait", "--rate", "0")
        assert (code, err) == (Exit.OK, "")
        assert "57 of 57 blocks" in out
        put_roots(ns, lost)
        after = node.slots()
        assert all((after[key].path, after[key].offset) != (before[key].path, before[key].offset) for key in lost)
        assert all(intact(node, key) for key in lost)


def intact(node: Node, key: bytes) -> bool:
    """Is what lies on disk what was stored?"""
    slot = node.slots()[key]
    with slot.path.open("rb") as file:
        file.seek(slot.offset + HEADER_BYTES)
        return file.read(BLOCK_BYTES) == value(key, BLOCK_BYTES).tobytes()
