"""`kvctl advise` and `kvctl explain-miss`: from words on a command line to requests, and answers as pages."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvctl import key_names, scope
from kvctl.client import ControlClient, Exit, KvctlError, printable
from kvctl.render import size
from kvproto import control_pb2 as pb
from kvproto.errors import UsageError
from kvproto.keys import block_keys
from kvproto.limits import KEYS_PER_FRAME, MIB

__all__ = ["Miss", "advice", "advise_request", "explanation", "parse"]

TOKENS_FILE_BYTES: Final = 64 * MIB  # four million token ids, the longest context that is priced, take 32
COMPARE: Final = (
    "Rules are tried on a sample, each key by itself: compare them with each other, not with what was really there."
)
TOKENS_WANTED: Final = "a JSON list of token ids, whole numbers from 0 to 2**32 - 1"


def advise_request(tenant: str | None) -> pb.AdviseRequest:
    """What to ask. Raises KvctlError."""
    _check_tenant(tenant)
    return pb.AdviseRequest(tenant=tenant)


def _check_tenant(tenant: str | None) -> None:
    if tenant == "":
        raise _usage("--tenant is empty; see `kvctl tenants`")


# -- what is asked of a miss ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Miss:
    """A chain, by its keys or by its tokens, and where it should be."""

    keys: tuple[str, ...]  # in lower-case hex, or their first digits
    tokens: tuple[int, ...]
    extra: bytes
    tenant: str | None
    namespace: str | None  # the first digits of its digest

    def ask(self, client: ControlClient) -> pb.ExplainMissResponse:
        """What became of it. Chains longer than a request are asked for in parts, the first part first.

        Raises KvctlError.
        """
        digest, keys = self.named(client)
        before = on_disk = 0
        while True:
            part = keys[before : before + KEYS_PER_FRAME]
            report = client.explain_miss(pb.ExplainMissRequest(tenant=self.tenant, namespace_digest=digest, keys=part))
            if report.state != "hit" or before + len(part) == len(keys):
                break
            digest = report.digest  # what follows lies where the beginning does
            before += report.found
            on_disk += report.on_disk
        if before:
            report.sentences.insert(0, f"The first {before:,} blocks are there; of those that follow:")
        report.asked, report.found, report.on_disk = len(keys), before + report.found, on_disk + report.on_disk
        return report

    def named(self, client: ControlClient) -> tuple[str | None, Sequence[bytes]]:
        """The digest of its namespace, if one was named, and its keys. Raises KvctlError."""
        digest = None
        if self.namespace is not None:
            digest = scope.parse(self.tenant, self.namespace, (), everything=False).resolved(client).digest
        if self.keys:
            return digest, key_names.resolved(client, self.tenant, digest, self.keys)
        return digest, self._keys(client, digest)

    def _keys(self, client: ControlClient, digest: str | None) -> Sequence[bytes]:
        client.need_tenant(self.tenant)
        listed = client.namespaces().namespaces
        steps = {
            one.block_tokens
            for one in listed
            if digest in (None, one.digest) and self.tenant in (None, one.tenant)
        }  # fmt: skip
        if not steps:
            raise KvctlError(Exit.NOT_FOUND, "no namespace holds blocks or is open; see `kvctl namespaces`")
        if len(steps) > 1:
            shown = ", ".join(map(str, sorted(steps)))
            raise _usage(f"namespaces have blocks of {shown} tokens; say which one is meant with --namespace")
        step = steps.pop()
        try:
            keys = block_keys(self.tokens, step, self.extra)
        except UsageError as error:
            raise _usage(f"--tokens takes {TOKENS_WANTED}: {error}") from None
        if not keys:
            raise _usage(f"{len(self.tokens)} tokens do not fill a block of {step}, so that nothing is stored of them")
        return keys


def parse(keys: Sequence[str], tokens: Path | None, extra: str, tenant: str | None, namespace: str | None) -> Miss:
    """The chain that a command line names. Raises KvctlError with USAGE, before any daemon is asked."""
    _check_tenant(tenant)
    if bool(keys) == (tokens is not None):
        raise _usage("name a chain: give its keys, or --tokens with a file, and not both")
    named = key_names.checked(keys)
    added = _from_hex(extra)
    if added is None:
        raise _usage(f"--extra takes hex digits, not {printable(extra)!r}")
    if namespace is not None:
        scope.parse(tenant, namespace, (), everything=False)
    read = _read(tokens) if tokens is not None else ()
    return Miss(named, read, added, tenant, namespace)


def _from_hex(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return None


def _read(path: Path) -> tuple[int, ...]:
    try:
        if str(path) == "-":
            text = sys.stdin.read(TOKENS_FILE_BYTES + 1)
        else:
            with path.open(encoding="utf-8") as file:
                text = file.read(TOKENS_FILE_BYTES + 1)
        if len(text) > TOKENS_FILE_BYTES:
            raise _usage(f"{path} is longer than {size(TOKENS_FILE_BYTES)}; give the beginning of the prompt")
        found = json.loads(text)
    except OSError as error:
        raise _usage(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise _usage(f"{path} is no JSON; --tokens takes {TOKENS_WANTED}") from None
    if not isinstance(found, list) or not all(type(one) is int and 0 <= one < 1 << 32 for one in found):
        raise _usage(f"{path} is something else; --tokens takes {TOKENS_WANTED}")
    return tuple(found)


def _usage(text: str) -> KvctlError:
    return KvctlError(Exit.USAGE, text)


# -- pages ------------------------------------------------------------------------------------------------------


def advice(report: pb.AdviseResponse) -> RenderableType:
    """Sentences, and below them what other rules would do."""
    lines: list[RenderableType] = [Text(printable(sentence)) for sentence in report.sentences]
    if report.rules and report.doubt == "none":
        lines += [_rules(report), Text(COMPARE)]
    if report.lost:
        lines.append(Text(f"{report.lost:,} sampled accesses were lost: what is said here may be a little off."))
    return Group(*lines)


def _rules(report: pb.AdviseResponse) -> Table:
    table = Table("rule", "in the sample", "against now", "", box=None, pad_edge=False)
    for one in report.rules:
        note = "now" if one.in_force else "" if one.measurable else "not told apart yet"
        table.add_row(one.rule, f"{100 * one.hit.share:.1f} %", f"{100 * one.hit_gain.share:+.1f} points", note)
    return table


def explanation(report: pb.ExplainMissResponse) -> RenderableType:
    """Sentences, below where it was looked for."""
    where = f"Namespace {report.digest[:12]} of {printable(report.tenant)}"
    return Group(Text(where), *(Text(printable(sentence)) for sentence in report.sentences))
