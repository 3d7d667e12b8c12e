"""What is answered of pins. `unpin`: owner thread; the rest: handlers'."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from kvproto import control_pb2 as pb
from kvstore.report_pins import PinsReport
from kvstore.store import Store


def unpin(store: Store, tenant: str, numbers: Sequence[int]) -> int:
    """End these pins of a tenant, or all of them; how many there were. Raises KeyError(text): unknown tenant."""
    if tenant not in store.tenants:
        raise KeyError(f"no tenant is called {tenant}")
    whose = store.tenants[tenant]
    mine = [number for number, pin in store.pinning.pins.items() if pin.tenant is whose]
    return store.pinning.unpin(whose, numbers or mine)


def pins_of(report: PinsReport) -> pb.ListPinsResponse:
    """Field by field."""
    return pb.ListPinsResponse(
        pins=[pb.Pin(**_named(one)) for one in report.pins],
        pins_total=report.pins_total,
        budgets=[pb.PinBudget(**_named(one)) for one in report.budgets],
        counters=pb.PinCounters(**_named(report.counters)),
    )


def _named(one: Any) -> dict[str, Any]:  # any dataclass of report_pins.py: its message has the same field names
    return {field.name: getattr(one, field.name) for field in fields(one)}
