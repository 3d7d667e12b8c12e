"""The units as systemd reads them, and what they promise of the daemon; its own judgement where it is installed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvctl import service
from kvctl.client import KvctlError
from kvctl.service import Install
from kvproto.limits import ARENAS, SEGMENTS, SESSIONS
from kvstored.config import EX_CONFIG, SETTINGS, load
from kvstored.layers import ENV_OF_OTHERS
from kvstored.service import HOT_NAMES, HOT_SOCKET, LINGER_S
from kvstored.settings import STOP_WITHIN, SYSTEM_RUNTIME_DIR, Basis

FOLDER = Path(__file__).parents[2] / "systemd"
SERVICE = FOLDER / "kvstored.service"
SOCKET = FOLDER / "kvstored.socket"
EXPOSURE_MAX = 2.5
ANALYZE = shutil.which("systemd-analyze")
TABLES = 64  # that are kept beside arenas, and room

Unit = dict[str, dict[str, list[str]]]


def unit_of(text: str) -> Unit:
    """Sections, keys, and the values of each in order."""
    found: Unit = {}
    section: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line or line.startswith(("#", ";")):
            continue
        if head := re.fullmatch(r"\[(\w+)\]", line):
            section = found.setdefault(head[1], {})
            continue
        key, sign, value = line.partition("=")
        assert sign, line
        section.setdefault(key, []).append(value)
    return found


def seconds(text: str) -> float:
    """A time span as units write it."""
    number, unit = re.fullmatch(r"(\d+)(ms|s|min)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"ms": 0.001, "s": 1.0, "min": 60.0}[unit]


@pytest.fixture(scope="module")
def run() -> dict[str, list[str]]:
    return unit_of(SERVICE.read_text())["Service"]


def test_the_unit_promises_what_the_daemon_does(run: dict[str, list[str]]) -> None:
    assert run["Type"] == ["notify"]
    assert run["RestartPreventExitStatus"] == [str(EX_CONFIG)]
    assert run["KillMode"] == ["mixed"], "the index process would be ended before the last commit"
    patience_s = STOP_WITHIN.default(Basis({}, 1 << 30, 1))
    assert seconds(run["TimeoutStopSec"][0]) > patience_s + LINGER_S
    assert seconds(run["WatchdogSec"][0]) >= 10
    assert int(run["FileDescriptorStoreMax"][0]) >= ARENAS + TABLES
    assert int(run["LimitNOFILE"][0]) >= ARENAS + SEGMENTS + 3 * SESSIONS
    assert run["LimitCORE"] == ["0"]
    for key in ("RuntimeDirectory", "StateDirectory", "CacheDirectory"):
        assert run[key] == ["kvstored"]
    assert run["RuntimeDirectoryPreserve"] == ["yes"], "the socket unit's socket lies there"


def test_its_environment_is_known_to_the_daemon(run: dict[str, list[str]]) -> None:
    known = {setting.env for setting in SETTINGS} | ENV_OF_OTHERS
    names = [word.partition("=")[0] for line in run["Environment"] for word in line.split()]
    assert "KVSTORED_CONFIG" in names
    for name in (*names, *re.findall(r"^# (KVSTORED_\w+)=", (FOLDER / "kvstored.env").read_text(), re.MULTILINE)):
        assert name in known
        assert name.replace("_", "-") not in known, "the control: not everything is known"


def test_the_socket_unit_listens_where_clients_look() -> None:
    socket = unit_of(SOCKET.read_text())["Socket"]
    assert socket["ListenSequentialPacket"] == [str(SYSTEM_RUNTIME_DIR / HOT_SOCKET)]
    assert socket["FileDescriptorName"][0] in HOT_NAMES
    assert socket["SocketMode"] == ["0666"]


def test_the_example_configuration_is_one_as_it_is_and_with_every_line_in_force(tmp_path: Path) -> None:
    text = (FOLDER / "kvstored.toml").read_text()
    file = tmp_path / "kvstored.toml"
    for lines, disks in ((text, 0), (re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE), 1)):
        file.write_text(lines)
        config = load(file, {"HOME": "/"}, {}, memory_bytes=1 << 40).config
        assert len(config.disk_directories) == disks
        assert len(config.tenants) == disks


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
class TestSystemdsOwnJudgement:
    """Debian's package `systemd` has the program; it needs neither root nor a running systemd."""

    @pytest.fixture
    def units(self, tmp_path: Path) -> Path:
        """Both units, with a program that is there in place of one that may not be."""
        program = tmp_path / "kvstored"
        program.symlink_to(sys.executable)
        wish = Install(program, systemd=_version())
        placed = service.place(service.pieces(wish), tmp_path, dry_run=False)
        assert placed
        return tmp_path / "etc/systemd/system"

    def test_verify_has_nothing_to_say(self, units: Path) -> None:
        assert ANALYZE is not None
        paths = [str(units / "kvstored.service"), str(units / "kvstored.socket")]
        done = subprocess.run([ANALYZE, "verify", *paths], check=False, capture_output=True, text=True)
        ours = [line for line in done.stderr.splitlines() if "kvstored" in line]
        assert (done.returncode, ours) == (0, [])
        (units / "kvstored.service").write_text(SERVICE.read_text().replace("WatchdogSec=", "WatchdogSek="))
        done = subprocess.run([ANALYZE, "verify", *paths], check=False, capture_output=True, text=True)
        assert "WatchdogSek" in done.stderr, "the control"

    def test_its_exposure_is_low_and_each_directive_left_open_has_its_reason(self, units: Path) -> None:
        assert ANALYZE is not None
        unit = str(units / "kvstored.service")
        command = [ANALYZE, "security", "--offline=true", "--no-pager"]
        most = ["--threshold", str(round(EXPOSURE_MAX * 10)), unit]
        done = subprocess.run([*command, *most], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        listed = subprocess.run([*command, "--json=short", unit], check=True, capture_output=True, text=True)
        opened = [one["name"] for one in json.loads(listed.stdout) if one["exposure"]]
        assert opened, "nothing is that safe"
        reasons = SERVICE.read_text().partition("# -- What stays open")[2]
        for name in opened:
            assert _directive(name) in reasons, f"{name} has no reason"
        Path(unit).write_text(SERVICE.read_text().partition("# -- What it may not")[0])
        done = subprocess.run([*command, *most], check=False, capture_output=True, text=True)
        assert done.returncode != 0, "the control"


def _directive(name: str) -> str:
    """`RootDirectory=/RootImage=` is about RootDirectory=; `SystemCallFilter=~@resources` about nothing else."""
    return name.replace("(INET|INET6)", "INET").partition("/")[0]


def _version() -> int:
    assert ANALYZE is not None
    said = subprocess.run([ANALYZE, "--version"], check=True, capture_output=True, text=True).stdout
    return int(said.split()[1])


# Putting them in place


def test_what_is_installed_starts_the_daemon_that_was_named_and_may_write_to_its_disks(tmp_path: Path) -> None:
    wish = Install(Path("/opt/a 100%/kvstored"), (Path("/mnt/nvme 0/kv"), Path("/mnt/b")), systemd=254)
    service.place(service.pieces(wish), tmp_path, dry_run=False)
    units = tmp_path / "etc/systemd/system"
    assert unit_of((units / "kvstored.service").read_text())["Service"]["ExecStart"] == ['"/opt/a 100%%/kvstored"']
    assert unit_of((units / "kvstored.service.d/disk.conf").read_text())["Service"]["ReadWritePaths"] == [
        '"/mnt/nvme 0/kv"', "/mnt/b",
    ]  # fmt: skip
    assert (units / "kvstored.service.d/254.conf").exists()
    assert 'd "/mnt/nvme 0/kv" 0700 kvstored' in (tmp_path / "etc/tmpfiles.d/kvstored.conf").read_text()
    older = {piece.path.name for piece in service.pieces(Install(Path("/usr/bin/kvstored"), systemd=252))}
    assert "254.conf" not in older, "it would complain of a key that it does not know"


def test_an_upgrade_replaces_units_and_keeps_configuration(tmp_path: Path) -> None:
    wish = Install(Path("/usr/bin/kvstored"), packaged=True)

    def states(*, dry_run: bool) -> dict[str, str]:
        placed = service.place(service.pieces(wish), tmp_path, dry_run=dry_run)
        return {one.piece.path.name: one.state.value for one in placed}

    assert set(states(dry_run=True).values()) == {"new"}
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    assert set(states(dry_run=False).values()) == {"new"}
    assert set(states(dry_run=False).values()) == {"same"}
    unit, settings = tmp_path / "usr/lib/systemd/system/kvstored.service", tmp_path / "etc/kvstored/kvstored.toml"
    unit.write_text("old")
    settings.write_text('[dram]\nsize = "1GiB"\n')
    for dry_run in (True, False):
        after = states(dry_run=dry_run)
        assert (after["kvstored.service"], after["kvstored.toml"]) == ("changed", "kept")
        assert (unit.read_text() == "old") is dry_run
    assert "1GiB" in settings.read_text()
    assert unit.stat().st_mode & 0o777 == 0o644


def test_what_the_service_could_not_see_is_refused_before_anything_is_written() -> None:
    for daemon, disks in (
        ("/home/someone/venv/bin/kvstored", ()),
        ("/usr/bin/kvstored", (Path("/home/kv"),)),
        ("/usr/bin/kvstored", (Path("kv"),)),
        ("/usr/bin/kvstored", (Path("/mnt/a\nExecStartPre=/bin/sh"),)),
    ):
        with pytest.raises(KvctlError):
            service.install(root=None, daemon=Path(daemon), disks=disks, start=False, dry_run=True)


def test_commands_come_in_an_order_in_which_each_finds_what_it_needs() -> None:
    wish = Install(Path("/opt/kvstored/bin/kvstored"))
    programs = [command[0] for command in service.commands(wish, start=True)]
    assert programs == ["systemd-sysusers", "systemd-tmpfiles", "runuser", *["systemctl"] * 3]
    assert service.commands(wish, start=False)[-1] == ["systemctl", "daemon-reload"]
    compiling = service.commands(wish, start=False)[2]
    assert compiling[-3] == "/opt/kvstored/bin/python"
    compile(compiling[-1], "command", "exec")
