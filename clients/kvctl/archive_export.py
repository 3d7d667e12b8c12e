"""Out of a store into an archive: which blocks there are, in an order in which each follows its parent; their bytes.

control socket: keys and parents, page by page -> order -> hot socket: leases of runs, as any client's -> Writer
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

import numpy as np

import kvclient
from kvclient import Client, Namespace
from kvctl.client import ControlClient, Exit, KvctlError, printable
from kvctl.scope import Scope
from kvproto import control_pb2 as pb
from kvproto.archive import Writer
from kvproto.errors import KvError
from kvproto.frames import Role
from kvproto.identity import NamespaceIdentity
from kvproto.limits import KEY_BYTES, MIB

RUN_BLOCKS: Final = 256
RUN_BYTES: Final = 32 * MIB  # leased, and in memory, at a time
WAIT_S: Final = 30.0  # for blocks that lie on disk
TTL_S: Final = 30.0
ROOT: Final = bytes(KEY_BYTES)

Progress = Callable[[int, int], None]  # blocks, bytes so far


@dataclass(slots=True)
class Chains:
    """The blocks of one namespace of one tenant."""

    tenant: str
    identity: NamespaceIdentity
    parents: dict[bytes, bytes]  # by key

    def ordered(self) -> Iterator[list[bytes]]:
        """Runs of keys, each the continuation of the one before in it; every parent comes before its children."""
        children: dict[bytes, list[bytes]] = {}
        for key, parent in self.parents.items():
            children.setdefault(parent, []).append(key)
        most = max(1, min(RUN_BLOCKS, RUN_BYTES // self.identity.block_bytes))
        left = children.pop(ROOT, [])[::-1]
        while left:
            run = [left.pop()]
            while len(run) < most and (below := children.pop(run[-1], None)):
                left += below[:0:-1]
                run.append(below[0])
            left += children.pop(run[-1], [])[::-1]
            yield run

    def below(self, tops: Sequence[bytes]) -> "Chains":
        """Those that continue one of `tops`, with all that lead there."""
        wanted: dict[bytes, bool] = dict.fromkeys(tops, True) | {ROOT: False}
        for key in self.parents:
            path = []
            at = key
            while at not in wanted:
                path.append(at)
                at = self.parents.get(at, ROOT)
            for one in path:
                wanted[one] = wanted[at]
        kept = {key for key in self.parents if wanted[key]}
        for top in [key for key in tops if key in self.parents]:
            at = self.parents[top]
            while at != ROOT and at in self.parents and at not in kept:
                kept.add(at)
                at = self.parents[at]
        return Chains(self.tenant, self.identity, {key: self.parents[key] for key in self.parents if key in kept})


@dataclass(slots=True)
class OfTenant:
    """What came of one tenant's blocks, for the audit file."""

    tenant: str
    blocks: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Exported:
    """What came of it, for people and programs."""

    namespaces: int = 0
    blocks: int = 0
    bytes: int = 0
    gone_blocks: int = 0  # were dropped or evicted before their turn came, or could not be read
    orphan_blocks: int = 0  # what they continue was not there
    tenants: list[str] = field(default_factory=list)
    by_tenant: list[OfTenant] = field(default_factory=list)


def chains_of(client: ControlClient, scope: Scope) -> list[Chains]:
    """All blocks that a resolved scope names. Raises KvctlError."""
    found = []
    for listed in client.namespaces().namespaces:
        if scope.tenant in (None, listed.tenant) and scope.digest in (None, listed.digest) and listed.blocks:
            chains = _walked(client, listed.tenant, listed.digest)
            found.append(chains.below(scope.key_bytes) if scope.keys else chains)
    return [one for one in found if one.parents]


def _walked(client: ControlClient, tenant: str, digest: str) -> Chains:
    after, identity, parents = 0, b"", {}
    while True:
        page = client.walk(pb.WalkBlocksRequest(tenant=tenant, namespace_digest=digest, after=after))
        identity = page.identity
        for at in range(0, len(page.keys), KEY_BYTES):
            parents[page.keys[at : at + KEY_BYTES]] = page.parents[at : at + KEY_BYTES]
        after = page.next
        if not after:
            return Chains(tenant, NamespaceIdentity.from_canonical(identity), parents)


def export(runtime_dir: Path, found: Sequence[Chains], writer: Writer, progress: Progress) -> Exported:
    """Write them. Raises KvctlError where the store lets us not read, OSError where the archive cannot be written."""
    done = Exported(tenants=sorted({one.tenant for one in found}))
    for tenant in done.tenants:
        with connected(runtime_dir, tenant, Role.TOOL, "kvctl export") as client:
            before = OfTenant(tenant, done.blocks, done.bytes)
            for chains in found:
                if chains.tenant == tenant:
                    _export_one(client, chains, writer, done, progress)
            done.by_tenant.append(OfTenant(tenant, done.blocks - before.blocks, done.bytes - before.bytes))
    return done


def connected(runtime_dir: Path, tenant: str, role: Role, name: str) -> Client:
    """A client of the hot socket. Raises KvctlError."""
    try:
        client = kvclient.connect(runtime_dir, tenant=tenant, role=role, name=name, timeout_s=WAIT_S)
    except KvError as error:
        why = printable(str(error))
        raise KvctlError(
            Exit.REFUSED,
            f"{why}; is there such a tenant (`kvctl tenants`), and do you belong to it, or are you root?",
        ) from None
    if not client.connected:
        why = client.status.why_not
        client.close()
        raise KvctlError(Exit.UNREACHABLE, f"no session: {why}; see `kvctl doctor`")
    return client


def namespace_of(client: Client, identity: NamespaceIdentity) -> Namespace:
    """Raises KvctlError for what this store cannot hold."""
    plain = {one.name: getattr(identity, one.name) for one in fields(identity)}
    tp, pp = (plain.pop("tp_rank"), plain.pop("tp_size")), (plain.pop("pp_rank"), plain.pop("pp_size"))
    try:
        return client.namespace(**plain, tp=tp, pp=pp)
    except KvError as error:
        text = f"a namespace of {identity.model} cannot be here: {error}"
        raise KvctlError(Exit.REFUSED, printable(text)) from None


def _export_one(client: Client, chains: Chains, writer: Writer, done: Exported, progress: Progress) -> None:
    namespace = namespace_of(client, chains.identity)
    writer.name(chains.tenant, chains.identity, len(chains.parents))
    done.namespaces += 1
    met, missing = 0, set[bytes]()
    for run in chains.ordered():
        met += len(run)
        readable = run if chains.parents[run[0]] not in missing else []
        blocks = read_run(namespace, readable)
        for key, body in zip(run, blocks, strict=False):
            parent = chains.parents[key]
            writer.block(key, None if parent == ROOT else parent, body)
            done.blocks += 1
            done.bytes += len(body)
        missing.update(run[len(blocks) :])
        done.gone_blocks += len(run) - len(blocks)
        progress(done.blocks, done.bytes)
    done.orphan_blocks += len(chains.parents) - met


def read_run(namespace: Namespace, run: Sequence[bytes]) -> "list[memoryview]":
    """The lead run, copied out and still valid after that; once more, if the lease lapsed meanwhile."""
    block_bytes = namespace.identity.block_bytes
    for _ in range(2):
        if not run:
            break
        with namespace.fetch(run, wait_s=WAIT_S, ttl_s=TTL_S) as lease:
            count = lease.blocks
            target = np.empty((count, block_bytes), dtype=np.uint8)
            if count and lease.copy_to(target):
                return [memoryview(row) for row in target]  # type: ignore[arg-type]  # ndarray has the buffer protocol
            run = run[: lease.blocks]
    return []
