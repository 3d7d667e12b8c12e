"""A store on fakes whose remote tier is real jobs against a server over a real socket, in a test's own turn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import xxhash

from kvproto.errors import Grant
from kvstore.sessions import Copy, Namespace
from kvstore.tier.remote_orders import Bytes, Forget, ForgetAll, Keep, Look, Piece, RemoteOrder
from kvstore.tier.remote_writing import RemoteAdmission
from kvstored.remote_removals import Removal
from tests.core import SECOND, Client, Core, value_of
from tests.s3 import S3Server
from tests.unit.remote_kit import Kit, kit


class Host:
    """`kvstore.tier.remote_orders.RemoteWorkers` that carries out what it is given when the test says so."""

    def __init__(self, core: Core, jobs: Kit, admission: RemoteAdmission) -> None:
        self.core, self.kit = core, jobs
        self.orders: list[RemoteOrder] = []
        self.looks: list[Look] = []
        self.copies: list[tuple[Copy, Bytes]] = []
        jobs.jobs.keeping.view = core.memory.view
        jobs.jobs.holdings.gone = core.store.remote.gone
        core.store.begin_remote(self, admission)
        self.uses = jobs.jobs.holdings.uses
        self.client: Client = core.client()

    def submit(self, order: RemoteOrder) -> bool:
        if isinstance(order, Keep):
            self.kit.jobs.begin_keep(order)
        elif isinstance(order, Forget | ForgetAll):
            self.kit.jobs.announce(order)
        self.orders.append(order)
        return True

    def look(self, order: Look) -> bool:
        self.looks.append(order)
        return True

    def reading(self) -> bool:
        return True

    def writing(self) -> bool:
        return True

    def room_again(self, object_bytes: int) -> bool:
        return self.kit.jobs.keeping.has_room_again(object_bytes)

    def carry(self, copies: list[tuple[Copy, Bytes]]) -> None:
        self.copies += copies

    def landed(self, piece: Piece) -> None:
        self.kit.jobs.reading._budget.give(piece.taken_bytes)
        piece.taken_bytes = 0

    def changed(self) -> None:
        raise AssertionError("nobody writes late here")

    def objects(self, below: ForgetAll) -> int:
        ledger = self.kit.jobs.holdings.ledger
        return ledger.noted([one for one in ledger.namespaces() if below.covers(one)])

    def work(self) -> None:
        """Carry out all that waits, and what follows from it."""
        store = self.core.store
        store.tick()
        while self.orders or self.copies or self.looks:
            while self.orders:
                self.carry_out(self.orders.pop(0))
            while self.looks:
                self.kit.jobs.look(self.looks[0])
                store.remote.looking.looked(self.looks.pop(0))
            while self.copies:
                copy, source = self.copies.pop(0)
                view = self.core.memory.view(copy.arena)
                view[copy.target_offset : copy.target_offset + copy.block_bytes] = source
                store.copied(copy.ticket, xxhash.xxh3_64_intdigest(source.tobytes()))
                store.flush_outcomes(copy.ticket.session)
            store.tick()

    def carry_out(self, order: RemoteOrder) -> None:
        remote, jobs = self.core.store.remote, self.kit.jobs
        if isinstance(order, Forget):
            jobs.begin_forget(order)
            remote.forgot(order)
            jobs.forget(order)
        elif isinstance(order, ForgetAll):
            jobs.begin_forget_all(order)
            remote.forgot(order)
            jobs.remove(Removal(order.prefix))
        elif isinstance(order, Keep):
            jobs.keep(order, remote.writing.copied)
            remote.kept(order)
        else:
            jobs.seek(order, remote.land)
            remote.sought(order)

    def put(self, ns: Namespace, keys: Sequence[bytes], version: int, parent: bytes | None = None) -> None:
        """Store a chain; bytes follow from keys and version."""
        answers = self.client.reserve(ns, keys, parent)
        for key, answer in zip(keys, answers, strict=True):
            assert answer.grant is Grant.GRANTED
            self.client.fill(ns, answer, value_of(key, ns.identity.block_bytes, version))
        self.client.commit([answer.ticket for answer in answers])
        self.core.finish_all()

    def ask(self, ns: Namespace, keys: Sequence[bytes]) -> int:
        """Look for a chain, long after anybody did, and have what follows from it done. How much of it is here then."""
        self.core.pass_time(100 * SECOND)
        self.kit.jobs.holdings.known.forget_all("")
        self.client.match(ns, keys)
        self.work()
        return self.client.match(ns, keys)

    def delete(self, ns: Namespace, key: bytes) -> None:
        """And what continues it."""
        self.client.delete(ns, [key])
        self.core.settle()
        self.work()

    def read(self, ns: Namespace, key: bytes, versions: int = 3) -> int:
        """Which version of a block is here."""
        row = self.core.store.tables.blocks[self.core.row(ns, key)]
        checksum = int(row["checksum"])
        sums = [xxhash.xxh3_64_intdigest(value_of(key, ns.identity.block_bytes, one)) for one in range(versions)]
        return sums.index(checksum)


@contextmanager
def host(
    s3: S3Server, arenas: int = 8, *, folder: Path | None = None, quota_bytes: int = 1 << 40,
    admission: RemoteAdmission = RemoteAdmission.SECOND_TOUCH,
) -> Iterator[Host]:  # fmt: skip
    """One."""
    with kit(s3, folder, quota_bytes=quota_bytes) as jobs:
        yield Host(Core(arenas), jobs, admission)
