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
from kvctl.service import Install, Opening
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
OPERATING = FOLDER.parent / "OPERATING.md"
# Sections of OPERATING.md about what the unit alone does not let through, and what in its settings is about that.
WANTED = {
    "GPUs": (Opening.GPU, "devices ="),
    "Operators of other hosts": (Opening.NETWORK, "listen ="),
    "Beyond one host": (Opening.NETWORK, "endpoint ="),
    "Routers": (Opening.NETWORK, "events.routable"),
    "Watch": (Opening.NETWORK, "trace.otlp"),
}
MEASURED_BY = 252  # the systemd whose figures are stated
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
    ours = [name for name in names if name.startswith("KVSTORED_")]
    for name in (*ours, *re.findall(r"^# (KVSTORED_\w+)=", (FOLDER / "kvstored.env").read_text(), re.MULTILINE)):
        assert name in known
        assert name.replace("_", "-") not in known, "the control: not everything is known"


def test_what_is_compiled_for_a_gpu_is_kept_where_the_daemon_may_write(run: dict[str, list[str]]) -> None:
    """CuPy wants to write to the home of who runs it, and the daemon's has none."""
    values = dict(word.split("=", 1) for line in run["Environment"] for word in line.split())
    (folder,) = run["CacheDirectory"]
    assert values["CUPY_CACHE_DIR"] == f"/var/cache/{folder}/cupy"


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

    @pytest.mark.parametrize("openings", [(), *((one,) for one in Opening), tuple(Opening)], ids=str)
    def test_with_its_drop_ins_it_is_verified_and_its_exposure_is_the_one_that_is_stated(
        self, tmp_path: Path, openings: tuple[Opening, ...]
    ) -> None:
        assert ANALYZE is not None
        program = tmp_path / "kvstored"
        program.symlink_to(sys.executable)
        service.place(service.pieces(Install(program, (), openings, _version())), tmp_path, dry_run=False)
        unit = tmp_path / "etc/systemd/system/kvstored.service"
        paths = [str(unit), str(unit.with_suffix(".socket"))]
        done = subprocess.run([ANALYZE, "verify", *paths], check=False, capture_output=True, text=True)
        assert (done.returncode, [line for line in done.stderr.splitlines() if "kvstored" in line]) == (0, [])
        command = [ANALYZE, "security", "--offline=true", "--no-pager", str(unit)]
        said = subprocess.run(command, check=False, capture_output=True, text=True).stdout
        level = re.search(r"exposure level for kvstored.service: ([\d.]+)", said)
        assert level is not None, said
        assert float(level[1]) <= EXPOSURE_MAX
        if _version() != MEASURED_BY:
            return
        text = OPERATING.read_text()
        if len(openings) == 1:
            assert f"(252) then says {level[1]}," in (FOLDER / f"kvstored-{openings[0].value}.conf").read_text()
            row = next(line for line in text.splitlines() if line.startswith(f"| [{openings[0].value}.conf]"))
            assert row.endswith(f"| {level[1]} |")
        else:
            assert f"{level[1]} of the unit alone" in text or f"{level[1]} with all" in text.replace("\n", " ")

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


# What it keeps shut


@pytest.mark.parametrize("opening", Opening)
def test_a_drop_in_opens_what_it_is_for_and_nothing_else(run: dict[str, list[str]], opening: Opening) -> None:
    text = (FOLDER / f"kvstored-{opening.value}.conf").read_text()
    assert f"--with {opening.value}" in text
    assert f"kvstored-{opening.value}.conf" in SERVICE.read_text()
    changed = unit_of(text)["Service"]
    assert (
        set(changed)
        == {
            Opening.GPU: {"PrivateDevices", "DevicePolicy", "DeviceAllow"},
            Opening.NETWORK: {"IPAddressAllow"},
            Opening.DIRECT: {"ProtectProc"},
        }[opening]
    )
    for key, values in changed.items():
        assert values != run.get(key), f"{key} is so already"


@pytest.mark.parametrize("section", WANTED)
def test_each_feature_that_needs_a_drop_in_names_it(section: str) -> None:
    opening, about = WANTED[section]
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", OPERATING.read_text(), re.MULTILINE))
    named = f"[{opening.value}.conf](#what-the-unit-keeps-shut)"
    assert about in sections[section], "it has moved"
    assert named in sections[section]
    assert named not in sections["Encryption"], "the control: not every section does"
    # The table links back to each.
    assert f"(#{section.lower().replace(' ', '-')})" in sections["What the unit keeps shut"]


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


def test_a_drop_in_of_ours_is_replaced_and_the_addresses_are_the_operators(tmp_path: Path) -> None:
    wish = Install(Path("/usr/bin/kvstored"), openings=tuple(Opening))
    service.place(service.pieces(wish), tmp_path, dry_run=False)
    folder = tmp_path / "etc/systemd/system/kvstored.service.d"
    for opening in Opening:
        assert (folder / f"{opening.value}.conf").read_text() == (FOLDER / f"kvstored-{opening.value}.conf").read_text()
        (folder / f"{opening.value}.conf").write_text("[Service]\n")
    placed = service.place(service.pieces(wish), tmp_path, dry_run=False)
    states = {one.piece.path.stem: one.state.value for one in placed if one.piece.path.parent.name == folder.name}
    assert states == {"254": "same", "gpu": "changed", "network": "kept", "direct": "changed"}


@pytest.mark.parametrize("packaged", [False, True])
def test_beside_a_package_only_what_it_does_not_have_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packaged: bool
) -> None:
    """A unit in /etc would hide the package's, and stay when that is upgraded."""
    there = tmp_path / "kvstored.service"
    monkeypatch.setattr(service, "PACKAGED_UNIT", there)
    monkeypatch.setattr(service, "_check_reach", lambda _wish: None)
    if packaged:
        there.touch()
    placed, _ = service.install(
        root=None, daemon=Path("/opt/kvstored/bin/kvstored"), disks=[Path("/mnt/kv")], openings=[Opening.GPU],
        start=False, dry_run=True,
    )  # fmt: skip
    names = {"/".join(one.piece.path.parts[-2:]) for one in placed}
    ours = {"kvstored.service.d/disk.conf", "kvstored.service.d/gpu.conf", "tmpfiles.d/kvstored.conf"}
    assert ours <= names
    assert (names == ours) is packaged


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
