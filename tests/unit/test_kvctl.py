"""kvctl against a real control socket: tables, JSON, exit codes, and what it asks before it clears."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pytest

from kvctl import checkup, render, scrub
from kvctl import client as kvctl_client
from kvctl.cli import globals_first
from kvctl.client import Exit
from kvctl.host import Entry, Ground, LinuxHost, Space
from kvstore.rules import Rule, Tier
from kvstored import control
from kvstored.control import ControlServer
from tests.kvctl_line import Result, Run, command_line
from tests.unit.control_fakes import DIGEST_A, DIGEST_B, KEYS, MemoryPort, ThreadOwner, disk_report, restart_report

HEX_A = DIGEST_A.hex()
KEY = KEYS[2].hex()


@dataclass
class Daemon:
    """A control server in memory."""

    folder: Path
    port: MemoryPort
    owner: ThreadOwner
    server: ControlServer


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("KVSTORED_RUNTIME_DIR", "KVSTORED_DISK", "XDG_RUNTIME_DIR")
    for name in (*ours, "COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checkup, "LinuxHost", SameEverywhere)


@pytest.fixture
def kvctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line as the console script does."""
    return command_line(monkeypatch, capsys)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    port = MemoryPort(runtime_dir=str(folder))
    owner = ThreadOwner(port)
    server = ControlServer(owner, folder)
    server.start()
    yield Daemon(folder, port, owner, server)
    server.stop(0.0)
    owner.stop()


@pytest.fixture
def ask(kvctl: Run, daemon: Daemon) -> Run:
    """The same with the daemon's directory given."""

    def run(*arguments: str, typed: str | None = None) -> Result:
        return kvctl("--runtime-dir", str(daemon.folder), *arguments, typed=typed)

    return run


READERS = (
    "status", "stats", "namespaces", "tenants", "clients", "config", "costs", "policy", "quota", "pins",
    "programs", "workflows", "doctor",
)  # fmt: skip


class TestAnswers:
    @pytest.mark.parametrize("command", READERS)
    def test_tables_fit_80_columns(self, ask: Run, command: str) -> None:
        answer = ask(command)
        assert (answer.code, answer.err) == (0, "")
        assert max(len(line.rstrip()) for line in answer.out.splitlines()) <= 80

    @pytest.mark.parametrize("command", [*READERS, "ping", "drain --yes", "undrain"])
    def test_json_is_one_object_with_its_version(self, ask: Run, command: str) -> None:
        answer = ask("-o", "json", *command.split())
        assert (answer.code, answer.err) == (0, "")
        assert answer.json["version"] == 1
        assert len(answer.json) == 2

    def test_status_shows_sizes_for_people(self, ask: Run) -> None:
        out = ask("status").out
        assert "kvstored 0.1.0, serving, up 3 h 12 min" in out
        assert "1.0 GiB" in out
        assert "16 x 64.0 MiB" in out
        assert "research" in out

    def test_status_as_json_has_raw_numbers(self, ask: Run) -> None:
        status = ask("status", "-o", "json").json["status"]
        assert status["version"] == "0.1.0"
        assert status["uptime_s"] == 11_530.5
        assert status["tiers"][0]["capacity_bytes"] == 1 << 30
        assert status["tenants"][0]["uids"] == [1000, 1001]
        assert status["counters"]["leases"] == 1001
        assert status["draining"] is False

    def test_status_has_a_line_for_each_tier_and_each_drive(self, ask: Run) -> None:
        lines = [line.split() for line in ask("status").out.splitlines()]
        assert ["dram", "1.0", "GiB", "128.0", "MiB", "16.0", "MiB", "8", "16", "x", "64.0", "MiB"] in lines
        assert ["disk", "1.0", "GiB", "64.0", "MiB", "6.0", "MiB", "3", "2", "x", "32.0", "MiB"] in lines
        assert ["/mnt/a/kv", "ok", "900.0", "MiB", "5.0", "MiB", "7.0", "MiB", "0"] in lines
        assert ["/mnt/b/kv", "full,", "buffered", "900.0", "MiB", "5.0", "MiB", "7.0", "MiB", "0"] in lines

    def test_status_says_what_disk_does_and_what_it_found(self, ask: Run) -> None:
        out = ask("status").out
        assert "disk: serving, index ready, admission second_touch, codec auto, not encrypted" in out
        assert "found at start: 2 blocks in 1 segments, 1 orphans dropped" in out
        assert "2,001 blocks saved (2.0 KiB), 2,003 packed, 4 chains wait, 2.0 MiB under way" in out
        assert "1,004 of them on disk" in " ".join(out.split())

    def test_status_shows_how_far_a_rebuild_is_and_why(self, ask: Run, daemon: Daemon) -> None:
        daemon.port.disk = replace(
            disk_report(), state="opening", index_state="rebuilding", rebuild_done_slots=300, rebuild_total_slots=1200,
            rebuilt="the index was damaged",
        )  # fmt: skip
        out = " ".join(ask("status").out.split())
        assert "disk: opening, index rebuilding (25% of 1,200 slots), made anew at this start (the index was" in out

    def test_status_says_how_this_life_began(self, ask: Run, daemon: Daemon) -> None:
        warm = (
            "began warm: 1,200 of 1,234 blocks kept, 300 not verified yet, "
            "3 slots withheld at first for leases of before; memory is kept by systemd"
        )
        assert warm in " ".join(ask("status").out.split())
        daemon.port.restart = replace(
            restart_report(), began="cold", reason="the configuration has changed", keeper="none"
        )
        cold = "began cold: the configuration has changed; memory is not kept over a restart"
        assert cold in " ".join(ask("status").out.split())

    def test_status_without_a_disk_tier_speaks_of_none(self, ask: Run, daemon: Daemon) -> None:
        daemon.port.disk = None
        assert "disk:" not in ask("status").out
        status = ask("status", "-o", "json").json["status"]
        assert status["disk"] is None
        assert status["restart"]["keeper"] == "systemd"

    def test_status_as_json_has_all_of_disk(self, ask: Run) -> None:
        disk = ask("status", "-o", "json").json["status"]["disk"]
        assert disk["counters"]["saved"] == 2001
        assert disk["foreign"] == ["/mnt/a/segments/notes.txt"]
        assert [(drive["state"], drive["direct"]) for drive in disk["drives"]] == [("ok", True), ("full", False)]

    def test_status_shows_each_warning(self, ask: Run, daemon: Daemon) -> None:
        daemon.port.warnings = ("memory is not locked: raise LimitMEMLOCK",)
        assert "warning: memory is not locked: raise LimitMEMLOCK" in ask("status").out

    def test_stats_show_every_counter(self, ask: Run) -> None:
        out = ask("stats").out
        assert "lease hits" in out
        assert "1,002" in out
        assert "published bytes" in out
        assert ask("stats", "-o", "json").json["counters"]["lease_hits"] == 1002

    def test_namespaces_show_enough_of_the_digest_to_clear_by(self, ask: Run) -> None:
        out = ask("namespaces").out
        assert HEX_A[:12] in out
        assert "meta-llama/Llama-3.1-8B-Instruct " in out
        assert "vllm-0.11 nhd bfloat16 tp0/2 pp0/1 " in out
        assert "revision 0e9e39f adapter - " in out
        assert ask("namespaces", "-o", "json").json["namespaces"][0]["digest"] == HEX_A

    def test_clients_show_who_they_are(self, ask: Run) -> None:
        out = ask("clients").out
        for shown in ("engine-0", "engine, copy", "31337", "accident only", "1 min 15 s"):
            assert shown in out

    def test_config_shows_every_value_with_its_origin(self, ask: Run) -> None:
        out = ask("config").out
        assert "dram.size" in out
        assert "flag --dram" in out
        settings = ask("config", "-o", "json").json["config"]
        origins = ["flag --dram", "file /etc/kvstored.toml:3", "environment KVSTORED_DISK"]
        assert [one["origin"] for one in settings] == origins

    def test_a_clients_name_cannot_steer_the_terminal(self, ask: Run, daemon: Daemon) -> None:
        daemon.port.client_name = "\x1b[2Jevil [red]name[/red] :smile:"
        out = ask("clients").out
        assert "\x1b" not in out
        assert "[red]" in out.replace("\n", "")
        assert ask("clients", "-o", "json").json["clients"][0]["name"] == daemon.port.client_name

    def test_ping_counts_round_trips(self, ask: Run) -> None:
        body = ask("ping", "--count", "3", "-o", "json").json["ping"]
        assert body["count"] == 3
        assert 0 < body["min_ms"] <= body["median_ms"] <= body["max_ms"]
        assert 0 < body["owner_median_ms"] < body["max_ms"]
        assert "3 round trips: min " in ask("ping", "-c", "3").out

    def test_drain_and_undrain_say_what_holds_now(self, ask: Run, daemon: Daemon) -> None:
        assert ask("drain", "--yes", "-o", "json").json["draining"] is True
        assert daemon.port.draining
        assert "draining" in ask("status").out
        assert "new blocks are taken again" in ask("undrain").out
        assert not daemon.port.draining

    def test_version_and_help_need_no_daemon(self, kvctl: Run) -> None:
        assert kvctl("--version").out.startswith("kvctl ")
        out = kvctl("--help").out
        assert "Exit codes: 0 done, 1 refused" in out
        assert "completion" in out
        assert max(len(line) for line in out.splitlines()) <= 80


class TestClear:
    def test_asks_and_clears_on_yes(self, ask: Run, daemon: Daemon) -> None:
        answer = ask("clear", "--tenant", "research", typed="y\n")
        assert answer.code == 0
        assert "would drop 7 blocks, 14.0 MiB: everything of tenant research" in answer.err
        assert "1 block of them, with all that leads there, leased or pinned" in answer.err
        assert "3 pending blocks would be discarded" in answer.err
        assert "Drop them?" in answer.err
        assert "dropped 7 blocks, 14.0 MiB" in answer.out
        assert daemon.port.tier().blocks == 1

    @pytest.mark.parametrize("typed", ["n\n", "\n", ""])
    def test_drops_nothing_on_anything_but_yes(self, ask: Run, daemon: Daemon, typed: str) -> None:
        answer = ask("clear", "--all", typed=typed)
        assert answer.code == Exit.REFUSED
        assert answer.out == ""
        assert daemon.port.tier().blocks == 8

    def test_without_a_terminal_refuses_before_it_asks_the_daemon(self, ask: Run, daemon: Daemon) -> None:
        answer = ask("clear", "--all")
        assert answer.code == Exit.USAGE
        assert answer.err == "kvctl: there is no terminal to ask on; give --yes to clear, or --dry-run to look\n"
        assert not daemon.owner.asked.is_set()

    def test_with_yes_clears_without_asking(self, ask: Run, daemon: Daemon) -> None:
        answer = ask("-o", "json", "clear", "--all", "--yes")
        assert (answer.code, answer.err) == (0, "")
        assert answer.json["clear"] == {
            "blocks": 8, "bytes": 8 << 21, "leased_blocks": 1, "pending_blocks": 3, "dry_run": False,
            "remote_objects": None,
        }  # fmt: skip
        assert daemon.port.tier().blocks == 0

    @pytest.mark.parametrize("more", [(), ("--yes",)])
    def test_dry_run_drops_nothing_and_asks_nothing(self, ask: Run, daemon: Daemon, more: tuple[str, ...]) -> None:
        answer = ask("clear", "--all", "--dry-run", *more)
        assert (answer.code, answer.err) == (0, "")
        assert "would drop 8 blocks" in answer.out
        assert "concerned: 600 pins" in answer.out
        assert daemon.port.tier().blocks == 8

    def test_of_nothing_asks_nothing(self, ask: Run) -> None:
        assert ask("clear", "--tenant", "web", "--yes").code == 0
        answer = ask("clear", "--tenant", "web", typed="")
        assert answer.code == 0
        assert "Drop them?" not in answer.err

    def test_json_on_stdout_is_not_mixed_with_the_question(self, ask: Run) -> None:
        answer = ask("clear", "--all", "-o", "json", typed="y\n")
        assert answer.json["clear"]["blocks"] == 8
        assert "Drop them?" in answer.err

    def test_takes_a_namespace_by_an_unambiguous_prefix_in_any_case(self, ask: Run, daemon: Daemon) -> None:
        answer = ask("clear", "--namespace", "ABCDEF02", "--yes")
        assert "dropped 2 blocks, 4.0 MiB: namespace abcdef02abcd of all tenants" in answer.out
        assert daemon.port.scopes[-1].digest == DIGEST_B

    def test_by_tenant_and_namespace_is_both(self, ask: Run, daemon: Daemon) -> None:
        ask("clear", "--namespace", HEX_A, "--tenant", "web", "--yes")
        assert daemon.port.tier().blocks == 7

    def test_by_key_drops_what_continues_it(self, ask: Run, daemon: Daemon) -> None:
        answer = ask("clear", "--namespace", "abcdef01", "--key", KEY, "--key", KEYS[3].hex(), "--yes")
        assert "dropped 3 blocks, 6.0 MiB: namespace abcdef01abcd from 2 keys on of all tenants" in answer.out
        assert daemon.port.scopes[-1].keys == KEYS[2:4]

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ((), "nothing is named; give --tenant, --namespace or --all"),
            (("--all", "--tenant", "web"), "--all means everything;"),
            (("--all", "--namespace", HEX_A), "--all means everything;"),
            (("--key", KEY), "a key means nothing without its namespace; add --namespace"),
            (("--key", KEY, "--tenant", "web"), "a key means nothing without its namespace; add --namespace"),
            (("--namespace", "abcde"), "a namespace is named by 6 to 64 hex digits"),
            (("--namespace", "abcdez"), "a namespace is named by 6 to 64 hex digits"),
            (("--namespace", HEX_A + "0"), "a namespace is named by 6 to 64 hex digits"),
            (
                ("--namespace", HEX_A, "--key", "abc"),
                "'abc' is not a key; a key is 64 hex digits, or 8 or more of the first",
            ),
            (("--tenant", ""), "--tenant is empty;"),
            (("--namespace", HEX_A, *("--key", KEY) * 1025), "1,025 keys are too many;"),
        ],
    )
    def test_refuses_a_scope_that_makes_no_sense(
        self, ask: Run, daemon: Daemon, arguments: tuple[str, ...], sentence: str
    ) -> None:
        answer = ask("clear", *arguments, "--yes")
        assert answer.code == Exit.USAGE
        assert sentence in answer.err
        assert not daemon.owner.asked.is_set()

    def test_refuses_an_ambiguous_namespace(self, ask: Run) -> None:
        answer = ask("clear", "--namespace", "abcdef", "--yes")
        assert answer.code == Exit.USAGE
        assert "2 namespaces begin with abcdef: abcdef01abcd, abcdef02abcd; give more digits" in answer.err

    def test_counts_a_namespace_of_two_tenants_as_one(self, ask: Run) -> None:
        assert ask("clear", "--namespace", "abcdef01", "--yes").code == 0

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("--tenant", "nobody"), "no tenant is called nobody;"),
            (("--namespace", "123456"), "no namespace has a digest that begins with 123456;"),
            (("--namespace", "abcdef02", "--tenant", "web"), "no namespace of tenant web has a digest"),
            (("--namespace", "00" * 32), "no namespace has the digest 000000000000;"),
        ],
    )
    def test_of_what_does_not_exist_is_not_found(self, ask: Run, arguments: tuple[str, ...], sentence: str) -> None:
        answer = ask("clear", *arguments, "--yes")
        assert answer.code == Exit.NOT_FOUND
        assert sentence in answer.err


class TestScrub:
    def test_starts_one_and_says_so(self, ask: Run, daemon: Daemon) -> None:
        answer = ask("scrub", "--rate", "100MiB")
        assert (answer.code, answer.err) == (0, "")
        assert answer.out == "scrub runs, at most 100.0 MiB a second: 0 of 3 blocks (0 B) read\n"
        assert daemon.port.scrubbed.rate_bytes_per_s == 100 << 20

    def test_of_memory_asks_for_that_to_the_end(
        self, ask: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scrub, "PAUSE_S", 0.0)
        daemon.port.decayed = True
        answer = ask("scrub", "--tier", "dram", "--wait")
        assert daemon.port.scrubbed_tier is Tier.DRAM
        assert answer.code == 1
        assert "1 damaged: they are misses now, and their place is not used again" in answer.out

    def test_status_starts_nothing(self, ask: Run, daemon: Daemon) -> None:
        assert ask("scrub", "--status").out == "no scrub was run since the daemon started\n"
        assert not daemon.port.scrubbed.running

    def test_with_wait_stays_until_it_is_done(self, ask: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scrub, "PAUSE_S", 0.0)
        answer = ask("scrub", "--wait")
        assert (answer.code, answer.err) == (0, "")
        assert answer.out == "scrub done in 1 min 1 s: 3 of 3 blocks (6.0 MiB) read\nnone damaged\n"

    def test_shows_a_bar_on_a_terminal(self, ask: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scrub, "PAUSE_S", 0.0)
        monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take stderr for a terminal
        answer = ask("-o", "json", "scrub", "--wait")
        assert "3/3" in answer.err
        assert answer.json["scrub"]["done_blocks"] == 3

    def test_says_how_far_it_is_in_a_log(self, ask: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scrub, "PAUSE_S", 0.0)
        monkeypatch.setattr(scrub, "LINE_S", 0.0)
        answer = ask("-o", "json", "scrub", "--wait")
        assert "scrub: 0 of 3 blocks, 0 B\n" in answer.err
        assert answer.json["scrub"]["done_blocks"] == 3

    def test_that_finds_damage_exits_with_1_if_somebody_waits(
        self, ask: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scrub, "PAUSE_S", 0.0)
        daemon.port.decayed = True
        answer = ask("scrub", "--wait")
        assert answer.code == Exit.REFUSED
        assert "1 damaged: they are misses now" in answer.out
        assert ask("scrub", "--status").code == 0

    def test_whose_place_another_one_took_is_not_called_done(
        self, ask: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def replace_it(_seconds: float) -> None:
            daemon.port.scrubbed = replace(daemon.port.scrubbed, started_unix_s=1.8e9)

        monkeypatch.setattr("kvctl.scrub.time.sleep", replace_it)
        answer = ask("scrub", "--wait")
        assert answer.code == Exit.REFUSED
        assert "another scrub has taken the place of this one;" in answer.err

    def test_that_nobody_waits_for_any_more_goes_on(
        self, ask: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvctl.scrub.time.sleep", interrupt)
        answer = ask("scrub", "--wait")
        assert answer.code == Exit.REFUSED
        assert "the scrub goes on" in answer.err
        assert daemon.port.scrubbed.running

    def test_without_a_disk_tier_is_refused(self, ask: Run, daemon: Daemon) -> None:
        daemon.port.disk = None
        answer = ask("scrub")
        assert (answer.code, answer.err) == (Exit.REFUSED, "kvctl: there is no disk tier; give --disk\n")

    @pytest.mark.parametrize(
        ("rate", "bytes_per_s"),
        [
            ("0", 0),
            ("4096", 4096),
            ("1KiB", 1024),
            ("20 MiB", 20 << 20),
            ("2GiB/s", 2 << 30),
            ("7B", 7),
            ("1.5M", 3 << 19),
            ("5MB/s", 5 * 10**6),
            ("1kB", 1000),
        ],
    )
    def test_rates_are_bytes_a_second(self, rate: str, bytes_per_s: int) -> None:
        assert scrub.parse_rate(rate) == bytes_per_s

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("--rate", "fast"), "'fast' is not a rate; --rate takes bytes a second"),
            (("--rate", "-1"), "'-1' is not a rate;"),
            (("--rate", "1.5B"), "'1.5B' is not a rate;"),
            (("--rate", "9" * 18 + "TiB"), "TiB' is not a rate;"),
            (("--rate", "999999GiB"), "rate_bytes_per_s is at most"),
            (("--status", "--rate", "1"), "--status starts nothing"),
        ],
    )
    def test_refuses_what_makes_no_sense(
        self, ask: Run, daemon: Daemon, arguments: tuple[str, ...], sentence: str
    ) -> None:
        answer = ask("scrub", *arguments)
        assert answer.code == Exit.USAGE
        assert sentence in answer.err
        assert not daemon.port.scrubbed.running


class TestPolicy:
    def test_shows_tiers_and_tenants_with_a_rule_of_their_own(self, ask: Run) -> None:
        ask("policy", "set", "--yes", "--tier", "disk", "--tenant", "web", "arc")
        lines = [line.split() for line in ask("policy").out.splitlines()]
        assert lines[0] == ["tier", "tenant", "rule", "from", "blocks"]
        assert ["dram", "*", "lru", "configuration", "8"] in lines
        assert ["disk", "web", "arc", "kvctl", "policy", "set", "1"] in lines

    def test_set_says_what_changed(self, ask: Run) -> None:
        answer = ask("policy", "set", "--yes", "density")
        assert (answer.code, answer.err) == (0, "")
        assert answer.out.splitlines() == [
            "dram: evicts by density, until now by lru (8 blocks)",
            "disk: evicts by density, until now by lru (8 blocks)",
        ]
        again = ask("policy", "set", "--yes", "--tier", "dram", "--tenant", "web", "density").out
        assert again == "dram, tenant web: evicts by density, as before (1 blocks)\n"

    def test_set_with_dry_run_says_what_would_change_and_changes_nothing(self, ask: Run, daemon: Daemon) -> None:
        out = ask("policy", "set", "--dry-run", "--tier", "dram", "--tenant", "web", "lfu").out
        told, below = out.splitlines()
        assert told == "dram, tenant web: would evict by lfu, until now by lru (1 blocks)"
        assert below == "concerned: 0 pins (0 B), 0 running leases, 0 clients"
        assert not daemon.port.rules

    def test_help_names_every_rule(self, kvctl: Run) -> None:
        for words in (("policy", "--help"), ("policy", "set", "--help")):
            named = kvctl(*words).out
            assert all(rule.value in named for rule in Rule)

    def test_set_as_json(self, ask: Run) -> None:
        body = ask("policy", "set", "--yes", "--tier", "dram", "lfu", "-o", "json").json
        assert body["version"] == 1
        assert body["policy"]["changes"] == [
            {
                "policy": {"tier": "dram", "tenant": "", "rule": "lfu", "chosen": True, "blocks": 8},
                "former_rule": "lru",
            }
        ]

    @pytest.mark.parametrize(
        ("arguments", "code", "sentence"),
        [
            (("mru",), Exit.USAGE, "no rule is called 'mru': it is one of lru,"),
            (("lru", "--tier", "hbm"), Exit.USAGE, "no tier is called 'hbm'"),
            (("lru", "--tenant", "nobody"), Exit.NOT_FOUND, "no tenant is called nobody;"),
            (("lru", "--tenant", ""), Exit.USAGE, "tenant must not be empty"),
        ],
    )
    def test_refuses_what_is_not_there(self, ask: Run, arguments: tuple[str, ...], code: Exit, sentence: str) -> None:
        answer = ask("policy", "set", *arguments)
        assert answer.code == code
        assert sentence in answer.err

    def test_without_a_daemon_is_said_with_a_remedy(self, kvctl: Run, tmp_path: Path) -> None:
        for words in (("policy",), ("policy", "set", "lru")):
            answer = kvctl("--runtime-dir", str(tmp_path), *words)
            assert answer.code == Exit.UNREACHABLE
            assert answer.err.startswith("kvctl: no kvstored is running")


class TestTrouble:
    def test_without_a_daemon_is_said_with_a_remedy(self, kvctl: Run, tmp_path: Path) -> None:
        answer = kvctl("--runtime-dir", str(tmp_path), "status")
        assert (answer.code, answer.out) == (Exit.UNREACHABLE, "")
        assert answer.err == (
            f"kvctl: no kvstored is running in {tmp_path}: there is no control.sock; "
            "start kvstored, or name its directory with --runtime-dir\n"
        )

    def test_a_user_that_nobody_knows_has_no_home(
        self, kvctl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in a container that runs under some uid, without HOME."""
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        answer = kvctl("--runtime-dir", str(tmp_path), "status")
        assert (answer.code, answer.err[:28]) == (Exit.UNREACHABLE, "kvctl: no kvstored is runnin")

    def test_a_stale_socket_is_told_from_a_missing_one(self, kvctl: Run, tmp_path: Path) -> None:
        leave_stale_socket(tmp_path)
        answer = kvctl("--runtime-dir", str(tmp_path), "status")
        assert answer.code == Exit.UNREACHABLE
        assert "left over from one that is gone" in answer.err

    def test_a_forbidden_socket_names_who_may(
        self, kvctl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(socket, "socket", ForbiddenSocket)
        answer = kvctl("--runtime-dir", str(tmp_path), "status")
        assert answer.code == Exit.UNREACHABLE
        assert "run kvctl as the daemon's user or as root" in answer.err

    def test_a_daemon_that_hangs_times_out(self, ask: Run, daemon: Daemon) -> None:
        with daemon.owner.busy():
            answer = ask("--timeout", "0.05", "status")
        assert answer.code == Exit.TIMED_OUT
        assert "no answer within 0.05 s;" in answer.err

    def test_a_daemon_that_stops_meanwhile_is_unreachable(
        self, ask: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kvctl_client, "probe", lambda _path, _timeout_s: daemon.server.stop(0.0))
        answer = ask("status")
        assert answer.code == Exit.UNREACHABLE
        assert "went away" in answer.err

    def test_a_bug_in_the_daemon_is_a_refusal_without_a_traceback(self, ask: Run, daemon: Daemon) -> None:
        daemon.port.trouble = ZeroDivisionError("secret")
        answer = ask("status")
        assert answer.code == Exit.REFUSED
        assert answer.err == (
            "kvctl: the daemon refused: ZeroDivisionError in the daemon: its log says more (INTERNAL); see its log\n"
        )

    @pytest.mark.parametrize(
        "arguments",
        [("statsu",), ("status", "--nope"), ("-o", "yaml", "status"), ("ping", "-c", "0"), ("--timeout", "0", "ping")],
    )
    def test_a_wrong_command_line_is_usage(self, kvctl: Run, arguments: tuple[str, ...]) -> None:
        answer = kvctl(*arguments)
        assert (answer.code, answer.out) == (Exit.USAGE, "")
        assert "Error: " in answer.err

    def test_a_directory_that_is_none_is_configuration(self, kvctl: Run, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        answer = kvctl("--runtime-dir", str(tmp_path / "file"), "status")
        assert answer.code == Exit.CONFIGURATION
        assert "is not a directory" in answer.err

    def test_a_directory_too_long_for_a_socket_is_configuration(self, kvctl: Run, tmp_path: Path) -> None:
        answer = kvctl("--runtime-dir", str(tmp_path / ("x" * 107)), "status")
        assert answer.code == Exit.CONFIGURATION
        assert "is too long: a socket's path holds 107 bytes" in answer.err


class TestRuntimeDirectory:
    @pytest.mark.parametrize("name", ["KVSTORED_RUNTIME_DIR", "XDG_RUNTIME_DIR"])
    def test_is_found_by_environment(
        self, kvctl: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        folder = daemon.folder
        if name == "XDG_RUNTIME_DIR":
            (folder.parent / "kvstored").symlink_to(folder)
            folder = folder.parent
        monkeypatch.setenv(name, str(folder))
        assert kvctl("status").code == 0

    def test_is_found_in_the_users_state(self, kvctl: Run, daemon: Daemon) -> None:
        place = Path(os.environ["HOME"]) / ".local/state/kvstored/run"
        place.parent.mkdir(parents=True)
        place.symlink_to(daemon.folder)
        assert kvctl("status").code == 0

    def test_that_is_given_hides_every_other(
        self, kvctl: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("KVSTORED_RUNTIME_DIR", str(daemon.folder))
        assert kvctl("--runtime-dir", str(tmp_path), "status").code == Exit.UNREACHABLE

    def test_nowhere_lists_the_places(self, kvctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kvctl_client, "SYSTEM_DIR", Path("/nonexistent"))
        answer = kvctl("status")
        assert answer.code == Exit.UNREACHABLE
        assert ".local/state/kvstored/run; start kvstored" in answer.err


class TestDoctor:
    def test_with_a_daemon_names_it(self, ask: Run) -> None:
        body = ask("doctor", "-o", "json").json["doctor"]
        checks = {check["name"]: check for check in body["checks"]}
        assert body["ok"] is True
        assert checks["daemon"]["found"] == f"kvstored 0.1.0, pid 4242, uid {os.getuid()}, serving"
        assert checks["control.sock"]["verdict"] == "ok"
        assert set(checks["memory"]) == {"name", "verdict", "found", "remedy"}

    def test_without_a_daemon_still_looks_at_the_machine(self, kvctl: Run, tmp_path: Path) -> None:
        leave_stale_socket(tmp_path)
        body = kvctl("--runtime-dir", str(tmp_path), "doctor", "-o", "json").json["doctor"]
        checks = {check["name"]: check["verdict"] for check in body["checks"]}
        assert (checks["daemon"], checks["control.sock"]) == ("skip", "warn")
        assert {"memory", "memlock", "kernel", "GPU"} <= set(checks)

    def test_looks_at_the_daemons_disks_and_at_those_it_is_shown(self, ask: Run) -> None:
        body = ask("doctor", "--disk", "/mnt/c", "--disk", "/mnt/a/kv", "-o", "json").json["doctor"]
        checks = {check["name"]: check["found"] for check in body["checks"]}
        assert checks["disk 3"] == "/mnt/c, xfs, 8.0 GiB free of 8.0 GiB"
        assert "disk 4" not in checks
        assert checks["disk space"].endswith("disk tier 1.0 GiB, 960.0 MiB of it not taken yet")

    def test_takes_disks_from_where_the_daemon_will_find_them(
        self, kvctl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVSTORED_DISK", "/mnt/c:/mnt/d")
        body = kvctl("--runtime-dir", str(tmp_path), "doctor", "-o", "json").json["doctor"]
        assert [check["name"] for check in body["checks"] if check["name"].startswith("disk")] == ["disk 1", "disk 2"]

    def test_finds_out_what_a_folder_is_good_for_and_leaves_nothing(self, tmp_path: Path) -> None:
        ground = LinuxHost().ground(str(tmp_path))
        assert ground.trouble == ""
        assert ground.file_system
        assert list(tmp_path.iterdir()) == []
        assert "No such file" in LinuxHost().ground(str(tmp_path / "absent")).trouble
        assert LinuxHost().ground("/dev/shm").file_system == "tmpfs"

    def test_that_finds_a_failure_exits_with_1(self, ask: Run, daemon: Daemon) -> None:
        daemon.folder.chmod(0o777)
        answer = ask("doctor")
        assert answer.code == Exit.REFUSED
        assert "fail" in answer.out
        assert "chmod go-w" in answer.out

    def test_of_a_daemon_that_hangs_is_a_failure_with_a_remedy(self, ask: Run, daemon: Daemon) -> None:
        with daemon.owner.busy():
            answer = ask("--timeout", "0.05", "doctor", "-o", "json")
        check = answer.json["doctor"]["checks"][0]
        assert answer.code == Exit.REFUSED
        assert (check["name"], check["verdict"], check["found"]) == ("daemon", "fail", "no answer within 0.05 s")
        assert "raise --timeout" in check["remedy"]

    def test_tells_a_listening_socket_from_a_stale_and_an_absent_one(self, daemon: Daemon, tmp_path: Path) -> None:
        host = LinuxHost()
        leave_stale_socket(tmp_path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hot:
            hot.bind(str(tmp_path / "hot.sock"))
            hot.listen()
            found = [host.listener(str(path)).value for path in (
                daemon.server.path, tmp_path / "hot.sock", tmp_path / "control.sock", tmp_path / "none",
            )]  # fmt: skip
        assert found == ["alive", "alive", "stale", "missing"]


class TestPieces:
    @pytest.mark.parametrize(
        ("given", "moved"),
        [
            ("status -o json", "-o json status"),
            ("status --output=json", "--output=json status"),
            ("--timeout 3 ping -c 2 --runtime-dir /x", "--timeout 3 --runtime-dir /x ping -c 2"),
            ("clear --all -- -o json", "clear --all -- -o json"),
            ("status -o", "-o status"),
            ("status -ojson", "-ojson status"),
        ],
    )
    def test_global_options_move_to_the_front(self, given: str, moved: str) -> None:
        assert globals_first(given.split()) == moved.split()

    @pytest.mark.parametrize(
        ("size_bytes", "text"),
        [
            (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), ((1 << 20) - 1, "1.0 MiB"),
            (1 << 30, "1.0 GiB"), (5 << 50, "5,120.0 TiB"),
        ],
    )  # fmt: skip
    def test_sizes_are_shown_with_units(self, size_bytes: int, text: str) -> None:
        assert render.size(size_bytes) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0.4, "0 s"), (59.9, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")],
    )
    def test_spans_are_shown_in_two_units(self, seconds: float, text: str) -> None:
        assert render.span(seconds) == text

    def test_both_ends_agree_on_the_socket(self) -> None:
        assert kvctl_client.SOCKET_NAME == control.SOCKET_NAME
        assert kvctl_client.ANSWER_BYTES >= control.ANSWER_BYTES

    def test_the_command_loads_nothing_of_the_daemon_or_the_engines(self) -> None:
        heavy = "{'numba', 'torch', 'cupy', 'kvstore', 'kvstored', 'kvkernels', 'transformers'}"
        program = f"import sys, kvctl.cli; print(sorted({heavy} & set(sys.modules)))"
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert ended.stdout == "[]\n"


class SameEverywhere(LinuxHost):
    """Real files and sockets, and of the rest of the machine nothing that could fail."""

    def text(self, path: str) -> str | None:
        return None

    def entry(self, path: str) -> Entry | None:
        return Entry("directory", 0o700, self.uid) if path.startswith("/mnt/") else super().entry(path)

    def space(self, path: str) -> Space | None:
        return Space(8 << 30, 8 << 30)

    def ground(self, folder: str) -> Ground:
        return Ground("xfs", "", direct=True)

    def memfd_trouble(self) -> str:
        return ""

    def kernel(self) -> str:
        return "6.8.0"


def interrupt(_seconds: float) -> None:
    raise KeyboardInterrupt


class ForbiddenSocket:
    """A socket whose every peer is closed to this user."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def settimeout(self, _: float) -> None: ...

    def connect(self, _: str) -> None:
        raise PermissionError


def leave_stale_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "control.sock"))
