"""Settings: where values come from, what is refused, and on which line."""

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvproto import limits
from kvproto.errors import UsageError
from kvproto.limits import GIB, KIB, MIB
from kvstore import tables
from kvstore.rules import Rule
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from kvstored import cli
from kvstored import settings as declared
from kvstored.config import (
    EX_CONFIG,
    SETTINGS,
    Config,
    ConfigError,
    Loaded,
    TenantConfig,
    format_bytes,
    format_seconds,
    load,
    parse_bytes,
    parse_seconds,
)
from kvstored.units import key_lines

MEMORY_BYTES = 64 * GIB
ENVIRON = {"RUNTIME_DIRECTORY": "/run/kvstored"}


def loaded(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> Loaded:
    return load(file, ENVIRON | dict(environ or {}), flags or {}, memory_bytes=memory_bytes)


def written(folder: Path, text: str) -> Path:
    file = folder / "kvstored.toml"
    file.write_text(text, encoding="utf-8", newline="")
    return file


def refusal(folder: Path, text: str) -> str:
    """What `load` says about a file, with the folder cut off."""
    with pytest.raises(ConfigError) as caught:
        loaded(file=written(folder, text))
    return str(caught.value).removeprefix(f"{folder}/")


def flag_refusal(name: str, text: str, **others: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(flags={name: text} | others)
    return str(caught.value)


def origin(result: Loaded, name: str) -> str:
    (value,) = [value for value in result.values if value.name == name]
    return value.origin


# Defaults


def test_defaults_are_a_quarter_of_memory_and_the_limits() -> None:
    config = loaded().config
    assert config == Config(
        dram_bytes=16 * GIB,
        arena_bytes=64 * MIB,
        prefault=True,
        lock=True,
        huge_pages=True,
        numa="auto",
        ring_bytes=64 * MIB,
        ticket_ttl_s=30.0,
        lease_ttl_max_s=60.0,
        runtime_dir=Path("/run/kvstored"),
        leaf_threads=min(4, len(os.sched_getaffinity(0))),
        log_level="info",
        keep=False,
        keep_patience_s=600.0,
        stop_within_s=5.0,
        dram_scrub="writable",
        dram_scrub_rate=100 * MIB,
        disk_directories=(),
        disk_bytes=0,
        segment_bytes=8 * MIB,
        disk_admission="second_touch",
        disk_write_rate=0,
        disk_codec="auto",
        disk_readers=8,
        disk_writers=12,
        disk_packers=1,
        disk_scrub_rate=10 * MIB,
        disk_key_file="none",
        policy_dram=Rule.DENSITY.value,
        policy_disk=Rule.LRU.value,
        insight_curves=True,
        metrics_listen="off",
        state_dir=Path("/run/kvstored"),
        admin_group="none",
        tenant_control=False,
        control_listen="off",
        control_certificate="none",
        control_key="none",
        control_client_ca="none",
        gpu_devices="none",
        gpu_hbm_bytes=0,
        trace_otlp="off",
        trace_one_in=100,
        events_listen="off",
        events_routable=False,
        events_tenant="*",
        events_topic="kv@{host}@{model}",
        events_hashes="int",
        events_form="maps",
        events_replay=10_000,
        events_high_water=1000,
        remote_url="off",
        remote_endpoint="none",
        remote_region="none",
        remote_python="none",
        remote_bytes=0,
        remote_admission="second_touch",
        remote_deadline_s=10.0,
        remote_connections=8,
        tenants=(),
    )


def test_every_setting_is_reported_with_unit_and_reason() -> None:
    values = loaded().values
    assert [value.name for value in values] == [setting.toml for setting in SETTINGS]
    assert {value.origin for value in values} == {"default"}
    assert all(value.value and value.unit and value.reason for value in values)


def test_the_table_names_every_field_once_and_alike_everywhere() -> None:
    fields = [field.name for field in dataclasses.fields(Config)]
    assert [setting.name for setting in SETTINGS] == fields[:-1]
    for setting in SETTINGS:
        assert setting.env == "KVSTORED_" + setting.flag[2:].upper().replace("-", "_")
        assert setting.toml.count(".") == 1
        assert setting.range


def test_a_small_machine_gets_small_arenas() -> None:
    config = loaded(memory_bytes=100 * MIB).config
    assert (config.dram_bytes, config.arena_bytes) == (24 * MIB, 8 * MIB)


def test_memory_comes_in_at_least_eight_arenas_where_it_can() -> None:
    sizes = {"64MiB": 8, "256MiB": 32, "512MiB": 64, "16GiB": 64}
    for dram, arena_mib in sizes.items():
        assert loaded(flags={"dram": dram}).config.arena_bytes == arena_mib * MIB


def test_a_machine_with_less_than_one_arena_is_told_so() -> None:
    with pytest.raises(ConfigError, match=r"^default of dram.size: 8MiB is more than the machine's memory, 4MiB$"):
        loaded(memory_bytes=4 * MIB)


@settings(derandomize=True)
@given(st.integers(64 * MIB, 16 << 40))
def test_the_default_size_is_whole_arenas_within_limits_on_any_machine(memory_bytes: int) -> None:
    config = loaded(memory_bytes=memory_bytes).config
    arenas, rest = divmod(config.dram_bytes, config.arena_bytes)
    assert rest == 0
    assert 1 <= arenas <= limits.ARENAS
    assert config.dram_bytes <= memory_bytes


def test_the_machine_is_asked_for_its_memory_when_nobody_says() -> None:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    memory_bytes = int(fields["MemTotal"].removesuffix("kB")) * KIB
    assert load(None, ENVIRON, {}) == loaded(memory_bytes=memory_bytes)


def test_exit_code_is_the_one_of_sysexits() -> None:
    assert os.EX_CONFIG == EX_CONFIG


# The runtime directory


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/run/user/7"}, "/run/a"),
        ({"XDG_RUNTIME_DIR": "/run/user/7", "HOME": "/home/x"}, "/run/user/7/kvstored"),
        ({"HOME": "/home/x"}, "/home/x/.local/state/kvstored/run"),
    ],
)
def test_the_runtime_dir_follows_systemd_then_the_session_then_home(
    environ: Mapping[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(declared, "SYSTEM_RUNTIME_DIR", tmp_path / "absent")
    assert load(None, environ, {}, memory_bytes=MEMORY_BYTES).config.runtime_dir == Path(expected)


def test_a_writable_system_runtime_dir_comes_before_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(declared, "SYSTEM_RUNTIME_DIR", Path("/dev/shm"))
    result = load(None, {"XDG_RUNTIME_DIR": "/run/user/7"}, {}, memory_bytes=MEMORY_BYTES)
    assert result.config.runtime_dir == Path("/dev/shm")


def test_without_any_place_for_sockets_the_default_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declared, "SYSTEM_RUNTIME_DIR", tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"^default of daemon.runtime_dir: .* is not an absolute path$"):
        load(None, {}, {}, memory_bytes=MEMORY_BYTES)


def test_a_runtime_dir_too_long_for_a_socket_path_is_refused() -> None:
    assert loaded(flags={"runtime-dir": "/" + "d" * 89}).config.runtime_dir == Path("/" + "d" * 89)
    assert flag_refusal("runtime-dir", "/" + "d" * 90).endswith("is longer than 90 bytes")


def test_a_relative_runtime_dir_is_refused() -> None:
    assert flag_refusal("runtime-dir", "run") == "flag --runtime-dir: 'run' is not an absolute path"


# Precedence and origins


def test_file_then_environment_then_flags_each_override_the_one_before(tmp_path: Path) -> None:
    file = written(tmp_path, "[clients]\nring = '2MiB'\n\n[dram]\nsize = '1GiB'\nlock = false\n")
    result = loaded(
        file=file,
        environ={"KVSTORED_DRAM": "2GiB", "KVSTORED_LEAF_THREADS": "2"},
        flags={"dram": "3GiB", "log-level": "debug"},
    )
    assert result.config.dram_bytes == 3 * GIB
    assert result.config.ring_bytes == 2 * MIB
    assert result.config.leaf_threads == 2
    assert result.config.log_level == "debug"
    assert not result.config.lock
    assert origin(result, "dram.size") == "flag --dram"
    assert origin(result, "daemon.leaf_threads") == "environment KVSTORED_LEAF_THREADS"
    assert origin(result, "clients.ring") == f"file {file}:2"
    assert origin(result, "dram.lock") == f"file {file}:6"
    assert origin(result, "dram.arena") == "default"


def test_a_value_that_is_overridden_must_be_right_all_the_same(tmp_path: Path) -> None:
    file = written(tmp_path, "[dram]\nsize = 'big'\n")
    with pytest.raises(ConfigError, match=re.escape(f"{file}:2: dram.size: 'big' is not a size")):
        loaded(file=file, flags={"dram": "1GiB"})


@pytest.mark.parametrize("name", ["--lease-ttl-max", "lease-ttl-max", "lease_ttl_max"])
def test_flags_may_be_keyed_as_typed_or_as_argparse_leaves_them(name: str) -> None:
    result = loaded(flags={name: "5s"})
    assert result.config.lease_ttl_max_s == 5.0
    assert origin(result, "clients.lease_ttl_max") == "flag --lease-ttl-max"


def test_a_flag_given_under_two_spellings_is_refused() -> None:
    assert flag_refusal("log-level", "info", log_level="debug") == "flag --log-level: given twice"


def test_integers_in_toml_are_bytes_and_threads(tmp_path: Path) -> None:
    file = written(tmp_path, "[dram]\nsize = 1_073_741_824\narena = 0x100000\n[daemon]\nleaf_threads = 3\n")
    config = loaded(file=file).config
    assert (config.dram_bytes, config.arena_bytes, config.leaf_threads) == (GIB, MIB, 3)


def test_the_variable_that_names_the_file_is_left_to_the_command_line() -> None:
    assert loaded(environ={"KVSTORED_CONFIG": "/etc/kvstored.toml", "PATH": "/bin"}) == loaded()


# Refusals


def test_an_unknown_key_is_refused_with_file_and_line(tmp_path: Path) -> None:
    text = "# sizes\n[dram]\nlock = true\nsise = '1GiB'\n"
    assert refusal(tmp_path, text) == "kvstored.toml:4: unknown key dram.sise; did you mean dram.size?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[dran]\n", "kvstored.toml:1: unknown section or key dran; did you mean dram?"),
        ("\nsize = 1\n", "kvstored.toml:2: unknown section or key size; did you mean dram.size?"),
        ("[daemon]\nring = 1\n", "kvstored.toml:2: unknown key daemon.ring; did you mean clients.ring?"),
        ("[dram]\nzzz = 1\n", "kvstored.toml:2: unknown key dram.zzz"),
        ("dram = 5\n", "kvstored.toml:1: must be a section, [dram], not an integer"),
        ("[[dram]]\nsize = 1\n", "kvstored.toml:1: must be a section, [dram], not an array"),
        ('[dram]\n"a\\nb" = 1\n', 'kvstored.toml:2: unknown key dram."a\\nb"'),
        (
            "[dram.size]\nx = 1\n",
            'dram.size: must be a size such as "1GiB", or a whole number of bytes, not a table',
        ),
        ("[dram]\nsize = 1.5\n", "kvstored.toml:2: dram.size: must be a size such as"),
        ("[dram]\nsize = true\n", "not a boolean"),
        ("[dram]\nsize = 2024-01-01\n", "not a date or time"),
        ("[dram]\nsize = -5\n", "kvstored.toml:2: dram.size: '-5' is not a size"),
        ("[dram]\nsize = 0x" + "f" * 9999, "kvstored.toml:2: dram.size: is larger than any TOML integer"),
        ("[dram]\nlock = 'yes'\n", "kvstored.toml:2: dram.lock: must be true or false, not a string"),
        ("[daemon]\nleaf_threads = '4'\n", "daemon.leaf_threads: must be a whole number, not a string"),
        ("[daemon]\nleaf_threads = true\n", "daemon.leaf_threads: must be a whole number, not a boolean"),
        ("[daemon]\nleaf_threads = 65\n", "daemon.leaf_threads: 65 is out of range; from 1 to 64"),
        ("[daemon]\nleaf_threads = -1\n", "daemon.leaf_threads: '-1' is not a whole number"),
        ("[clients]\nticket_ttl = 30\n", 'must be a duration such as "30s", not an integer'),
        (
            "[clients]\nticket_ttl = '30'\n",
            "clients.ticket_ttl: '' is not a unit of time; one of ms, s, m, h",
        ),
        ("[dram]\nsize = '5 parsec'\n", "dram.size: 'parsec' is not a unit of size; one of B, KiB"),
    ],
)
def test_what_a_file_may_not_say_is_refused_with_its_reason(tmp_path: Path, text: str, expected: str) -> None:
    message = refusal(tmp_path, text)
    assert re.match(r"kvstored\.toml:\d+: ", message)
    assert expected in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[dram]\nsize = \n", 2),
        ("[dram]\nsize = 1\nsize = 2\n", 3),
        ("[dram]\nlock = true\n[dram]\n", 3),
        ("[dram]\n\nsize = '''", 3),
        ("size", 1),
        ("[dram]\r\nsize = = 1\r\n", 2),
    ],
)
def test_a_syntax_error_or_a_duplicate_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"kvstored.toml:{line}: ")
    assert "(at " not in message


def test_nesting_without_bottom_is_refused_and_not_a_crash(tmp_path: Path) -> None:
    assert refusal(tmp_path, "a = " + "[" * 100_000).startswith("kvstored.toml:1: ")


def test_an_endless_number_is_refused_and_not_a_crash(tmp_path: Path) -> None:
    assert refusal(tmp_path, "[dram]\nsize = " + "9" * 10_000).startswith("kvstored.toml:")


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "kvstored.toml"
    file.write_bytes(b"[dram]\n# caf\xe9\n")
    with pytest.raises(ConfigError, match=r":2: is not UTF-8$"):
        loaded(file=file)


def test_a_file_of_unreasonable_size_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "#" * (MIB + 1)) == "kvstored.toml:1: is larger than 1MiB"


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.toml cannot be read: No such file or directory$"):
        loaded(file=tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r" cannot be read: Is a directory$"):
        loaded(file=tmp_path)


def test_an_unknown_variable_with_our_prefix_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(environ={"KVSTORED_DRAMM": "1GiB"})
    assert str(caught.value) == "environment KVSTORED_DRAMM: unknown; did you mean KVSTORED_DRAM?"


def test_a_bad_value_in_the_environment_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(environ={"KVSTORED_LOCK": "perhaps"})
    assert str(caught.value) == "environment KVSTORED_LOCK: 'perhaps' is neither true nor false"


def test_an_unknown_flag_is_refused() -> None:
    assert flag_refusal("--leaf-thread", "4") == "flag --leaf-thread: unknown; did you mean --leaf-threads?"


def test_an_unknown_log_level_is_refused() -> None:
    assert flag_refusal("log-level", "loud").endswith("'loud' is not one of debug, info, warning, error")


@pytest.mark.parametrize(
    ("flag", "good", "bad"),
    [
        ("arena", "1MiB", "1020KiB"),
        ("ring", "1MiB", "1023KiB"),
        ("ring", "4GiB", "5GiB"),
        ("ticket-ttl", "10ms", "9ms"),
        ("ticket-ttl", "10m", "601s"),
        ("lease-ttl-max", "200ms", "199ms"),
        ("lease-ttl-max", "60s", "60001ms"),
        ("leaf-threads", "1", "0"),
        ("leaf-threads", "64", "65"),
        ("keep-patience", "1s", "999ms"),
        ("keep-patience", "24h", "86401s"),
        ("disk-segment", "8MiB", "8188KiB"),
        ("disk-segment", "64GiB", "65GiB"),
        ("disk-write-rate", "1TiB", "1025GiB"),
        ("disk-readers", "32", "33"),
        ("disk-writers", "1", "0"),
        ("disk-packers", "32", "33"),
        ("disk-scrub-rate", "0", "1025GiB"),
    ],
)
def test_ranges_hold_at_their_ends(flag: str, good: str, bad: str) -> None:
    loaded(flags={flag: good, "dram": "1GiB"})
    assert " is out of range; from " in flag_refusal(flag, bad, dram="1GiB")


def test_a_rule_of_eviction_is_one_of_those_there_are() -> None:
    for rule in Rule:
        config = loaded(flags={"policy-dram": rule.value, "policy-disk": rule.value}).config
        assert (config.policy_dram, config.policy_disk) == (rule.value, rule.value)
    assert flag_refusal("policy-dram", "mru") == f"flag --policy-dram: 'mru' is not one of {', '.join(Rule)}"
    assert flag_refusal("policy-disk", "LRU").startswith("flag --policy-disk: 'LRU' is not one of lru, ")


def test_an_arena_is_whole_pages() -> None:
    assert flag_refusal("arena", "1048577") == "flag --arena: '1048577' is not a multiple of 4KiB"
    assert loaded(flags={"arena": str(MIB + 4 * KIB), "dram": "64MiB"}).config.arena_bytes == MIB + 4 * KIB


# DRAM, arena and machine


def test_more_dram_than_the_machine_has_is_refused() -> None:
    assert loaded(flags={"dram": "64GiB"}).config.dram_bytes == MEMORY_BYTES
    assert flag_refusal("dram", "65GiB") == "flag --dram: 65GiB is more than the machine's memory, 64GiB"


def test_less_dram_than_one_arena_is_refused_unless_the_arena_is_smaller() -> None:
    message = flag_refusal("dram", "4MiB")
    assert message == "flag --dram: a dram.size of 4MiB does not hold one dram.arena of 8MiB"
    assert loaded(flags={"dram": "4MiB", "arena": "2MiB"}).config.arena_bytes == 2 * MIB


def test_an_arena_larger_than_dram_blames_the_arena(tmp_path: Path) -> None:
    text = "[dram]\nsize = '1GiB'\narena = '2GiB'\n"
    expected = "kvstored.toml:3: dram.arena: a dram.size of 1GiB does not hold one dram.arena of 2GiB"
    assert refusal(tmp_path, text) == expected


def test_more_arenas_than_the_limit_are_refused_with_one_that_works() -> None:
    assert loaded(flags={"dram": "1GiB", "arena": "1MiB"}).config.arena_bytes == MIB
    message = flag_refusal("arena", "1MiB", dram="2GiB")
    assert message == "flag --arena: 2GiB makes more than 1024 arenas of 1MiB; take 64MiB"


def test_arenas_grow_with_dram() -> None:
    assert loaded(flags={"dram": "1TiB"}, memory_bytes=2 << 40).config.arena_bytes == GIB


# Disk

DISK_FLAGS = {"disk": "/mnt/a:/mnt/b", "disk_size": "1TiB"}


def test_a_disk_tier_is_a_list_in_the_file_and_has_colons_elsewhere(tmp_path: Path) -> None:
    file = written(tmp_path, '[disk]\ndirectories = [\n  "/mnt/a/", # one\n  "/mnt/c/../b",\n]\nsize = "1TiB"\n')
    result = loaded(file=file)
    assert result.config.disk_directories == (Path("/mnt/a"), Path("/mnt/b"))
    assert (result.config.disk_bytes, result.config.segment_bytes) == (1 << 40, 256 * MIB)
    assert origin(result, "disk.directories") == f"file {file}:2"
    for environ, flags in (({"KVSTORED_DISK": "/mnt/a:/mnt/b"}, {}), ({}, {"disk": "/mnt/a:/mnt/b"})):
        elsewhere = loaded(file=file, environ=environ, flags=flags)
        assert elsewhere.config == result.config
        assert [one.value for one in elsewhere.values if one.name == "disk.directories"] == ["/mnt/a:/mnt/b"]


@pytest.mark.parametrize("nothing", ["", "none"])
def test_a_flag_can_say_that_there_is_no_disk_tier_after_all(tmp_path: Path, nothing: str) -> None:
    file = written(tmp_path, '[disk]\ndirectories = ["/mnt/a"]\nsize = "1TiB"\n')
    config = loaded(file=file, flags={"disk": nothing}).config
    assert (config.disk_directories, config.disk_bytes) == ((), 0)
    assert loaded(file=written(tmp_path, "[disk]\ndirectories = []\n")).config.disk_directories == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "directories = '/mnt/a'",
            'disk.directories: must be a list of absolute paths, such as ["/mnt/nvme0/kv"], not',
        ),
        ("directories = [1]", "disk.directories: a path is a string, not an integer"),
        ("directories = ['/a:/b']", "disk.directories: '/a:/b' is not an absolute path without ':'"),
        ("directories = ['']", "disk.directories: '' is not an absolute path without ':'"),
        ("directories = ['none']", "disk.directories: 'none' is not an absolute path without ':'"),
        ("directories = ['mnt/a']", "disk.directories: 'mnt/a' is not an absolute path"),
        ("directories = ['~/a']", "disk.directories: '~/a' is not an absolute path"),
        ("directories = ['/a', '/a/']", "disk.directories: '/a' is listed twice"),
        ("directories = ['/a', '/b/../a']", "disk.directories: '/a' is listed twice"),
        ("directories = ['/a', '/a/b']", "disk.directories: /a/b lies inside /a; take folders beside each other"),
        ("directories = ['/a/b', '/a']", "disk.directories: /a/b lies inside /a; take folders beside each other"),
        ("directories = ['/run/kvstored']", "disk.directories: /run/kvstored is daemon.runtime_dir, which has files"),
        (f"directories = ['/{'d' * 1024}']", "is longer than 1024 bytes"),
        (f"directories = {[f'/d{number}' for number in range(17)]}", "disk.directories: 17 are more than 16"),
        ("size = '16MiB'\nadmission = 'some'", "disk.admission: 'some' is not one of all, second_touch, none"),
        ("size = '16MiB'\ncodec = 'zip'", "disk.codec: 'zip' is not one of auto, raw, bf16-planes+zstd"),
        ("direktories = []", "unknown key disk.direktories; did you mean disk.directories?"),
        ("arena = 1", "unknown key disk.arena; did you mean dram.arena?"),
        ("segment = '8193KiB'", "disk.segment: '8193KiB' is not a multiple of 4KiB"),
    ],
)
def test_what_a_disk_tier_may_not_be_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    message = refusal(tmp_path, f"[disk]\n{text}\n")
    assert re.match(r"kvstored\.toml:[23]: ", message)
    assert expected in message


def test_directories_that_are_one_by_a_link_are_refused(tmp_path: Path) -> None:
    real, link, inner = tmp_path / "real", tmp_path / "link", tmp_path / "link" / "inner"
    real.mkdir()
    link.symlink_to(real)
    assert flag_refusal("disk", f"{real}:{link}", disk_size="1GiB").endswith(f"{link} and {real} are one folder")
    assert f"{inner} lies inside {real};" in flag_refusal("disk", f"{real}:{inner}", disk_size="1GiB")


def test_a_disk_without_a_size_is_refused_and_a_size_without_a_disk_too(tmp_path: Path) -> None:
    needs = "disk.directories needs disk.size (--disk-size), the bytes that all directories may take together"
    assert flag_refusal("disk", "/mnt/a") == f"flag --disk: {needs}"
    assert flag_refusal("disk-size", "0", disk="/mnt/a") == f"flag --disk-size: {needs}"
    assert (
        flag_refusal("disk-size", "1GiB")
        == "flag --disk-size: 1GiB of disk, and no disk.directories: name a folder on each drive"
    )
    assert refusal(tmp_path, "[disk]\ndirectories = ['/mnt/a']\n") == f"kvstored.toml:2: disk.directories: {needs}"


def test_a_disk_holds_at_least_two_segments_and_at_most_the_limit() -> None:
    assert loaded(flags={"disk": "/a", "disk_size": "16MiB"}).config.segment_bytes == 8 * MIB
    message = flag_refusal("disk-size", "15MiB", disk="/a")
    assert message == "flag --disk-size: a disk.size of 15MiB does not hold 2 segments of 8MiB"
    assert flag_refusal("disk-segment", "1TiB", **DISK_FLAGS).startswith("flag --disk-segment: 1TiB is out of range")
    assert "does not hold 2 segments" in flag_refusal("disk-segment", "16MiB", disk="/a", disk_size="24MiB")
    message = flag_refusal("disk-segment", "8MiB", **DISK_FLAGS)
    assert message == "flag --disk-segment: 1TiB makes more than 65536 segments of 8MiB; take 256MiB"


def test_segments_grow_where_large_arenas_leave_few_numbers_for_them() -> None:
    config = load(None, ENVIRON, {"dram": "1TiB", "disk": "/a", "disk-size": "16TiB"}, memory_bytes=2 << 40).config
    assert config.arena_bytes == GIB
    assert config.segment_bytes > limits.segment_bytes_for(16 << 40)
    with pytest.raises(ConfigError, match=r"more slots than 32 bits can number; take larger ones, or less disk$"):
        load(None, ENVIRON, {"dram": "1TiB", "disk": "/a", "disk-size": "999TiB"}, memory_bytes=2 << 40)


@settings(derandomize=True, max_examples=200)
@given(
    st.integers(24, 44).map(lambda bits: 1 << bits),
    st.integers(24, 47).map(lambda bits: 1 << bits),
    st.none() | st.sampled_from(["8MiB", "100MiB", "1GiB", "64GiB"]),
)
def test_what_is_called_good_has_a_number_for_every_slot(dram: int, disk: int, segment: str | None) -> None:
    flags = {"dram": str(dram), "disk": "/a", "disk-size": str(disk)}
    try:
        config = load(
            None, ENVIRON, flags | ({"disk-segment": segment} if segment else {}), memory_bytes=1 << 45
        ).config
        good = True
    except ConfigError as error:
        if "32 bits" not in str(error):
            return
        good = False
        words = re.search(r"in segments of (\S+) beside arenas of (\S+) has", str(error))
        assert words is not None
        segment_bytes, arena_bytes = parse_bytes(words[1]), parse_bytes(words[2])
    if good:
        segment_bytes, arena_bytes = config.segment_bytes, config.arena_bytes
    numbered = tables.Limits(dram, arena_bytes, disk=DiskLimits(disk, segment_bytes))
    try:
        tables.geometry_of(numbered)
    except UsageError:
        assert not good
    else:
        assert good


def test_the_words_of_the_disk_tier_are_those_of_the_store() -> None:
    assert tuple(Admission) == declared.ADMISSIONS
    assert tuple(Wish) == declared.CODECS


def test_configuration_is_read_without_what_takes_long_to_import() -> None:
    program = "import sys, kvstored.cli; print(sorted({'numba', 'grpc', 'lmdb', 'zstandard'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


# The command line


def test_a_switch_may_stand_alone_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Loaded] = []

    def run(loaded: Loaded) -> int:
        ran.append(loaded)
        return 0

    monkeypatch.setattr(cli, "_run", run)
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/kvstored")
    assert cli.main(["--keep", "--lock", "false", "--prefault", "--dram", "64MiB", "--disk", "none"]) == 0
    config = ran[0].config
    assert (config.keep, config.lock, config.prefault, config.dram_bytes) == (True, False, True, 64 * MIB)
    assert origin(ran[0], "daemon.keep") == "flag --keep"


def test_a_flag_with_an_empty_value_is_a_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", lambda _: 0)
    assert cli.main(["--dram="]) == EX_CONFIG
    assert "flag --dram: '' is not a size" in capsys.readouterr().err
    assert cli.main(["--disk=", "--dram", "64MiB"]) == 0


# Tenants


def test_tenants_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = '[tenants.research]\nuids = [\n  1001, # one\n  0,\n]\n[tenants]\n"team.a" = {uids = [1001]}\n'
    file = written(tmp_path, text)
    result = loaded(file=file)
    assert result.config.tenants == (TenantConfig("research", (1001, 0)), TenantConfig("team.a", (1001,)))
    first, second = result.values[len(SETTINGS) :]
    assert (first.name, first.value, first.origin) == ("tenants.research.uids", "1001, 0", f"file {file}:2")
    assert (second.name, second.origin) == ('tenants."team.a".uids', f"file {file}:7")


def test_only_a_tenant_that_is_marked_is_trusting_and_config_says_so(tmp_path: Path) -> None:
    text = (
        "[tenants.a]\nuids = [1]\ntrusting = true\n[tenants.b]\nuids = [2]\ntrusting = false\n[tenants.c]\nuids = [3]\n"
    )
    result = loaded(file=written(tmp_path, text))
    assert [result.config.trusts(name) for name in ("a", "b", "c", "uid-4")] == [True, False, False, False]
    said = {value.name: value.value for value in result.values if value.name.endswith("trusting")}
    assert said == {"tenants.a.trusting": "true", "tenants.b.trusting": "false"}


def test_a_uid_belongs_to_its_tenants_or_to_one_of_its_own(tmp_path: Path) -> None:
    text = "[tenants.a]\nuids = [1, 2]\n[tenants.b]\nuids = [2, 3]\n"
    config = loaded(file=written(tmp_path, text)).config
    assert config.tenants_of(2) == ("a", "b")
    assert config.tenants_of(3) == ("b",)
    assert config.tenants_of(4) == ("uid-4",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tenants = 1\n", "kvstored.toml:1: must be a section, [tenants], not an integer"),
        ("[tenants]\na = 1\n", "kvstored.toml:2: must be a section, [tenants.a], not an integer"),
        ("[tenants.a]\n", "kvstored.toml:1: tenants.a.uids: must be a list of at least one uid"),
        ("[tenants.a]\nuids = []\n", "kvstored.toml:2: tenants.a.uids: must be a list of at least one uid"),
        ("[tenants.a]\nuids = 5\n", "kvstored.toml:2: tenants.a.uids: must be a list of at least one uid"),
        (
            "[tenants.a]\nuid = [5]\n",
            "kvstored.toml:2: unknown key tenants.a.uid; did you mean tenants.a.uids?",
        ),
        ("[tenants.a]\nuids = ['x']\n", "tenants.a.uids: a uid is a whole number, not a string"),
        ("[tenants.a]\nuids = [true]\n", "tenants.a.uids: a uid is a whole number, not a boolean"),
        ("[tenants.a]\nuids = [-1]\n", "tenants.a.uids: a uid is from 0 to 4294967294"),
        ("[tenants.a]\nuids = [4294967295]\n", "tenants.a.uids: a uid is from 0 to 4294967294"),
        (
            "[tenants.a]\nuids = [65534]\n",
            "tenants.a.uids: 65534 stands for every uid that is not mapped here",
        ),
        ("[tenants.a]\nuids = [7, 7]\n", "tenants.a.uids: 7 is listed twice"),
        ("[tenants.a]\nuids = [7]\ntrusting = 1\n", "tenants.a.trusting: must be true or false, not an integer"),
        ("[tenants.a]\nuids = [7]\ntrustin = true\n", "did you mean tenants.a.trusting?"),
        ("[tenants.uid-7]\nuids = [7]\n", "kvstored.toml:1: uid-7: names that start with uid- belong to"),
        ("[tenants.'a b']\nuids = [7]\n", "kvstored.toml:1: 'a b' is not a tenant name; 1 to 64 of"),
        (f"[tenants.{'a' * 65}]\nuids = [7]\n", "is not a tenant name"),
        ("[tenants.'']\nuids = [7]\n", "'' is not a tenant name"),
    ],
)
def test_what_a_tenant_may_not_be_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(tmp_path, text)


def test_one_tenant_too_many_is_refused_with_its_line(tmp_path: Path) -> None:
    tables = [f"[tenants.t{number}]\nuids = [{number}]\n" for number in range(limits.TENANTS + 1)]
    assert len(loaded(file=written(tmp_path, "".join(tables[:-1]))).config.tenants) == limits.TENANTS
    assert refusal(tmp_path, "".join(tables)) == f"kvstored.toml:{2 * limits.TENANTS + 1}: more than 64 tenants"


# Units


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("1KiB", 1024),
        ("1.5 MB", 1_500_000),
        ("3kB", 3000),
        ("3KB", 3000),
        ("3K", 3072),
        ("1.5 G", 3 << 29),
        (" 2TB ", 2 * 10**12),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "1g", "1gib", "1k", "1Ki", "1Mib", "-1", "1e3", "0.3B", "1 2", "1  GiB", "٣B", "1" * 5000]
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a (size|unit of size|whole number of bytes)|is not a unit"):
        parse_bytes(text)


@settings(derandomize=True)
@given(st.integers(0, 10**17))
def test_a_size_shown_and_read_again_is_the_same(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes)) == size_bytes


@settings(derandomize=True)
@given(st.integers(1, 1 << 20), st.sampled_from([KIB, MIB, GIB]))
def test_a_size_is_shown_in_its_largest_whole_unit(count: int, unit_bytes: int) -> None:
    shown = format_bytes(count * unit_bytes)
    digits = shown.rstrip("BKMGTi")
    assert int(digits) % 1024 or shown.endswith("TiB")


@pytest.mark.parametrize(
    ("text", "duration_s"), [("500ms", 0.5), ("30s", 30.0), ("5m", 300.0), ("1h", 3600.0), ("0.1 s", 0.1)]
)
def test_durations_are_read_in_seconds(text: str, duration_s: float) -> None:
    assert parse_seconds(text) == duration_s


@pytest.mark.parametrize("text", ["", "30", "s", "1d", "1m30s", "-1s", "inf", "nan"])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a (duration|unit of time)"):
        parse_seconds(text)


@settings(derandomize=True)
@given(st.integers(1, 3_600_000))
def test_a_duration_shown_and_read_again_is_the_same(duration_ms: int) -> None:
    assert parse_seconds(format_seconds(duration_ms / 1000)) == duration_ms / 1000


# Lines of keys


def test_lines_are_found_through_every_way_to_write_a_key() -> None:
    source = '''# a [comment] = 1
dram.size = "1GiB"   # [x]
dram . "lock" = true
'clients' = { ring = "[", ticket_ttl = { a = [1, {b = 2}] } }

[ tenants . "team.a\\u0041" ]
uids = [
  1, # ] not the end
  2,
]
text = """
[fake]
key = 1 \\"""
quoted""\"""
after = \'\'\'
[fake]'\'\'\'
[[list]]
x = 1979-05-27 07:32:00
'''
    tomllib.loads(source)
    assert key_lines(source) == {
        ("dram",): 2,
        ("dram", "size"): 2,
        ("dram", "lock"): 3,
        ("clients",): 4,
        ("clients", "ring"): 4,
        ("clients", "ticket_ttl"): 4,
        ("clients", "ticket_ttl", "a"): 4,
        ("clients", "ticket_ttl", "a", "b"): 4,
        ("tenants",): 6,
        ("tenants", "team.aA"): 6,
        ("tenants", "team.aA", "uids"): 7,
        ("tenants", "team.aA", "text"): 11,
        ("tenants", "team.aA", "after"): 15,
        ("list",): 17,
        ("list", "x"): 18,
    }


def test_a_scan_that_gets_lost_keeps_what_it_found() -> None:
    assert key_lines("a = 1\nb = [1, 2") == {("a",): 1, ("b",): 2}
    assert key_lines("a = 1\n*") == {("a",): 1}


@settings(derandomize=True)
@given(st.text(alphabet="ab.=[]{}\"'#\\, \n1"))
def test_no_text_whatever_crashes_the_scan(source: str) -> None:
    key_lines(source)


TOML_KEYS = st.text(alphabet="ab-_1. \"'\\#=[]é\t", max_size=4)
TOML_VALUES = st.recursive(
    st.sampled_from(
        [
            "1",
            "true",
            "-1.5e3",
            '""',
            '"a # ] } , \\" \\\\"',
            "''",
            "'\\'",
            '"""\n[x]\n"a""\\""""',
            "'''\n#'\n'''",
        ]
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: "[\n" + ",# c ]\n".join(items) + "\n]"),
    max_leaves=4,
)


def quoted_key(key: str) -> str:
    return '"' + key.replace("\\", "\\\\").replace('"', '\\"').replace("\t", "\\t") + '"'


@settings(derandomize=True, max_examples=200)
@given(
    st.dictionaries(TOML_KEYS, st.dictionaries(TOML_KEYS, TOML_VALUES, max_size=4), max_size=4),
    st.sampled_from(["\n", "\r\n"]),
)
def test_every_key_of_a_generated_file_is_found_on_its_line(
    sections: Mapping[str, Mapping[str, str]], line_end: str
) -> None:
    lines: list[str] = []
    expected: dict[tuple[str, ...], int] = {}
    for section, pairs in sections.items():
        lines += ["# comment", f" [ {quoted_key(section)} ] # ]"]
        expected[(section,)] = len(lines)
        for key, value in pairs.items():
            expected[(section, key)] = len(lines) + 1
            lines += f"{quoted_key(key)} = {value} # 'end".split("\n")
    source = line_end.join(lines)
    assert tomllib.loads(source).keys() == sections.keys()
    assert key_lines(source) == expected


class TestSegment:
    """What disk.segment is where nobody says: the size of those that are there, whatever disk.size becomes."""

    def chosen(self, tmp_path: Path, size: str, *given: str) -> int:
        flags = {"--disk": str(tmp_path), "--disk-size": size, "--dram": "1GiB"}
        return loaded(flags=flags | dict(zip(given[::2], given[1::2], strict=True))).config.segment_bytes

    def test_is_that_of_the_files_that_are_there(self, tmp_path: Path) -> None:
        usual = [self.chosen(tmp_path, size) for size in ("10GiB", "5GiB")]
        assert usual[0] != usual[1], "the control"
        (tmp_path / "segments").mkdir()
        for number in range(3):
            with (tmp_path / "segments" / f"{number:08}.seg").open("wb") as file:
                file.truncate(usual[0])
        assert [self.chosen(tmp_path, size) for size in ("10GiB", "5GiB", "1TiB")] == [usual[0]] * 3
        assert self.chosen(tmp_path, "5GiB", "--disk-segment", "64MiB") == 64 << 20

    @pytest.mark.parametrize("size", [0, 1, 4096, (64 << 20) + 1, 1 << 40])
    def test_is_the_usual_one_beside_files_that_are_no_segments(self, tmp_path: Path, size: int) -> None:
        usual = self.chosen(tmp_path, "5GiB")
        (tmp_path / "segments").mkdir()
        with (tmp_path / "segments" / "00000001.seg").open("wb") as file:
            file.truncate(size)
        (tmp_path / "segments" / "00000002.seg").mkdir()
        assert self.chosen(tmp_path, "5GiB") == usual

    def test_is_the_usual_one_where_those_that_are_there_do_not_fit(self, tmp_path: Path) -> None:
        (tmp_path / "segments").mkdir()
        with (tmp_path / "segments" / "00000001.seg").open("wb") as file:
            file.truncate(512 << 20)
        assert self.chosen(tmp_path, "600MiB") < 300 << 20
