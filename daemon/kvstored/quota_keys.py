"""Quotas in a [tenants.NAME] table, and whether all of them can be kept at a time.

[tenants.research]
uids = [1001]
dram_guaranteed = "16GiB"       # nobody else can take it; without: an equal share of what nobody is promised
dram_max = "32GiB"              # without: no maximum
disk_guaranteed = "200GiB"
disk_max = "1TiB"
pin_share = 0.5                 # of its memory that pins may hold
in_flight = 4096                # tickets, and leases that wait, at a time; without: what sessions may have
pin_1h_ttl = "30m"              # pins for more than five minutes last so long at most; also pin_5m_ttl, pin_tool_ttl
pin_1h_share = 0.25             # of its memory that such pins are sure of; also pin_5m_share, pin_tool_share
unused_ttl = "24h"              # what is not pinned is dropped once nobody has used it for so long
hbm_guaranteed = "1GiB"         # of each GPU's memory that is a tier (gpu.hbm); without: an equal share
hbm_max = "2GiB"                # without: no maximum
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvstore.classes import PIN_TTL_S_MAX, PIN_TTL_S_MIN, UNUSED_TTL_S_MAX, UNUSED_TTL_S_MIN, PinClass
from kvstore.quotas import BYTES_MAX, IN_FLIGHT_MAX, PIN_SHARE, Capacity, Quota, QuotaError, check_quotas
from kvstore.report import ConfigValue
from kvstored.units import ConfigError, Kind, TomlFile, count_kind, dotted, duration_kind, size_kind, toml_type_name


def share_kind() -> Kind[float]:
    """A part of a whole, from 0 to 1."""

    def parse(text: str) -> float:
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0.0 <= share <= 1.0:
            raise ValueError("a share is from 0 to 1")
        return share

    return Kind(parse, str, (int, float), "a share, such as 0.5", "0 to 1")


@dataclass(frozen=True, slots=True)
class QuotaKey:
    """One key of a tenant's table, and the field of `Quota` that it says."""

    field: str
    kind: Kind[Any]
    unit: str
    reason: str


def _class_keys(kind: PinClass, pins: str) -> "dict[str, QuotaKey]":
    """Of one class of pins."""
    return {
        f"pin_{kind}_ttl": QuotaKey(f"pin_{kind}_ttl_s", _PIN_TTL, "seconds", f"{pins} last so long at most"),
        f"pin_{kind}_share": QuotaKey(
            f"pin_{kind}_share", share_kind(), "share", f"of its memory that {pins} are sure of"
        ),
    }


_SIZE: Final = size_kind(0, BYTES_MAX)
_PIN_TTL: Final = duration_kind(PIN_TTL_S_MIN, PIN_TTL_S_MAX)
_UNUSED_TTL: Final = duration_kind(UNUSED_TTL_S_MIN, UNUSED_TTL_S_MAX)
QUOTA_KEYS: Final = {
    "dram_guaranteed": QuotaKey("dram_guaranteed_bytes", _SIZE, "bytes", "memory that no other tenant can take"),
    "dram_max": QuotaKey("dram_max_bytes", _SIZE, "bytes", "memory that it never has more of"),
    "disk_guaranteed": QuotaKey("disk_guaranteed_bytes", _SIZE, "bytes", "disk that no other tenant can take"),
    "disk_max": QuotaKey("disk_max_bytes", _SIZE, "bytes", "disk that it never has more of"),
    "pin_share": QuotaKey("pin_share", share_kind(), "share", f"of its memory that pins may hold; else {PIN_SHARE}"),
    "in_flight": QuotaKey(
        "in_flight", count_kind(1, IN_FLIGHT_MAX), "requests", "tickets, and leases that wait, at a time"
    ),
    **_class_keys(PinClass.SHORT, "pins for up to five minutes"),
    **_class_keys(PinClass.LONG, "pins for more than five minutes"),
    **_class_keys(PinClass.TOOL, "pins for programs that wait for tools"),
    "hbm_guaranteed": QuotaKey(
        "hbm_guaranteed_bytes", _SIZE, "bytes", "of each GPU's memory that is a tier, what no other tenant can take"
    ),
    "hbm_max": QuotaKey("hbm_max_bytes", _SIZE, "bytes", "of each GPU's memory that it never has more of"),
    "unused_ttl": QuotaKey("unused_ttl_s", _UNUSED_TTL, "seconds", "what nobody has used for so long is dropped"),
}
_KEY_OF: Final = {key.field: name for name, key in QUOTA_KEYS.items()}


def read_quota(file: TomlFile, section: tuple[str, ...]) -> tuple[Quota, tuple[ConfigValue, ...]]:
    """What a tenant's table says of quotas; its other keys are not looked at. Raises ConfigError."""
    table, fields, values = file.table(*section), {}, []
    for name, key in QUOTA_KEYS.items():
        if name not in table:
            continue
        keys, given = (*section, name), table[name]
        if type(given) not in key.kind.toml_types:  # not isinstance: true is an int to Python
            reason = f"must be {key.kind.expects}, not {toml_type_name(given)}"
            raise file.error(keys, f"{dotted(*keys)}: {reason}")
        try:
            value = key.kind.parse(str(given))
        except ValueError as error:
            raise file.error(keys, f"{dotted(*keys)}: {error}") from None
        fields[key.field] = value
        shown = key.kind.show(value)
        values.append(ConfigValue(dotted(*keys), shown, f"file {file.place(*keys)}", key.unit, key.reason))
    return Quota(**fields), tuple(values)


def check_all(
    quotas: Mapping[str, Quota], capacities: Iterable[Capacity], section: str, values: Iterable[ConfigValue]
) -> None:
    """Could all of these be kept at a time? Raises ConfigError that says where the one to blame stands."""
    try:
        check_quotas(quotas, capacities)
    except QuotaError as error:
        name = dotted(section, error.tenant, _KEY_OF[error.field])
        origin = next((value.origin for value in values if value.name == name), "file")
        raise ConfigError(f"{origin.removeprefix('file ')}: {name}: {error}") from None
