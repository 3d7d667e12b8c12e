"""`kvctl export` and `kvctl import`: blocks as a file, to warm another host with (proto/ARCHIVE.md)."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

import typer
from rich.text import Text

from kvctl import values
from kvctl.archive_room import Gate, Needs, held, room_of
from kvctl.asking import DryRun, Yes
from kvctl.client import ControlClient, Exit, KvctlError, printable
from kvctl.program import Globals, OfNamespace, OfTenant, Output, command, globals_of
from kvctl.render import size
from kvctl.scope import parse
from kvctl.whole_file import WholeFile, need_free
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
    if file != STREAM:
        need_free(file, force=force)
    from kvctl.archive_export import chains_of, export  # noqa: PLC0415

    chosen.socket()  # refuses another host, before anything is written: blocks go through this one's memory
    with chosen.connect() as client:
        client.need_tenant(tenant)
        scope = scope.resolved(client)
        found = chains_of(client, scope)
        planned = sum(len(one.parents) for one in found)
        planned_bytes = sum(len(one.parents) * one.identity.block_bytes for one in found)
        progress = _Progress("exported", planned_bytes)
        with _target(file, force=force) as archive:
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

    Asks before anything has to leave memory, or the disk: all goes through memory, so what is free on disk does not
    help. Where more comes than it was thought to, it stops there and asks. A dry run verifies all of it, and needs no
    daemon. Exits with 1 if the archive is damaged or cut short, or if blocks were refused.
    """
    chosen = globals_of(context)
    if tenant == "":
        raise KvctlError(Exit.USAGE, "--tenant is empty; see `kvctl tenants`")
    from kvctl.archive_import import Importer  # noqa: PLC0415

    with _read(file) as archive:
        try:
            reader = Reader(archive, keeps=not dry_run)
        except ArchiveError as error:
            raise KvctlError(Exit.REFUSED, f"{file}: {error}; nothing was stored") from None
        progress = _Progress("verified" if dry_run else "imported", reader.planned_bytes)
        room = ""
        try:
            if dry_run:
                with Importer(None, tenant, progress, None, durable=False) as importer:
                    done = importer.take(reader)
                room = _foretold(chosen, done, tenant, importer.taken)
            else:
                done = _import(chosen, reader, tenant, progress, yes=yes)
        finally:
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
        room = room_of(client)
        gate = None if yes else Gate(client, room, reader, tenant, progress.over)
        with Importer(client.socket_path.parent, tenant, progress, gate, durable=room.disk is not None) as importer:
            done, ended = importer.done, False
            try:
                importer.take(reader)
                ended = True
            finally:
                if ended or done.stored_blocks:
                    _note(client, "import", tenant or "", None, done.stored_blocks, done.stored_bytes)
    return done


def _foretold(chosen: Globals, done: "Imported", tenant: str | None, needs: Needs) -> str:
    """What storing a verified archive would mean for those who are there; of no daemon, that nobody can say."""
    try:
        chosen.socket()
        with chosen.connect() as client:
            room = room_of(client)
            those = held(client, tenant)
    except KvctlError as error:
        return f"would store {done.blocks:,} blocks; into what room is not known: {error}"
    text = f"would store {done.blocks:,} blocks, {size(done.bytes)}, less what is there already; "
    return text + ("there is room for all of it" if room.has(needs) else room.short(needs, would="would be")) + those


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
    lines += [f"damaged {printable(text)}" for text in done.damages]
    if done.damaged > len(done.damages):
        lines.append(f"and {done.damaged - len(done.damages):,} more places")
    if not done.whole:
        lines.append("the archive is not whole: what is said above was left out, or is missing at its end")
    return Text("\n".join(lines))


@contextmanager
def _target(file: Path, *, force: bool) -> Iterator[BinaryIO]:
    if file != STREAM:
        with WholeFile(file, force=force) as target:
            yield target
        return
    try:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    except OSError as error:
        raise KvctlError(Exit.REFUSED, f"stdout cannot be written: {error.strerror}") from None


@contextmanager
def _read(file: Path) -> Iterator[BinaryIO]:
    if file == STREAM:
        opened = sys.stdin.buffer
    else:
        try:
            opened = file.open("rb", buffering=1 << 20)
        except OSError as error:
            raise KvctlError(Exit.USAGE, f"{file} cannot be read: {error.strerror}") from None
    with opened:
        try:
            yield opened
        except OSError as error:
            raise KvctlError(Exit.REFUSED, f"{file} cannot be read: {error.strerror}") from None
