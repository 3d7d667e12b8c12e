"""What the store says of quotas: plain values, safe to hand to another thread."""

from dataclasses import dataclass
from typing import Final

# Of a Quota, reported as they are.
CLASS_FIELDS: Final = (
    "pin_5m_ttl_s", "pin_5m_share", "pin_1h_ttl_s", "pin_1h_share", "pin_tool_ttl_s", "pin_tool_share", "unused_ttl_s",
    "hbm_guaranteed_bytes", "hbm_max_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuotaReport:
    """What one tenant is promised, and the most that it may have. Sizes that hold are in whole arenas or segments."""

    tenant: str
    chosen: bool  # any of it at run time: see `chosen_fields`; else all comes from the configuration
    dram_guaranteed_bytes: int  # as of now: an equal share changes as tenants come and go
    dram_asked_bytes: int | None  # promised by name; None: an equal share of what nobody is promised by name
    dram_max_bytes: int | None  # None: no maximum
    disk_guaranteed_bytes: int
    disk_asked_bytes: int | None
    disk_max_bytes: int | None
    pin_share: float  # of its memory that pins may hold
    pin_budget_bytes: int  # what that is now
    in_flight_max: int | None  # tickets, and LEASEs that wait, at a time; None: as many as its sessions may have
    dram_max_asked_bytes: int | None  # before it came to whole arenas, and to no more than there are
    disk_max_asked_bytes: int | None
    pin_5m_ttl_s: float | None = None  # by class of pins: longest time, and share of its memory that it is sure of
    pin_5m_share: float | None = None
    pin_1h_ttl_s: float | None = None
    pin_1h_share: float | None = None
    pin_tool_ttl_s: float | None = None
    pin_tool_share: float | None = None
    unused_ttl_s: float | None = None  # what is not pinned is dropped once nobody has used it for so long
    hbm_guaranteed_bytes: int | None = None  # of each GPU, as asked for; None: an equal share
    hbm_max_bytes: int | None = None
    chosen_fields: tuple[str, ...] = ()  # of `SetQuotaRequest`: those that were chosen at run time
    hbm_sure_bytes: int = 0  # of each GPU, in whole arenas, as of now; 0 where there is no such tier


@dataclass(frozen=True, slots=True)
class QuotaChange:
    """What holds now, or would, and what held before."""

    quota: QuotaReport
    former: QuotaReport
    others: "tuple[QuotaChange, ...]" = ()  # of other tenants, of which a guarantee or the budget of pins falls by it
