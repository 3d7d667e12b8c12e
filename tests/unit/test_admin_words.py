"""What the audit file and events say of an act: the words of a command line that would do it."""

import pytest

from kvctl import quotas
from kvproto import control_pb2 as pb
from kvproto.limits import GIB, MIB
from kvstored.admin_audit import SCOPE_LETTERS
from kvstored.admin_gate import _ACTS
from kvstored.admin_words import verb_of, words_of

DIGEST = "abcdef01" * 8
EVERYTHING = pb.ClearRequest.Everything()
PREFIX = pb.ClearRequest.Prefix(namespace_digest=DIGEST, keys=[b"k" * 32, b"l" * 32])
CHAIN = pb.Prefix(tenant="chat", namespace_digest=DIGEST, keys=[b"k" * 32])
SAID = [
    ("Clear", pb.ClearRequest(everything=EVERYTHING), "clear", "--all"),
    ("Clear", pb.ClearRequest(everything=EVERYTHING, tenant="chat"), "clear", "--tenant chat"),
    ("Clear", pb.ClearRequest(prefix=PREFIX), "clear", "--namespace abcdef01abcd (2 keys)"),
    (
        "Evict", pb.EvictRequest(namespace_digest=DIGEST, tier="disk", bytes=4 * GIB), "evict",
        "--namespace abcdef01abcd --tier disk --bytes 4GiB",
    ),
    ("Evict", pb.EvictRequest(everything=EVERYTHING), "evict", "--all --tier dram"),
    ("Drain", pb.DrainRequest(), "drain", ""),
    ("Undrain", pb.UndrainRequest(), "undrain", ""),
    ("Scrub", pb.ScrubRequest(start=True, rate_bytes_per_s=100 * MIB), "scrub", "--tier disk --rate 100MiB"),
    ("SetPolicy", pb.SetPolicyRequest(rule="lru"), "policy set", "lru"),
    (
        "SetPolicy", pb.SetPolicyRequest(rule="arc", tier="dram", tenant="chat"), "policy set",
        "arc --tier dram --tenant chat",
    ),
    ("SetPolicy", pb.SetPolicyRequest(reset=True, tenant="chat", tier="disk"), "policy reset", "chat --tier disk"),
    ("SetQuota", pb.SetQuotaRequest(tenant="chat", reset=True), "quota reset", "chat"),
    ("SetQuota", pb.SetQuotaRequest(tenant="chat", configured=["dram_max_bytes", "in_flight_max"]), "quota reset",
     "chat dram_max in_flight"),
    (
        "SetQuota",
        pb.SetQuotaRequest(tenant="chat", dram_max_bytes=48 * GIB, in_flight_max=7, usual=["disk_max_bytes"]),
        "quota set", "chat dram_max=48GiB in_flight=7 disk_max=none",
    ),
    (
        "SetQuota", pb.SetQuotaRequest(tenant="chat", reset=True, pin_share=0.25, unused_ttl_s=86400), "quota set",
        "chat pin_share=0.25 unused_ttl=86400s (reset: all others)",
    ),
    ("Pin", pb.PinRequest(prefix=CHAIN, ttl_s=300), "pin", "--tenant chat --namespace abcdef01abcd (1 key) for 300 s"),
    ("Prefetch", pb.PrefetchRequest(prefix=CHAIN), "prefetch", "--tenant chat --namespace abcdef01abcd (1 key)"),
    ("HandOver", pb.HandOverRequest(prefix=CHAIN), "move", "--tenant chat --namespace abcdef01abcd (1 key)"),
    (
        "Evict", pb.EvictRequest(prefix=PREFIX, exactly=True), "evict",
        "--namespace abcdef01abcd (2 keys) --tier dram (not what continues them)",
    ),
    ("Unpin", pb.UnpinRequest(tenant="chat", pins=[7, 9]), "unpin", "chat 7 9"),
    ("Unpin", pb.UnpinRequest(tenant="chat"), "unpin", "chat --all"),
    ("NoteTransfer", pb.NoteTransferRequest(verb="export", tenant="chat"), "export", "--tenant chat"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "request_", "command", "words"), SAID)
def test_an_act_is_told_in_the_words_of_the_command_line(verb: str, request_: object, command: str, words: str) -> None:
    assert (verb_of(verb, request_), words_of(verb, request_)) == (command, words)


def test_keys_are_never_told_and_words_have_an_end() -> None:
    for verb, request, _, _ in SAID:
        assert (b"k" * 32).hex() not in words_of(verb, request)
    many = pb.UnpinRequest(tenant="t" * 1000, pins=range(1, 99))
    assert len(words_of("Unpin", many)) == SCOPE_LETTERS
    assert words_of("Unpin", pb.UnpinRequest(tenant="t", pins=range(1, 20))).endswith(" 15 16 and 3 more")


def test_what_quota_set_says_is_what_the_audit_repeats() -> None:
    pairs = ["dram_guaranteed=16GiB", "pin_share=0.5", "pin_1h_ttl=1800s", "in_flight=9", "disk_max=none"]
    request = quotas.wish("chat", ["set", *pairs], dry_run=False)
    assert set(words_of("SetQuota", request).split()) == {"chat", *pairs}
    assert set(words_of("SetQuota", quotas.wish("chat", ["reset", *quotas.KEYS], dry_run=False)).split()) == {
        "chat", *quotas.KEYS,
    }  # fmt: skip


def test_every_act_of_an_operator_is_among_them() -> None:
    assert {"Clear", "Evict", "SetPolicy", "SetQuota", "Unpin"} <= {verb for verb, *_ in SAID} <= _ACTS.keys()
