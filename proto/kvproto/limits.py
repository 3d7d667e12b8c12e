"""Every bound of the system in one place, each with its arithmetic."""

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# 2: blocks that arrive by READY, FLUSH; 3: PIN, PREFETCH, HINT, REPORT, ADVISE; 4: MATCH_ALL; 5: PREFETCH for the
# remote tier, and nothing else is new
PROTOCOL_VERSION: Final = 5
PROTOCOL_VERSION_OLDEST: Final = 3  # that both sides still speak

# Frames. A default-size SEQPACKET message holds 212,960 bytes (net.core.wmem_default less overhead); larger
# ones fail with EMSGSIZE. 1,024 keys of 32 bytes plus 1,024 commits and 1,024 releases of 8 bytes and 64 bytes
# of heads make 49,216 bytes; the largest answer (RESERVE, 16 bytes a block) makes 16,448.
KEY_BYTES: Final = 32
KEYS_PER_FRAME: Final = 1024
RIDERS_PER_FRAME: Final = 1024
FRAME_BYTES: Final = 64 * KIB

# MATCH_ALL: namespaces (ranks of one model), and keys times namespaces: four times the work of the largest MATCH.
NAMESPACES_PER_MATCH: Final = 64
MATCHES_PER_FRAME: Final = 4 * KEYS_PER_FRAME

# A page is the unit of slots and spans: DMA, O_DIRECT and mmap all want 4 KiB.
PAGE_BYTES: Final = 4 * KIB

# Arenas. At most about 1,000 of them: each is a descriptor, and their names must fit the exec environment at a
# hand-over. 64 MiB each up to 64 GiB of DRAM, in proportion beyond; smaller where there would be fewer than eight,
# since tenants and slot sizes share memory by whole arenas (`arena_bytes_for`).
ARENA_BYTES: Final = 64 * MIB
ARENA_BYTES_SMALL: Final = 8 * MIB
ARENAS_WANTED: Final = 8
ARENAS: Final = 1024
ARENA_BYTES_MAX: Final = 64 * GIB
STALE_PER_TENANT: Final = (
    64  # given up and still mapped by clients: a descriptor each, and memory a late reader brings back
)

# Sessions: one engine process each, with a ring, a socket and a pidfd. 256 rings of 64 MiB make 16 GiB at worst; a
# ring takes memory from its session's first RESERVE to its end.
SESSIONS: Final = 256
SESSIONS_PER_UID: Final = 64
# A few users must not use them up for all others: the last 64 are for who has none, and of these half for configured
# tenants, in equal parts and at least one each: 32 for one, 4 each for eight, one each for 64.
SESSIONS_KEPT: Final = 64
SESSIONS_KEPT_CONFIGURED: Final = SESSIONS_KEPT // 2
LINGERING_PER_UID: Final = 256  # closed, but their processes live and may still read; a descriptor each
RING_BYTES: Final = 64 * MIB
RING_BYTES_MAX: Final = 4 * GIB

# One uid a tenant by default. Each tenant has its own index, and its own share of every number, so that no tenant can
# use them up for the others: 1,000 models, adapters and ranks in use at once, in 64 slot sizes.
TENANTS: Final = 64
NAMESPACES_PER_SESSION: Final = 256
NAMESPACES_PER_TENANT: Final = 1000
NAMESPACES: Final = TENANTS * NAMESPACES_PER_TENANT + 1  # 64,001: fits the 16 bits that a row has for it
POOLS_PER_TENANT: Final = 64
POOLS: Final = TENANTS * POOLS_PER_TENANT

# Tickets: blocks between RESERVE and the end of their copy. Eight full frames a session.
TICKETS_PER_SESSION: Final = 8 * KEYS_PER_FRAME
TICKET_TTL_NS: Final = 30 * 10**9

# Leases. At most a minute, so that a lost client returns its memory; a chain of 1,000,000 tokens in blocks of 16
# needs 62 leases of 1,024 blocks.
LEASES_PER_SESSION: Final = 1024
LEASE_TTL_NS_MAX: Final = 60 * 10**9
LEASE_MARGIN_NS: Final = 100 * 10**6
LEASE_WAIT_NS_MAX: Final = 60 * 10**9
PARKED_PER_SESSION: Final = 64

# Disk. A segment is a file of slots of one size: large enough that reads and writes run side by side in it, small
# enough that there are 32 of them for tenants and slot sizes to share. Its number must fit 32 bits together with its
# slots (`kvstore/blocks.py`): 65,536 segments of 256 MiB are 16 TiB.
SEGMENT_BYTES: Final = 256 * MIB
SEGMENT_BYTES_SMALL: Final = 8 * MIB
SEGMENTS_WANTED: Final = 32
SEGMENTS: Final = 65536
DISK_SLOT_BYTES_MIN: Final = 2 * PAGE_BYTES  # a header and a page
DISK_POOLS_PER_TENANT: Final = 256  # each slot size in DRAM, in up to 16 sizes when packed
DISK_POOLS: Final = TENANTS * DISK_POOLS_PER_TENANT
DISK_ROWS_BYTES: Final = 16 * KIB  # a row of the block table for so many bytes of disk
STORED_PER_SESSION: Final = 1 << 18  # blocks that a FLUSH can speak of
FLUSHES_PER_SESSION: Final = 16
FLUSH_WAIT_NS_MAX: Final = 3600 * 10**9

# Frames queued for a client that does not read: 256 of at most 64 KiB. Past that it is told to go away.
OUTBOX_FRAMES: Final = 256

# Texts in HELLO and OPEN. Identity fields are names and digests, not documents.
NAME_BYTES: Final = 64
FIELD_BYTES: Final = 1024

# Pins: 4 bytes a block (8 of a chain that names one twice) and about 1 KiB each: 20 MiB for 4,096 of 1,024 blocks, at
# worst 36. They end after a day at most.
PINS_PER_TENANT: Final = 4096
PIN_TTL_NS_MAX: Final = 24 * 3600 * 10**9

# Prefetches that wait for their turn. A frame of keys each, 32 KiB: 8 MiB a tenant, and as much again for its pins.
PREFETCHES_PER_TENANT: Final = 256
PREFETCH_NS_MAX: Final = 3600 * 10**9

# Hints. Names hold a UUID, a slash and a label; a description of 256 steps takes 40 KB.
HINT_NAME_BYTES: Final = 512
HINT_TEXT_BYTES: Final = 60 * KIB

# Prefill profiles. One of 50 cells takes 30 KiB, 8 MiB a tenant; one in which every cell is filled 145 KiB.
PROFILES_PER_TENANT: Final = 256

# Mode daemon. Engines have one KV memory, perhaps two; in most layouts an allocation a layer. The daemon keeps a
# descriptor for each allocation: so many of a session, of a uid, and of all; never more than a quarter of what the
# process may have.
MEMORIES_PER_SESSION: Final = 8
HANDLES_PER_SESSION: Final = 256
HANDLES_PER_UID: Final = 1024
HANDLES_ATTACHED: Final = 4096
TRANSFERS_PER_SESSION: Final = 64  # each up to 1,024 blocks: 36 KiB of keys and pages
LAYER_GROUPS: Final = 256  # groups of layers that a LOAD may be told of one by one

# Keys that people name by their first digits: 32 bits tell a block from a million others.
KEY_BEGINNING_DIGITS: Final = 8
BEGINNINGS_PER_REQUEST: Final = 64
KEYS_PER_BEGINNING: Final = 8  # listed where several begin so

BLOCK_TOKENS_MAX: Final = 1 << 16
BLOCK_BYTES_MAX: Final = ARENA_BYTES_MAX


def arena_bytes_for(dram_bytes: int) -> int:
    """Arena size in bytes for a pool: `ARENA_BYTES`, halved or doubled for `ARENAS_WANTED` to `ARENAS` of them."""
    arena_bytes = ARENA_BYTES
    while dram_bytes < arena_bytes * ARENAS_WANTED and arena_bytes > ARENA_BYTES_SMALL:
        arena_bytes //= 2
    while dram_bytes > arena_bytes * ARENAS:
        arena_bytes *= 2
    return arena_bytes


def segment_bytes_for(disk_bytes: int) -> int:
    """Segment size in bytes for a disk tier: `SEGMENT_BYTES`, halved for `SEGMENTS_WANTED`, doubled for `SEGMENTS`."""
    segment_bytes = SEGMENT_BYTES
    while disk_bytes < segment_bytes * SEGMENTS_WANTED and segment_bytes > SEGMENT_BYTES_SMALL:
        segment_bytes //= 2
    while disk_bytes > segment_bytes * SEGMENTS:
        segment_bytes *= 2
    return segment_bytes


def slot_bytes_for(block_bytes: int) -> int:
    """Slot size in bytes for a block: rounded up to whole pages."""
    return -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
