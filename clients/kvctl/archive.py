"""`kvctl export` and `kvctl import`: blocks as a file, to warm another host with (proto/ARCHIVE.md)."""

import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

import typer
from rich.text import Text

from kvctl import values
from kvctl.asking import DryRun, Yes, ask, concerned, need_terminal
from kvctl.client import ControlClient, Exit, KvctlError, printable
from kvctl.program import Globals, OfNamespace, OfTenant, Output, command, globals_of
from kvctl.render import size
from kvctl.scope import parse
from kvproto import control_pb2 as pb
from kvproto.archive import ArchiveError, Reader, Writer

if TYPE_CHECKING:
    from kvctl.archive_export import Exported
    from kvctl.archive_import import Imported

# What reads and stores blocks is imported where it is used: it brings the client, which no other command waits for.
STREAM: Final = Path("-")
EACH_S: Final = 1.0  # a line of progress, where nobody sees it being overwritten ten times as rarely


@dataclass(slots=True)
class _Progress:
    """On stderr: one line that is written over on a terminal, a line now and then elsewhere."""

    verb: str
    planned_bytes: int
    _next_s: float = 0.0

    def __call__(self, blocks: int, done_bytes: int) -> None:
        now_s, shown = time.monotonic(), sys.stderr.isatty()
        if now_s < self._next_s:
            return
        first, self._next_s = not self._next_s, now_s + EACH_S * (1 if shown else 10)
        if first:
            return
        share = f", {done_bytes / self.planned_bytes:.0%}" if self.planned_bytes else ""
        text = f"{self.verb} {blocks:,} blocks, {size(done_bytes)}{share}"
        sys.stderr.write(f"\r{text:<60}" if shown else f"{text}\n")
        sys.stderr.flush()

    def over(self) -> None:
        """Nothing is left on the line."""
        if self._next_s and sys.stderr.isatty():
            sys.stderr.write("\r" + " " * 60 + "\r")


@command("export")
def export_blocks(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to write; - for stdout.")],
    *,
    tenant: OfTenant = None,
    namespace: OfNamespace = None,
    key: Annotated[
        list[str] | None,
        typer.Option(metavar="HEX", help="Only blocks that continue this key, and what leads there. Repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write blocks, all or those named, into an archive. Read as by any client: what lies on disk comes to memory."""
    chosen = globals_of(context)
    scope = parse(tenant, namespace, key or (), everything=not (tenant or namespace or key))
    if file == STREAM and chosen.output is Output.JSON:
        raise KvctlError(Exit.USAGE, "stdout cannot take both the archive and the answer; name a file")
    if file != STREAM and file.exists() and not force:
        raise KvctlError(Exit.USAGE, f"{file} is there already; --force writes over it")
    from kvctl.archive_export import chains_of, export  # noqa: PLC0415

    chosen.socket()  # refuses another host, before anything is written: blocks go through this one's memory
    with chosen.connect() as client:
        client.need_tenant(tenant)
        scope = scope.resolved(client)
        found = chains_of(client, scope)
        planned = sum(len(one.parents) for one in found)
        planned_bytes = sum(len(one.parents) * one.identity.block_bytes for one in found)
        progress = _Progress("exported", planned_bytes)
        with _written(file) as archive:
            writer = Writer(archive, planned, planned_bytes)
            done = export(client.socket_path.parent, found, writer, progress)
            writer.finish()
        progress.over()
        for one in done.by_tenant:
            _note(client, "export", one.tenant, scope.digest, one.blocks, one.bytes)
    text = f"exported {done.blocks:,} blocks of {done.namespaces:,} namespaces, {size(done.bytes)}: {file}"
    text += _less(done)
    if file == STREAM:
        typer.echo(text, err=True)
    else:
        chosen.show("export", {**asdict(done), "file": str(file)}, Text(printable(text)))


@command("import", short="Store what an archive holds.")
def import_blocks(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to read; - for stdin.")],
    *,
    tenant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", autocompletion=values.tenants, help="Whose blocks they become. Else as in the archive."
        ),
    ] = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Store what an archive holds, every block verified; what is there already stays. May be ended and begun anew.

    Asks if it has more than there is room for, since others then have to leave. A dry run verifies all of it, and needs
    no daemon. Exits with 1 if the archive is damaged or cut short, or if blocks were refused.
    """
    chosen = globals_of(context)
    if tenant == "":
        raise KvctlError(Exit.USAGE, "--tenant is empty; see `kvctl tenants`")
    from kvctl.archive_import import Importer  # noqa: PLC0415

    with _read(file) as archive:
        try:
            reader = Reader(archive)
        except ArchiveError as error:
            raise KvctlError(Exit.REFUSED, f"{file}: {error}; nothing was stored") from None
        progress = _Progress("verified" if dry_run else "imported", reader.planned_bytes)
        room = ""
        if dry_run:
            with Importer(None, tenant, progress, durable=False) as importer:
                done = importer.take(reader)
            room = _foretold(chosen, done, tenant)
        else:
            done = _import(chosen, reader, tenant, progress, yes=yes)
        progress.over()
    chosen.show(
        "import", {**asdict(done), "reasons": dict(done.reasons), "dry_run": dry_run}, _said(done, file, dry_run, room)
    )
    if not done.whole or done.refused_blocks:
        raise typer.Exit(Exit.REFUSED)


def _import(chosen: Globals, reader: Reader, tenant: str | None, progress: _Progress, *, yes: bool) -> "Imported":
    from kvctl.archive_import import Importer  # noqa: PLC0415

    chosen.socket()  # refuses another host: blocks go through this one's memory
    with chosen.connect() as client:
        room_bytes, disk = _room(client, tenant)
        if reader.planned_bytes > room_bytes and not yes:
            need_terminal("import more than there is room for", yes=yes, dry_run=False)
            text = f"the archive has {reader.planned_blocks:,} blocks, {size(reader.planned_bytes)}; "
            text += f"{size(room_bytes)} are free, and for the rest what is there is evicted{_held(client, tenant)}"
            ask("Import it?", "nothing was imported; answer y, or give --yes, to import", Text(text))
        with Importer(client.socket_path.parent, tenant, progress, durable=disk) as importer:
            try:
                return importer.take(reader)
            finally:
                done = importer.done
                _note(client, "import", tenant or "", None, done.stored_blocks, done.stored_bytes)


def _foretold(chosen: Globals, done: "Imported", tenant: str | None) -> str:
    """What storing a verified archive would mean for those who are there; of no daemon, that nobody can say."""
    try:
        chosen.socket()
        with chosen.connect() as client:
            room_bytes, _ = _room(client, tenant)
            held = _held(client, tenant)
    except KvctlError as error:
        return f"would store {done.blocks:,} blocks; into what room is not known: {error}"
    text = f"would store {done.blocks:,} blocks, {size(done.bytes)}, less what is there already; "
    if done.bytes > room_bytes:
        return f"{text}{size(room_bytes)} are free, and for the rest what is there would be evicted{held}"
    return f"{text}{size(room_bytes)} are free, so that nobody has to leave{held}"


def _held(client: ControlClient, tenant: str | None) -> str:
    """Pins and leases that are there: what they hold stays. Nothing to those who may not see it."""
    try:
        return f"\n{concerned(client, tenant)}; what they hold stays"
    except KvctlError:
        return ""


def _room(client: ControlClient, tenant: str | None) -> tuple[int, bool]:
    """What may come without anything else going, as far as we are told; and whether there is a disk."""
    mine = [one for one in client.tenants().tenants if tenant in (None, one.name)]
    try:
        tiers = {one.name: one for one in client.status().tiers}
    except KvctlError:  # for those who act
        return sum(one.dram_guaranteed_bytes - one.used_bytes for one in mine), False
    dram, disk = tiers.get("dram", pb.Tier()), tiers.get("disk", pb.Tier())
    free = dram.capacity_bytes - dram.used_bytes
    if tenant is not None:
        free = min([free, *(one.dram_max_bytes - one.used_bytes for one in mine if one.HasField("dram_max_bytes"))])
    return max(0, free) + disk.capacity_bytes - disk.used_bytes, "disk" in tiers


def _note(client: ControlClient, verb: str, tenant: str, digest: str | None, blocks: int, done_bytes: int) -> None:
    """For the audit file. Who may not act has read or stored what is their own, which nobody writes down."""
    with suppress(KvctlError):
        client.note_transfer(
            pb.NoteTransferRequest(
                verb=verb, tenant=tenant, namespace_digest=digest or "", blocks=blocks, bytes=done_bytes
            )
        )


def _less(done: "Exported") -> str:
    gone = f"; {done.gone_blocks:,} were gone when their turn came" if done.gone_blocks else ""
    return gone + (f"; {done.orphan_blocks:,} continue what is not there" if done.orphan_blocks else "")


def _said(done: "Imported", file: Path, dry_run: bool, room: str) -> Text:
    lines = [
        f"{printable(str(file))}: {done.blocks:,} whole blocks of {done.namespaces:,} namespaces, {size(done.bytes)}"
    ]
    if dry_run:
        lines.append(room)
    else:
        durable = f", {done.durable_blocks:,} of them on disk" if done.durable_blocks else ""
        lines.append(f"{done.stored_blocks:,} stored{durable}, {done.known_blocks:,} were there already")
    if done.refused_blocks:
        reasons = ", ".join(f"{count:,} {why}" for why, count in done.reasons.items())
        lines.append(f"{done.refused_blocks:,} refused: {reasons}")
    lines += [f"damaged {text}" for text in done.damages]
    if done.damaged > len(done.damages):
        lines.append(f"and {done.damaged - len(done.damages):,} more places")
    if not done.whole:
        lines.append("the archive is not whole: what is said above was left out, or is missing at its end")
    return Text("\n".join(lines))


class _written:  # noqa: N801  used as a function
    """A file that appears under its name once it is whole, readable by its owner alone; or stdout."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.part")
        self._file: BinaryIO | None = None

    def __enter__(self) -> BinaryIO:
        if self._path == STREAM:
            return sys.stdout.buffer
        try:
            self._part.unlink(missing_ok=True)
            fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KvctlError(Exit.REFUSED, f"{self._part} cannot be written: {error.strerror}") from None
        self._file = os.fdopen(fd, "wb", buffering=1 << 20)
        return self._file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if self._file is None:
                sys.stdout.buffer.flush()
                return
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                self._part.replace(self._path)
        except OSError as failed:
            kind, error = OSError, failed
        if isinstance(error, OSError):
            self._part.unlink(missing_ok=True)
            raise KvctlError(Exit.REFUSED, f"{self._path} cannot be written: {error.strerror}") from None
        if kind is not None:
            self._part.unlink(missing_ok=True)


def _read(file: Path) -> BinaryIO:
    if file == STREAM:
        return sys.stdin.buffer
    try:
        return file.open("rb", buffering=1 << 20)
    except OSError as error:
        raise KvctlError(Exit.USAGE, f"{file} cannot be read: {error.strerror}") from None
