"""Reports of the owner thread, those that have parts, as messages of the control socket. Any thread."""

from typing import Any

from kvproto import control_pb2 as pb
from kvstore.report import DaemonReport, DiskReport, PolicyChange, TierReport
from kvstore.report_costs import CostsReport, NamespaceCosts
from kvstored.requests import named

__all__ = ["change_of", "costs_of", "status_of"]


def status_of(report: DaemonReport) -> pb.GetStatusResponse:
    """Everything of `kvctl status`."""
    nested: dict[str, Any] = {
        "tiers": [_tier(tier) for tier in report.tiers],
        "tenants": [pb.Tenant(**named(tenant)) for tenant in report.tenants],
        "counters": pb.Counters(**named(report.counters)),
        "disk": _disk(report.disk) if report.disk else None,
        "restart": pb.Restart(**named(report.restart)),
        "remote": pb.Remote(**named(report.remote)) if report.remote else None,
        "devices": [pb.Device(**named(device)) for device in report.devices],
    }
    return pb.GetStatusResponse(**{**named(report), **nested})


def _tier(report: TierReport) -> pb.Tier:
    nested: dict[str, Any] = {"nodes": [pb.NodeMemory(**named(node)) for node in report.nodes]}
    return pb.Tier(**{**named(report), **nested})


def _disk(report: DiskReport) -> pb.Disk:
    nested: dict[str, Any] = {
        "counters": pb.DiskCounters(**named(report.counters)),
        "drives": [pb.Drive(**named(drive)) for drive in report.drives],
    }
    return pb.Disk(**{**named(report), **nested})


def costs_of(report: CostsReport) -> pb.GetCostsResponse:
    """What is known of costs."""
    return pb.GetCostsResponse(
        namespaces=map(_namespace_costs, report.namespaces),
        more=report.more,
        ways=[pb.Way(**named(way)) for way in report.ways],
    )


def _namespace_costs(report: NamespaceCosts) -> pb.NamespaceCosts:
    nested: dict[str, Any] = {
        "prefills": [pb.Prefill(**named(prefill)) for prefill in report.prefills],
        "runs": [pb.Run(**named(run)) for run in report.runs],
    }
    return pb.NamespaceCosts(**{**named(report), **nested})


def change_of(change: PolicyChange) -> pb.PolicyChange:
    """One tier's, or one tenant's in it."""
    return pb.PolicyChange(policy=pb.Policy(**named(change.policy)), former_rule=change.former_rule)
