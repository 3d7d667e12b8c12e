"""`kvctl doctor`: the daemon and the host, asked and examined."""

import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Group
from rich.text import Text

from kvctl import render
from kvctl.asking import DryRun, Yes, ask, need_terminal
from kvctl.client import ControlClient, Exit, KvctlError, printable
from kvctl.doctor import Check, DaemonFacts, Verdict, examine
from kvctl.host import Host, LinuxHost, Listener
from kvctl.program import Globals, Output, command, globals_of
from kvctl.service import daemon_beside
from kvproto import control_pb2 as pb


@command("doctor")
def doctor(
    context: typer.Context,
    disk: Annotated[
        list[Path] | None,
        typer.Option(
            envvar="KVSTORED_DISK",
            metavar="DIR",
            help="A directory that is to become one of the disk tier. Repeatable.",
        ),
    ] = None,
) -> None:
    """Check this machine and the daemon on it, with remedies."""
    chosen = globals_of(context)
    checks = _examine(chosen, LinuxHost(), _folders(map(str, disk or ())))
    failed = any(check.verdict is Verdict.FAIL for check in checks)
    found: list[render.Json] = [
        {"name": one.name, "verdict": one.verdict.value, "found": one.found, "remedy": one.remedy} for one in checks
    ]
    body: render.Json = {"ok": not failed, "checks": found}
    chosen.show("doctor", body, render.checks(checks))
    if failed:
        raise typer.Exit(Exit.REFUSED)


def examined(chosen: Globals) -> list[Check]:
    """What `kvctl doctor` finds on this host."""
    return _examine(chosen, LinuxHost(), ())


@command("check", short="Look at a disk tier whose daemon is stopped.")
def check(
    context: typer.Context,
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="All of a disk tier's, as configured.")],
    *,
    repair: Annotated[bool, typer.Option("--repair", help="Erase what is damaged, and make the index anew.")] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Look at a disk tier whose daemon is stopped, block by block, as kvstored check. Exits as that does.

    Without --repair nothing is changed, as on a dry run. A repair says first how many blocks and bytes it erases, and
    asks; the daemon's audit file has it.
    """
    chosen = globals_of(context)
    repair = repair and not dry_run
    if repair:
        need_terminal("repair", yes=yes, dry_run=dry_run)
    done = _checked(chosen, directories, repair=repair and yes)
    if repair and not yes and done.returncode == Exit.REFUSED:  # there is something to repair
        untouched = "nothing was erased; answer y, or give --yes, to repair"
        ask("Erase the damaged blocks, and make the index anew?", untouched, _found(done), Text(_UNUSED))
        done = _checked(chosen, directories, repair=True)
    body: render.Json = {"exit_code": done.returncode, "lines": done.stdout.splitlines(), "dry_run": not repair}
    parts = [_found(done)] if done.stdout else []  # it says on stderr why it did not look
    if not repair and done.returncode == Exit.REFUSED:
        parts.append(Text(f"nothing was changed; --repair would erase what is damaged; {_UNUSED}"))
    if parts or chosen.output is Output.JSON:
        chosen.show("check", body, Group(*parts))
    if done.returncode:
        raise typer.Exit(done.returncode)


# Of a daemon that is stopped nobody holds a lease; and its pins never made a damaged block a hit.
_UNUSED: Final = (
    "concerned: no leases, since no daemon is at work there; damaged blocks are misses already, pinned or not"
)


def _checked(chosen: Globals, directories: Sequence[Path], *, repair: bool) -> "subprocess.CompletedProcess[str]":
    words = [str(daemon_beside()), "check", *(["--repair"] if repair else []), "--", *map(str, directories)]
    where = {} if chosen.runtime_dir is None else {"KVSTORED_RUNTIME_DIR": str(chosen.runtime_dir.absolute())}
    return subprocess.run(  # noqa: S603  our own words
        words, stdout=subprocess.PIPE, text=True, errors="replace", check=False, env={**os.environ, **where}
    )


def _found(done: "subprocess.CompletedProcess[str]") -> Text:
    return Text("\n".join(map(printable, done.stdout.splitlines())))


def _examine(chosen: Globals, host: Host, disks: Sequence[str]) -> list[Check]:
    if chosen.remote is not None:
        chosen.socket()  # says that this is about another host
    try:
        socket = chosen.socket()
    except KvctlError as error:
        # An explicit directory that cannot work is a finding; that the usual places are empty is none.
        where, trouble = (None, "") if chosen.runtime_dir is None else (str(chosen.runtime_dir), str(error))
        return examine(host, where, None, trouble, disks)
    try:
        with ControlClient(socket, chosen.timeout_s) as client:
            daemon = _facts(client)
    except KvctlError as error:
        gone = host.listener(str(socket)) in (Listener.MISSING, Listener.STALE)
        return examine(host, str(socket.parent), None, "" if gone else str(error), disks)
    return examine(host, str(socket.parent), daemon, "", disks)


def _folders(given: Iterable[str]) -> tuple[str, ...]:
    """Without what says that there are none, as the daemon does."""
    return tuple(folder for folder in given if folder not in ("", ".", "none"))


def _facts(client: ControlClient) -> DaemonFacts:
    report = client.status()
    settings = {one.name: one.value for one in client.config().settings}
    dram = next((tier for tier in report.tiers if tier.name == "dram"), pb.Tier())
    disk = next((tier for tier in report.tiers if tier.name == "disk"), pb.Tier())
    return DaemonFacts(
        version=report.version,
        pid=report.pid,
        uid=report.uid,
        draining=report.draining,
        capacity_bytes=dram.capacity_bytes,
        populated_bytes=dram.populated_bytes,
        locked_bytes=dram.locked_bytes,
        locks=settings.get("dram.lock") != "false",
        warnings=tuple(report.warnings),
        disks=_folders(settings.get("disk.directories", "none").split(os.pathsep)),
        disk_bytes=disk.capacity_bytes,
        disk_assigned_bytes=disk.assigned_bytes,
        keeper=report.restart.keeper or "none",
        admin_group=settings.get("control.admin_group", "none"),
        huge_pages=settings.get("dram.huge_pages") != "false",
        huge_bytes=dram.huge_bytes,
    )
