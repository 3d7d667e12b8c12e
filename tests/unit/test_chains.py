"""The tree of hinted chains against a list of them."""

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from kvproto.ids import BlockKey, NamespaceNumber
from kvstore.hints.chains import Chain, Chains, Mark, mark_of, marks_of
from kvstore.hints.refusal import Refusal, Refused

NAMESPACE = NamespaceNumber(3)
OTHER = NamespaceNumber(4)


def key(name: str) -> BlockKey:
    return BlockKey(hashlib.sha256(name.encode()).digest())


def chain(path: str, namespace: NamespaceNumber = NAMESPACE) -> Chain:
    """A block for each letter, named by all letters up to it: paths that begin alike share blocks."""
    return Chain.of(namespace, [key(path[: n + 1]) for n in range(len(path))])


PATHS = st.text("ab", min_size=1, max_size=6)
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PATHS, st.none() | st.integers(0, 4)),
        st.tuples(st.just("drop"), st.integers(0, 9), st.none()),
        st.tuples(st.just("change"), st.integers(0, 9), st.none() | st.integers(0, 4)),
    ),
    max_size=40,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(moves=MOVES)
def test_a_block_is_worth_the_least_of_all_chains_through_it(moves: list[tuple[str, str | int, int | None]]) -> None:
    chains = Chains()
    named: list[tuple[str, Mark, int | None]] = []
    for verb, what, value in moves:
        if isinstance(what, str):
            end = chains.add(chain(what))
            assert not isinstance(end, Refused)
            chains.change([(end, None, value)])
            named.append((what, end, value))
        elif named:
            path, end, old = named.pop(what % len(named))
            chains.change([(end, old, value)])
            if verb == "drop":
                chains.change([(end, value, None)])
                chains.drop(end)
            else:
                named.append((path, end, value))
        paths = {path[: n + 1] for path, _, _ in named for n in range(len(path))}
        assert (chains.blocks, chains.ends) == (len(paths), len(named))
        assert all(chains.chain(end) == chain(path) for path, end, _ in named)
        for path in paths:
            through = [value for other, _, value in named if other.startswith(path) and value is not None]
            assert chains.least(mark_of(NAMESPACE, key(path))) == min(through, default=None)
    assert chains.least(mark_of(NAMESPACE, key("no path"))) is None


def test_keys_of_another_namespace_are_other_blocks() -> None:
    chains = Chains()
    end = chains.add(chain("ab"))
    assert not isinstance(end, Refused)
    chains.change([(end, None, 2)])
    assert chains.least(mark_of(NAMESPACE, key("ab"))) == 2
    assert chains.least(mark_of(OTHER, key("ab"))) is None
    assert chains.add(chain("ab", OTHER)) != end
    assert chains.blocks == 4


def test_marks_of_a_chain_are_the_marks_of_its_keys() -> None:
    for namespace in (NAMESPACE, OTHER, NamespaceNumber(64_000)):
        assert marks_of(chain("abc", namespace)) == [mark_of(namespace, key(path)) for path in ("a", "ab", "abc")]


def test_keys_that_do_not_continue_each_other_are_refused_and_nothing_changes() -> None:
    chains = Chains()
    end = chains.add(chain("abc"))
    good = [key(path) for path in ("a", "ab", "abc")]
    for keys in ([good[1]], [key("x"), good[1]], [good[0], good[2]], [key("x"), key("x")], [good[0], good[0]]):
        assert chains.add(Chain.of(NAMESPACE, keys)) == Refused(Refusal.NO_CHAIN)
    assert (chains.blocks, chains.ends) == (3, 1)
    assert chains.add(chain("abc")) == end


def test_no_more_blocks_or_chains_are_named_than_a_tenant_may() -> None:
    chains = Chains(most_blocks=4, most_ends=3)
    assert not isinstance(chains.add(chain("abc")), Refused)
    assert chains.add(chain("xy")) == Refused(Refusal.FULL)
    assert not isinstance(chains.add(chain("abcd")), Refused)
    assert not isinstance(chains.add(chain("ab")), Refused)
    assert chains.add(chain("ab")) == Refused(Refusal.FULL)
    assert (chains.blocks, chains.ends) == (4, 3)
