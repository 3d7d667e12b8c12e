"""ListBlocks, GetTree and StatPrefix: handlers that ask the owner thread for slices, and put them together themselves.

One answer is made of many short questions, so that the owner is never held for more than a millisecond however many
blocks there are. Only one tree grows at a time, since each is a copy of its namespace's rows.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from kvproto import control_pb2 as pb
from kvproto.ids import BlockKey, NamespaceDigest
from kvproto.limits import KEY_BYTES
from kvstore.insight.forest import BLOCKS_MOST, TICK_NS, Forest, Part, choose, grow, joined
from kvstore.insight.looking import (
    KEEPERS_A_LOOK,
    KEYS_A_LOOK,
    LIST_MOST,
    LISTED_A_LOOK,
    Begun,
    BlockReport,
    Keeper,
    Looking,
    first_of,
)
from kvstored.requests import digest_of, keys_of, named, namespace_of, tenant_of

NODES_MOST: Final = 1024
DEPTH_MOST: Final = 1024
BY: Final = ("blocks", "hits", "recent")
QUALITY: Final = "exact"  # no tier keeps less than what was stored

_growing = threading.Lock()

T = TypeVar("T")
R = TypeVar("R")


class TooManyError(Exception):
    """More than is answered at once. Says what to do, after a semicolon."""


class Asks(Protocol):
    """One call's way to the owner thread."""

    def __call__(self, question: Callable[[Looking], T]) -> T:
        """Ask it. Raises TimeoutError once the call's time is over, and what the question raises."""


class Owner(Protocol):
    """See `control_port.Owner`."""

    def ask(self, question: Callable[[Any], T], timeout_s: float) -> T:
        """See there."""


def asker(owner: Owner, wait_s: float) -> Asks:
    """Many questions within the time of one call."""
    until_s = time.monotonic() + wait_s

    def ask(question: Callable[[Looking], R]) -> R:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return owner.ask(lambda port: question(port.looking), left_s)

    return ask


# -- a list -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ListWish:
    """A page of a namespace."""

    tenant: str | None
    digest: NamespaceDigest
    cursor: int
    limit: int


def list_wish_of(request: pb.ListBlocksRequest) -> ListWish:
    """Raises ValueError."""
    if request.limit > LIST_MOST:
        raise ValueError(f"limit is at most {LIST_MOST}")
    if request.cursor >= 1 << 32:
        raise ValueError("cursor is none that a page has given")
    limit = request.limit or LIST_MOST
    return ListWish(tenant_of(request), digest_of(request.namespace_digest), max(1, request.cursor), limit)


def list_blocks(ask: Asks, wish: ListWish) -> pb.ListBlocksResponse:
    """Raises KeyError, ValueError, TimeoutError."""
    begun = ask(lambda looking: looking.begin(wish.tenant, wish.digest))
    found: list[BlockReport] = []
    cursor = wish.cursor
    while cursor and len(found) < wish.limit:
        more, cursor = ask(_page(begun, cursor, min(LISTED_A_LOOK, wish.limit - len(found))))
        found += more
    blocks = [_block(one) for one in found]
    return pb.ListBlocksResponse(tenant=begun.tenant, digest=begun.digest, blocks=blocks, next_cursor=cursor)


def _page(begun: Begun, cursor: int, most: int) -> Callable[[Looking], tuple[list[BlockReport], int]]:
    return lambda looking: looking.page(begun, cursor, most)


def _block(report: BlockReport) -> pb.Block:
    return pb.Block(**named(report))


# -- a tree -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TreeWish:
    """What of a namespace is to be drawn."""

    tenant: str | None
    digest: NamespaceDigest
    key: BlockKey | None
    depth: int
    width: int
    limit: int
    by: str


def tree_wish_of(request: pb.GetTreeRequest) -> TreeWish:
    """Raises ValueError."""
    if request.key and len(request.key) != KEY_BYTES:
        raise ValueError(f"a key is {KEY_BYTES} bytes, not {len(request.key)}")
    for name, value, most in (
        ("depth", request.depth, DEPTH_MOST), ("width", request.width, NODES_MOST), ("limit", request.limit, NODES_MOST)
    ):  # fmt: skip
        if value > most:
            raise ValueError(f"{name} is at most {most}")
    by = request.by or BY[0]
    if by not in BY:
        raise ValueError(f"nothing is listed by {by!r}: it is one of {', '.join(BY)}")
    key = BlockKey(request.key) if request.key else None
    depth = request.depth if request.HasField("depth") else 8
    return TreeWish(
        tenant_of(request), digest_of(request.namespace_digest), key, depth, request.width or 8,
        request.limit or 64, by,
    )  # fmt: skip


def draw_tree(ask: Asks, wish: TreeWish, wait_s: float) -> pb.GetTreeResponse:
    """Raises KeyError, ValueError, TimeoutError, TooManyError."""
    if not _growing.acquire(timeout=wait_s):
        raise TooManyError("another tree is being drawn; try again in a moment")
    try:
        begun = ask(lambda looking: looking.begin(wish.tenant, wish.digest, wish.key))
        copy = _copied(ask, begun)
        forest = grow(copy, begun.start_row)
    finally:
        _growing.release()
    chosen = choose(forest.runs, wish.by, wish.depth, wish.width, wish.limit)
    return _drawn(ask, begun, copy, forest, chosen)


def _copied(ask: Asks, begun: Begun) -> Part:
    parts: list[Part] = []
    start, count = 1, 0
    while start:
        part, start = ask(_slice(begun, start))
        parts.append(part)
        count += part.rows.size
        if count > BLOCKS_MOST:
            raise TooManyError(f"more than {BLOCKS_MOST:,} blocks are not drawn; `kvctl ls` lists them page by page")
    return joined(parts)


def _slice(begun: Begun, start: int) -> Callable[[Looking], tuple[Part, int]]:
    return lambda looking: looking.slice(begun, start)


def _drawn(ask: Asks, begun: Begun, copy: Part, forest: Forest, chosen: Sequence[int]) -> pb.GetTreeResponse:
    runs, slot_bytes = forest.runs, begun.slot_bytes
    first, last = runs.first[chosen], runs.last[chosen]
    first_keys = ask(lambda looking: looking.keys(copy.rows[first], copy.tags[first]))
    last_keys = ask(lambda looking: looking.keys(copy.rows[last], copy.tags[last]))
    columns = [column[chosen].tolist() for column in runs]
    nodes = []
    for i, run in enumerate(zip(*columns, strict=True)):
        _, level, _, _, before, length, total, dram, disk, pinned, held, hits, age, longest, branches = run
        nodes.append(
            pb.TreeNode(
                level=level, first_key=first_keys[i], last_key=last_keys[i], before_blocks=before, run_blocks=length,
                blocks=total, dram_blocks=dram, disk_blocks=disk, total_bytes=total * slot_bytes, hits=hits,
                age_s=age * TICK_NS / 1e9, pinned_blocks=pinned, held_blocks=held, branches=branches,
                longest_blocks=longest,
            )
        )  # fmt: skip
    blocks = int(runs.blocks[forest.roots].sum())
    return pb.GetTreeResponse(
        tenant=begun.tenant, digest=begun.digest, block_tokens=begun.block_tokens, nodes=nodes,
        roots=int(forest.roots.size), blocks=blocks, bytes=blocks * slot_bytes, runs=int(runs.parent.size),
        changed_blocks=forest.changed,
    )  # fmt: skip


# -- a prefix ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StatWish:
    """A chain by its keys."""

    tenant: str | None
    digest: NamespaceDigest | None
    keys: tuple[BlockKey, ...]


def stat_wish_of(request: pb.StatPrefixRequest) -> StatWish:
    """Raises ValueError."""
    return StatWish(tenant_of(request), namespace_of(request), keys_of(request.keys))


def stat_prefix(ask: Asks, wish: StatWish) -> pb.StatPrefixResponse:
    """Raises KeyError, ValueError, TimeoutError."""
    begun = ask(lambda looking: looking.begin(wish.tenant, wish.digest))
    reports: list[BlockReport] = []
    rows: list[int] = []
    for at in range(0, len(wish.keys), KEYS_A_LOOK):
        more, at_rows = ask(_chain(begun, wish.keys[at : at + KEYS_A_LOOK]))
        reports += more
        rows += at_rows
    whole = [one.in_dram or one.on_disk for one in reports]
    found = whole.index(False) if False in whole else len(whole)
    pins = _keepers(ask, lambda looking: looking.pins(begun), _pins(frozenset(filter(None, rows))))
    leases = _keepers(ask, lambda looking: looking.leases(), _leases(rows))
    run = reports[:found]
    return pb.StatPrefixResponse(
        tenant=begun.tenant, digest=begun.digest, block_tokens=begun.block_tokens, blocks=map(_block, reports),
        found_blocks=found, dram_blocks=sum(one.in_dram for one in run), disk_blocks=sum(one.on_disk for one in run),
        hbm_blocks=sum(one.in_hbm for one in run), bytes=found * begun.slot_bytes,
        pins_total=len(pins), leases_total=len(leases), quality=QUALITY,
        pins=[pb.KeptBy(**named(one)) for one in first_of(pins)],
        leases=[pb.KeptBy(**named(one)) for one in first_of(leases)],
    )  # fmt: skip


def _chain(begun: Begun, keys: Sequence[BlockKey]) -> Callable[[Looking], tuple[list[BlockReport], list[int]]]:
    return lambda looking: looking.chain(begun, keys)


def _keepers(
    ask: Asks, all_of: Callable[[Looking], list[T]], look: Callable[[Sequence[T]], Callable[[Looking], list[Keeper]]]
) -> list[Keeper]:
    things = ask(all_of)
    found: list[Keeper] = []
    for at in range(0, len(things), KEEPERS_A_LOOK):
        found += ask(look(things[at : at + KEEPERS_A_LOOK]))
    return found


def _pins(rows: frozenset[int]) -> Callable[[Sequence[Any]], Callable[[Looking], list[Keeper]]]:
    return lambda pins: lambda looking: looking.pins_of(pins, rows)


def _leases(rows: Sequence[int]) -> Callable[[Sequence[Any]], Callable[[Looking], list[Keeper]]]:
    return lambda leases: lambda looking: looking.leases_of(leases, rows)
