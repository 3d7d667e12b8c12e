"""`kvctl advise` and `kvctl explain-miss`: over a real socket, against an owner in memory and against a real store."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvctl import insight, render
from kvctl.client import ControlClient, Exit, KvctlError
from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.ids import BlockKey
from kvproto.keys import block_keys
from kvproto.limits import KEYS_PER_FRAME, PAGE_BYTES
from kvstore.insight.advise import Sizes
from kvstore.insight.curves import Curves, Estimate, Limits
from kvstore.insight.explain import MissQuestion
from kvstore.insight.shadow import ShadowReport
from kvstore.insight.tap import sample
from kvstore.watching import Observed
from kvstored.admin_insight import CurvesOffError, advice_of, observe, question_of
from kvstored.control import ControlServer
from tests.core import SECOND, Core, chain
from tests.unit.control_fakes import DIGEST_A, KEYS, MemoryPort, ThreadOwner

HEX_A = DIGEST_A.hex()


@pytest.fixture
def port() -> MemoryPort:
    return MemoryPort()


@pytest.fixture
def client(tmp_path: Path, port: MemoryPort) -> Iterator[ControlClient]:
    owner = ThreadOwner(port)
    server = ControlServer(owner, tmp_path)
    server.start()
    with ControlClient(tmp_path / "control.sock", 10.0) as connected:
        yield connected
    server.stop(0.0)
    owner.stop()


def text_of(page: object) -> str:
    """As a terminal shows it."""
    console = render.console()
    with console.capture() as shown:
        console.print(page)
    return shown.get()


def observed(*, cost_s: float = 0.25, seconds: int = 3600, rule: str = "lru") -> Observed:
    """An hour in which 1,000 keys of a page were asked for in turn, each second some, all seen."""
    curves = Curves([3, 5, 7, 11, 13], 1, 0, Limits(first_rate=1.0))
    curves.open(1, 1, PAGE_BYTES)
    curves.tap.price(1, cost_s, 0.0)
    keys = np.random.default_rng(1).integers(0, 1 << 64, 4000, dtype=np.uint64)
    for second in range(seconds // 4):
        sample(keys, 4 * (second * 10 % 1000), 10, 1, 0, 0, curves.tap.words)
        curves.drain(4 * second * SECOND)
    names = ("lru", "second_touch", "density")
    shadows = tuple(
        ShadowReport(name, 500 * PAGE_BYTES, Estimate(0.1 * n, 0.01), Estimate(0.1 * n, 0.01), 400,
                     Estimate(0.1 * n, 0.01), Estimate(0.2 * n, 0.02))
        for n, name in enumerate(names)
    )  # fmt: skip
    sizes = Sizes(512 * PAGE_BYTES, 256 * PAGE_BYTES)
    return Observed("", True, sizes, curves.curve(0, seconds * SECOND), 9000.0, 3000.0, 0, rule, shadows, 3000.0)


class TestAdvise:
    def test_sizes_changes_rules_and_curve_arrive_as_they_are(self, client: ControlClient, port: MemoryPort) -> None:
        port.observed = observed()
        report = client.advise(insight.advise_request(None))
        assert (report.watched, report.doubt, report.priced) == (True, "none", True)
        assert (report.dram_bytes, report.disk_bytes) == (512 * PAGE_BYTES, 256 * PAGE_BYTES)
        quarter = 128 * PAGE_BYTES
        assert [(one.tier, one.delta_bytes) for one in report.changes] == [
            *(("DRAM", delta * quarter) for delta in (-1, 1, 2, 4)),
            *(("disk", delta * quarter // 2) for delta in (-1, 1, 2, 4)),
        ]
        gains = [one.hit.share for one in report.changes if one.tier == "DRAM"]
        assert gains[:3] == pytest.approx([0, 0, 0], abs=0.01)  # round and round: all of it, or nothing
        assert gains[3] > 0.8
        assert report.hit_ceiling.share > 0.85
        assert report.really_hit_share == pytest.approx(1 / 3)
        assert [(one.rule, one.in_force, one.measurable) for one in report.rules] == [
            ("lru", True, False), ("second_touch", False, True), ("density", False, True),
        ]  # fmt: skip
        per_s = 2.5 * 0.25  # accesses a second, and what each costs
        assert report.rules[2].prefill_s_per_min == pytest.approx(60 * per_s * 0.4, rel=0.01)
        assert report.points[-1].hit_share == pytest.approx(report.hit_ceiling.share)

    def test_the_page_says_all_of_that_in_sentences(self, client: ControlClient, port: MemoryPort) -> None:
        port.observed = observed()
        page = text_of(insight.advice(client.advise(insight.advise_request(None))))
        assert "Now, 2 MiB of DRAM and 1 MiB of disk" in page
        assert "really 33.3 %" in page
        assert "+2 MiB of DRAM: +" in page
        assert "Rule density: +20.0 points" in page
        assert "second_touch" in page
        lines = [line.rstrip() for line in page.splitlines()]
        (head,) = (line for line in lines if line.startswith("rule"))
        assert "in the sample" in head
        assert lines[-2:] == [  # the figures of the rules are not what was really found
            "Rules are tried on a sample, each key by itself: compare them with each other,",
            "not with what was really there.",
        ]
        assert "Rule lru" not in page

    def test_without_prices_no_seconds_are_made_up(self, client: ControlClient, port: MemoryPort) -> None:
        port.observed = observed(cost_s=0.0)
        report = client.advise(insight.advise_request(None))
        assert not report.priced
        assert all(one.prefill_s_per_min == 0 for one in report.changes)
        assert all(one.prefill_s_per_min == 0 for one in report.rules)
        assert "prefill" not in text_of(insight.advice(report))

    def test_too_early_says_why_and_nothing_else(self, client: ControlClient, port: MemoryPort) -> None:
        port.observed = observed(seconds=60)
        report = client.advise(insight.advise_request(None))
        assert report.doubt == "short"
        assert [one.startswith("Too early") for one in report.sentences] == [True]
        assert "second_touch" not in text_of(insight.advice(report))

    def test_of_a_tenant_nobody_has_seen_yet(self, client: ControlClient) -> None:
        report = client.advise(insight.advise_request("research"))
        assert not report.watched
        assert report.sentences[0] == "Tenant research is not observed, or nothing has been asked for yet."
        with pytest.raises(KvctlError) as caught:
            client.advise(insight.advise_request("nobody"))
        assert caught.value.code is Exit.NOT_FOUND
        with pytest.raises(KvctlError):
            insight.advise_request("")

    def test_a_store_is_observed_as_large_as_it_is(self) -> None:
        core = Core(4)
        busy = core.client("busy")
        busy.fetch(busy.open(), chain(3))
        assert observe(core.store, None).sizes == Sizes(core.store.limits.dram_bytes)
        mine = observe(core.store, "busy")
        assert (mine.tenant, mine.shadows) == ("busy", ())
        with pytest.raises(KeyError):
            observe(core.store, "nobody")
        core.store.watching.on = False
        with pytest.raises(CurvesOffError, match=r"insight\.curves"):
            observe(core.store, None)

    def test_advice_of_a_store_that_was_never_asked_has_no_curve(self) -> None:
        answer = advice_of(observe(Core(4).store, None))
        assert not answer.watched
        assert len(answer.sentences) == 1


class TestExplainMiss:
    def ask(self, client: ControlClient, *keys: bytes, **others: str) -> pb.ExplainMissResponse:
        return insight.parse([key.hex() for key in keys], None, "", others.get("tenant"), others.get("namespace")).ask(
            client
        )

    def test_the_question_reaches_the_owner_as_it_was_put(self, client: ControlClient, port: MemoryPort) -> None:
        report = self.ask(client, *KEYS[:2], tenant="research", namespace=HEX_A[:8])
        assert port.questions == [MissQuestion("research", DIGEST_A, KEYS[:2])]
        assert (report.cause, report.rule, report.age_s, report.key) == ("evicted", "density", 64.0, KEYS[0].hex())
        page = text_of(insight.explanation(report))
        assert page.splitlines() == [f"Namespace {HEX_A[:12]} of research", "Gone.", "For good."]

    def test_a_chain_longer_than_a_request_is_asked_for_in_parts(self, client: ControlClient, port: MemoryPort) -> None:
        keys = tuple(BlockKey(number.to_bytes(32, "little")) for number in range(2 * KEYS_PER_FRAME + 5))
        port.whole = KEYS_PER_FRAME + 7
        report = self.ask(client, *keys)
        assert [len(one.keys) for one in port.questions] == [KEYS_PER_FRAME, KEYS_PER_FRAME]
        assert port.questions[1].digest == DIGEST_A  # where the beginning was
        assert (report.asked, report.found, report.key) == (
            len(keys),
            KEYS_PER_FRAME + 7,
            keys[KEYS_PER_FRAME + 7].hex(),
        )
        assert report.sentences[0] == "The first 1,024 blocks are there; of those that follow:"
        port.questions.clear()
        port.whole = len(keys)
        assert self.ask(client, *keys).state == "hit"
        assert len(port.questions) == 3

    def test_tokens_become_the_keys_that_an_engine_would_use(
        self, client: ControlClient, port: MemoryPort, tmp_path: Path
    ) -> None:
        file = tmp_path / "tokens.json"
        file.write_text(json.dumps(list(range(40))))
        insight.parse([], file, "ab01", None, HEX_A[:8]).ask(client)
        (question,) = port.questions
        assert list(question.keys) == block_keys(range(40), 16, bytes.fromhex("ab01"))
        assert len(question.keys) == 2
        assert list(question.keys) != block_keys(range(40), 16)

    @pytest.mark.parametrize("text", ["", "{}", "[1, -1]", "[1.5]", "[true]", '["a"]', "[4294967296]", "[" * 100_000])
    def test_a_file_of_something_else_is_refused_before_any_daemon_is_asked(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "tokens.json"
        file.write_text(text)
        with pytest.raises(KvctlError, match="token ids") as caught:
            insight.parse([], file, "", None, None)
        assert caught.value.code is Exit.USAGE

    def test_fewer_tokens_than_a_block_are_nothing_to_look_for(self, client: ControlClient, tmp_path: Path) -> None:
        file = tmp_path / "tokens.json"
        file.write_text(json.dumps(list(range(15))))
        with pytest.raises(KvctlError, match="do not fill a block of 16"):
            insight.parse([], file, "", None, None).ask(client)

    @pytest.mark.parametrize(
        ("keys", "tokens", "extra", "said"),
        [
            ([], None, "", "name a chain"),
            (["ab"], Path("x"), "", "not both"),
            (["ab"], None, "", "64 hex digits"),
            (["zz" * 32], None, "", "64 hex digits"),
            (["ab" * 32], None, "x", "--extra takes hex"),
            ([], Path("/nowhere/at/all"), "", "cannot be read"),
        ],
    )
    def test_a_command_line_that_makes_no_sense_says_why(
        self, keys: list[str], tokens: Path | None, extra: str, said: str
    ) -> None:
        with pytest.raises(KvctlError, match=said) as caught:
            insight.parse(keys, tokens, extra, None, None)
        assert caught.value.code is Exit.USAGE

    @pytest.mark.parametrize(
        "request_",
        [
            pb.ExplainMissRequest(),
            pb.ExplainMissRequest(keys=[b"short"]),
            pb.ExplainMissRequest(keys=[bytes(32)] * (KEYS_PER_FRAME + 1)),
            pb.ExplainMissRequest(keys=[bytes(32)], namespace_digest="ab"),
            pb.ExplainMissRequest(keys=[bytes(32)], namespace_digest=""),
            pb.ExplainMissRequest(keys=[bytes(32)], tenant=""),
        ],
    )
    def test_whatever_comes_over_the_socket_is_checked_before_the_owner_is_asked(
        self, client: ControlClient, port: MemoryPort, tmp_path: Path, request_: pb.ExplainMissRequest
    ) -> None:
        with grpc.insecure_channel(f"unix:{client.socket_path}") as channel, pytest.raises(grpc.RpcError) as caught:
            control_pb2_grpc.ControlStub(channel).ExplainMiss(request_, timeout=10.0)  # type: ignore[no-untyped-call, unused-ignore]
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert port.questions == []

    def test_a_good_request_is_taken(self) -> None:
        asked = question_of(pb.ExplainMissRequest(keys=[bytes(32)], namespace_digest=HEX_A, tenant="t"))
        assert asked == MissQuestion("t", DIGEST_A, (BlockKey(bytes(32)),))
        assert question_of(pb.ExplainMissRequest(keys=[bytes(32)])).digest is None
