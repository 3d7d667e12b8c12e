"""What must be true of every value, kept apart from the store: who wrote it, under which key, until when it counts.

A generation is one block from the grant of its ticket on. The model follows the answers of RESERVE, the ends of
copies, and what was deleted; it does not know what is evicted, so a miss is always allowed and a hit never is unless

    - its generation is the latest of its key, in its tenant and namespace, and was published;
    - neither it nor what it continues was deleted or failed before, so far as the store has said that this is done;
    - its bytes are those that the copy left.
"""

from dataclasses import dataclass, field

from kvproto.errors import Grant
from kvstore.sessions import Namespace


@dataclass(slots=True, eq=False)
class Generation:
    """One value of one key."""

    key: bytes
    parent: "Generation | None"
    content: bytes = b""  # what its writer means to store, then what was published
    published: bool = False
    dead: bool = False  # deleted, failed or lapsed: out of the index
    swept: bool = False  # and so is all that continues it
    children: list["Generation"] = field(default_factory=list)

    def swept_above(self) -> bool:
        """Was it, or anything that it continues, dropped for good?"""
        at: Generation | None = self
        while at is not None:
            if at.swept:
                return True
            at = at.parent
        return False

    def family(self) -> list["Generation"]:
        """Itself and all that continues it."""
        found, i = [self], 0
        while i < len(found):
            found += found[i].children
            i += 1
        return found


class Model:
    """The latest generation of every key of every namespace."""

    def __init__(self) -> None:
        self.latest: dict[tuple[int, bytes], Generation] = {}
        self._over: list[Generation] = []

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

    def find(self, namespace: Namespace, key: bytes) -> Generation | None:
        """The latest generation of a key."""
        return self.latest.get((namespace.number, key))

    def reserved(
        self, namespace: Namespace, parent: bytes | None, keys: list[bytes], grants: list[Grant]
    ) -> list[Generation | None]:
        """Follow the answers of RESERVE: new generations for what was granted."""
        made: list[Generation | None] = []
        before = self.find(namespace, parent) if parent is not None else None
        for key, grant in zip(keys, grants, strict=True):
            known = self.find(namespace, key)
            if grant is Grant.KNOWN:
                assert known is not None, "KNOWN, and never stored"
                assert known.published, "KNOWN, and never published"
                assert not known.dead, "KNOWN after it was dropped"
                assert not known.swept_above(), "KNOWN after what it continues was dropped"
            if grant is Grant.PENDING:
                assert known is not None, "PENDING, and nobody writes it"
                assert not known.published, "PENDING, and published"
                # It may be dead: the tickets of a closed session end slice by slice.
            new = None
            if grant is Grant.GRANTED:
                new = Generation(key, before)
                if before is not None:
                    before.children.append(new)
                self.latest[namespace.number, key] = new
            if grant in (Grant.GRANTED, Grant.KNOWN, Grant.PENDING):
                before = new or known
            made.append(new)
        return made

    def hit(self, namespace: Namespace, key: bytes) -> Generation:
        """The generation that a hit on this key is allowed to return now."""
        found = self.find(namespace, key)
        assert found is not None, "a hit on a key that this tenant never stored"
        assert found.published, "a hit on a block that was never published"
        assert not found.dead, "a hit on a block that was dropped"
        assert not found.swept_above(), "a hit on a block whose parent was dropped for good"
        return found

    def dropped(self, namespace: Namespace, keys: list[bytes]) -> list[Generation]:
        """DELETE begins: these keys never hit again. Returns what will be swept when it is answered."""
        tops = [found for key in keys if (found := self.find(namespace, key)) is not None and not found.dead]
        for top in tops:
            top.dead = True
        return tops

    def cleared(self, namespaces: list[Namespace], keys: list[bytes] | None) -> list[Generation]:
        """CLEAR begins: what will be gone when it is answered."""
        numbers = {namespace.number for namespace in namespaces}
        tops = [
            generation
            for (number, key), generation in self.latest.items()
            if number in numbers and (keys is None or key in keys) and not generation.dead
        ]
        return [member for top in tops for member in top.family()]
