"""What the daemon runs with, once every value is found (`config.py`) and fits the others (`config_checks.py`)."""

from dataclasses import dataclass
from pathlib import Path

from kvstore.quotas import HBM, HBM_ARENA_BYTES, USUAL, Capacity, Quota
from kvstore.report import ConfigValue
from kvstore.rules import Tier
from kvstored.block_events_address import EventsConfig
from kvstored.control_address import TlsFiles
from kvstored.device_names import NO_DEVICES
from kvstored.http_address import OFF
from kvstored.key_file import KeyRing, read_keys
from kvstored.layers import TenantConfig
from kvstored.remote_address import RemoteAddress, parse_remote
from kvstored.units import NO_FILE


@dataclass(frozen=True, slots=True)
class Config:
    """What the daemon runs with. `settings.py` says what each value means; only `load` builds one."""

    dram_bytes: int
    arena_bytes: int
    prefault: bool
    lock: bool
    huge_pages: bool
    numa: str  # "auto", "interleave", "off" or numbers of nodes (`placement.py`)
    dram_scrub: str  # one of SCRUBS
    dram_scrub_rate: int  # bytes a second, 0: no scrub of memory in the background
    ring_bytes: int
    ticket_ttl_s: float
    lease_ttl_max_s: float
    runtime_dir: Path
    leaf_threads: int
    log_level: str
    keep: bool
    keep_patience_s: float
    stop_within_s: float
    disk_directories: tuple[Path, ...]  # empty: no disk tier
    disk_bytes: int  # in all of them; 0 without any
    segment_bytes: int
    disk_admission: str  # one of ADMISSIONS
    disk_write_rate: int  # bytes a second, 0: no limit
    disk_codec: str  # one of CODECS
    disk_readers: int  # threads of each directory
    disk_writers: int  # threads of each directory
    disk_packers: int  # threads of all
    disk_scrub_rate: int  # bytes a second, 0: no scrub in the background
    disk_key_file: str  # NO_FILE: not encrypted
    policy_dram: str  # one of RULES
    policy_disk: str  # one of RULES
    insight_curves: bool
    metrics_listen: str  # "off", a loopback address, or a path (`http_address.py`)
    state_dir: Path
    admin_group: str  # "none", or whose members act on the control socket
    tenant_control: bool  # is there a socket for everybody?
    control_listen: str  # "off", or an address (`control_address.py`)
    control_certificate: str  # this and what follows: NO_FILE, or all are there
    control_key: str
    control_client_ca: str
    gpu_devices: str  # "none", or devices (`device_names.py`)
    gpu_hbm_bytes: int  # of each of them; 0: no tier there
    trace_otlp: str  # "off", or the address of a collector (`otlp_address.py`)
    trace_one_in: int  # leases
    events_listen: str  # "off", "grpc", "ipc" or an address (`block_events_address.py`)
    events_routable: bool
    events_tenant: str  # ANY_TENANT, or a name
    events_topic: str
    events_hashes: str  # one of HASHES
    events_form: str  # one of FORMS
    events_replay: int  # batches
    events_high_water: int  # batches
    remote_url: str  # "off", or a bucket (`remote_address.py`)
    remote_endpoint: str
    remote_region: str
    remote_python: str  # "none", or the path of an interpreter
    remote_bytes: int
    remote_admission: str  # one of ADMISSIONS
    remote_deadline_s: float
    remote_connections: int
    tenants: tuple[TenantConfig, ...]

    def tenants_of(self, uid: int) -> tuple[str, ...]:
        """Names that a process of `uid` may ask for in HELLO; the first is its default. Never empty."""
        return tuple(tenant.name for tenant in self.tenants if uid in tenant.uids) or (f"uid-{uid}",)

    def disk_keys(self) -> KeyRing | None:
        """Keys of the disk tier as their file has them now; None: it is not encrypted. Raises SecretFileError."""
        return None if self.disk_key_file == NO_FILE else read_keys(Path(self.disk_key_file))

    def control_tls(self) -> TlsFiles | None:
        """Files of mutual TLS; None: no address is listened on."""
        if self.control_listen == OFF:
            return None
        return TlsFiles(Path(self.control_certificate), Path(self.control_key), Path(self.control_client_ca))

    def events(self) -> EventsConfig:
        """What is to be told of blocks, and to whom."""
        return EventsConfig(
            self.events_listen, self.events_tenant, self.events_topic, self.events_hashes, self.events_form,
            self.events_replay, self.events_high_water, self.runtime_dir,
        )  # fmt: skip

    def remote_address(self) -> RemoteAddress | None:
        """Where the remote tier is; None: there is none."""
        return parse_remote(self.remote_url, self.remote_endpoint, self.remote_region, self.remote_python)

    def trusts(self, tenant: str) -> bool:
        """May a tenant's engines write into its memory themselves?"""
        return any(one.name == tenant and one.trusting for one in self.tenants)

    def quotas(self) -> dict[str, Quota]:
        """Of tenants of which the configuration says more than that they are there."""
        return {tenant.name: tenant.quota for tenant in self.tenants if tenant.quota != USUAL}

    def hbm_capacity(self) -> Capacity:
        """The tier on each GPU, as quotas count it."""
        there = self.gpu_hbm_bytes if self.gpu_devices != NO_DEVICES else 0
        return Capacity(HBM, HBM_ARENA_BYTES, there // HBM_ARENA_BYTES)

    def capacities(self) -> tuple[Capacity, ...]:
        """DRAM, disk and GPUs, as quotas count them."""
        segments = self.disk_bytes // self.segment_bytes if self.disk_directories else 0
        return (
            Capacity(Tier.DRAM, self.arena_bytes, self.dram_bytes // self.arena_bytes),
            Capacity(Tier.DISK, self.segment_bytes, segments),
            self.hbm_capacity(),
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and where each of its values came from."""

    config: Config
    values: tuple[ConfigValue, ...]
