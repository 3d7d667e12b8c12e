"""How the value of every setting (`settings.py`) is found.

    defaults  <  one TOML file  <  environment (KVSTORED_*)  <  flags

Each layer is checked even where a later one overrides it: a mistake in the file stops the start today and
not on the day the flag is dropped. All trouble is a `ConfigError`, and the process ends with `EX_CONFIG`.

    [daemon]
    leaf_threads = 4
    [dram]
    size = "64GiB"
    [disk]                          # without directories there is no disk tier
    directories = ["/mnt/nvme0/kv", "/mnt/nvme1/kv"]
    size = "2TiB"
    [policy]                        # who is evicted first
    dram = "lru"
    [tenants.research]              # HELLO may name it; the first tenant that lists a uid is its default
    uids = [1001, 1002]             # a uid that no tenant lists gets a tenant of its own, uid-N
    trusting = true                 # its engines may write into its memory themselves (mode direct)
    dram_guaranteed = "16GiB"       # and other quotas: quota_keys.py
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from kvproto.sizes import format_bytes, parse_bytes, parse_seconds
from kvstored.block_events_address import check_events
from kvstored.config_checks import check_config, check_dram
from kvstored.config_chooser import Chooser
from kvstored.config_values import Config, Loaded
from kvstored.host_limits import Limit, memory_limit
from kvstored.http_address import OFF
from kvstored.layers import TENANTS, TenantConfig, read_layers
from kvstored.otlp_address import missing_packages
from kvstored.placement import NoSuchNodeError, Topology, plan
from kvstored.quota_keys import check_all
from kvstored.settings import (
    ADMIN_GROUP,
    ARENA,
    CONTROL_CERTIFICATE,
    CONTROL_CLIENT_CA,
    CONTROL_KEY,
    CONTROL_LISTEN,
    DISK,
    DISK_ADMISSION,
    DISK_CODEC,
    DISK_KEY_FILE,
    DISK_PACKERS,
    DISK_READERS,
    DISK_SCRUB_RATE,
    DISK_SEGMENT,
    DISK_SIZE,
    DISK_WRITE_RATE,
    DISK_WRITERS,
    DRAM,
    DRAM_SCRUB,
    DRAM_SCRUB_RATE,
    EVENTS_FORM,
    EVENTS_HASHES,
    EVENTS_HIGH_WATER,
    EVENTS_LISTEN,
    EVENTS_REPLAY,
    EVENTS_ROUTABLE,
    EVENTS_TENANT,
    EVENTS_TOPIC,
    GPU_DEVICES,
    GPU_HBM,
    HUGE_PAGES,
    INSIGHT_CURVES,
    KEEP,
    KEEP_PATIENCE,
    LEAF_THREADS,
    LEASE_TTL_MAX,
    LOCK,
    LOG_LEVEL,
    METRICS_LISTEN,
    NUMA,
    POLICY_DISK,
    POLICY_DRAM,
    PREFAULT,
    REMOTE,
    REMOTE_ADMISSION,
    REMOTE_CONNECTIONS,
    REMOTE_DEADLINE,
    REMOTE_ENDPOINT,
    REMOTE_PYTHON,
    REMOTE_REGION,
    REMOTE_SIZE,
    RING,
    RUNTIME_DIR,
    SETTINGS,
    STATE_DIR,
    STOP_WITHIN,
    TENANT_CONTROL,
    TICKET_TTL,
    TRACE_ONE_IN,
    TRACE_OTLP,
    Basis,
    Setting,
)
from kvstored.units import ConfigError, format_seconds

__all__ = [
    "EX_CONFIG", "SETTINGS", "Config", "ConfigError", "Loaded", "Setting", "TenantConfig", "load",
    "format_bytes", "format_seconds", "parse_bytes", "parse_seconds",
]  # fmt: skip

EX_CONFIG: Final = 78  # sysexits.h: something was found in an unconfigured or misconfigured state


def load(
    config_file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, str],
    *,
    memory_bytes: int | None = None,
) -> Loaded:
    """Find every value and its origin. Raises ConfigError at the first mistake.

    `flags` is keyed by flag name (`--dram`; the dashes may be missing and `_` stands for `-`, as argparse
    leaves them). `memory_bytes` is the machine's memory; None: what this process may have of it (`host_limits.py`).
    """
    layers = read_layers(config_file, environ, flags)
    memory = memory_limit() if memory_bytes is None else Limit(memory_bytes, "the machine's memory")
    basis = Basis(
        environ=environ,
        memory_bytes=memory.limit_bytes,
        cpus=len(os.sched_getaffinity(0)),
    )
    chooser = Chooser(layers.given)
    dram_bytes = chooser.choose(DRAM, basis)
    basis = replace(basis, dram_bytes=dram_bytes)
    arena_bytes = chooser.choose(ARENA, basis)
    check_dram(arena_bytes, basis, chooser, memory)
    basis = replace(basis, arena_bytes=arena_bytes)
    config = Config(
        dram_bytes=dram_bytes,
        arena_bytes=arena_bytes,
        prefault=chooser.choose(PREFAULT, basis),
        lock=chooser.choose(LOCK, basis),
        huge_pages=chooser.choose(HUGE_PAGES, basis),
        numa=_numa(chooser, basis),
        dram_scrub=chooser.choose(DRAM_SCRUB, basis),
        dram_scrub_rate=chooser.choose(DRAM_SCRUB_RATE, basis),
        ring_bytes=chooser.choose(RING, basis),
        ticket_ttl_s=chooser.choose(TICKET_TTL, basis),
        lease_ttl_max_s=chooser.choose(LEASE_TTL_MAX, basis),
        runtime_dir=(runtime_dir := chooser.choose(RUNTIME_DIR, basis)),
        leaf_threads=chooser.choose(LEAF_THREADS, basis),
        log_level=chooser.choose(LOG_LEVEL, basis),
        keep=chooser.choose(KEEP, basis),
        keep_patience_s=chooser.choose(KEEP_PATIENCE, basis),
        stop_within_s=chooser.choose(STOP_WITHIN, basis),
        disk_directories=(directories := chooser.choose(DISK, basis)),
        disk_bytes=(disk_bytes := chooser.choose(DISK_SIZE, basis)),
        segment_bytes=chooser.choose(
            DISK_SEGMENT, replace(basis, disk_bytes=disk_bytes, disk_directories=tuple(directories))
        ),
        disk_admission=chooser.choose(DISK_ADMISSION, basis),
        disk_write_rate=chooser.choose(DISK_WRITE_RATE, basis),
        disk_codec=chooser.choose(DISK_CODEC, basis),
        disk_readers=chooser.choose(DISK_READERS, basis),
        disk_writers=chooser.choose(DISK_WRITERS, basis),
        disk_packers=chooser.choose(DISK_PACKERS, basis),
        disk_scrub_rate=chooser.choose(DISK_SCRUB_RATE, basis),
        disk_key_file=chooser.choose(DISK_KEY_FILE, basis),
        policy_dram=chooser.choose(POLICY_DRAM, basis),
        policy_disk=chooser.choose(POLICY_DISK, basis),
        insight_curves=chooser.choose(INSIGHT_CURVES, basis),
        metrics_listen=chooser.choose(METRICS_LISTEN, basis),
        state_dir=chooser.choose(STATE_DIR, replace(basis, runtime_dir=runtime_dir)),
        admin_group=chooser.choose(ADMIN_GROUP, basis),
        tenant_control=chooser.choose(TENANT_CONTROL, basis),
        control_listen=chooser.choose(CONTROL_LISTEN, basis),
        control_certificate=chooser.choose(CONTROL_CERTIFICATE, basis),
        control_key=chooser.choose(CONTROL_KEY, basis),
        control_client_ca=chooser.choose(CONTROL_CLIENT_CA, basis),
        gpu_devices=chooser.choose(GPU_DEVICES, basis),
        gpu_hbm_bytes=chooser.choose(GPU_HBM, basis),
        trace_otlp=_trace_otlp(chooser, basis),
        trace_one_in=chooser.choose(TRACE_ONE_IN, basis),
        events_listen=chooser.choose(EVENTS_LISTEN, basis),
        events_routable=chooser.choose(EVENTS_ROUTABLE, basis),
        events_tenant=chooser.choose(EVENTS_TENANT, basis),
        events_topic=chooser.choose(EVENTS_TOPIC, basis),
        events_hashes=chooser.choose(EVENTS_HASHES, basis),
        events_form=chooser.choose(EVENTS_FORM, basis),
        events_replay=chooser.choose(EVENTS_REPLAY, basis),
        events_high_water=chooser.choose(EVENTS_HIGH_WATER, basis),
        remote_url=chooser.choose(REMOTE, basis),
        remote_endpoint=chooser.choose(REMOTE_ENDPOINT, basis),
        remote_region=chooser.choose(REMOTE_REGION, basis),
        remote_python=chooser.choose(REMOTE_PYTHON, basis),
        remote_bytes=chooser.choose(REMOTE_SIZE, basis),
        remote_admission=chooser.choose(REMOTE_ADMISSION, basis),
        remote_deadline_s=chooser.choose(REMOTE_DEADLINE, basis),
        remote_connections=chooser.choose(REMOTE_CONNECTIONS, basis),
        tenants=tuple(tenant for tenant, _ in layers.tenants),
    )
    check_config(config, chooser)
    check_events(config.events(), chooser.places[EVENTS_LISTEN.name], routable=config.events_routable)
    if not config.disk_directories:
        config = replace(config, disk_bytes=0)
    of_tenants = [value for _, values in layers.tenants for value in values]
    check_all(config.quotas(), config.capacities(), TENANTS, of_tenants)
    return Loaded(config, (*chooser.values, *of_tenants))


def _trace_otlp(chooser: Chooser, basis: Basis) -> str:
    """What it needs is no part of what a daemon needs otherwise."""
    address = chooser.choose(TRACE_OTLP, basis)
    if address != OFF and (missing := missing_packages()):
        raise ConfigError(f"{chooser.places[TRACE_OTLP.name]}: {missing} is missing: pip install 'kvstored[otel]'")
    return address


def _numa(chooser: Chooser, basis: Basis) -> str:
    """Nodes that are named must be there; their number is what `HostMemory` spreads arenas over."""
    wish = chooser.choose(NUMA, basis)
    try:
        plan(wish, Topology.read())
    except NoSuchNodeError as error:
        raise ConfigError(f"{chooser.places[NUMA.name]}: {error}") from None
    return wish
