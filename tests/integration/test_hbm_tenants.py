"""The tier on a GPU as tenants and operators see it, through a real daemon on the emulation: pins, quotas, words."""

import os
from collections.abc import Iterator, Sequence

import pytest
from typer.testing import CliRunner

import kvclient
from bench.process import DaemonProcess
from kvctl.cli import app, globals_first
from kvctl.client import ControlClient
from kvproto import control_pb2 as pb
from tests.attached_kit import BLOCK_BYTES, EMULATED, Engine, connected, engine, namespace_of
from tests.node import until

MIB = 1 << 20
PINS = 4  # blocks of each GPU that a tenant may pin
COUNT = 6


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Two GPUs with two arenas each; a tenant with a guarantee of one of them."""
    folder = tmp_path_factory.mktemp("daemon")
    uid = os.getuid()
    share = PINS * BLOCK_BYTES / (16 * MIB)
    (folder / "toml").write_text(
        f'[tenants.kv]\nuids = [{uid}]\nhbm_guaranteed = "16MiB"\npin_share = {share}\n'
        f'[tenants.other]\nuids = [{uid}]\nhbm_max = "16MiB"\n'
    )
    arguments = ("--dram", "64MiB", "--arena", "8MiB", "--policy-dram", "lru", "--gpu-hbm", "32MiB")
    two = (EMULATED[0], "emulation:0,emulation:1")
    with DaemonProcess(
        folder / "run", "--config", str(folder / "toml"), *arguments, *two, log_file=folder / "log"
    ) as process:
        yield process


@pytest.fixture
def control(daemon: DaemonProcess) -> Iterator[ControlClient]:
    with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as made:
        yield made


def stored(client: kvclient.Client, kv: Engine, model: str) -> tuple[kvclient.Namespace, Sequence[bytes]]:
    """A chain in DRAM; and pages on the engine's GPU, which says where its copies belong."""
    namespace = namespace_of(client, model)
    keys = list(namespace.keys(list(range(4 * COUNT))))
    assert namespace.save(keys, kv.attach(client)[range(COUNT)]).accepted == COUNT
    return namespace, keys


def tenant_of(control: ControlClient, name: str) -> pb.Tenant:
    return next(one for one in control.tenants().tenants if one.name == name)


def test_a_pin_there_is_cut_to_its_budget_and_everybody_names_the_tier(
    daemon: DaemonProcess, control: ControlClient
) -> None:
    with connected(daemon, tenant="kv") as client, engine() as kv:
        namespace, keys = stored(client, kv, "pinned")
        assert namespace.match(keys).tiers == kvclient.Tiers(dram=COUNT)
        pinned = namespace.pin(keys, ttl_s=60.0, tier="hbm")
        assert (pinned.blocks, pinned.partial) == (PINS, "budget")
        assert until(lambda: namespace.match(keys).tiers == kvclient.Tiers(hbm=PINS, dram=COUNT - PINS))
        digest = namespace.identity.digest().hex()
        summary = control.summarise(pb.SummariseMatchRequest(tenant="kv", namespace_digests=[digest], keys=keys))
        assert (summary.hbm_blocks, summary.dram_blocks, summary.hbm_bytes) == (PINS, 2, PINS * BLOCK_BYTES)
        stat = control.stat(pb.StatPrefixRequest(tenant="kv", namespace_digest=digest, keys=keys))
        assert stat.hbm_blocks == PINS
        assert [one.in_hbm for one in stat.blocks] == [True] * PINS + [False] * (COUNT - PINS)
        mine = tenant_of(control, "kv")
        assert (mine.hbm_used_bytes, mine.hbm_pinned_bytes) == (PINS * BLOCK_BYTES, PINS * BLOCK_BYTES)
        assert (mine.hbm_guaranteed_bytes, mine.HasField("hbm_max_bytes")) == (16 * MIB, False)
        said = {
            command[0]: CliRunner().invoke(app, globals_first(["--runtime-dir", str(daemon.runtime_dir), *command]))
            for command in (
                ("match", "--namespace", digest, "--tenant", "kv", *(key.hex() for key in keys)),
                ("stat", "--namespace", digest, "--tenant", "kv", *(key.hex() for key in keys)),
                ("tenants",), ("status",), ("load",),
            )
        }  # fmt: skip
        assert "4 on a GPU" in said["match"].output
        assert "4 on a GPU" in said["stat"].output
        assert "hbm+dram" in said["stat"].output
        assert "kv, on GPUs: 64.0 KiB of 16.0 MiB used, 64.0 KiB pinned" in said["tenants"].output
        assert "its tier: 64.0 KiB of 32.0 MiB" in said["status"].output
        assert "hbm" in said["load"].output
        assert namespace.unpin(pinned) == 1
        assert until(lambda: not tenant_of(control, "kv").hbm_pinned_bytes)


def test_each_gpu_has_what_its_own_engine_reads(daemon: DaemonProcess, control: ControlClient) -> None:
    def copies() -> list[int]:
        return [one.hbm_promoted for one in control.status().devices]

    with connected(daemon, tenant="kv") as client, engine(number=1) as second:
        namespace, keys = stored(client, second, "second")
        before = copies()
        namespace.load(keys, second.attach(client)[range(COUNT, 2 * COUNT)])
        namespace.prefetch(keys, tier="hbm")
        assert until(lambda: sum(copies()) >= sum(before) + COUNT)
        assert [now - then for now, then in zip(copies(), before, strict=True)] == [0, COUNT]


def test_what_the_next_turn_needs_is_copied_there_when_a_tool_has_answered(daemon: DaemonProcess) -> None:
    with connected(daemon, tenant="kv") as client, engine() as kv:
        namespace, keys = stored(client, kv, "agent")
        memory = kv.attach(client)
        namespace.load(keys, memory[range(COUNT, 2 * COUNT)])
        with client.program("agent") as program:
            program.context(namespace, keys)
            program.tool_started("search", expected_s=60.0)
            assert namespace.match(keys).tiers == kvclient.Tiers(dram=COUNT), (
                "a tool that runs long needs nothing there"
            )
            program.tool_finished()
            assert until(lambda: namespace.match(keys).tiers.hbm == COUNT)


def test_a_tenant_has_no_more_than_its_maximum_and_that_can_be_changed(
    daemon: DaemonProcess, control: ControlClient
) -> None:
    def mine() -> pb.Tenant:
        return tenant_of(control, "other")

    with connected(daemon, tenant="other") as client, engine() as kv:
        namespace, keys = stored(client, kv, "most")
        assert mine().hbm_max_bytes == 16 * MIB
        namespace.prefetch(keys, tier="hbm")
        assert until(lambda: namespace.match(keys).tiers.hbm == COUNT)
        assert mine().hbm_assigned_bytes == 16 * MIB
        control.set_quota(pb.SetQuotaRequest(tenant="other", hbm_max_bytes=0))
        more, others = stored(client, kv, "more")
        more.prefetch(others, tier="hbm")
        assert until(lambda: mine().hbm_assigned_bytes == 0)
        assert more.match(others).tiers == kvclient.Tiers(dram=COUNT)
        quota = control.quotas(pb.GetQuotasRequest(tenant="other")).quotas[0]
        assert (quota.hbm_max_bytes, "hbm_max_bytes" in quota.chosen_fields) == (0, True)
        control.set_quota(pb.SetQuotaRequest(tenant="other", configured=["hbm_max_bytes"]))
        more.prefetch(others, tier="hbm")
        assert until(lambda: more.match(others).tiers.hbm == COUNT)
