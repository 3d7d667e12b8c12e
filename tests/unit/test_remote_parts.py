"""Small parts of the remote tier: names and headers, breakers, addresses and settings."""

from dataclasses import replace
from random import Random

import pytest

from kvproto.limits import GIB
from kvstore.tier.format import FormatError
from kvstore.tier.remote_breaker import FAILURES, FIRST_NS, LONGEST_NS, Breaker, Circuit
from kvstore.tier.remote_format import (
    HEADER_BYTES,
    NO_PARENT,
    OBJECT_BLOCKS,
    ObjectHeader,
    Place,
    marks_in,
    name_of,
    pack_header,
    parse_header,
    tenant_digest,
)
from kvstore.tier.remote_index import RUNS, Known, Run
from kvstored import remote_address
from kvstored.config import Config, ConfigError, load
from kvstored.remote_port import NAME_BYTES
from tests.core import chain, key_of

PLACE = Place(tenant_digest("t"), key_of("namespace"))


def header(count: int) -> ObjectHeader:
    return ObjectHeader(PLACE, key_of("parent"), tuple(chain(count)), tuple(range(count)), 4096)


@pytest.mark.parametrize("count", [1, 2, OBJECT_BLOCKS])
def test_headers_come_back_and_no_damaged_one_does(count: int) -> None:
    page = pack_header(header(count))
    assert parse_header(page) == header(count)
    assert parse_header(page) != replace(header(count), parent=NO_PARENT)
    random = Random(8)
    for _ in range(200):
        changed = bytearray(page)
        changed[random.randrange(HEADER_BYTES)] ^= 1 << random.randrange(8)
        with pytest.raises(FormatError):
            parse_header(bytes(changed))
    for junk in (b"", page[:-1], page + b"x", bytes(HEADER_BYTES), random.randbytes(HEADER_BYTES)):
        with pytest.raises(FormatError):
            parse_header(junk)


def test_names_fit_say_how_long_a_run_is_and_tell_tenants_apart() -> None:
    keys = chain(OBJECT_BLOCKS)
    name = name_of(PLACE, keys)
    assert len(name) + remote_address.PREFIX_BYTES < NAME_BYTES
    marks = marks_in(name, name[: name.rfind("/") + 1])
    assert marks is not None
    assert len(marks) == OBJECT_BLOCKS - 1
    other = name_of(Place(tenant_digest("u"), PLACE.namespace), keys)
    assert name.rsplit("/", 1)[1] == other.rsplit("/", 1)[1]
    assert name.split("/")[1] != other.split("/")[1]
    assert name_of(PLACE, keys[:1]).endswith("/1.")


@pytest.mark.parametrize("last", ["2.a\nb", "2.a\x1bb", "2.a/b", "2.\u00e9aa", "2.ab", "2.abcd", "02.abc", "0."])
def test_names_that_are_not_ours_are_nobodys(last: str) -> None:
    assert marks_in(f"p/{last}", "p/") is None
    assert marks_in("p/2.a-_", "p/") == ("a-_",)


def test_what_is_known_is_bounded_and_gets_old() -> None:
    known = Known()
    for number in range(RUNS + 10):
        known.add(f"{number}/", Run(f"{number}/1.", (), 1), 0)
    assert len(known) == RUNS
    assert known.runs("0/", 0) is None
    assert known.runs(f"{RUNS}/", 0)
    assert known.runs(f"{RUNS}/", 1 << 60) is None
    known.learn("none/", [], 0)
    assert known.runs("none/", 0) == ()
    assert known.runs("none/", 30 * 10**9) is None


def test_a_breaker_opens_tries_one_call_and_waits_twice_as_long() -> None:
    breaker, now_ns = Breaker(), 0
    for _ in range(FAILURES):
        assert breaker.allow(now_ns)
        breaker.bad("down", now_ns)
    wait_ns = FIRST_NS
    for _ in range(8):
        assert breaker.state is Circuit.OPEN
        assert breaker.until_ns == now_ns + wait_ns
        assert not breaker.allow(breaker.until_ns - 1)
        now_ns = breaker.until_ns
        assert breaker.allow(now_ns)
        assert not breaker.allow(now_ns), "one at a time"
        breaker.bad("down", now_ns)
        wait_ns = min(2 * wait_ns, LONGEST_NS)
    assert breaker.allow(breaker.until_ns)
    breaker.good()
    assert breaker.allow(0)
    assert not breaker.reason


def configured(*settings: str) -> Config:
    flags = dict(setting.split("=", 1) for setting in settings)
    return load(None, {"HOME": "/root"}, {"--runtime-dir": "/run/kv", **flags}, memory_bytes=8 * GIB).config


def test_it_is_off_by_default_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured().remote_address() is None
    whole = ("--remote=s3://bucket/a/b", "--remote-size=1GiB")
    address = configured(*whole, "--remote-endpoint=http://127.0.0.1:9000", "--remote-region=eu-1").remote_address()
    assert address is not None
    assert (address.bucket, address.prefix, address.endpoint) == ("bucket", "a/b", "http://127.0.0.1:9000")
    for wrong in (
        ("--remote=s3://bucket",),
        ("--remote-size=1GiB",),
        ("--remote=http://bucket", "--remote-size=1GiB"),
        ("--remote=s3://bucket/../x", "--remote-size=1GiB"),
        ("--remote=s3://key:secret@bucket", "--remote-size=1GiB"),
        (*whole, "--remote-endpoint=http://a:b@host"),
        (*whole, "--remote-endpoint=ftp://host"),
    ):
        with pytest.raises(ConfigError) as told:
            configured(*wrong)
        assert "remote" in str(told.value), wrong
    monkeypatch.setattr(remote_address, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="obstore is missing: pip install"):
        configured(*whole)


def test_the_bytes_of_a_header_are_those_of_version_one() -> None:
    """Other hosts have written such objects: whoever changes this makes another version."""
    page = pack_header(header(2))
    assert page[:12] == b"KVREMOTE\x01\0\0\0"
    assert page[-8:].hex() == "c43e3e017e4fc118"
