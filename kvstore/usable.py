"""Which blocks an engine can use: those that all of its ranks have, for who is told of hashes and not of namespaces.

    namespaces of one tenant, told under one name (a model)
      form: all of an identity but its ranks --> a block is in a tier for it where each rank that is known here has it
      another layout, codec, adapter ... ------> another form: a block is there for the name if it is for one of them

Ranks store the same chain of keys into one namespace each, and what one of them lacks is no use to any. Consumers of
vLLM's events keep sets of hashes, or count: told once for each rank, a hash would be gone for the former when the first
rank loses it, and there for the latter until the last one does. Which ranks there are is known by who has opened a
namespace, or left blocks in it. Owner thread.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvproto.identity import NamespaceIdentity
from kvproto.limits import NAMESPACES
from kvstore.blocks import U4, Rows, compiled
from kvstore.registry import Registry
from kvstore.sessions import Namespace, Tenant

Number: TypeAlias = Any

# Of a namespace. `owner` is that of its number, whichever namespace bears it; of one that is unknown `ranks` is 0.
KIN: Final = np.dtype([("owner", "<u4"), ("name", "<u4"), ("form", "<u4"), ("ranks", "<u4")])
Kin: TypeAlias = npt.NDArray[np.void]


@compiled
def usable(
    told: Rows, first: Number, epochs: U4, kin: Kin, namespace: Number, key: Number, was: Number, now: Number
) -> tuple[Number, Number, Number]:
    """In which tiers a block is and was for its name, where in a namespace of it `was` became `now`; and how many rows
    were looked at. `first`: of the chain in which all of this key's rows are.
    """
    form, name, ranks = kin[namespace]["form"], kin[namespace]["name"], kin[namespace]["ranks"]
    mates_dram = mates_disk = np.int64(1)
    others = np.uint8(0)
    steps = 0
    at = first
    while at:
        one = told[at]
        of = np.int64(one["namespace"])
        if of != namespace and _same(one, key) and one["epoch"] == epochs[of]:
            if kin[of]["form"] == form:
                mates_dram += np.int64(one["tiers"] & 1)
                mates_disk += np.int64(one["tiers"] >> 1 & 1)
            elif kin[of]["name"] == name:
                theirs, more = _whole(told, first, epochs, kin, kin[of]["form"], kin[of]["ranks"], key)
                others |= theirs
                steps += more
        at = np.int64(one["next"])
        steps += 1
    whole = np.uint8(mates_dram == ranks) | np.uint8(mates_disk == ranks) << 1
    return np.uint8(was & whole | others), np.uint8(now & whole | others), steps


@compiled
def _same(one: Number, key: Number) -> Number:
    its = one["key"]
    return its[0] == key[0] and its[1] == key[1] and its[2] == key[2] and its[3] == key[3]


@compiled
def _whole(
    told: Rows, first: Number, epochs: U4, kin: Kin, form: Number, ranks: Number, key: Number
) -> tuple[Number, Number]:
    """In which tiers all ranks of a form have a block; and how many rows were looked at."""
    dram = disk = np.int64(0)
    steps = 0
    at = first
    while at:
        one = told[at]
        of = np.int64(one["namespace"])
        if kin[of]["form"] == form and _same(one, key) and one["epoch"] == epochs[of]:
            dram += np.int64(one["tiers"] & 1)
            disk += np.int64(one["tiers"] >> 1 & 1)
        at = np.int64(one["next"])
        steps += 1
    return np.uint8(dram == ranks) | np.uint8(disk == ranks) << 1, steps


@dataclass(slots=True, eq=False)
class _Form:
    """Its ranks, by numbers of their namespaces."""

    number: int
    ranks: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Name:
    """What is told of under one name."""

    number: int
    forms: dict[NamespaceIdentity, _Form] = field(default_factory=dict)


class Forms:
    """Of all namespaces of one daemon."""

    def __init__(self, registry: Registry, *, by_model: bool = True) -> None:
        """`by_model`: each model of a tenant is told under a name of its own; else all have one."""
        self.kin: Kin = np.zeros(NAMESPACES, dtype=KIN)
        self._registry = registry
        self._by_model = by_model
        self._seen = 0  # of the registry's numbers
        self._again: set[int] = set()  # numbers that go to another namespace
        self._owners: dict[str, int] = {}
        self._names: dict[tuple[str, str], _Name] = {}
        self._known: dict[int, Namespace] = {}
        self._last = 0
        self._most = 1

    def learn(self, told: Callable[[int], object]) -> set[Tenant]:
        """Take in namespaces that came since the last time: mostly none.

        Returns tenants of whom blocks that were `told` (of a number: are there any?) are not usable as they were, since
        another rank of theirs has come.
        """
        if len(self._registry.by_number) == self._seen and not self._again:
            return set()
        came = [*self._again]
        if len(self._registry.by_number) > self._seen:
            came += islice(self._registry.by_number, self._seen, None)
        self._seen = len(self._registry.by_number)
        self._again.clear()
        other = set()
        for number in came:
            namespace = self._registry.by_number[number]
            if self._registry.namespaces.get((namespace.tenant, namespace.digest)) is not namespace:
                self._again.add(number)  # between two namespaces
                continue
            ranks = self._joined(number, namespace)
            if any(told(one) for one in ranks if one != number):
                other.add(namespace.tenant)
        return other

    def leave(self, number: int) -> list[int]:
        """A namespace gives its number to another one. Returns the numbers of the other ranks of its form."""
        namespace = self._known.pop(number, None)
        if namespace is None:
            return []
        self._again.add(number)
        name = self._names[self._name_of(namespace)]
        form = name.forms[_form_of(namespace.identity)]
        form.ranks.remove(number)
        self.kin[number]["name"] = self.kin[number]["form"] = self.kin[number]["ranks"] = 0
        self.kin["ranks"][form.ranks] = len(form.ranks)
        if not form.ranks:
            del name.forms[_form_of(namespace.identity)]
        if not name.forms:
            del self._names[self._name_of(namespace)]
        return form.ranks

    @property
    def most(self) -> int:
        """How many namespaces there are under one name, at most."""
        return self._most

    def mates(self, number: int) -> list[int]:
        """Numbers of the other ranks of its form."""
        namespace = self._known.get(number)
        if namespace is None:
            return []
        ranks = self._names[self._name_of(namespace)].forms[_form_of(namespace.identity)].ranks
        return [one for one in ranks if one != number]

    def others(self, number: int) -> Iterator[list[int]]:
        """Ranks of each other form under its name, by their numbers."""
        namespace = self._known.get(number)
        if namespace is not None:
            for form in self._names[self._name_of(namespace)].forms.values():
                if number not in form.ranks:
                    yield form.ranks

    def _joined(self, number: int, namespace: Namespace) -> list[int]:
        """All ranks of its form."""
        owner = self._owners.setdefault(namespace.tenant.name, len(self._owners) + 1)
        name = self._names.get(self._name_of(namespace))
        if name is None:
            name = self._names[self._name_of(namespace)] = _Name(self._next())
        form = name.forms.setdefault(_form_of(namespace.identity), _Form(0))
        form.number = form.number or self._next()
        form.ranks.append(number)
        self._known[number] = namespace
        self._most = max(self._most, sum(len(one.ranks) for one in name.forms.values()))
        self.kin[number] = owner, name.number, form.number, 0
        self.kin["ranks"][form.ranks] = len(form.ranks)
        return form.ranks

    def _name_of(self, namespace: Namespace) -> tuple[str, str]:
        return namespace.tenant.name, namespace.identity.model if self._by_model else ""

    def _next(self) -> int:
        self._last += 1
        return self._last


def _form_of(identity: NamespaceIdentity) -> NamespaceIdentity:
    return replace(identity, tp_rank=0, pp_rank=0)
