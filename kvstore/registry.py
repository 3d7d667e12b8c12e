"""Who is who: tenants, pools and namespaces, and the numbers that rows and arenas know them by. Owner thread.

A number is given once and journalled, so that a successor gives it to the same one. That of a namespace which nobody
uses any more goes to another when its tenant has no more of its own.

There are places for so many tenants. Each configured one has its own, whether it has come or not. Another one that came
and went, and for which nothing was ever made, gives its place up to who comes when there is no other; after those, who
has only said something (`guiding.py`), whoever was not heard of for longest first. A tenant that had a namespace keeps
its place, since what is left of it goes by its pools.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from kvproto.errors import KvError, LimitError, NamespaceError, UsageError
from kvproto.identity import NamespaceIdentity
from kvproto.ids import NamespaceDigest
from kvproto.limits import (
    NAMESPACES,
    NAMESPACES_PER_SESSION,
    NAMESPACES_PER_TENANT,
    POOLS_PER_TENANT,
    TENANTS,
    slot_bytes_for,
)
from kvstore.arenas import Arenas
from kvstore.blocks import U4, Index, Tables
from kvstore.hints.refusal import is_name
from kvstore.journal import JOURNAL_BYTES, Journal, Record
from kvstore.policies import Chosen, Policies, Requeue, Tier
from kvstore.ports import Memory, Randomness
from kvstore.quotas import Choice, Quotas, choice_as_record
from kvstore.sessions import Namespace, Pool, Session, Tenant, nobody_hears
from kvstore.tables import Limits, index_buckets


class Registry:
    """All tenants, pools and namespaces of one store."""

    def __init__(
        self, limits: Limits, tables: Tables, arenas: Arenas, memory: Memory, randomness: Randomness,
        policies: Policies, quotas: Quotas, head: Record, forget: Callable[[int], None],
    ) -> None:  # fmt: skip
        """`head` is what the journal begins with; `forget` hears of a namespace whose number goes to another."""
        self.tenants: dict[str, Tenant] = {}
        self.pools: dict[tuple[Tenant, int], Pool] = {}  # by slot bytes
        self.namespaces: dict[tuple[Tenant, bytes], Namespace] = {}  # by digest
        self.by_number: dict[int, Namespace] = {}
        self._passing: dict[str, Tenant] = {}  # nothing was ever made for them: no pool, nothing said, in no journal
        self._heard: dict[str, Tenant] = {}  # nor for these, but they said something; the last heard of at the end
        self.forgotten: Callable[[Tenant], None] = nobody_hears  # `Guiding`, of one of these
        self._spare: list[tuple[int, U4]] = []  # numbers of such that were forgotten, and heads of their empty indexes
        self._configured = frozenset((*limits.tenants, *limits.quotas))
        self._restoring = True  # a former life's: it kept places itself, and its pools count on all of its tenants
        self._of: dict[Tenant, dict[int, Namespace]] = {}  # by number
        self._limits = limits
        self._tables = tables
        self._arenas = arenas
        self._memory = memory
        self._randomness = randomness
        self._policies = policies
        self._quotas = quotas
        self._head = head
        self._forget = forget
        self.disk_unknown_since = 0  # a generation; 0: what lies on disk is known, or the journal says nothing of it
        self._journal = Journal(memory.table("journal", JOURNAL_BYTES), self._everybody)

    # -- opening -------------------------------------------------------------------------------------------------

    def open(self, session: Session, identity: NamespaceIdentity) -> Namespace:
        """Open a namespace in a session. Raises UsageError for blocks beyond an arena, LimitError past the limits."""
        namespace = self._namespace(session.tenant, identity)
        if namespace.number not in session.namespaces:
            if len(session.namespaces) >= NAMESPACES_PER_SESSION:
                raise LimitError(f"more than {NAMESPACES_PER_SESSION} namespaces in a session")
            session.namespaces[namespace.number] = namespace
            namespace.sessions += 1
        return namespace

    def namespace(self, session: Session, number: int) -> Namespace:
        """The namespace a frame names. Raises NamespaceError unless this session opened it."""
        namespace = session.namespaces.get(number)
        if namespace is None:
            raise NamespaceError(f"namespace {number} was not opened in this session")
        return namespace

    def tenant(self, name: str, seeds: Sequence[int] = ()) -> Tenant:
        """A tenant by name; of a new one the index begins with these seeds, or with secret ones.

        Raises LimitError past the number of tenants.
        """
        tenant = self.tenants.get(name)
        if tenant is None:
            self._make_place(name)
            number, heads = self._spare.pop() if self._spare else self._new_number()
            seeds = seeds or (self._randomness.word(), self._randomness.word())
            shape = np.array([8, 0, 0, *seeds], dtype=np.uint64)
            tenant = self.tenants[name] = self._passing[name] = Tenant(name, number, Index(heads, shape))
            self._quotas.begin(tenant)
        return tenant

    def knows(self, name: str) -> bool:
        """Is a tenant of that name here, or did an operator choose something for it, whether it still fits or not?"""
        ruled = (choice.tenant for choice in self._policies.chosen())
        promised = (*self._quotas.chosen(), *self._quotas.forgotten)
        return name in self.tenants or name in ruled or any(one == name for one, _ in promised)

    def keep(self, tenant: Tenant) -> None:
        """Something is made for a tenant: its place is its own from now on, in successors too."""
        if (self._passing.pop(tenant.name, None) or self._heard.pop(tenant.name, None)) is not None:
            self._journal.add(_tenant_as_record(tenant))

    def heard(self, tenant: Tenant) -> None:
        """A tenant has said something."""
        if self._passing.pop(tenant.name, None) is not None or tenant.name in self._heard:
            self._heard.pop(tenant.name, None)
            self._heard[tenant.name] = tenant

    def unheard(self, tenant: Tenant) -> None:
        """Of what a tenant has said nothing is left."""
        if self._heard.pop(tenant.name, None) is not None:
            self._passing[tenant.name] = tenant

    def heard_before(self, name: str) -> Tenant | None:
        """A tenant that had said something in a former life; None if no place is free for it, or it cannot be one."""
        free = is_name(name) and len(self.tenants) + self._awaited(name) < TENANTS
        return self.tenants.get(name) or (self.tenant(name) if free else None)

    def _new_number(self) -> tuple[int, U4]:
        number = len(self.tenants)
        heads = self._memory.table(f"index-{number}", 4 * index_buckets(self._limits), lasting=False)
        return number, heads.view(np.uint32)

    def _make_place(self, name: str) -> None:
        """For one tenant more. Raises LimitError."""
        if len(self.tenants) + self._awaited(name) < TENANTS or (self._restoring and len(self.tenants) < TENANTS):
            return
        if self._restoring or not self._forget_passing():
            reason = " beside those that are configured" if self._awaited(name) else ""
            raise LimitError(f"more than {TENANTS} tenants{reason}")

    def _awaited(self, name: str = "") -> int:
        """How many configured tenants have not come yet, but for one of that name."""
        return sum(one not in self.tenants for one in self._configured if one != name)

    def _forget_passing(self) -> bool:
        """Forget a tenant for which nothing was ever made, and which has no session. False if there is none.

        Its number goes to another: no block, arena or ghost has ever borne it.
        """
        for tenant in (*self._passing.values(), *self._heard.values()):
            if not tenant.sessions and tenant.name not in self._configured:
                assert tenant.entries() + tenant.arenas + tenant.segments == 0, f"{tenant.name} has something"
                if self._passing.pop(tenant.name, None) is None:
                    del self._heard[tenant.name]
                    self.forgotten(tenant)
                del self.tenants[tenant.name]
                self._quotas.end(tenant)
                self._spare.append((tenant.number, tenant.index.heads))
                return True
        return False

    def pool(self, tenant: Tenant, slot_bytes: int) -> Pool:
        """The pool of a slot size. Raises LimitError past the limits."""
        pool = self.pools.get((tenant, slot_bytes))
        if pool is None:
            if sum(owner is tenant for owner, _ in self.pools) >= POOLS_PER_TENANT:
                raise LimitError(f"more than {POOLS_PER_TENANT} slot sizes of one tenant")
            self.keep(tenant)
            pool = self.pools[tenant, slot_bytes] = self._arenas.add_pool(tenant, slot_bytes)
            self._journal.add(["pool", tenant.name, slot_bytes])
        return pool

    def _namespace(self, tenant: Tenant, identity: NamespaceIdentity) -> Namespace:
        digest = identity.digest()
        return self.namespaces.get((tenant, digest)) or self._add_namespace(tenant, identity, digest)

    def _add_namespace(self, tenant: Tenant, identity: NamespaceIdentity, digest: NamespaceDigest) -> Namespace:
        slot_bytes = slot_bytes_for(identity.block_bytes)
        if slot_bytes > self._limits.arena_bytes:
            raise UsageError(
                f"block_bytes {identity.block_bytes} is more than an arena holds ({self._limits.arena_bytes})"
            )
        pool = self.pool(tenant, slot_bytes)
        return self._file(Namespace(self._free_number(tenant), tenant, identity, digest, slot_bytes, pool))

    def of(self, tenant: Tenant) -> list[Namespace]:
        """A tenant's namespaces, those that came first in front."""
        return list(self._of.get(tenant, {}).values())

    def _free_number(self, tenant: Tenant) -> int:
        """A number that no block bears; past the tenant's limit, that of a namespace nobody uses any more."""
        mine = self.of(tenant)
        if len(mine) < NAMESPACES_PER_TENANT:
            number = len(self.by_number) + 1
            while number in self.by_number:  # a former life may have left gaps
                number = number + 1 if number < NAMESPACES - 1 else 1
            return number
        for namespace in mine:
            if not namespace.sessions and not self._tables.census[namespace.number]:
                self._unfile(namespace)
                self._forget(namespace.number)
                return namespace.number
        raise LimitError(f"more than {NAMESPACES_PER_TENANT} namespaces of one tenant in use")

    def _file(self, namespace: Namespace) -> Namespace:
        self.namespaces[namespace.tenant, namespace.digest] = namespace
        self.by_number[namespace.number] = self._of.setdefault(namespace.tenant, {})[namespace.number] = namespace
        self._journal.add(_as_record(namespace))
        return namespace

    def _unfile(self, namespace: Namespace) -> None:
        """Its number is about to be another one's."""
        del self.namespaces[namespace.tenant, namespace.digest]
        del self._of[namespace.tenant][namespace.number]

    # -- what a former life, or a disk, knows of -----------------------------------------------------------------

    def known_tenant(self, name: str) -> Tenant | None:
        """A tenant that somebody left something of; None if there are too many."""
        try:
            tenant = self.tenant(name)
        except LimitError:
            return None
        self.keep(tenant)
        return tenant

    def restore_tenant(self, name: str, seeds: Sequence[int]) -> None:
        """A tenant of the former life; what its ghosts lie by goes on, if it was written down."""
        whole = len(seeds) == 2 and all(0 <= seed < 1 << 64 for seed in seeds)
        with suppress(LimitError):
            self.tenant(name, seeds if whole else ())

    def known_namespace(self, tenant_name: str, identity: NamespaceIdentity) -> Namespace | None:
        """A namespace that somebody left something of; None if it does not fit any more."""
        tenant = self.known_tenant(tenant_name)
        if tenant is None:
            return None
        try:
            return self._namespace(tenant, identity)
        except KvError:
            return None

    def restore_namespace(self, tenant: Tenant, identity: NamespaceIdentity, number: int) -> None:
        """A namespace of the former life, with the number that its rows bear. Raises KvError."""
        digest, slot_bytes = identity.digest(), slot_bytes_for(identity.block_bytes)
        if not 1 <= number < NAMESPACES:
            raise LimitError(f"namespace {number}")
        former = self.by_number.get(number)
        if former is not None:  # its number was given to another one later
            self._unfile(former)
        self._file(Namespace(number, tenant, identity, digest, slot_bytes, self.pool(tenant, slot_bytes)))

    # -- rules and quotas ----------------------------------------------------------------------------------------

    def choose_rule(self, chosen: Chosen) -> list[Requeue]:
        """A rule chosen at run time: a successor goes by it too. Returns the work that puts blocks in order."""
        work = self._policies.choose(chosen, self._arenas.by_number.values())
        self._journal.add(_rule_as_record(chosen))
        return work

    def reset_rule(self, tier: Tier, tenant: str | None) -> list[Requeue]:
        """A choice of a rule is over, for successors too. Returns work as `choose_rule`."""
        work = self._policies.reset(tier, tenant, self._arenas.by_number.values())
        self._journal.add(["rule", tier.value, tenant or "", ""])
        return work

    def choose_quota(self, tenant: str, choice: Choice) -> None:
        """What of a quota is chosen at run time, or (empty) the end of such a choice: a successor goes by it too.

        Raises QuotaError.
        """
        self._quotas.choose(tenant, choice)
        self._journal.add(choice_as_record(tenant, choice))

    def restore_quota(self, tenant: str, choice: Choice) -> None:
        """One that a former life chose; it holds from `settle` on."""
        self._quotas.restore(tenant, choice)

    def settle(self) -> None:
        """All whom the former life knew are known, and all that it chose."""
        self._quotas.settle()
        self._restoring = False
        while len(self.tenants) + self._awaited() > TENANTS and self._forget_passing():
            pass  # of an earlier version: it kept no places, and wrote down who only came and went

    # -- the journal ---------------------------------------------------------------------------------------------

    def note_disk(self, unknown_since: int) -> None:
        """Blocks of this generation and later were stored while nobody knew what lies on disk; 0: it is known now."""
        self.disk_unknown_since = unknown_since
        self._journal.add(_disk_as_record(unknown_since))

    def begin_with(self, head: Record) -> None:
        """The journal begins with something else from now on."""
        self._head = head
        self.begin_journal()

    def begin_journal(self) -> None:
        """Whatever the former life said is over: say everybody anew."""
        self._restoring = False
        self._journal.begin(self._everybody())

    def _everybody(self) -> list[Record]:
        """Disk, rules, quotas, then tenants, pools and namespaces, in the order in which they got their numbers. Of a
        tenant that only came and went, or said something, nothing is said.
        """
        records: list[Record] = [self._head, _disk_as_record(self.disk_unknown_since)]
        records += map(_rule_as_record, self._policies.chosen())
        records += [choice_as_record(name, choice) for name, choice in self._quotas.chosen()]
        light = self._passing.keys() | self._heard.keys()
        records += [_tenant_as_record(one) for one in self.tenants.values() if one.name not in light]
        records += [["pool", pool.tenant.name, pool.slot_bytes] for pool in self._arenas.pools]
        records += [_as_record(self.by_number[number]) for number in sorted(self.by_number)]
        return records


def _disk_as_record(unknown_since: int) -> Record:
    return ["disk", unknown_since]


def _tenant_as_record(tenant: Tenant) -> Record:
    """With the seeds of its index: what is remembered of its evicted blocks lies where these say."""
    return ["tenant", tenant.name, *map(int, tenant.index.shape[3:5])]


def _as_record(namespace: Namespace) -> Record:
    return ["namespace", namespace.number, namespace.tenant.name, namespace.identity.canonical().hex()]


def _rule_as_record(chosen: Chosen) -> Record:
    return ["rule", chosen.tier.value, chosen.tenant or "", chosen.rule.value]
