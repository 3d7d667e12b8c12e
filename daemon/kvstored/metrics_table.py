"""Every metric of our own in one table: its name, what it means, its labels, and where its values come from.

systemd/METRICS.md has the same names, which a test holds. Names and units are Prometheus': seconds, bytes, `_total`.
Every series is there from the first scrape on, at zero, with two exceptions: tenants nobody has configured appear with
their first session, and there are no series of a disk or remote tier, or of events, where there is none. Labels are
tiers, reasons and the like, tenants (64 at most) and directories (16): never a request, a key or a model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from kvstore.report import DeviceReport, DiskReport, DriveReport, RemoteReport
from kvstored.block_log import EventTally
from kvstored.metrics_snapshot import Snapshot, TenantFigures

TIERS: Final = ("dram", "disk")
Row = tuple[tuple[str, ...], float]  # values of the labels, and the value


@dataclass(frozen=True, slots=True)
class Facts:
    """What values are read from."""

    now: Snapshot
    load_s: Mapping[tuple[str, str], float]  # by tenant and tier
    serving: bool
    version: str
    protocol: int

    @property
    def disk(self) -> DiskReport | None:
        """The disk tier."""
        return self.now.disk


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of series. `kind`: counter (its name then ends in _total) or gauge."""

    name: str
    kind: str
    says: str
    labels: tuple[str, ...]
    rows: Callable[[Facts], Iterable[Row]]


def _one(name: str, kind: str, says: str, value: Callable[[Facts], float]) -> Metric:
    return Metric(name, kind, says, (), lambda facts: [((), value(facts))])


def _some(name: str, kind: str, says: str, label: str, values: Callable[[Facts], Mapping[str, float]]) -> Metric:
    return Metric(name, kind, says, (label,), lambda facts: [((key,), value) for key, value in values(facts).items()])


def _tenants(name: str, kind: str, says: str, value: Callable[[TenantFigures], float]) -> Metric:
    return Metric(name, kind, says, ("tenant",), lambda facts: [((one.name,), value(one)) for one in facts.now.tenants])


def _tenants_by_tier(name: str, kind: str, says: str, values: Callable[[TenantFigures], tuple[float, float]]) -> Metric:
    def rows(facts: Facts) -> Iterator[Row]:
        tiers = TIERS if facts.disk else TIERS[:1]
        for one in facts.now.tenants:
            for tier, value in zip(tiers, values(one), strict=False):
                yield (one.name, tier), value

    return Metric(name, kind, says, ("tenant", "tier"), rows)


def _on_disk(name: str, kind: str, says: str, value: Callable[[Facts, DiskReport], float]) -> Metric:
    return Metric(name, kind, says, (), lambda facts: [((), value(facts, facts.disk))] if facts.disk else [])


def _remote(name: str, kind: str, says: str, value: Callable[[RemoteReport], float]) -> Metric:
    return Metric(name, kind, says, (), lambda facts: [((), value(facts.now.remote))] if facts.now.remote else [])


def _events(name: str, kind: str, says: str, value: Callable[[EventTally], float]) -> Metric:
    return Metric(name, kind, says, (), lambda facts: [((), value(facts.now.events))] if facts.now.events else [])


def _device(name: str, kind: str, says: str, value: Callable[[DeviceReport], float]) -> Metric:
    return Metric(name, kind, says, ("device",), lambda facts: [((one.name,), value(one)) for one in facts.now.devices])


def _remote_faults(facts: Facts) -> Iterator[Row]:
    remote = facts.now.remote
    if remote is not None:
        for kind in ("unreachable", "refused", "full", "damaged", "absent"):
            yield (kind,), getattr(remote, kind)


def _drives(name: str, kind: str, says: str, value: Callable[[DriveReport], float]) -> Metric:
    def rows(facts: Facts) -> Iterator[Row]:
        for drive in facts.disk.drives if facts.disk else ():
            yield (drive.directory,), value(drive)

    return Metric(name, kind, says, ("directory",), rows)


def _arenas(facts: Facts) -> Iterator[Row]:
    free = (facts.now.arenas_free, facts.now.segments_free)
    for tier, empty in zip(facts.now.tiers, free, strict=False):
        yield (tier.name, "serving"), tier.arenas
        yield (tier.name, "free"), empty


def _hits(facts: Facts) -> dict[str, float]:
    counted = facts.now.counters
    disk = {"disk": float(counted.lease_disk_hits)} if facts.disk else {}
    return {"dram": counted.lease_hits - counted.lease_disk_hits} | disk


def _misses(facts: Facts) -> Iterator[Row]:
    yield from facts.now.misses.items()


def _load_seconds(facts: Facts) -> Iterator[Row]:
    for one in facts.now.tenants:
        for tier in TIERS if facts.disk else TIERS[:1]:
            yield (one.name, tier), facts.load_s.get((one.name, tier), 0.0)


def _evicted(facts: Facts) -> Iterator[Row]:
    yield ("dram", "room"), facts.now.evicted
    yield ("dram", "operator"), facts.now.counters.evicted_by_operators
    if facts.disk:
        yield ("disk", "operator"), facts.now.counters.disk_evicted_by_operators


def _reserved(facts: Facts) -> dict[str, float]:
    counted = facts.now.counters
    refused = ("full", "busy", "quota", "no_parent", "draining")
    return {name: getattr(counted, name) for name in ("granted", "known", "pending")} | {
        name: getattr(counted, f"refused_{name}") for name in refused
    }


def _memory(facts: Facts) -> dict[str, float]:
    dram = facts.now.tiers[0]
    return {name: getattr(dram, f"{name}_bytes") for name in ("populated", "locked", "huge", "stale")}


def _recycled(facts: Facts) -> dict[str, float]:
    disk = {"disk": float(facts.disk.counters.segments_recycled)} if facts.disk else {}
    return {"dram": facts.now.counters.arenas_recycled} | disk


def _pin_events(facts: Facts) -> dict[str, float]:
    tally = facts.now.pin_tally
    return {name: getattr(tally, name) for name in _PIN_EVENTS}


def _prefetches(facts: Facts) -> dict[str, float]:
    tally = facts.now.prefetch_tally
    return {name: getattr(tally, name) for name in _PREFETCHES}


def _prefetched(facts: Facts) -> dict[str, float]:
    tally = facts.now.prefetch_tally
    return {name: getattr(tally, f"{name}_bytes") for name in ("fetched", "used", "wasted")}


def _faults(facts: Facts) -> dict[str, float]:
    found: dict[str, float] = {"verify": facts.now.verify_faults, "changed": facts.now.changed}
    if facts.disk:
        counted = facts.disk.counters
        found |= {
            "damaged": counted.damaged, "load": counted.load_faults, "gone": counted.gone, "save": counted.save_faults,
            "erase": counted.erase_faults, "commit": counted.commit_faults,
        }  # fmt: skip
    return found


_PIN_EVENTS: Final = ("pinned", "ended", "expired", "refreshed", "dropped", "over_budget", "gave_way")
_PREFETCHES: Final = ("asked", "refused", "merged", "cancelled", "late", "no_room")

# fmt: off
METRICS: Final[tuple[Metric, ...]] = (
    Metric("kvstored_build_info", "gauge", "Always 1: which build serves.", ("version", "protocol"),
           lambda facts: [((facts.version, str(facts.protocol)), 1)]),
    _one("kvstored_serving", "gauge", "1 while new blocks are taken: neither draining nor stopping.",
         lambda facts: facts.serving),
    _one("kvstored_draining", "gauge", "1 while an operator drains it.", lambda facts: facts.now.draining),
    _one("kvstored_warnings", "gauge", "Warnings that kvctl status has now.", lambda facts: facts.now.warnings),
    _one("kvstored_snapshot_timestamp_seconds", "gauge", "When these values were taken, since the epoch.",
         lambda facts: facts.now.at_unix_s),
    _one("kvstored_warm_start", "gauge", "1 if memory was taken over from the life before.",
         lambda facts: facts.now.kept.warm),
    _some("kvstored_restart_blocks", "gauge", "Blocks in memory of the life before, by what became of them.", "result",
          lambda facts: {"kept": facts.now.kept.blocks, "lost": facts.now.kept.lost}),
    _one("kvstored_unverified_blocks", "gauge", "Blocks kept over the restart and not looked at yet.",
         lambda facts: facts.now.unverified),

    # Clients
    _tenants("kvstored_sessions", "gauge", "Clients that are connected.", lambda one: one.sessions),
    _one("kvstored_sessions_opened_total", "counter", "Clients that have connected.",
         lambda facts: facts.now.counters.sessions_opened),
    _one("kvstored_sessions_failed_total", "counter", "Clients that were sent away for what they did.",
         lambda facts: facts.now.counters.sessions_failed),
    _tenants("kvstored_in_flight_requests", "gauge", "Tickets, and leases that wait.", lambda one: one.in_flight),
    _tenants("kvstored_refused_requests_total", "counter", "Blocks for which there was no room, and leases not let "
             "wait.", lambda one: one.refused),

    # Reading
    _one("kvstored_leases_total", "counter", "Leases that were asked for and answered.",
         lambda facts: facts.now.counters.leases),
    _some("kvstored_hit_blocks_total", "counter", "Blocks that were leased, by where they were.", "tier", _hits),
    Metric("kvstored_miss_blocks_total", "counter", "Blocks that a lease, or first a lookup, asked for and did not "
           "get, by what became of the first of them. The sum is exact, the reasons a sample.",
           ("reason", "tier"), _misses),
    _tenants_by_tier("kvstored_hit_bytes_total", "counter", "Bytes of blocks that were leased.",
                     lambda one: one.hit_bytes),
    _one("kvstored_matches_total", "counter", "Lookups that take nothing.", lambda facts: facts.now.counters.matches),
    _some("kvstored_match_blocks_total", "counter", "Blocks that were looked up.", "result",
          lambda facts: {"hit": facts.now.counters.match_hits, "miss": facts.now.counters.match_misses}),
    _one("kvstored_leases_expired_total", "counter", "Leases that ended by their deadline.",
         lambda facts: facts.now.counters.leases_expired),
    _one("kvstored_leases", "gauge", "Leases that are held.", lambda facts: facts.now.leases),
    _one("kvstored_waiting_leases", "gauge", "Leases that wait for blocks that are being stored.",
         lambda facts: facts.now.waiting_leases),

    # What it is worth
    _tenants_by_tier("kvstored_compute_saved_seconds_total", "counter", "Prefill that was not computed again, as "
                     "engines have timed theirs.", lambda one: one.saved_s),
    Metric("kvstored_load_seconds_total", "counter", "What loading instead took, estimated from the bandwidth that "
           "engines and drives have shown; nothing where nobody has measured it.", ("tenant", "tier"), _load_seconds),
    _tenants("kvstored_unpriced_hit_blocks_total", "counter", "Blocks that were leased and whose computing nobody has "
             "timed: they count as nothing saved.", lambda one: one.unpriced_blocks),

    # Writing
    _some("kvstored_reserve_blocks_total", "counter", "Blocks that clients wanted to store, by the answer.", "result",
          _reserved),
    _one("kvstored_published_blocks_total", "counter", "Blocks that were stored.",
         lambda facts: facts.now.counters.published),
    _one("kvstored_published_bytes_total", "counter", "Bytes of blocks that were stored.",
         lambda facts: facts.now.counters.published_bytes),
    _some("kvstored_unpublished_blocks_total", "counter", "Blocks that were begun and not stored: too late, or dropped "
          "meanwhile.", "reason",
          lambda facts: {"stale": facts.now.counters.stale, "discarded": facts.now.counters.discarded}),
    _one("kvstored_open_tickets", "gauge", "Blocks that are being stored.", lambda facts: facts.now.tickets),
    _one("kvstored_deleted_blocks_total", "counter", "Blocks that clients deleted, with what continued them.",
         lambda facts: facts.now.counters.deleted),
    Metric("kvstored_evicted_blocks_total", "counter", "Blocks that gave up their place: in memory for want of room, "
           "or in either tier because an operator evicted them.", ("tier", "reason"), _evicted),
    _one("kvstored_forgotten_blocks_total", "counter", "Blocks that were evicted from the last tier that had them.",
         lambda facts: facts.now.forgotten),

    # Room
    _some("kvstored_capacity_bytes", "gauge", "Size of a tier.", "tier",
          lambda facts: {tier.name: tier.capacity_bytes for tier in facts.now.tiers}),
    _some("kvstored_blocks", "gauge", "Blocks in a tier.", "tier",
          lambda facts: {tier.name: tier.blocks for tier in facts.now.tiers}),
    _tenants_by_tier("kvstored_assigned_bytes", "gauge", "Arenas and segments that a tenant has.",
                     lambda one: one.assigned_bytes),
    _tenants_by_tier("kvstored_used_bytes", "gauge", "Slots that hold blocks, pinned ones too.",
                     lambda one: one.used_bytes),
    _tenants("kvstored_pinned_bytes", "gauge", "Slots that pins keep, each once.", lambda one: one.pinned_bytes),
    _one("kvstored_pins", "gauge", "Pins that hold.", lambda facts: facts.now.pins),
    _some("kvstored_pin_events_total", "counter", "What happened to pins.", "event", _pin_events),
    Metric("kvstored_arenas", "gauge", "Arenas of memory and segments of disk, by whether a tenant has them.",
           ("tier", "state"), _arenas),
    _some("kvstored_arenas_recycled_total", "counter", "Arenas that were emptied for somebody else.", "tier",
          _recycled),
    _some("kvstored_memory_bytes", "gauge", "Memory of arenas: populated, of that locked and in huge pages; stale: "
          "given up and still held by clients.", "kind", _memory),

    _one("kvstored_out_of_use_bytes", "gauge", "Slots of memory that wait until a client that may write there is gone.",
         lambda facts: facts.now.stranded_bytes),
    _one("kvstored_scrubbed_bytes_total", "counter", "Bytes of memory that were hashed again.",
         lambda facts: facts.now.scrubbed_bytes),

    # Ahead of time
    _some("kvstored_prefetches_total", "counter", "Prefetches that were asked for, and those that came to little.",
          "result", _prefetches),
    _some("kvstored_prefetched_bytes_total", "counter", "Bytes that were fetched ahead of use; used, or wasted, in the "
          "end.", "result", _prefetched),

    # Disk
    _on_disk("kvstored_disk_serving", "gauge", "1 while the disk tier answers.",
             lambda _, disk: disk.state == "serving"),
    _on_disk("kvstored_disk_saved_blocks_total", "counter", "Blocks that were written to disk.",
             lambda _, disk: disk.counters.saved),
    _on_disk("kvstored_disk_saved_bytes_total", "counter", "Bytes of them there, headers and padding included.",
             lambda _, disk: disk.counters.saved_bytes),
    _on_disk("kvstored_disk_packed_blocks_total", "counter", "Blocks that were written smaller than they are.",
             lambda _, disk: disk.counters.packed),
    Metric("kvstored_disk_unsaved_blocks_total", "counter", "Blocks that were admitted to disk and not written.",
           ("reason",), lambda facts: [(("no_room",), facts.disk.counters.dropped),
                                       (("not_worth",), facts.disk.counters.not_worth)] if facts.disk else []),
    _on_disk("kvstored_disk_loaded_blocks_total", "counter", "Blocks that were read from disk.",
             lambda _, disk: disk.counters.loaded),
    _on_disk("kvstored_disk_loaded_bytes_total", "counter", "Bytes of them in memory.",
             lambda _, disk: disk.counters.loaded_bytes),
    _on_disk("kvstored_disk_erased_blocks_total", "counter", "Blocks that were dropped and overwritten.",
             lambda _, disk: disk.counters.erased),
    _on_disk("kvstored_disk_commits_total", "counter", "Transactions of the index.",
             lambda _, disk: disk.counters.commits),
    _on_disk("kvstored_disk_foreign_files", "gauge", "Files among the segments that are not ours, or that no key "
             "opens: left alone.", lambda _, disk: disk.foreign_files),
    _on_disk("kvstored_disk_unread_segments", "gauge", "Segments that could not be read when the daemon started: left "
             "alone, and read by the next start if it can.", lambda _, disk: disk.unread_segments),
    _on_disk("kvstored_disk_surplus_segments", "gauge", "Segments that the last start dropped, beyond a limit that had "
             "shrunk.", lambda _, disk: disk.surplus_segments),
    _on_disk("kvstored_write_behind_chains", "gauge", "Chains that wait to be written to disk.",
             lambda _, disk: disk.queued_chains),
    _on_disk("kvstored_write_behind_running_bytes", "gauge", "Bytes that are being packed or written.",
             lambda _, disk: disk.running_bytes),
    _on_disk("kvstored_write_behind_lag_bytes", "gauge", "Bytes stored since the chain was queued that waits longest.",
             lambda facts, _: facts.now.write_behind_lag_bytes),
    _drives("kvstored_drive_up", "gauge", "1 while a directory takes all that it is given.",
            lambda drive: drive.state == "ok"),
    _drives("kvstored_drive_read_bytes_total", "counter", "Bytes read.", lambda drive: drive.read_bytes),
    _drives("kvstored_drive_written_bytes_total", "counter", "Bytes written: what wears the drive out.",
            lambda drive: drive.written_bytes),
    _drives("kvstored_drive_errors_total", "counter", "System calls that failed or stopped short.",
            lambda drive: drive.errors),
    _drives("kvstored_drive_damaged_blocks_total", "counter", "Blocks that were not what was written.",
            lambda drive: drive.damaged),
    _drives("kvstored_drive_free_bytes", "gauge", "Free bytes of its file system.", lambda drive: drive.free_bytes),
    _drives("kvstored_drive_capacity_bytes", "gauge", "Size of its file system.", lambda drive: drive.capacity_bytes),

    # GPUs
    _device("kvstored_device_lost", "gauge", "1 once the GPU does nothing any more for the daemon.",
            lambda one: one.lost),
    _device("kvstored_device_emulated", "gauge", "1 if it is no GPU, but an emulation in host memory.",
            lambda one: one.emulated),
    _device("kvstored_device_attached_bytes", "gauge", "Memory of engines that the daemon has open.",
            lambda one: one.attached_bytes),
    _device("kvstored_device_loads_total", "counter", "Loads that engines asked for (mode daemon).",
            lambda one: one.loads),
    _device("kvstored_device_saves_total", "counter", "Saves that engines asked for (mode daemon).",
            lambda one: one.saves),
    _device("kvstored_device_failed_total", "counter", "Of both, those that the GPU failed.", lambda one: one.failed),
    _device("kvstored_device_loaded_bytes_total", "counter", "Bytes of blocks copied into memory of engines.",
            lambda one: one.loaded_bytes),
    _device("kvstored_device_saved_bytes_total", "counter", "Bytes of blocks copied out of memory of engines.",
            lambda one: one.saved_bytes),
    _device("kvstored_hbm_capacity_bytes", "gauge", "What the tier on the GPU has.", lambda one: one.hbm_bytes),
    _device("kvstored_hbm_used_bytes", "gauge", "Of that, slots with copies of blocks.",
            lambda one: one.hbm_used_bytes),
    _device("kvstored_hbm_hit_blocks_total", "counter", "Blocks that were loaded from there.",
            lambda one: one.hbm_hits),
    _device("kvstored_hbm_promoted_blocks_total", "counter", "Blocks that were copied there.",
            lambda one: one.hbm_promoted),
    _device("kvstored_hbm_evicted_blocks_total", "counter", "Copies that gave way there.", lambda one: one.hbm_evicted),
    _device("kvstored_hbm_blocks", "gauge", "Copies that are there, or on their way.", lambda one: one.hbm_blocks),
    _device("kvstored_hbm_hit_bytes_total", "counter", "Bytes of blocks that were loaded from there.",
            lambda one: one.hbm_hit_bytes),
    _device("kvstored_hbm_promoted_bytes_total", "counter", "Bytes of slots that were copied there.",
            lambda one: one.hbm_promoted_bytes),
    _device("kvstored_hbm_unpinned_blocks_total", "counter", "Pinned copies among those that gave way.",
            lambda one: one.hbm_unpinned),
    _device("kvstored_hbm_residency_seconds_total", "counter", "How long the copies that gave way had been there; by "
            "their number, how long one lasts.", lambda one: one.hbm_evicted_after_s),
    _tenants("kvstored_hbm_tenant_used_bytes", "gauge", "Slots with copies in memory of GPUs.",
             lambda one: one.hbm_used_bytes),
    _tenants("kvstored_hbm_tenant_pinned_bytes", "gauge", "Slots that pins keep there.",
             lambda one: one.hbm_pinned_bytes),
    _tenants("kvstored_hbm_tenant_hit_bytes_total", "counter", "Bytes of blocks that were loaded out of memory of "
             "GPUs.", lambda one: one.hbm_hit_bytes),

    # Beyond this host
    _remote("kvstored_remote_reading", "gauge", "1 while calls that read from the remote tier go through.",
            lambda remote: remote.reading in {"goes on", "fails"}),
    _remote("kvstored_remote_writing", "gauge", "1 while calls that write to the remote tier go through.",
            lambda remote: remote.writing in {"goes on", "fails"}),
    _remote("kvstored_remote_capacity_bytes", "gauge", "What this host may have written there.",
            lambda remote: remote.capacity_bytes),
    _remote("kvstored_remote_used_bytes", "gauge", "What it has written there and not removed.",
            lambda remote: remote.used_bytes),
    _remote("kvstored_remote_sought_chains_total", "counter", "Chains that were asked for there, after a miss.",
            lambda remote: remote.sought),
    _remote("kvstored_remote_promoted_blocks_total", "counter", "Blocks that were read there and stored here.",
            lambda remote: remote.promoted),
    _remote("kvstored_remote_kept_blocks_total", "counter", "Blocks that were written there, or found to be there.",
            lambda remote: remote.kept),
    _remote("kvstored_remote_owed_keys", "gauge", "Keys that were deleted, and are still to be removed there.",
            lambda remote: remote.owed),
    _remote("kvstored_remote_closed_namespaces", "gauge", "Namespaces of which more was deleted than can be noted: "
            "neither read nor written there until they have been cleared.", lambda remote: remote.closed),
    _remote("kvstored_remote_deletes_not_noted_total", "counter", "Requests to delete that came faster than they "
            "could be noted.", lambda remote: remote.not_noted),
    _remote("kvstored_remote_keys_not_remembered_total", "counter", "Keys that were deleted, and forgotten for others "
            "before they were removed there.", lambda remote: remote.not_remembered),
    _remote("kvstored_remote_read_bytes_total", "counter", "Bytes read there.", lambda remote: remote.read_bytes),
    _remote("kvstored_remote_written_bytes_total", "counter", "Bytes written there.",
            lambda remote: remote.written_bytes),
    Metric("kvstored_remote_requests_total", "counter", "Requests, listings and deletes too.", ("kind",),
           lambda facts: [(("read",), facts.now.remote.reads), (("write",), facts.now.remote.writes)]
           if facts.now.remote else []),
    Metric("kvstored_remote_faults_total", "counter", "Requests that were not answered, refused, or found no room; "
           "objects that were damaged, or gone when they were to be read.", ("kind",), _remote_faults),

    # What routers are told
    _events("kvstored_events_changes_total", "counter", "Changes of blocks that were told to routers, one for a "
            "block and a look.", lambda events: events.changes),
    _events("kvstored_events_messages_total", "counter", "Messages that these made.", lambda events: events.batches),
    _events("kvstored_events_overruns_total", "counter", "Times that a subscriber of ZeroMQ fell so far behind that "
            "it missed messages; how many it missed nobody knows.", lambda events: events.overruns),
    _events("kvstored_events_replays_total", "counter", "Requests of subscribers for what they missed.",
            lambda events: events.replays),
    _events("kvstored_events_replayed_messages_total", "counter", "Messages sent again for these.",
            lambda events: events.replayed),
    _events("kvstored_events_faults_total", "counter", "Times that something could not be told, or a subscriber not be "
            "answered; what is there is told anew.", lambda events: events.faults),
    _events("kvstored_events_number_faults_total", "counter", "Times that the number that is kept over restarts could "
            "not be read or written.", lambda events: events.number_faults),
    _events("kvstored_events_waiting_changes", "gauge", "Changes that were found and not passed on yet; while 65,536 "
            "wait, nobody looks for more.", lambda events: events.waiting),
    _events("kvstored_events_subscribers", "gauge", "Connections to the sockets of ZeroMQ.",
            lambda events: events.subscribers),
    _events("kvstored_events_watchers", "gauge", "Streams of changes on control sockets.",
            lambda events: events.watchers),

    # Faults
    _some("kvstored_faults_total", "counter", "Blocks (of commit: transactions) that a fault cost: damaged, not "
          "readable, gone with their segment, not written, not erased, not committed, not what was kept, changed in "
          "memory after they were published.", "kind", _faults),
    _on_disk("kvstored_quarantined_slots", "gauge", "Places on disk that are not used again.",
             lambda _, disk: disk.counters.quarantined),
)
# fmt: on

# Histograms are timed apart (metrics_timing.py): name, what it means, label.
HISTOGRAMS: Final = (
    ("kvstored_request_seconds", "What a frame takes the owner thread, of every 7th of each client.", "verb"),
    ("kvstored_disk_seconds", "What reading or writing some neighbouring blocks takes.", "operation"),
    ("kvstored_owner_lag_seconds", "How long a question waits for the owner thread; asked once a second.", ""),
)  # fmt: skip
