"""What an audit (`audit.py`) looks at: the columns of the block table as plain lists, taken once. For tests."""

from kvstore import blocks
from kvstore.blocks import FREE
from kvstore.store import Store

_COLUMNS = (
    "state", "holds", "slot", "namespace", "flags", "parent", "first_child", "next_sibling", "prev_sibling",
    "older", "newer", "writer", "touched", "lease_until_ns", "chain", "disk", "dram_children", "generation", "queue",
)  # fmt: skip


class Look:
    """One look at a store, with the columns of the block table as plain lists."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.arenas = store.arenas
        self.tables = store.tables
        self.shift = int(store.tables.book[blocks.SHIFT])
        self.unused = int(store.tables.book[blocks.UNUSED_ROW])
        self.limbo = int(store.tables.book[blocks.LIMBO])
        self.column = {name: store.tables.blocks[name][: self.unused].tolist() for name in _COLUMNS}
        self.state: list[int] = self.column["state"]
        self.holds: list[int] = self.column["holds"]
        self.parent: list[int] = self.column["parent"]
        self.rows = [row for row in range(1, self.unused) if self.state[row] != FREE]
        self.pool_at: list[int] = [number - 1 for number in store.tables.arenas["pool"].tolist()]
        self.slots_at: list[int] = store.tables.arenas["slots"].tolist()
        self.tickets = [ticket for session in store.sessions.values() for ticket in session.tickets.values()]

    def pool_of(self, row: int) -> int:
        """The pool a block lies in."""
        return self.pool_at[int(self.column["slot"][row]) >> self.shift]

    def serving(self, position: int) -> int:
        """The arena at a position."""
        return int(self.tables.arenas[position]["id"])
