"""Who starts the daemon of the day: a real systemd where one runs, else the service manager of `tests/systemd.py`.

A real one is the host's own (process 1, and we are root) or the one that a user has. It runs two units of the day's own
that are gone afterwards; those that are shipped, with all that they forbid, are in
`tests/integration/test_service_systemd.py`.
"""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from tests.systemd import ServiceManager

NAME: Final = "kvstored-day"
WATCHDOG_S: Final = 30.0
WAIT_S: Final = 100.0
GOOD_END: Final = "kvstored: stopped"  # its last word
BOOTED: Final = Path("/run/systemd/system")  # sd_booted(3)

SOCKET: Final = """\
[Unit]
Description=A day of kvstored, hot socket
[Socket]
ListenSequentialPacket={run}/hot.sock
FileDescriptorName=hot
SocketMode=0666
RemoveOnStop=yes
TriggerLimitIntervalSec=0
Service={name}.service
"""
SERVICE: Final = """\
[Unit]
Description=A day of kvstored
Requires={name}.socket
After={name}.socket
[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
{environ}
WatchdogSec={watchdog_s:.0f}s
TimeoutStartSec={wait_s:.0f}s
KillMode=mixed
Restart=no
FileDescriptorStoreMax=1100
LimitNOFILE={files}
LimitCORE=0
StandardOutput=append:{log}
StandardError=append:{log}
"""


class Supervisor(Protocol):
    """Runs the daemon. A context manager: nothing of it is left."""

    name: str

    @property
    def pid(self) -> int:
        """Of the daemon."""

    def start(self) -> None:
        """Until it says that it is ready. Raises RuntimeError."""

    def restart(self) -> int:
        """Stop it, and start the next one with what it has left in the descriptor store; how the first one ended."""

    def stop(self) -> int:
        """Ask it to end; how it did."""

    def lose_power(self) -> None:
        """It is killed, and nothing is kept."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def supervisor_of(command: Sequence[str], environ: Mapping[str, str], run: Path, log: Path) -> Supervisor:
    """The best that there is here. A real one passes on of `environ` what says where programs and packages are."""
    where = running_systemd()
    if where is None:
        return Stand(command, environ, run, log)
    return Systemd(command, environ, run, log, user=where == "user")


def running_systemd() -> str | None:
    """ "system" or "user": which one starts units for us; None without any."""
    if BOOTED.is_dir() and os.geteuid() == 0 and _answers("--system"):
        return "system"
    if os.environ.get("XDG_RUNTIME_DIR") and _answers("--user"):
        return "user"
    return None


def _answers(which: str) -> bool:
    try:
        done = subprocess.run(
            ["systemctl", which, "show", "--property=Version", "--value"], capture_output=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


class Stand:
    """The one of `tests/systemd.py`."""

    name = "a stand-in for systemd"

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], run: Path, log: Path) -> None:
        self._manager = ServiceManager(command, environ, log.parent, log_file=log, watchdog_s=WATCHDOG_S)
        self._manager.listen(run / "hot.sock")

    @property
    def pid(self) -> int:
        """See the protocol."""
        return self._manager.process.pid if self._manager.process else 0

    def start(self) -> None:
        """See the protocol."""
        self._manager.start()
        self._manager.wait_ready()

    def restart(self) -> int:
        """See the protocol."""
        code = self._manager.stop()
        self.start()
        return code

    def stop(self) -> int:
        """See the protocol."""
        return self._manager.stop()

    def lose_power(self) -> None:
        """See the protocol."""
        self._manager.kill()
        self._manager.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()


class Systemd:
    """A real one."""

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], run: Path, log: Path, *, user: bool = False
    ) -> None:
        self.name = "systemd of this user" if user else "systemd"
        self._which = "--user" if user else "--system"
        self._log = log
        folder = Path(os.environ["XDG_RUNTIME_DIR"], "systemd/user") if user else BOOTED
        folder.mkdir(parents=True, exist_ok=True)
        self._units = [folder / f"{NAME}.{kind}" for kind in ("service", "socket")]
        for path, text in zip(self._units, units(command, environ, run, log), strict=True):
            path.write_text(text)
        self._systemctl("daemon-reload")

    @property
    def pid(self) -> int:
        """See the protocol."""
        return int(self._show("MainPID"))

    def start(self) -> None:
        """See the protocol. Type=notify: systemctl waits for READY."""
        self._systemctl("start", f"{NAME}.service")

    def restart(self) -> int:
        """See the protocol. A stop and a start would do before systemd 254 what a loss of power does."""
        ends = self._good_ends()
        self._systemctl("restart", f"{NAME}.service")
        return 0 if self._good_ends() == ends + 1 else 1

    def stop(self) -> int:
        """See the protocol."""
        self._systemctl("stop", f"{NAME}.service")
        return int(self._show("ExecMainStatus"))

    def lose_power(self) -> None:
        """See the protocol. A stop empties the descriptor store."""
        self._systemctl("kill", "--kill-who=all", "--signal=KILL", f"{NAME}.service")
        self._systemctl("stop", f"{NAME}.service")
        self._systemctl("reset-failed", f"{NAME}.service", check=False)  # it may be that it counts as stopped

    def _show(self, name: str) -> str:
        return self._systemctl("show", "--value", f"--property={name}", f"{NAME}.service").strip()

    def _good_ends(self) -> int:
        return self._log.read_text(errors="replace").count(GOOD_END)

    def _systemctl(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            ["systemctl", self._which, *arguments], capture_output=True, text=True, check=False, timeout=WAIT_S
        )
        if check and done.returncode:
            raise RuntimeError(f"systemctl {' '.join(arguments)}: {done.stderr}{self._log.read_text()[-2000:]}")
        return done.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._systemctl("stop", f"{NAME}.socket", f"{NAME}.service", check=False)
        for path in self._units:
            path.unlink(missing_ok=True)
        self._systemctl("daemon-reload", check=False)
        self._systemctl("reset-failed", f"{NAME}.service", check=False)


def units(command: Sequence[str], environ: Mapping[str, str], run: Path, log: Path) -> tuple[str, str]:
    """The service and its socket."""
    # As the shipped unit: with it memory survives a restart under a systemd that offers no descriptors by itself.
    wanted = {"PYTHONPATH": environ.get("PYTHONPATH", ""), "PATH": environ.get("PATH", ""), "KVSTORED_KEEP": "true"}
    lines = [f"Environment={_quoted(f'{name}={value}')}" for name, value in wanted.items() if value]
    line = " ".join(_quoted(word, "$$") for word in command)
    service = SERVICE.format(
        name=NAME, command=line, environ="\n".join(lines), watchdog_s=WATCHDOG_S, wait_s=WAIT_S, files=65536, log=log
    )
    return service, SOCKET.format(name=NAME, run=run)


def _quoted(word: str, dollar: str = "$") -> str:
    """One word as systemd.syntax(7) reads it, without specifiers. A `dollar` is written twice in command lines."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", dollar)
    return f'"{plain}"' if shlex.quote(word) != word else word
