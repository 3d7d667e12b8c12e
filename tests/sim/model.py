"""What must be true of every value, kept apart from the store: who wrote it, under which key, until when it counts.

A generation is one block from the grant of its ticket on. The model follows the answers of RESERVE, the ends of
copies, and what was deleted; it does not know what is evicted, so a miss is always allowed and a hit never is unless

    - its generation is the latest of its key, in its tenant and namespace, and was published;
    - neither it nor what it continues was deleted or failed before, so far as the store has said that this is done;
    - its bytes are those that the copy left.

A store that dies leaves what lies on disk. Its successor may bring back any generation that was published and whose
end was not answered, or whose header could not be overwritten, an older one too; from the first look on that one is the
latest of its key. The number that the store gave a generation tells which it is: `Model.look` asks for it, and the
bytes prove it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvproto.errors import Grant
from kvstore.sessions import Namespace

Name = tuple[str, bytes, bytes]  # tenant, digest of the namespace, key


@dataclass(slots=True, eq=False)
class Generation:
    """One value of one key."""

    name: Name
    parent: "Generation | None"
    life: int  # of the store that it was written to
    content: bytes = b""  # what its writer means to store, then what was published
    published: bool = False
    dead: bool = False  # deleted, failed or lapsed: out of the index
    ending: bool = False  # somebody has asked for its end
    swept: bool = False  # and so is all that continues it
    number: int = 0  # that the store gave it when it was published
    durable: bool = False  # FLUSH has said so
    harmed: bool = False  # its copy on disk was damaged, or lost with its segment
    unerased: bool = False  # overwriting its header failed: the one way in which what was dropped may come back
    children: list["Generation"] = field(default_factory=list)

    def swept_above(self) -> bool:
        """Was it, or anything that it continues, dropped for good?"""
        at: Generation | None = self
        while at is not None:
            if at.swept:
                return True
            at = at.parent
        return False

    def ending_above(self) -> bool:
        """Has somebody asked for its end, or for that of anything that it continues?"""
        at: Generation | None = self
        while at is not None and not at.ending:
            at = at.parent
        return at is not None

    def family(self) -> list["Generation"]:
        """Itself and all that continues it."""
        found, i = [self], 0
        while i < len(found):
            found += found[i].children
            i += 1
        return found


def name_of(namespace: Namespace, key: bytes) -> Name:
    """What stands for a key in every life."""
    return namespace.tenant.name, namespace.digest, key


class Model:
    """The latest generation of every key of every namespace, and all that were ever published."""

    def __init__(self) -> None:
        self.life = 0
        self.latest: dict[Name, Generation] = {}
        self.published: dict[int, Generation] = {}  # by the store's number
        self.named: dict[Name, list[Generation]] = {}  # all of them, by name
        self.look: Callable[[Namespace, bytes], int] = lambda _namespace, _key: 0  # number of a live block, or 0
        self._over: list[Generation] = []

    # -- what happens --------------------------------------------------------------------------------------------

    def is_over(self, generations: list[Generation]) -> None:
        """A delete or a clear is answered. It counts from the next event on: RESERVE may have said KNOWN just before
        it made room, and with that brought the answer about.
        """
        self._over += generations

    def next_event(self) -> None:
        """What was answered in the last event is over for good."""
        for generation in self._over:
            generation.dead = generation.swept = True
        self._over.clear()

    def publish(self, generation: Generation, number: int) -> None:
        """A block became visible."""
        assert number not in self.published, "a generation is given twice"
        generation.published, generation.number = True, number
        self.published[number] = generation

    def crash(self) -> None:
        """The store is gone. What was not published never will be, and what was being dropped may come back."""
        self.next_event()
        self.life += 1
        self.latest.clear()
        for generation in self.published.values():
            generation.dead = generation.swept
            generation.harmed |= generation.ending  # its header may be gone already

    # -- what is known -------------------------------------------------------------------------------------------

    def find(self, namespace: Namespace, key: bytes) -> Generation | None:
        """The latest generation of a key; one that a former life left if this one has none."""
        name = name_of(namespace, key)
        if name not in self.latest:
            number = self.look(namespace, key)
            if number:
                self.latest[name] = self._former(name, number)
        return self.latest.get(name)

    def _former(self, name: Name, number: int) -> Generation:
        found = self.published.get(number)
        assert found is not None, "a block that was never published"
        assert found in self.named[name], "a block of another key"
        return found

    def reserved(
        self, namespace: Namespace, parent: bytes | None, keys: list[bytes], grants: list[Grant]
    ) -> list[Generation | None]:
        """Follow the answers of RESERVE: new generations for what was granted."""
        made: list[Generation | None] = []
        before = self.find(namespace, parent) if parent is not None else None
        for key, grant in zip(keys, grants, strict=True):
            known = self.find(namespace, key)
            if grant is Grant.KNOWN:
                known = self.known(namespace, key) if known is not None else self._swept_meanwhile(namespace, key)
            if grant is Grant.PENDING:
                assert known is not None, "PENDING, and nobody writes it"
                assert not known.published, "PENDING, and published"
                # It may be dead: the tickets of a closed session end slice by slice.
            new = None
            if grant is Grant.GRANTED:
                above = before if before is not None and not self.lingers(before) else None
                name = name_of(namespace, key)
                new = Generation(name, above, self.life)
                if above is not None:
                    above.children.append(new)
                self.latest[name] = new
                self.named.setdefault(name, []).append(new)
            if grant in (Grant.GRANTED, Grant.KNOWN, Grant.PENDING):
                before = new or known
            made.append(new)
        return made

    def _swept_meanwhile(self, namespace: Namespace, key: bytes) -> Generation:
        """What RESERVE has said KNOWN of and nobody had looked for in this life: it made room then, and with that went
        on sweeping what was dropped above it.
        """
        left = [
            generation
            for generation in self.named.get(name_of(namespace, key), ())
            if generation.life < self.life and generation.published and generation.ending_above()
        ]
        assert left, "a hit on a key that this tenant never stored"
        return left[-1]

    def lingers(self, generation: Generation) -> bool:
        """Is it one whose end was answered in a former life? The index may know it still: reading it will fail."""
        return generation.life < self.life and generation.swept_above()

    def known(self, namespace: Namespace, key: bytes) -> Generation:
        """The generation that the store may say is there, without showing its bytes."""
        found = self.find(namespace, key)
        number = self.look(namespace, key)
        if found is not None and number and number != found.number:  # disk was opened since it was evicted
            found = self._former(name_of(namespace, key), number)
            assert found.life < self.life, "an older block of this life came back"
            self.latest[name_of(namespace, key)] = found
        assert found is not None, "a hit on a key that this tenant never stored"
        assert found.published, "a hit on a block that was never published"
        if not self.lingers(found):
            assert not found.dead, "a hit on a block that was dropped"
            assert not found.swept_above(), "a hit on a block whose parent was dropped for good"
        return found

    def hit(self, namespace: Namespace, key: bytes) -> Generation:
        """The generation that a hit on this key is allowed to return now."""
        found = self.known(namespace, key)
        assert found.unerased or not self.lingers(found), "what was dropped in a former life is back"
        return found

    def leased(self, namespace: Namespace, key: bytes, number: int) -> Generation:
        """A generation that was there when a lease was granted: another one may have the key by now."""
        found = self._former(name_of(namespace, key), number)
        assert found.unerased or not self.lingers(found), "what was dropped in a former life is back"
        return found

    # -- what is dropped -----------------------------------------------------------------------------------------

    def dropped(self, namespace: Namespace, keys: list[bytes], *, opening: bool) -> list[Generation]:
        """DELETE begins: these keys never hit again; what lies on a disk that is still opening, once it is answered.
        Returns what will be swept then: evicted blocks too, which may still lie on disk.
        """
        names = [name_of(namespace, key) for key in keys]
        tops = [generation for name in names for generation in self.named.get(name, ()) if not generation.dead]
        for top in tops:
            top.ending = True
            top.dead = not opening or top.life == self.life
        return tops

    def cleared(self, namespaces: list[Namespace], keys: list[bytes] | None) -> list[Generation]:
        """CLEAR begins: what will be gone when it is answered."""
        scopes = {(namespace.tenant.name, namespace.digest) for namespace in namespaces}
        tops = [
            generation
            for (tenant, digest, key), generations in self.named.items()
            if (tenant, digest) in scopes and (keys is None or key in keys)
            for generation in generations
            if not generation.dead
        ]
        family = [member for top in tops for member in top.family()]
        for member in family:
            member.ending = True
        return family
