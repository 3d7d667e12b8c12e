"""A control side over a real store: what `control_fakes` answers from lists, and blocks from here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvproto.policy_frames import Tier
from kvstore import survey
from kvstore.insight.looking import Looking
from kvstore.report import NamespaceReport
from kvstored.admin_routing import Routing
from kvstored.control import ControlServer
from kvstored.events import Events
from tests.core import SECOND, Client, Core, chain, words
from tests.unit.control_fakes import MemoryPort, ThreadOwner
from tests.unit.test_disk import make, put

SYSTEM = chain(6, "system")
CHATS = 12


@dataclass
class StorePort(MemoryPort):
    """Two namespaces: one of conversations behind a common beginning, and one that holds little."""

    @cached_property
    def core(self) -> Core:
        core = make(arenas=8)
        self.client: Client = core.client("research")
        self.talks, other = self.client.open(model="meta-llama/Llama-3.1-8B-Instruct"), self.client.open(model="other")
        put(self.client, self.talks, SYSTEM)
        for chat in range(CHATS):
            put(self.client, self.talks, [*SYSTEM, *chain(1 + chat % 4, f"chat {chat}")])
        put(self.client, self.talks, chain(3, "alone"))
        put(self.client, other, chain(2, "other"))
        core.store.pinning.pin(
            self.client.session.tenant, self.talks, words(SYSTEM), 0, 6, 60 * SECOND, Tier.DRAM, owner="operator"
        )
        self.client.lease(self.talks, SYSTEM[:4])
        core.store.leasing.account()
        return core

    @cached_property
    def looking(self) -> Looking:
        return Looking(self.core.store)

    @cached_property
    def routing(self) -> Routing:
        return Routing(self.core.store)

    def namespaces(self) -> tuple[NamespaceReport, ...]:
        return survey.namespace_reports(self.core.store)


@contextmanager
def served(
    folder: Path, events: Events | None = None, kind: type[StorePort] = StorePort
) -> Iterator[tuple[StorePort, ThreadOwner]]:
    """Its control socket in a folder."""
    folder.mkdir(mode=0o755, exist_ok=True)
    port = kind(runtime_dir=str(folder))
    owner = ThreadOwner(port)
    server = ControlServer(owner, folder, events=events)
    server.start()
    try:
        yield port, owner
    finally:
        server.stop(0.0)
        owner.stop()
