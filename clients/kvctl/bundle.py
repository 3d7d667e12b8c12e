"""`kvctl support-bundle`: how a daemon and its host stand, as one file to send to whoever helps.

Every part is got by itself: what cannot be had is named in `missing.txt`, and a daemon that is gone leaves the host's
part and its log. Nothing in it is a block, a token, a salt, a key or a name that a client gave (`redaction.py`).
"""

import gzip
import http.client
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.text import Text

from kvctl import checkup, render
from kvctl.client import ControlClient, Exit, KvctlError, printable
from kvctl.host import package_version
from kvctl.program import Globals, command, globals_of
from kvctl.redaction import scrubbed, setting_value, without
from kvctl.render import Json, plain, size
from kvctl.whole_file import WholeFile, need_free
from kvproto import control_pb2 as pb

PART_BYTES: Final = 4 << 20  # of each, the end of what is longer
LOG_LINES: Final = 5000
EVENTS: Final = 2000
WAIT_S: Final = 10.0
PACKAGES: Final = ("kvstored", "numpy", "numba", "grpcio", "protobuf", "lmdb", "xxhash", "zstandard", "typer", "rich")
# Text that clients give, and keys: known by their fields.
_THEIRS: Final = frozenset(
    {"name", "owner", "program", "run", "workflow", "tool", "key", "keys", "tokens", "running", "near"}
)
_HOST_FILES: Final = (
    "/proc/meminfo", "/proc/cpuinfo", "/proc/mounts", "/proc/sys/vm/overcommit_memory", "/proc/sys/vm/nr_hugepages",
    "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "/sys/fs/cgroup/memory.max", "/etc/os-release",
)  # fmt: skip
_README: Final = """A support bundle of kvstored: how the daemon and this host stood when it was made.

It holds no blocks, tokens, salts, keys or names that clients gave. Digests of namespaces are cut to twelve digits.
It does hold: names of tenants, models and folders, numbers of users and processes, and the daemon's own log.
missing.txt says which parts could not be had, and why.
"""

Part = Callable[[], str]


@command("support-bundle", short="Gather how all stands into one file, without payload.")
def support_bundle(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Ends with .tar.gz, or .tar.zst.")],
    *,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The daemon's log. Else the journal's, of the unit kvstored.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Gather how the daemon and this host stand into one file: no blocks, keys, salts or tokens."""
    chosen = globals_of(context)
    packed = _packing(file)
    need_free(file, force=force)
    parts, missing = gathered(chosen, log)
    content = packed(_tar(parts))
    with WholeFile(file, force=force) as target:
        target.write(content)
    body: Json = {"file": str(file), "bytes": len(content), "parts": sorted(parts), "missing": missing}
    lines = [f"{printable(str(file))}: {len(parts):,} parts, {size(len(content))}"]
    lines += [f"missing {name}: {printable(why)}" for name, why in missing.items()]
    chosen.show("support-bundle", body, Text("\n".join(lines)))


def gathered(chosen: Globals, log: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """Every part by its name, and why others are missing."""
    parts = {"README.txt": _README}
    missing: dict[str, str] = {}

    def add(name: str, part: Part) -> None:
        try:
            parts[name] = scrubbed(part()[-PART_BYTES:])
        except (KvctlError, OSError, ValueError, subprocess.SubprocessError, http.client.HTTPException) as error:
            missing[name] = scrubbed(str(error))

    add("versions.json", _versions)
    add("doctor.json", lambda: _json([
        {"name": one.name, "verdict": one.verdict.value, "found": one.found, "remedy": one.remedy}
        for one in checkup.examined(chosen)
    ]))  # fmt: skip
    add("log.txt", lambda: _log(log))
    for path in _HOST_FILES:
        if Path(path).exists():
            add(f"host{path}", lambda path=path: _text(Path(path)))  # type: ignore[misc]
    try:
        with chosen.connect() as client:
            for name, part in _of_daemon(client).items():
                add(name, part)
    except KvctlError as error:
        missing["daemon"] = scrubbed(str(error))
    parts["missing.txt"] = "".join(f"{name}: {why}\n" for name, why in missing.items()) or "nothing\n"
    return parts, missing


def _of_daemon(client: ControlClient) -> dict[str, Part]:
    config = client.config().settings
    pid = client.status().pid
    return {
        "status.json": lambda: _json(plain(client.status())),
        "statistics.json": lambda: _json(plain(client.statistics())),
        "namespaces.json": lambda: _json([plain(one) for one in client.namespaces().namespaces]),
        "tenants.json": lambda: _json([plain(one) for one in client.tenants().tenants]),
        "clients.json": lambda: _json(without([plain(one) for one in client.clients().clients], _THEIRS)),
        "config.json": lambda: _json([
            {**plain(one), "value": setting_value(one.name, one.value)} for one in config
        ]),
        "policies.json": lambda: _json(plain(client.policies())),
        "quotas.json": lambda: _json(plain(client.quotas(pb.GetQuotasRequest()))),
        "pins.json": lambda: _json(without(plain(client.pins(pb.ListPinsRequest())), _THEIRS)),
        "programs.json": lambda: _json(without(plain(client.programs(pb.ListProgramsRequest())), _THEIRS)),
        "workflows.json": lambda: _json(without(plain(client.workflows(pb.ListWorkflowsRequest())), _THEIRS)),
        "costs.json": lambda: _json(plain(client.costs(pb.GetCostsRequest()))),
        "advice.json": lambda: _json(plain(client.advise(pb.AdviseRequest()))),
        "scrub.json": lambda: _json(plain(client.scrub(pb.ScrubRequest()))),
        "audit.json": lambda: _json(plain(client.acts(pb.ListActsRequest()))),
        "events.json": lambda: _json([_event(one) for one in client.events(pb.WatchEventsRequest(last=EVENTS))]),
        "metrics.txt": lambda: _metrics({one.name: one.value for one in config}.get("metrics.listen", "off")),
        "process/limits.txt": lambda: _text(Path(f"/proc/{pid}/limits")),
        "process/status.txt": lambda: _text(Path(f"/proc/{pid}/status")),
        "process/cgroup.txt": lambda: _text(Path(f"/proc/{pid}/cgroup")),
    }  # fmt: skip


def _event(event: pb.Event) -> dict[str, Json]:
    """Of clients that come and go, the numbers only: their names are theirs."""
    told = plain(event)
    return {**told, "text": ""} if event.kind == "client" else told


def _json(body: Json) -> str:
    return json.dumps({"version": render.JSON_VERSION, "body": body}, indent=1) + "\n"


def _versions() -> str:
    names: dict[str, Json] = {name: package_version(name) for name in PACKAGES}
    names |= {"python": sys.version, "kernel": platform.release(), "machine": platform.machine()}
    return _json({**names, "made_unix_s": time.time(), "uid": os.geteuid()})


def _text(path: Path) -> str:
    with path.open("rb") as file:  # in pieces: some files of /proc want memory for all that they are asked for
        return b"".join(iter(lambda: file.read(4096), b""))[:PART_BYTES].decode(errors="replace")


def _log(log: Path | None) -> str:
    """Its end."""
    if log is not None:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - PART_BYTES))
            return file.read(PART_BYTES).decode(errors="replace")
    journal = shutil.which("journalctl")
    if journal is None:
        raise KvctlError(Exit.NOT_FOUND, "there is no journal here; name the daemon's log with --log")
    command_line = [journal, "--unit=kvstored", f"--lines={LOG_LINES}", "--no-pager", "--output=short-iso"]
    found = subprocess.run(command_line, capture_output=True, timeout=WAIT_S, check=False)  # noqa: S603  our own words
    if found.returncode:
        raise KvctlError(Exit.NOT_FOUND, f"journalctl: {found.stderr[:200].decode(errors='replace').strip()}")
    return found.stdout[-PART_BYTES:].decode(errors="replace")


def _metrics(listen: str) -> str:
    if listen == "off":
        raise KvctlError(Exit.NOT_FOUND, "metrics.listen is off")
    connection = http.client.HTTPConnection("localhost", timeout=WAIT_S)
    if listen.startswith("/"):
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(WAIT_S)
        connection.sock.connect(listen)
    else:
        host, _, port = listen.rpartition(":")
        connection.sock = socket.create_connection((host.strip("[]"), int(port)), WAIT_S)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read(PART_BYTES).decode(errors="replace")
    finally:
        connection.close()


def _tar(parts: dict[str, str]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, text in parts.items():
            content = text.encode()
            entry = tarfile.TarInfo(f"kvstored-support/{name}")
            entry.size, entry.mode, entry.mtime = len(content), 0o600, int(time.time())
            tar.addfile(entry, io.BytesIO(content))
    return target.getvalue()


def _packing(file: Path) -> Callable[[bytes], bytes]:
    """By the end of a file's name. Raises KvctlError."""
    if file.name.endswith(".tar.gz"):
        return gzip.compress
    if file.name.endswith(".tar.zst"):
        with suppress(ImportError):
            import zstandard  # noqa: PLC0415  comes with the daemon, and kvctl may be here without it

            return zstandard.ZstdCompressor().compress
        raise KvctlError(Exit.USAGE, "zstandard is not installed here; take a name that ends with .tar.gz")
    raise KvctlError(Exit.USAGE, "a bundle's name ends with .tar.gz or .tar.zst")
