"""What `kvctl status` says of GPUs and of the remote tier."""

from rich.text import Text

from kvctl.amounts import size, span
from kvctl.client import printable
from kvproto import control_pb2 as pb


def device(one: pb.Device) -> Text:
    """A GPU that the daemon copies for, and the tier on it."""
    text = f"GPU {printable(one.name)}{', lost' if one.lost else ''}: {size(one.attached_bytes)} of engines, "
    text += f"{one.loads:,} loads ({size(one.loaded_bytes)}), {one.saves:,} saves "
    text += f"({size(one.saved_bytes)}), {one.failed:,} failed"
    if one.hbm_bytes:
        text += f"\nits tier: {size(one.hbm_used_bytes)} of {size(one.hbm_bytes)}, {one.hbm_hits:,} blocks "
        text += f"loaded from there, {one.hbm_promoted:,} copied there, {one.hbm_evicted:,} gave way"
        if one.hbm_evicted:
            text += f" after {span(one.hbm_evicted_after_s / one.hbm_evicted)}"
        if one.hbm_unpinned:
            text += f", {one.hbm_unpinned:,} of them pinned"
    return Text(text)


def remote(far: pb.Remote) -> Text:
    """The tier beyond this host."""
    text = f"remote: {printable(far.url)}, reading {printable(far.reading)}, writing {printable(far.writing)}"
    if far.reason:
        text += f" ({printable(far.reason)})"
    text += f"\n{size(far.used_bytes)} of {size(far.capacity_bytes)} in {far.objects:,} objects of this host"
    text += f" and {far.uncounted:,} that are not counted" if far.uncounted else ""
    text += f", read at {size(far.bytes_per_s)}/s" if far.bytes_per_s else ""
    text += f"\n{far.kept:,} blocks kept ({size(far.kept_bytes)}), {far.shared:,} of them there already, "
    text += f"{far.not_worth:,} not worth it, {far.not_kept:,} given up, {far.queued_runs:,} runs wait"
    text += f"\n{far.sought:,} chains sought, {far.sought_empty:,} not there, {far.promoted:,} blocks brought "
    text += f"({size(far.promoted_bytes)}), {far.no_room:,} without room, {far.damaged:,} objects damaged"
    if far.owed or far.not_noted or far.not_remembered or far.closed:
        text += f"\n{far.owed:,} deleted keys still to be removed, {far.not_remembered:,} forgotten before they were, "
        text += f"{far.not_noted:,} requests not noted, {far.closed:,} namespaces closed for that"
    faults = far.unreachable + far.refused + far.full
    return Text(f"{text}\n{far.reads + far.writes:,} requests, {faults:,} of them in vain")
