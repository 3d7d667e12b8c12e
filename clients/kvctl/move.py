"""`kvctl move`: another daemon is to go on with a prefix.

    by the remote tier    this daemon writes it there at once, and reads it back; what is not there whole was not moved.
                          The other one finds it, sooner if told `kvctl prefetch`
    --to RUNTIME_DIR      of this machine: read out of one and stored into the other, as any client does (move_near.py)

What is here is shown and somebody is asked, as everywhere; the source keeps its blocks unless told otherwise. With
--evict that is what would leave, what pins and leases keep here, and which of these the namespace and its tenant have.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.text import Text

from kvctl import insight
from kvctl.asking import DryRun, Yes, ask, concerned, need_terminal
from kvctl.client import ControlClient, Exit, KvctlError, printable
from kvctl.program import Digest, Extra, Globals, Keys, Owner, Tokens, command, globals_of
from kvctl.render import size
from kvproto import control_pb2 as pb
from kvproto.limits import KEYS_PER_FRAME

LOOK_S: Final = 0.02
LOOK_S_MAX: Final = 0.2
AGAIN_S: Final = 2.0  # where nothing was written meanwhile


@dataclass(slots=True)
class Moved:
    """What came of it, for people and programs. Blocks are the first so many of the chain."""

    blocks: int  # here
    bytes: int
    there_blocks: int  # of them, in the remote tier before (`remote`)
    moved_blocks: int = 0  # the other daemon can have now; with `dry_run` 0
    moved_bytes: int = 0
    evicted_blocks: int = 0  # left this daemon; with `dry_run` would leave it
    evicted_bytes: int = 0  # of memory and disk
    held_blocks: int = 0  # stay where they are, though told to leave: pinned, leased or on their way
    pinned_blocks: int = 0  # of these
    seconds: float = 0.0
    why: str = ""  # the first block that did not come there has not, if that is known
    remote: bool = False
    dry_run: bool = False


@command("move", short="Have another daemon go on with a prefix.")
def move(
    context: typer.Context,
    key: Keys = None,
    *,
    tokens: Tokens = None,
    extra: Extra = "",
    namespace: Digest = None,
    tenant: Owner = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The directory of another daemon of this machine. Else by the remote tier."),
    ] = None,
    evict: Annotated[
        bool, typer.Option("--evict", help="What was moved leaves memory and disk here, unless others continue it.")
    ] = False,
    within: Annotated[
        float, typer.Option(min=0.1, max=3600.0, metavar="SECONDS", help="How long to wait until all is there.")
    ] = 60.0,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Have another daemon go on with a prefix: by way of the remote tier at once, or straight into one of this machine.

    Copied, not taken away, unless --evict. All of it is read back from there and compared first: exits with 1, and
    evicts nothing, if not all of what is here came there whole.
    """
    chosen = globals_of(context)
    chain = insight.parse(key or (), tokens, extra, tenant, namespace)
    need_terminal("move", yes=yes, dry_run=dry_run)
    if to is not None:
        chosen.socket()  # refuses another host: blocks go through this one's memory
    with chosen.connect() as client:
        prefix = _Prefix.named(client, chain)
        moved = _look(client, prefix, remote=to is None, dry_run=dry_run)
        where = "the remote tier" if to is None else str(to)
        if dry_run or not yes:
            told, shown = _foretold(client, prefix, moved, where, evict=evict)
        if dry_run:
            chosen.show("move", asdict(told), Text(shown))
            return
        if not yes:
            ask("Move them?", "nothing was moved; answer y, or give --yes, to move", Text(shown), client=client)
        _move(chosen, client, prefix, moved, to, within)
        if evict and moved.moved_blocks == moved.blocks:
            _evict(client, prefix, moved, moved.blocks, dry_run=False)
    chosen.show("move", asdict(moved), Text(_said(moved, where)))
    if moved.moved_blocks < moved.blocks:
        first = "".join(f", {key.hex()[:16]} the first of them" for key in prefix.keys[moved.moved_blocks :][:1])
        why = f": {printable(moved.why)}" if moved.why else ""
        text = f"{moved.blocks - moved.moved_blocks:,} blocks did not come there{first}{why}"
        raise KvctlError(Exit.REFUSED, f"{text}{'; nothing was evicted here' if evict else ''}")


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A chain of one namespace of one tenant."""

    tenant: str
    digest: str
    keys: Sequence[bytes]

    @classmethod
    def named(cls, client: ControlClient, chain: insight.Miss) -> "_Prefix":
        """The only one that a command line can mean. Raises KvctlError."""
        client.need_tenant(chain.tenant)
        digest, keys = chain.named(client)
        listed = [
            one
            for one in client.namespaces().namespaces
            if digest in (None, one.digest) and chain.tenant in (None, one.tenant)
        ]
        if not listed:
            raise KvctlError(Exit.NOT_FOUND, "no such namespace holds blocks or is open; see `kvctl namespaces`")
        if len(listed) > 1:
            raise KvctlError(Exit.USAGE, f"{len(listed)} namespaces could be meant; say --namespace, and --tenant")
        return cls(listed[0].tenant, listed[0].digest, keys)

    def parts(self) -> list[pb.Prefix]:
        """As many as a request takes, each."""
        return [
            pb.Prefix(tenant=self.tenant, namespace_digest=self.digest, keys=self.keys[at : at + KEYS_PER_FRAME])
            for at in range(0, len(self.keys), KEYS_PER_FRAME)
        ]


def _look(client: ControlClient, prefix: _Prefix, *, remote: bool, dry_run: bool) -> Moved:
    """What is here. Raises KvctlError with NOT_FOUND where nothing is."""
    told = _asked(client, prefix, 1.0, dry_run=True)
    if not told.blocks:
        raise KvctlError(Exit.NOT_FOUND, "the first block of this chain is not here; see `kvctl match`, `explain-miss`")
    if remote and not told.remote:
        text = "this daemon has no remote tier that it may write to, or it does not answer; see `kvctl status`"
        raise KvctlError(Exit.REFUSED, f"{text}, or move --to a daemon of this machine")
    return Moved(told.blocks, told.bytes, told.there if remote else 0, remote=remote, dry_run=dry_run)


def _foretold(
    client: ControlClient, prefix: _Prefix, moved: Moved, where: str, *, evict: bool
) -> tuple[Moved, str]:  # fmt: skip
    """What a move would do, and a text of it. Nothing is changed."""
    told = replace(moved)
    lines = [f"would move the first {moved.blocks:,} blocks of the chain; they stay here, too"]
    if evict:
        _evict(client, prefix, told, moved.blocks, dry_run=True)
        lines = [f"would move the first {moved.blocks:,} blocks of the chain, and then evict them here:"]
        lines.append(f"{told.evicted_blocks:,} would leave this daemon, {size(told.evicted_bytes)}")
        lines += _held(told)
        lines.append(str(concerned(client, prefix.tenant, prefix.digest)))
    return told, "\n".join([_here(moved, where), *lines])


def _asked(
    client: ControlClient, prefix: _Prefix, within_s: float, *, dry_run: bool, looked_within_s: float = 0.0
) -> pb.HandOverResponse:
    """Of all parts together, up to the first that is not here as a whole."""
    total = pb.HandOverResponse(dry_run=dry_run)
    lead = seen = True
    for part in prefix.parts():
        one = client.hand_over(
            pb.HandOverRequest(
                prefix=part, within_s=within_s, dry_run=dry_run, looked_within_s=looked_within_s if seen else 0.0
            )
        )
        if seen:
            total.looked, total.why = total.looked + one.looked, one.why
        seen &= one.looked == len(part.keys)
        total.blocks, total.bytes, total.remote = total.blocks + one.blocks, total.bytes + one.bytes, one.remote
        if lead:
            total.there += one.there
        lead &= one.there == len(part.keys)
        total.coming += one.coming
        if one.blocks < len(part.keys):
            break
    return total


def _move(
    chosen: Globals, client: ControlClient, prefix: _Prefix, moved: Moved, to: Path | None, within_s: float
) -> None:
    began = time.monotonic()
    block_bytes = moved.bytes // moved.blocks
    if to is None:
        moved.moved_blocks, moved.why = _by_remote(client, prefix, moved, began, within_s)
    else:
        from kvctl.move_near import copy  # noqa: PLC0415  it brings the client, which no other command waits for

        moved.moved_blocks = copy(chosen, client, to, prefix.tenant, prefix.digest, prefix.keys[: moved.blocks])
    moved.moved_bytes, moved.seconds = moved.moved_blocks * block_bytes, round(time.monotonic() - began, 3)


def _by_remote(
    client: ControlClient, prefix: _Prefix, moved: Moved, began: float, within_s: float
) -> tuple[int, str]:  # fmt: skip
    """How many of the first blocks are over there, each read back since this began, and what is wrong with the next.

    Asks once, waits, and asks again where nothing happens: what was not there whole is written anew then.
    """
    until, best, asked, nap_s = began + within_s, (0, 0), began, LOOK_S
    if moved.there_blocks < moved.blocks:
        _asked(client, prefix, max(0.1, until - time.monotonic()), dry_run=False)
    while True:  # what was given up for good is known as soon as it has been tried
        since_s = max(1e-3, time.monotonic() - began)
        told = _asked(client, prefix, 1.0, dry_run=True, looked_within_s=since_s)
        now, found = time.monotonic(), (min(moved.blocks, told.looked), told.there)
        if found[0] == moved.blocks or now >= until:
            return found[0], told.why
        if found > best:
            best, nap_s, asked = found, LOOK_S, now
        elif now - asked > AGAIN_S:
            again = _asked(client, prefix, max(0.1, until - now), dry_run=False)
            if not again.coming and told.why and told.looked == told.there:
                return found[0], told.why
            asked = now
        time.sleep(min(nap_s, max(0.0, until - now)))
        nap_s = min(2 * nap_s, LOOK_S_MAX)


def _evict(client: ControlClient, prefix: _Prefix, moved: Moved, count: int, *, dry_run: bool) -> None:
    """The first `count` blocks leave here, the last of them first. What others continue, lease or pin stays."""
    keys = prefix.keys[:count]
    tiers = [tier.name for tier in client.status().tiers]
    for at in range((len(keys) - 1) // KEYS_PER_FRAME * KEYS_PER_FRAME, -1, -KEYS_PER_FRAME):
        scope = pb.ClearRequest.Prefix(namespace_digest=prefix.digest, keys=keys[at : at + KEYS_PER_FRAME])
        held = pinned = 0
        for tier in ("disk", "dram") if "disk" in tiers else ("dram",):
            request = pb.EvictRequest(tenant=prefix.tenant, prefix=scope, tier=tier, exactly=True, dry_run=dry_run)
            report = client.evict(request)
            # On a dry run nothing has left the disk when memory's turn comes: then "kept there" means nothing.
            kept = 0 if dry_run and tier == "dram" else report.kept_blocks
            moved.evicted_blocks += report.blocks - kept
            moved.evicted_bytes += report.bytes
            held, pinned = max(held, report.held_blocks), max(pinned, report.pinned_blocks)
        moved.held_blocks, moved.pinned_blocks = moved.held_blocks + held, moved.pinned_blocks + pinned


def _here(moved: Moved, where: str) -> str:
    there = f"\n{moved.there_blocks:,} of them are there already" if moved.remote and moved.there_blocks else ""
    return f"{moved.blocks:,} blocks are here, {size(moved.bytes)}; to {printable(where)}{there}"


def _held(moved: Moved) -> list[str]:
    others = moved.held_blocks - moved.pinned_blocks
    text = f"{moved.held_blocks:,} stay, and what leads there: {moved.pinned_blocks:,} pinned"
    text += f", {others:,} leased or on their way"
    return [text] if moved.held_blocks else []


def _said(moved: Moved, where: str) -> str:
    lines = [_here(moved, where)]
    if moved.seconds:
        lines.append(f"{moved.moved_blocks:,} are there now, {size(moved.moved_bytes)}, in {moved.seconds:.3g} s")
    if moved.seconds and moved.remote and moved.moved_blocks:
        lines.append("the other daemon finds them when they are asked for; `kvctl prefetch` there has them at once")
    if moved.evicted_blocks:
        lines.append(f"{moved.evicted_blocks:,} blocks have left this daemon, {size(moved.evicted_bytes)} are free")
    return "\n".join([*lines, *_held(moved)])
