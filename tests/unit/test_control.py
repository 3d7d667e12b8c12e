"""The control server over a real Unix socket, with an owner that answers from memory in a thread of its own."""

import logging
import os
import queue
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.limits import MIB, PAGE_BYTES
from kvstore import report, report_costs, report_quotas
from kvstore.rules import Rule, Tier
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits, DiskState
from kvstored import control_verbs, door
from kvstored.admin import SCRUB_RATE, Admin
from kvstored.admin_disk import FILES_NAMED, NOTE_DAMAGED, PACKED_TRIED
from kvstored.config import load
from kvstored.control import ControlServer
from kvstored.control_port import RefusedError
from kvstored.drive_health import DriveState, DriveStatus
from kvstored.index import State
from kvstored.index_marks import OWED, DamagedError
from kvstored.keep import NoKeeper
from kvstored.owed import read_owed
from kvstored.placement import Placement
from kvstored.settings import DISK_DIRECTORIES, DISK_PATH_BYTES
from tests.core import Core, chain
from tests.unit.control_fakes import (
    BLOCK_BYTES,
    DIGEST_A,
    DIGEST_B,
    KEYS,
    MemoryPort,
    ThreadOwner,
    disk_report,
    drive_report,
)

HEX_A, HEX_B = DIGEST_A.hex(), DIGEST_B.hex()
SERVICE = "kvstored.control.v1.Control"
WAIT_S = 10.0  # for what comes at once unless something is broken
Health = health_pb2.HealthCheckResponse


@dataclass
class Served:
    """A running server, and what a caller needs."""

    server: ControlServer
    owner: ThreadOwner
    port: MemoryPort
    channel: grpc.Channel

    @property
    def stub(self) -> Any:
        return control_pb2_grpc.ControlStub(self.channel)

    def health(self, service: str = "") -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S).status)

    def refusal(self, verb: str, request: object, timeout_s: float | None = WAIT_S) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            getattr(self.stub, verb)(request, timeout=timeout_s)
        return caught.value.code(), str(caught.value.details())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    port = MemoryPort()
    owner = ThreadOwner(port)
    server = ControlServer(owner, tmp_path)
    server.start()
    with grpc.insecure_channel(f"unix:{server.path}") as channel:
        yield Served(server, owner, port, channel)
    server.stop(0.0)
    owner.stop()


class TestSocket:
    def test_is_0600_before_anybody_can_find_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[int, int, bool]] = []
        rename = Path.rename

        def spy(source: Path, target: Path) -> Path:
            seen.append((mode(source.parent), mode(source), target.exists()))
            return rename(source, target)

        monkeypatch.setattr(Path, "rename", spy)
        port = MemoryPort()
        owner = ThreadOwner(port)
        server = ControlServer(owner, tmp_path)
        before = os.umask(0)
        try:
            server.start()
        finally:
            os.umask(before)
        assert seen == [(0o700, 0o600, False)]
        assert mode(server.path) == 0o600
        assert [entry.name for entry in tmp_path.iterdir()] == ["control.sock"]
        server.stop(0.0)
        owner.stop()

    def test_is_removed_by_stop_and_stop_may_be_repeated(self, served: Served) -> None:
        served.server.stop(0.0)
        assert not served.server.path.exists()
        served.server.stop(0.0)

    def test_of_a_successor_survives_stop(self, served: Served) -> None:
        served.server.path.unlink()
        served.server.path.touch()
        served.server.stop(0.0)
        assert served.server.path.exists()

    def test_left_by_a_dead_daemon_is_replaced(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "control.sock"))
        owner = ThreadOwner(MemoryPort())
        server = ControlServer(owner, tmp_path)
        server.start()
        with grpc.insecure_channel(f"unix:{server.path}") as channel:
            control_pb2_grpc.ControlStub(channel).Ping(pb.PingRequest(), timeout=WAIT_S)
        server.stop(0.0)
        owner.stop()

    def test_may_lie_in_a_directory_with_odd_letters(self, tmp_path: Path) -> None:
        odd = tmp_path / "a b%20#é"
        odd.mkdir()
        server = ControlServer(NoOwner(), odd)
        server.start()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(odd / "control.sock"))
        server.stop(0.0)

    def test_path_too_long_for_a_socket_is_a_clear_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="longer than the 107 bytes"):
            ControlServer(NoOwner(), tmp_path / ("x" * 107)).start()

    def test_without_its_directory_is_an_error_and_leaves_nothing(self, tmp_path: Path) -> None:
        server = ControlServer(NoOwner(), tmp_path / "absent")
        with pytest.raises(FileNotFoundError):
            server.start()
        server.stop(0.0)
        assert list(tmp_path.iterdir()) == []


class TestAnswers:
    def test_status_is_the_report_field_by_field(self, served: Served) -> None:
        answer = served.stub.GetStatus(pb.GetStatusRequest(), timeout=WAIT_S)
        same(answer, served.port.status())

    def test_status_without_a_disk_tier_has_no_such_part(self, served: Served) -> None:
        served.port.disk = None
        answer = served.stub.GetStatus(pb.GetStatusRequest(), timeout=WAIT_S)
        assert not answer.HasField("disk")
        assert [tier.name for tier in answer.tiers] == ["dram"]

    def test_status_of_the_most_drives_with_the_longest_names_is_small(self, served: Served) -> None:
        name = "/" + "d" * (DISK_PATH_BYTES - 1)
        drives = (drive_report(name, reason=name),) * DISK_DIRECTORIES
        served.port.disk = replace(disk_report(), drives=drives, foreign=(name + "/segments/x",) * FILES_NAMED)
        answer = served.stub.GetStatus(pb.GetStatusRequest(), timeout=WAIT_S)
        assert answer.ByteSize() < 64 << 10

    def test_statistics_are_the_counters(self, served: Served) -> None:
        same(served.stub.GetStatistics(pb.GetStatisticsRequest(), timeout=WAIT_S).counters, served.port.counters())

    def test_lists_come_in_order_and_whole(self, served: Served) -> None:
        stub = served.stub
        same(stub.ListNamespaces(pb.ListNamespacesRequest(), timeout=WAIT_S).namespaces, served.port.namespaces())
        same(stub.ListTenants(pb.ListTenantsRequest(), timeout=WAIT_S).tenants, served.port.tenants())
        same(stub.ListClients(pb.ListClientsRequest(), timeout=WAIT_S).clients, served.port.clients())
        same(stub.GetConfig(pb.GetConfigRequest(), timeout=WAIT_S).settings, served.port.config())

    def test_ping_says_how_long_the_owner_took(self, served: Served) -> None:
        assert 0.0 < served.stub.Ping(pb.PingRequest(), timeout=WAIT_S).owner_s < WAIT_S

    def test_reflection_names_every_service(self, served: Served) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=WAIT_S)
        names = {service.name for service in answer.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names

    @pytest.mark.parametrize(
        ("message", "value"),
        [
            (pb.Tier, report.TierReport),
            (pb.Counters, report.Counters),
            (pb.Namespace, report.NamespaceReport),
            (pb.Tenant, report.TenantReport),
            (pb.Client, report.SessionReport),
            (pb.ConfigValue, report.ConfigValue),
            (pb.GetStatusResponse, report.DaemonReport),
            (pb.ClearResponse, report.ClearReport),
            (pb.DiskCounters, report.DiskCounters),
            (pb.Drive, report.DriveReport),
            (pb.Disk, report.DiskReport),
            (pb.Restart, report.RestartReport),
            (pb.ScrubResponse, report.ScrubReport),
            (pb.Policy, report.PolicyReport),
            (pb.PolicyChange, report.PolicyChange),
            (pb.Quota, report_quotas.QuotaReport),
            (pb.GetCostsResponse, report_costs.CostsReport),
            (pb.NamespaceCosts, report_costs.NamespaceCosts),
            (pb.Prefill, report_costs.PrefillReport),
            (pb.Run, report_costs.RunReport),
            (pb.Way, report_costs.WayReport),
        ],
    )
    def test_messages_mirror_the_reports_name_by_name(self, message: Any, value: Any) -> None:
        assert {one.name for one in message.DESCRIPTOR.fields} == {one.name for one in fields(value)}


class TestDrain:
    def test_flips_health_and_undrain_flips_it_back(self, served: Served) -> None:
        assert [served.health(), served.health(SERVICE)] == [Health.SERVING] * 2
        served.stub.Drain(pb.DrainRequest(), timeout=WAIT_S)
        assert served.port.draining
        assert [served.health(), served.health(SERVICE)] == [Health.NOT_SERVING] * 2
        served.stub.Undrain(pb.UndrainRequest(), timeout=WAIT_S)
        assert not served.port.draining
        assert [served.health(), served.health(SERVICE)] == [Health.SERVING] * 2

    def test_is_seen_by_watchers(self, served: Served) -> None:
        watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status == Health.SERVING
        served.stub.Drain(pb.DrainRequest(), timeout=WAIT_S)
        assert next(watch).status == Health.NOT_SERVING
        watch.cancel()

    def test_that_fails_leaves_health_alone(self, served: Served) -> None:
        served.port.trouble = RuntimeError("broken")
        assert served.refusal("Drain", pb.DrainRequest())[0] is grpc.StatusCode.INTERNAL
        assert served.health() == Health.SERVING

    def test_whose_caller_gave_up_after_it_began_still_flips_health(self, served: Served) -> None:
        began, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            began.set()
            go_on.wait()

        served.port.before_drain = hold
        watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status == Health.SERVING
        call = served.stub.Drain.future(pb.DrainRequest(), timeout=WAIT_S)
        assert began.wait(WAIT_S)
        call.cancel()
        go_on.set()
        assert next(watch).status == Health.NOT_SERVING
        watch.cancel()


class TestClear:
    @pytest.mark.parametrize(
        ("request_", "scope", "blocks"),
        [
            (pb.ClearRequest(everything={}), report.ClearScope(), 8),
            (pb.ClearRequest(everything={}, tenant="web"), report.ClearScope("web"), 1),
            (pb.ClearRequest(namespace_digest=HEX_A), report.ClearScope(None, DIGEST_A), 6),
            (pb.ClearRequest(namespace_digest=HEX_A, tenant="web"), report.ClearScope("web", DIGEST_A), 1),
            (
                pb.ClearRequest(prefix={"namespace_digest": HEX_A, "keys": KEYS[2:4]}),
                report.ClearScope(None, DIGEST_A, KEYS[2:4]),
                3,
            ),
        ],
    )
    def test_drops_what_its_scope_says(
        self, served: Served, request_: pb.ClearRequest, scope: report.ClearScope, blocks: int
    ) -> None:
        request_.dry_run = True
        counted = served.stub.Clear(request_, timeout=WAIT_S)
        assert (counted.blocks, counted.bytes, counted.dry_run) == (blocks, blocks * BLOCK_BYTES, True)
        request_.dry_run = False
        dropped = served.stub.Clear(request_, timeout=WAIT_S)
        assert (dropped.blocks, dropped.leased_blocks, dropped.dry_run) == (blocks, counted.leased_blocks, False)
        assert served.port.scopes == [scope, scope]
        assert served.port.tier().blocks == 8 - blocks

    @pytest.mark.parametrize(
        ("request_", "reason"),
        [
            (pb.ClearRequest(), "nothing to clear"),
            (pb.ClearRequest(tenant="web"), "nothing to clear"),
            (pb.ClearRequest(everything={}, tenant=""), "tenant must not be empty"),
            (pb.ClearRequest(namespace_digest="abc"), "64 hex digits"),
            (pb.ClearRequest(namespace_digest=HEX_A[:-2] + "zz"), "64 hex digits"),
            (pb.ClearRequest(namespace_digest=HEX_A[:-2] + "  "), "64 hex digits"),
            (pb.ClearRequest(namespace_digest=HEX_A + "00"), "64 hex digits"),
            (pb.ClearRequest(prefix={"keys": KEYS[:1]}), "keys mean nothing without"),
            (pb.ClearRequest(prefix={"namespace_digest": HEX_A}), "1 to 1024 keys"),
            (pb.ClearRequest(prefix={"namespace_digest": HEX_A, "keys": [b"short"]}), "32 bytes, not 5"),
            (pb.ClearRequest(prefix={"namespace_digest": HEX_A, "keys": [KEYS[0]] * 1025}), "not 1025"),
        ],
    )
    def test_refuses_a_malformed_scope_without_asking_the_owner(
        self, served: Served, request_: pb.ClearRequest, reason: str
    ) -> None:
        code, text = served.refusal("Clear", request_)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert reason in text
        assert not served.owner.asked.is_set()

    @pytest.mark.parametrize(
        ("request_", "text"),
        [
            (pb.ClearRequest(everything={}, tenant="nobody"), "no tenant is called nobody"),
            (pb.ClearRequest(namespace_digest="00" * 32), "no namespace has the digest 000000000000"),
            (
                pb.ClearRequest(namespace_digest=HEX_B, tenant="web"),
                "no namespace has the digest abcdef02abcd",
            ),
        ],
    )
    def test_of_what_does_not_exist_is_not_found(self, served: Served, request_: pb.ClearRequest, text: str) -> None:
        assert served.refusal("Clear", request_) == (grpc.StatusCode.NOT_FOUND, text)


class TestScrub:
    def test_starts_at_the_rate_that_was_asked_for_and_says_how_far_it_is(self, served: Served) -> None:
        started = served.stub.Scrub(pb.ScrubRequest(start=True, rate_bytes_per_s=0), timeout=WAIT_S)
        assert (started.running, started.rate_bytes_per_s, started.total_blocks) == (True, 0, 3)
        looks = [served.stub.Scrub(pb.ScrubRequest(), timeout=WAIT_S) for _ in range(3)]
        assert [look.done_blocks for look in looks] == [1, 2, 3]
        same(looks[-1], served.port.scrubbed)

    def test_without_a_rate_goes_at_the_configured_one(self, served: Served) -> None:
        assert served.stub.Scrub(pb.ScrubRequest(start=True), timeout=WAIT_S).rate_bytes_per_s == 1 << 20

    def test_names_the_tier_and_means_disk_unless_told(self, served: Served) -> None:
        served.port.disk = None
        served.stub.Scrub(pb.ScrubRequest(start=True, tier="dram"), timeout=WAIT_S)
        named = [served.port.scrubbed_tier]
        served.refusal("Scrub", pb.ScrubRequest(start=True))
        named.append(served.port.scrubbed_tier)
        assert named == [Tier.DRAM, Tier.DISK]

    def test_only_looks_unless_told_to_start(self, served: Served) -> None:
        same(served.stub.Scrub(pb.ScrubRequest(), timeout=WAIT_S), report.ScrubReport())

    def test_without_a_disk_tier_is_refused_with_a_remedy(self, served: Served) -> None:
        served.port.disk = None
        refusal = served.refusal("Scrub", pb.ScrubRequest(start=True))
        assert refusal == (grpc.StatusCode.FAILED_PRECONDITION, "there is no disk tier; give --disk")

    @pytest.mark.parametrize(
        "request_",
        [
            pb.ScrubRequest(start=True, rate_bytes_per_s=(1 << 40) + 1),
            pb.ScrubRequest(rate_bytes_per_s=5),
            pb.ScrubRequest(start=True, tier="tape"),
        ],
    )
    def test_refuses_a_rate_or_tier_that_means_nothing_without_asking_the_owner(
        self, served: Served, request_: pb.ScrubRequest
    ) -> None:
        assert served.refusal("Scrub", request_)[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert not served.owner.asked.is_set()


class TestAdmin:
    """What the owner thread says, from a store on a fake drive."""

    def test_counts_blocks_in_the_tier_where_they_lie(self) -> None:
        parts = Parts()
        parts.fill()
        dram, disk = parts.admin.status().tiers
        assert (dram.name, dram.blocks, dram.used_bytes) == ("dram", 4, 4 * PAGE_BYTES)
        assert (disk.name, disk.blocks, disk.used_bytes) == ("disk", 4, 8 * PAGE_BYTES)
        assert (disk.capacity_bytes, disk.assigned_bytes) == (4 * SEGMENT_BYTES, SEGMENT_BYTES)
        assert (disk.arenas, disk.arena_bytes) == (1, SEGMENT_BYTES)
        counters = parts.disk().counters
        assert (counters.saved, counters.saved_bytes, counters.loaded) == (4, 8 * PAGE_BYTES, 0)

    def test_of_a_store_without_disk_has_one_tier(self) -> None:
        status = Parts(disk=False).admin.status()
        assert [tier.name for tier in status.tiers] == ["dram"]
        assert status.disk is None

    def test_serves_unless_it_is_drained(self) -> None:
        admin = Parts().admin
        assert admin.status().serving
        admin.drain(on=True)
        assert (admin.status().serving, admin.status().draining) == (False, True)
        admin.drain(on=False)
        assert admin.status().serving

    def test_that_stops_is_neither_drained_nor_undrained(self) -> None:
        parts = Parts()
        parts.admin.ending = parts.core.store.draining = True
        for on in (True, False):
            with pytest.raises(RefusedError, match="stopping"):
                parts.admin.drain(on=on)
        assert parts.core.store.draining
        assert not parts.admin.status().serving

    def test_of_a_well_set_up_daemon_has_no_warning(self) -> None:
        parts = Parts()
        parts.fill()
        assert parts.admin.status().warnings == ()
        disk = parts.disk()
        assert (disk.state, disk.index_state, disk.admission, disk.codec) == ("serving", "ready", "all", "raw")
        assert [drive.directory for drive in disk.drives] == ["/mnt/a"]
        assert parts.admin.status().restart == report.RestartReport(
            began="cold", reason="nothing was kept", found_blocks=0, kept_blocks=0, withheld_slots=0,
            unverified_blocks=0, verified_blocks=0, verify_faults=0, keeper="none",
        )  # fmt: skip

    @pytest.mark.parametrize("state", [state for state in DriveState if state is not DriveState.OK])
    def test_warns_of_a_drive_in_any_state_but_ok_with_what_to_do(self, state: DriveState) -> None:
        parts = Parts()
        parts.hands.drives.found = (replace(WELL_DRIVE, state=state, reason="Input/output error"),)
        (warning,) = parts.admin.status().warnings
        found, _, remedy = warning.partition("; ")
        assert found == f"disk /mnt/a is {state.value} (Input/output error)"
        assert remedy

    def test_warns_of_a_drive_without_direct_io(self) -> None:
        parts = Parts()
        parts.hands.drives.found = (replace(WELL_DRIVE, direct=False),)
        (warning,) = parts.admin.status().warnings
        assert warning.startswith("disk /mnt/a has no direct I/O: blocks go through the page cache and fill memory; ")

    @pytest.mark.parametrize(
        ("state", "reason", "text"),
        [
            (
                State.LOST,
                "killed by signal 9",
                "the index on disk is lost (killed by signal 9); restart kvstored when it suits: ",
            ),
            (State.HUNG, "", "the index on disk hangs: nothing becomes durable until it answers; "),
            (State.READY, "No space left on device", "the index on disk is not written (No space left on device); "),
        ],
    )
    def test_warns_of_an_index_that_does_not_do_its_work(self, state: State, reason: str, text: str) -> None:
        parts = Parts()
        parts.hands.index.state, parts.hands.index.reason = state, reason
        (warning,) = parts.admin.status().warnings
        assert warning.startswith(text)

    def test_shows_how_far_a_rebuild_is(self) -> None:
        parts = Parts()
        parts.hands.index.state, parts.hands.index.read = State.REBUILDING, (3, 12)
        disk = parts.disk()
        assert (disk.index_state, disk.rebuild_done_slots, disk.rebuild_total_slots) == ("rebuilding", 3, 12)
        assert parts.admin.status().warnings == ()

    def test_tells_what_the_index_found_that_is_no_block(self) -> None:
        parts = Parts()
        strangers = [Path(f"/mnt/a/segments/{number}") for number in range(20)]
        parts.hands.loaded = Found(strangers, ["/mnt/b: Permission denied"], "it was damaged", 5)
        disk = parts.disk()
        assert (disk.rebuilt, disk.useless_records, disk.foreign_files) == ("it was damaged", 5, 20)
        assert disk.foreign == tuple(map(str, strangers[:FILES_NAMED]))
        unreadable, foreign = parts.admin.status().warnings
        assert unreadable.startswith("disk /mnt/b: Permission denied: what lies there was not taken over; ")
        assert foreign.startswith("20 files among the segments are not ours, or are encrypted with a key that is")
        assert "such as /mnt/a/segments/0; " in foreign

    def test_tells_what_could_not_be_read_from_what_is_somebody_elses(self) -> None:
        """And does not have operators remove what is theirs."""
        parts = Parts()
        ours = [Path(f"/mnt/a/segments/{number:08d}.seg") for number in range(20)]
        parts.hands.loaded = Found([Path("/mnt/a/segments/x")], [], "", 0, unread=ours)
        disk = parts.disk()
        assert (disk.foreign_files, disk.unread_segments) == (1, 20)
        assert disk.unread == tuple(map(str, ours[:FILES_NAMED]))
        unread, foreign = parts.admin.status().warnings
        assert unread.startswith(f"20 files among the segments could not be read in this life, such as {ours[0]}: ")
        assert "; do not remove them: once its drive is mended and kvstored is restarted they are read again" in unread
        assert foreign.startswith("1 files among the segments are not ours")

    def test_says_of_a_lost_index_what_helps(self) -> None:
        parts = Parts()
        parts.hands.index.state, parts.hands.index.reason = State.LOST, "the package lmdb is not installed"
        parts.hands.loaded = Found([], [], "", 0, unread=[Path("/mnt/a/segments/00000001.seg")])
        lost, unread = parts.admin.status().warnings
        assert "; see to that, and restart kvstored: it then reads the headers of all blocks" in lost
        assert "; do not remove them: once the index is mended they are read again" in unread

    def test_says_of_a_damaged_note_that_a_restart_is_not_enough(self, tmp_path: Path) -> None:
        note = tmp_path / OWED
        note.write_bytes(b"{}")
        with pytest.raises(DamagedError, match=NOTE_DAMAGED) as told:
            read_owed(note)
        parts = Parts()
        parts.hands.index.state, parts.hands.index.reason = State.LOST, str(told.value)
        (lost,) = parts.admin.status().warnings
        assert lost.startswith(f"the index on disk is lost ({note} is not what was written (")
        assert "; bring that file back as it was, or remove it together with what lies in the folders of disk" in lost
        assert lost.endswith(": a restart alone changes nothing")
        parts.hands.loaded = Found([], [], "", 0, unread=[tmp_path / "00000001.seg"])
        same, unread = parts.admin.status().warnings
        assert same == lost
        assert unread.endswith("; they stay as they are until that is settled")
        parts.hands.loaded = Found([], [], "", 0, store=b"")
        (off,) = parts.admin.status().warnings
        assert off.startswith("the disk tier is off (")
        assert off.endswith(": a restart alone changes nothing")

    def test_warns_that_disk_is_off_where_nothing_there_can_be_used(self) -> None:
        parts = Parts()
        parts.hands.loaded = Found([], [], "", 0, store=b"", unread=[Path("/mnt/a/segments/00000001.seg")])
        parts.hands.index.state, parts.hands.index.reason = State.LOST, "written by another version"
        (warning,) = parts.admin.status().warnings
        assert warning.startswith("the disk tier is off (written by another version): nothing is read or written")

    def test_says_that_disk_opens_before_there_are_drives(self) -> None:
        parts = Parts()
        hands: Any = parts.hands
        hands.drives, parts.core.store.disk.state = None, DiskState.OPENING
        assert (parts.disk().state, parts.disk().drives) == ("opening", ())

    def test_warns_if_packing_was_wished_for_and_does_not_pay(self) -> None:
        parts = Parts(codec=Wish.BF16_PLANES_ZSTD)
        tally = parts.core.store.disk.demotion.tally
        tally.saved, tally.packed = PACKED_TRIED - 1, 0
        assert parts.admin.status().warnings == ()
        tally.saved = PACKED_TRIED
        (warning,) = parts.admin.status().warnings
        found = "only 0 of 256 blocks got smaller with disk.codec bf16-planes+zstd"
        assert warning == f"{found}; the rest is written raw: set it to auto"
        tally.packed = PACKED_TRIED // 2
        assert parts.admin.status().warnings == ()

    def test_passes_on_what_memory_and_its_keeper_complain_of(self) -> None:
        parts = Parts(keeper_fault="memory does not survive a restart: no fd-keeper")
        parts.faults.append("memory is not locked")
        assert parts.admin.status().warnings == (
            "memory is not locked",
            "memory does not survive a restart: no fd-keeper",
        )

    @pytest.mark.parametrize(("rate", "begun"), [(None, 10 * MIB), (0, 0), (77, 77)])
    def test_scrubs_at_the_rate_given_or_configured(self, rate: int | None, begun: int) -> None:
        parts = Parts()
        parts.fill()
        assert parts.admin.scrub(start=False, rate=None) == report.ScrubReport()
        started = parts.admin.scrub(start=True, rate=rate)
        assert (started.running, started.rate_bytes_per_s, started.total_blocks) == (True, begun, 4)

    def test_scrubs_at_a_modest_rate_where_the_background_scrub_is_off(self) -> None:
        assert Parts(scrub_rate="0").admin.scrub(start=True, rate=None).rate_bytes_per_s == SCRUB_RATE

    def test_scrubs_all_of_memory_where_there_is_no_disk_too(self) -> None:
        parts = Parts(disk=False)
        parts.fill()
        assert parts.admin.scrub(start=False, rate=None, tier=Tier.DRAM) == report.ScrubReport()
        started = parts.admin.scrub(start=True, rate=None, tier=Tier.DRAM)
        assert (started.running, started.rate_bytes_per_s, started.total_blocks) == (True, 100 * MIB, 4)

    def test_does_not_scrub_before_disk_serves(self) -> None:
        parts = Parts()
        parts.core.store.disk.state = DiskState.ADOPTING
        with pytest.raises(RefusedError, match="disk is adopting; try again"):
            parts.admin.scrub(start=True, rate=None)
        assert not parts.admin.scrub(start=False, rate=None).running


class TestPolicy:
    def test_set_answers_what_holds_now_and_what_held(self, served: Served) -> None:
        changed = served.stub.SetPolicy(pb.SetPolicyRequest(tier="dram", rule="arc"), timeout=WAIT_S)
        (change,) = changed.changes
        same(change.policy, report.PolicyReport("dram", "", "arc", True, 8))
        assert (change.former_rule, changed.dry_run) == ("lru", False)
        (now,) = served.stub.GetPolicy(pb.GetPolicyRequest(tier="dram"), timeout=WAIT_S).policies
        assert (now.rule, now.chosen) == ("arc", True)

    def test_without_a_tier_means_every_tier(self, served: Served) -> None:
        request = pb.SetPolicyRequest(rule="density", tenant="web")
        assert [one.policy.tier for one in served.stub.SetPolicy(request, timeout=WAIT_S).changes] == ["dram", "disk"]
        asked = pb.GetPolicyRequest(tenant="web")
        assert [one.rule for one in served.stub.GetPolicy(asked, timeout=WAIT_S).policies] == ["density"] * 2

    def test_of_a_dry_run_changes_nothing(self, served: Served) -> None:
        request = pb.SetPolicyRequest(rule="density", dry_run=True)
        assert served.stub.SetPolicy(request, timeout=WAIT_S).dry_run
        assert not served.port.rules

    @pytest.mark.parametrize(
        ("request_", "reason"),
        [
            (pb.SetPolicyRequest(rule="mru"), "no rule is called 'mru': it is one of lru, second_touch, pgdsf, lfu"),
            (pb.SetPolicyRequest(), "no rule is called ''"),
            (pb.SetPolicyRequest(rule="lru", tier="hbm"), "no tier is called 'hbm': it is one of dram, disk"),
            (pb.SetPolicyRequest(rule="lru", tenant=""), "tenant must not be empty"),
        ],
    )
    def test_refuses_what_cannot_be_without_asking_the_owner(
        self, served: Served, request_: pb.SetPolicyRequest, reason: str
    ) -> None:
        code, text = served.refusal("SetPolicy", request_)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert reason in text
        assert not served.owner.asked.is_set()

    def test_of_an_unknown_tenant_is_not_found(self, served: Served) -> None:
        refusal = served.refusal("SetPolicy", pb.SetPolicyRequest(rule="lru", tenant="nobody"))
        assert refusal == (grpc.StatusCode.NOT_FOUND, "no tenant is called nobody")
        assert served.refusal("GetPolicy", pb.GetPolicyRequest(tenant="nobody"))[0] is grpc.StatusCode.NOT_FOUND
        assert served.refusal("GetPolicy", pb.GetPolicyRequest(tier="l2"))[0] is grpc.StatusCode.INVALID_ARGUMENT

    def test_of_a_tier_that_is_not_here_is_refused(self, served: Served) -> None:
        served.port.disk = None
        refusal = served.refusal("SetPolicy", pb.SetPolicyRequest(rule="lru", tier="disk"))
        assert refusal == (grpc.StatusCode.FAILED_PRECONDITION, "there is no disk tier; give --disk")

    def test_of_the_store_is_shown_by_tier_and_by_tenant_with_a_rule_of_its_own(self) -> None:
        parts = Parts()
        parts.fill()
        other = parts.core.client("other")
        other.put(other.open(), chain(2, "other"))
        assert parts.admin.policies(None, None) == (
            report.PolicyReport("dram", "", "lru", False, 6), report.PolicyReport("disk", "", "lru", False, 4),
        )  # fmt: skip
        (change,) = parts.admin.set_policy(Tier.DRAM, "other", Rule.ARC, dry_run=False)
        assert change == report.PolicyChange(report.PolicyReport("dram", "other", "arc", True, 2), "lru")
        assert parts.admin.policies(Tier.DRAM, None) == (
            report.PolicyReport("dram", "", "lru", False, 4), report.PolicyReport("dram", "other", "arc", True, 2),
        )  # fmt: skip
        would = parts.admin.set_policy(None, None, Rule.DENSITY, dry_run=True)
        assert [(one.policy.tier, one.policy.rule, one.former_rule) for one in would] == [
            ("dram", "density", "lru"), ("disk", "density", "lru"),
        ]  # fmt: skip
        assert parts.admin.policies(None, "t")[0].rule == "lru", "nothing was changed"
        parts.admin.set_policy(None, None, Rule.PGDSF, dry_run=False)
        assert [one.rule for one in parts.admin.policies(None, "t")] == ["pgdsf"] * 2
        assert parts.admin.policies(Tier.DRAM, "other")[0].rule == "arc", "its own wins"

    def test_of_the_store_knows_no_tenant_before_it_came_and_no_tier_that_is_not_there(self) -> None:
        parts = Parts(disk=False)
        with pytest.raises(KeyError, match="no tenant is called t"):
            parts.admin.set_policy(None, "t", Rule.ARC, dry_run=False)
        with pytest.raises(RefusedError, match="there is no disk tier"):
            parts.admin.set_policy(Tier.DISK, None, Rule.ARC, dry_run=False)
        parts.core.client("t")
        assert len(parts.admin.set_policy(None, "t", Rule.ARC, dry_run=False)) == 1


class TestTrouble:
    def test_of_an_owner_that_does_not_answer_ends_at_the_callers_deadline(self, served: Served) -> None:
        with served.owner.busy():
            assert served.refusal("Drain", pb.DrainRequest(), 0.05)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
            # The caller's clock may have run out before the handler's.
            assert not served.owner.asked.is_set() or served.owner.gave_up.wait(WAIT_S)
        served.stub.Ping(pb.PingRequest(), timeout=WAIT_S)
        assert not served.port.draining, "a question that timed out before it began must not run"

    def test_of_an_owner_that_does_not_answer_ends_without_a_deadline_too(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control_verbs, "OWNER_WAIT_S", 0.02)
        with served.owner.busy():
            code, text = served.refusal("GetStatus", pb.GetStatusRequest(), None)
        assert (code, text) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the owner thread did not answer in 0.02 s")

    @pytest.mark.parametrize("trouble", [ZeroDivisionError("secret"), KeyError("not a refusal here")])
    def test_nobody_foresaw_is_logged_once_and_harms_no_other_call(
        self, served: Served, caplog: pytest.LogCaptureFixture, trouble: Exception
    ) -> None:
        served.port.trouble = trouble
        with caplog.at_level(logging.DEBUG):
            code, text = served.refusal("ListTenants", pb.ListTenantsRequest())
        assert code is grpc.StatusCode.INTERNAL
        assert type(trouble).__name__ in text
        assert "secret" not in text
        warned = [record.name for record in caplog.records if record.levelno >= logging.WARNING]
        assert warned == ["kvstored.control_verbs"]
        served.port.trouble = None
        served.stub.GetStatus(pb.GetStatusRequest(), timeout=WAIT_S)

    def test_of_an_oversized_request_is_its_own(self, served: Served) -> None:
        request = pb.ClearRequest(prefix={"namespace_digest": HEX_A, "keys": [b"x" * 70_000]})
        assert served.refusal("Clear", request)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        served.stub.Ping(pb.PingRequest(), timeout=WAIT_S)

    def test_of_too_many_calls_at_once_is_refused(self, served: Served) -> None:
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with served.owner.busy():
            for _ in range(door.CALLS + 8):
                served.stub.Ping.future(pb.PingRequest(), timeout=WAIT_S).add_done_callback(ended.put)
            early = {ended.get(timeout=WAIT_S).code() for _ in range(8)}
        late = {ended.get(timeout=WAIT_S).code() for _ in range(door.CALLS)}
        assert early == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert late == {grpc.StatusCode.OK}

    def test_of_a_stuck_owner_does_not_hold_up_stop(self, served: Served) -> None:
        with served.owner.busy():
            call = served.stub.Ping.future(pb.PingRequest(), timeout=WAIT_S)
            assert served.owner.asked.wait(WAIT_S)
            served.server.stop(0.01)
            assert call.exception(WAIT_S).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


WELL_DRIVE = DriveStatus(
    directory=Path("/mnt/a"), state=DriveState.OK, reason="", direct=True, segments=1, free_bytes=5, capacity_bytes=9,
    read_bytes=0, written_bytes=0, errors=0, damaged=0,
)  # fmt: skip
SEGMENT_BYTES = 18 * PAGE_BYTES


@dataclass
class FoundDrives:
    found: tuple[DriveStatus, ...] = (WELL_DRIVE,)

    def status(self) -> tuple[DriveStatus, ...]:
        return self.found


@dataclass
class FoundIndex:
    state: State = State.READY
    reason: str = ""
    read: tuple[int, int] | None = None

    def progress(self) -> tuple[int, int] | None:
        return self.read


@dataclass(frozen=True)
class Found:
    foreign: list[Path]
    unreadable: list[str]
    rebuilt: str
    dropped: int
    store: bytes = b"sixteen letters."
    unread: list[Path] = field(default_factory=list)


@dataclass
class FoundHands:
    drives: FoundDrives = field(default_factory=FoundDrives)
    index: FoundIndex = field(default_factory=FoundIndex)
    loaded: Found | None = None


class Parts:
    """An `Admin` and what it looks at."""

    def __init__(
        self, *, disk: bool = True, codec: Wish = Wish.RAW, keeper_fault: str = "", scrub_rate: str = "10MiB"
    ) -> None:
        limits = DiskLimits(4 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=codec, row_bytes=2 * PAGE_BYTES)
        self.core = Core(disk=limits if disk else None)
        self.hands = FoundHands()
        devices = SimpleNamespace(report=tuple, warnings=tuple)
        hot: Any = SimpleNamespace(clients=SimpleNamespace(connections={}), devices=devices)
        self.faults: list[str] = []
        memory: Any = SimpleNamespace(
            faults=self.faults, advice="", populated_bytes=0, huge_bytes=0, locked_bytes=0, placement=Placement()
        )
        loaded = load(None, {"RUNTIME_DIRECTORY": "/run/kvstored"}, {"dram": "64MiB", "disk-scrub-rate": scrub_rate})
        self.admin = Admin(
            loaded, self.core.store, hot, memory, hands=self.hands if disk else None, keeper=NoKeeper(keeper_fault)
        )

    def disk(self) -> report.DiskReport:
        disk = self.admin.status().disk
        assert disk is not None
        return disk

    def fill(self) -> None:
        """Four blocks in DRAM, and on disk."""
        client = self.core.client()
        client.put(client.open(model="m"), chain(4), None)
        self.core.work_all()


class NoOwner:
    def ask(self, question: Callable[..., Any], timeout_s: float) -> Any:
        raise AssertionError("nobody asks here")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def same(message: Any, value: Any) -> None:
    """A message (or a list of them) says exactly what a report says."""
    if isinstance(value, tuple):
        assert len(message) == len(value)
        for one, other in zip(message, value, strict=True):
            same(one, other)
    elif hasattr(value, "__dataclass_fields__"):
        for one in fields(value):
            if getattr(value, one.name) is None:
                assert not message.HasField(one.name), one.name
            else:
                same(getattr(message, one.name), getattr(value, one.name))
    else:
        assert message == value
