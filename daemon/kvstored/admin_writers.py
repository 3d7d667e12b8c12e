"""What status warns of where clients write into memory themselves (mode direct). Owner thread."""

from collections.abc import Iterator
from typing import Final

from kvproto.sizes import format_bytes
from kvstore.store import Store

LOST_SHARE: Final = 20  # of DRAM one part in so many may be out of use before anybody is warned


def writer_warnings(store: Store) -> Iterator[str]:
    """Blocks that were changed, and slots that are out of use."""
    damaged, lost_bytes = store.scrubbing.damaged, store.writers.stranded_bytes()
    if damaged:
        remedy = "see which engine in mode direct writes where it must not, or take tenants.NAME.trusting back"
        yield f"{damaged} blocks in memory were changed after they were published, and are misses now; {remedy}"
    if lost_bytes * LOST_SHARE > store.limits.dram_bytes:
        remedy = "it comes back when these processes end, or with the arena"
        yield f"{format_bytes(lost_bytes)} of memory is out of use, since clients may still write there; {remedy}"
