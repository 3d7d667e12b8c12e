"""SGLang's own host memory, backend factory and controller threads with the backend, over a real daemon.

Every page holds what follows from the name of its content and its number, so any page that comes back can be compared,
and pages under another content must be seen to differ. Two processes: one saves, the other loads.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvclient
from bench.engines.hicache import VALUES, HicacheProcess, digest_of, find_sglang, page_of, why_not
from tests.node import Node, until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

LAYOUTS: list[dict[str, Any]] = [
    *({"kind": "mha", "layout": each} for each in ("layer_first", "page_first", "page_first_direct", "page_head")),
    *({"kind": "asymmetric", "layout": each} for each in ("page_first", "page_first_direct")),
    *({"kind": "mla", "layout": each} for each in ("layer_first", "page_first", "page_first_direct")),
    {"kind": "mha", "layout": "page_first", "hybrid": False},  # the controller of a decoding server
    {"kind": "mla", "layout": "page_first", "hybrid": False},
    {"kind": "mha", "layout": "page_first", "dtype": "float32", "page_tokens": 1},
]
IMPATIENT = {"lookup_timeout_ms": 300, "transfer_timeout_ms": 300}
LARGE = {"layers": 8, "heads": 4, "dim": 128, "page_tokens": 64}  # pages of 1 MiB


@pytest.fixture(scope="session")
def python() -> Path:
    """Of the environment with SGLang."""
    found = find_sglang()
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(why_not())
    if found is None:
        pytest.skip(why_not())
    return found


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with a disk."""
    with Node(dram="128MiB", size="512MiB") as node:
        node.start("--disk-admission", "all")
        yield node


@pytest.fixture(scope="module")
def first(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HicacheProcess]:
    """Saves."""
    with HicacheProcess(python, {}, log_file=tmp_path_factory.mktemp("first") / "log") as process:
        yield process


@pytest.fixture(scope="module")
def second(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HicacheProcess]:
    """Loads."""
    with HicacheProcess(python, {}, log_file=tmp_path_factory.mktemp("second") / "log") as process:
        yield process


def extra(run: Path, **more: Any) -> dict[str, Any]:
    """What a user writes, and where the daemon is."""
    return {
        "backend_name": "kvstored",
        "module_path": "kvclient.integrations.sglang",
        "class_name": "KvstoredHiCache",
        "interface_v1": 1,
        "runtime_dir": str(run),
        "revision": "tests",
        "lookup_timeout_ms": 5000,  # on a busy host a late answer is none
        "transfer_timeout_ms": 5000,
    } | more


def begin(process: HicacheProcess, run: Path, **engine: Any) -> int:
    """Another engine in this process; bytes of a page."""
    return int(ready(process, run, **engine)["page_bytes"])


def ready(process: HicacheProcess, run: Path, **engine: Any) -> dict[str, Any]:
    """Another engine in this process; what it says."""
    settings = extra(run, **engine.pop("settings", {}))
    answer = process.ask(do="engine", **({"extra": settings, "server": {"model_path": "none"}} | engine))
    assert answer.get("backend") == "KvstoredHiCache", answer
    return answer


def refusal(process: HicacheProcess, run: Path, *, settings: dict[str, Any] | None = None, **engine: Any) -> str:
    """Why such an engine does not start."""
    return str(process.ask(do="engine", extra=extra(run, **(settings or {})), **engine)["refused"])


def save(process: HicacheProcess, prompt: str, pages: int, **more: Any) -> list[bytes]:
    """Until it is on disk, too. Keys."""
    answer = process.ask(do="save", prompt=prompt, pages=pages, **more)
    assert answer["pages"] == pages - more.get("first", 0), answer
    process.ask(do="settle")
    return [bytes.fromhex(key) for key in answer["keys"]]


def namespace_of(node: Node, identity: dict[str, Any]) -> kvclient.Namespace:
    """That of an engine."""
    tp, pp = ((identity.pop(f"{axis}_rank"), identity.pop(f"{axis}_size")) for axis in ("tp", "pp"))
    return node.client.namespace(**identity, tp=tp, pp=pp)


def pages_of(content: str, numbers: range, page_bytes: int) -> list[str]:
    """What must come back. The control of every comparison: no page is like another, or like one that nobody filled."""
    digests = [digest_of(page_of(content, number, page_bytes)) for number in numbers]
    assert len({*digests, digest_of(bytes(page_bytes))}) == len(digests) + 1
    return digests


@pytest.mark.parametrize("engine", LAYOUTS, ids=lambda engine: " ".join(map(str, engine.values())))
def test_what_one_engine_saved_another_loads_byte_by_byte(
    first: HicacheProcess, second: HicacheProcess, node: Node, engine: dict[str, Any]
) -> None:
    page_bytes = begin(first, node.run, **engine)
    assert begin(second, node.run, **engine) == page_bytes
    save(first, "prompt", 5)
    save(first, "spoilt prompt", 2, content="other bytes")
    empty = digest_of(bytes(page_bytes))
    found = second.ask(do="load", prompt="prompt", pages=7)
    assert (found["hit"], found["pages"]) == (5, 5)
    assert found["digests"] == [*pages_of("prompt", range(5), page_bytes), empty, empty]
    spoilt = second.ask(do="load", prompt="spoilt prompt", pages=2)["digests"]
    assert spoilt == pages_of("other bytes", range(2), page_bytes)
    assert spoilt != pages_of("spoilt prompt", range(2), page_bytes)


@pytest.mark.parametrize("engine", [LAYOUTS[0], LAYOUTS[1], LAYOUTS[5], LAYOUTS[7]], ids=str)
@pytest.mark.parametrize("codec", ["bf16-fixed", "int8"])
def test_encoded_pages_come_back_as_near_as_their_codec_promises(
    first: HicacheProcess, second: HicacheProcess, node: Node, engine: dict[str, Any], codec: str
) -> None:
    settings, prompt = {"codec": codec, "lossy": codec == "int8"}, f"{VALUES}{codec}"
    page_bytes = begin(first, node.run, settings=settings, **engine)
    identity = ready(second, node.run, settings=settings, **engine)["identity"]
    assert identity["codec"].startswith(f"{codec}/")
    assert identity["block_bytes"] < page_bytes * 0.8
    save(first, prompt, 4)
    found = second.ask(do="load", prompt=prompt, pages=4)
    assert (found["hit"], found["pages"]) == (4, 4)
    right = pages_of(prompt, range(4), page_bytes)
    assert (found["digests"] == right) == (codec == "bf16-fixed")
    assert found["digests"] != pages_of("another prompt", range(4), page_bytes)
    begin(second, node.run, **engine)  # raw pages are others
    assert second.ask(do="load", prompt=prompt, pages=4)["hit"] == 0


def test_pages_that_a_codec_cannot_take_are_not_stored_and_engines_that_have_none_do_not_start(
    first: HicacheProcess, node: Node
) -> None:
    begin(first, node.run, settings={"codec": "bf16-fixed"})
    assert first.ask(do="save", prompt="any bytes at all", pages=2)["pages"] == 0
    said = refusal(first, node.run, settings={"codec": "int8", "lossy": True}, dtype="float32")
    assert "bfloat16 or float16, not 'float32'" in said
    assert 'say "lossy": true' in refusal(first, node.run, settings={"codec": "int8"})


def test_an_engine_told_to_use_numba_that_has_none_does_not_start(
    python: Path, first: HicacheProcess, node: Node
) -> None:
    if subprocess.run([python, "-c", "import numba"], check=False, capture_output=True).returncode == 0:
        pytest.skip("numba is in this environment")
    settings = {"codec": "bf16-fixed", "accelerate": "numba"}
    assert "wants numba, which is not installed" in refusal(first, node.run, settings=settings)
    begin(first, node.run, settings={"codec": "bf16-fixed"})  # the control


@pytest.mark.parametrize("engine", [e for e in LAYOUTS if e["kind"] != "asymmetric"], ids=str)
def test_flat_pages_are_the_same_bytes_as_pages_in_place(
    first: HicacheProcess, second: HicacheProcess, node: Node, engine: dict[str, Any]
) -> None:
    page_bytes = begin(first, node.run, settings={"interface_v1": 0}, **engine)
    begin(second, node.run, **engine)
    save(first, "flat", 3)
    found = second.ask(do="load", prompt="flat", pages=4)
    assert (found["hit"], found["digests"][:3]) == (3, pages_of("flat", range(3), page_bytes))
    save(second, "in place", 3)
    flat = first.ask(do="load", prompt="in place", pages=4)
    assert (flat["pages"], flat["digests"][:3]) == (3, pages_of("in place", range(3), page_bytes))
    for verb, count in (("batch_get", 3), ("get", 1)):
        asked = first.ask(do="ask", verb=verb, prompt="in place", pages=count)
        assert asked["digests"] == pages_of("in place", range(count), page_bytes)
    for verb in ("batch_set", "set"):
        assert first.ask(do="ask", verb=verb, prompt=verb, pages=1)["got"] is True
        first.ask(do="settle")
        assert second.ask(do="load", prompt=verb, pages=1)["digests"] == pages_of(verb, range(1), page_bytes)
    assert first.ask(do="ask", verb="get", prompt="nobody", pages=1)["digests"] == [None]
    save(second, "spoilt flat", 3, content="other bytes")
    for verb in ("batch_get", "get"):
        spoilt = first.ask(do="ask", verb=verb, prompt="spoilt flat", pages=1)["digests"]
        assert spoilt == pages_of("other bytes", range(1), page_bytes)
        assert spoilt != pages_of("spoilt flat", range(1), page_bytes), "the control: what is there is what is told"


@pytest.mark.parametrize(
    "other",
    [
        {"layout": "page_first_direct"}, {"dtype": "float16"}, {"page_tokens": 32}, {"layers": 4}, {"heads": 4},
        {"tp": [1, 2]}, {"settings": {"revision": "others"}}, {"kind": "mla"},
        {"server": {"model_path": "none", "kv_cache_dtype": "fp8_e5m2"}},
        {"server": {"model_path": "none", "json_model_override_args": '{"rope_theta": 1}'}},
        {"server": {"model_path": "none", "weight_version": "2"}}, {"server": {"model_path": "none", "dtype": "half"}},
        {"server": {"model_path": "none", "quantization": "fp8"}},
    ],
    ids=str,
)  # fmt: skip
def test_engines_that_differ_never_see_each_others_pages(
    first: HicacheProcess, second: HicacheProcess, node: Node, other: dict[str, Any]
) -> None:
    like: dict[str, Any] = {"tp": [0, 2]}
    begin(first, node.run, **like)
    prompt = f"apart {other}"
    save(first, prompt, 3)
    begin(second, node.run, **(like | other))
    assert second.ask(do="ask", verb="batch_exists", prompt=prompt, pages=3)["got"] == 0
    begin(second, node.run, **like)
    assert second.ask(do="ask", verb="batch_exists", prompt=prompt, pages=3)["got"] == 3


@pytest.mark.parametrize("prefix_keys", [True, False])
def test_a_prompt_is_found_as_far_as_it_is_there_and_from_wherever_the_engine_goes_on(
    first: HicacheProcess, second: HicacheProcess, node: Node, prefix_keys: bool
) -> None:
    page_bytes = begin(first, node.run, prefix_keys=prefix_keys)
    begin(second, node.run, prefix_keys=prefix_keys)
    prompt = f"parts {prefix_keys}"
    save(first, prompt, 4)
    assert second.ask(do="load", prompt=prompt, pages=9)["pages"] == 4
    save(first, prompt, 9, first=6)  # what lies between was never stored
    assert second.ask(do="load", prompt=prompt, pages=9)["pages"] == 4
    late = second.ask(do="load", prompt=prompt, pages=9, first=6)
    assert (late["hit"], late["digests"]) == (3, pages_of(prompt, range(6, 9), page_bytes))
    save(first, prompt, 6, first=4)
    whole = second.ask(do="load", prompt=prompt, pages=10)
    assert (whole["pages"], whole["digests"][:9]) == (9, pages_of(prompt, range(9), page_bytes))
    assert second.ask(do="load", prompt=f"{prompt}, and no more", pages=4)["hit"] == 0


def test_pages_are_stored_behind_those_before_them(first: HicacheProcess, node: Node) -> None:
    namespace = namespace_of(node, ready(first, node.run)["identity"])
    keys = save(first, "chain", 4)
    save(first, "chain", 9, first=4)
    assert namespace.delete(keys[:1]) == 9, "with a page goes all that continues it"
    begin(first, node.run, prefix_keys=False)
    keys = save(first, "chain 2", 4)
    late = save(first, "chain 2", 9, first=4)
    assert (namespace.delete(keys[:1]), namespace.delete(late[:1])) == (4, 5), "nobody said that they belong together"
    first.ask(do="load", prompt="chain 3", pages=9)  # now somebody has
    keys = save(first, "chain 3", 4)
    save(first, "chain 3", 9, first=4)
    assert namespace.delete(keys[:1]) == 9


def test_a_batch_of_more_pages_than_sglang_moves_at_once(
    first: HicacheProcess, second: HicacheProcess, node: Node
) -> None:
    page_bytes = begin(first, node.run, pages=320)
    begin(second, node.run, pages=320, layout="page_first")
    save(first, "long", 300)
    found = second.ask(do="load", prompt="long", pages=310)
    assert (found["pages"], found["digests"][:300]) == (300, pages_of("long", range(300), page_bytes))


def test_ranks_with_latent_kv_share_their_pages_and_one_of_them_writes(
    first: HicacheProcess, second: HicacheProcess, node: Node
) -> None:
    page_bytes = begin(first, node.run, kind="mla", tp=[0, 2])
    begin(second, node.run, kind="mla", tp=[1, 2])
    assert second.ask(do="ask", verb="batch_set_v1", prompt="latent", pages=3)["got"] == [True] * 3
    second.ask(do="settle")
    assert first.ask(do="load", prompt="latent", pages=3)["hit"] == 0, "the second rank has written"
    save(first, "latent", 3)
    found = second.ask(do="load", prompt="latent", pages=3)
    assert (found["pages"], found["digests"]) == (3, pages_of("latent", range(3), page_bytes))
    begin(second, node.run, kind="mha", tp=[1, 2])
    assert second.ask(do="ask", verb="batch_set_v1", prompt="own heads", pages=3)["got"] == [True] * 3
    second.ask(do="settle")
    assert second.ask(do="load", prompt="own heads", pages=3)["pages"] == 3
    begin(first, node.run, kind="mha", tp=[0, 2])
    assert first.ask(do="load", prompt="own heads", pages=3)["hit"] == 0, "heads of another rank"


def test_an_engine_that_only_loads_stores_nothing(first: HicacheProcess, second: HicacheProcess, node: Node) -> None:
    begin(first, node.run, settings={"store": False})
    begin(second, node.run)
    assert first.ask(do="save", prompt="kept back", pages=2)["pages"] == 2
    assert second.ask(do="load", prompt="kept back", pages=2)["hit"] == 0
    save(second, "kept back", 2)
    assert first.ask(do="load", prompt="kept back", pages=2)["pages"] == 2


def test_weights_are_known_by_their_files(
    first: HicacheProcess, second: HicacheProcess, node: Node, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}')
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    server = {"model_path": str(tmp_path)}
    for process in (first, second):
        begin(process, node.run, settings={"revision": ""}, server=server)
    save(first, "of these weights", 2)
    assert second.ask(do="load", prompt="of these weights", pages=2)["pages"] == 2
    weights.write_bytes(b"trained")
    begin(second, node.run, settings={"revision": ""}, server=server)
    assert second.ask(do="load", prompt="of these weights", pages=2)["hit"] == 0


def test_after_an_update_of_the_weights_the_store_is_used_no_more(first: HicacheProcess, node: Node) -> None:
    begin(first, node.run)
    save(first, "old weights", 2)
    assert first.ask(do="ask", verb="batch_exists", prompt="old weights", pages=2)["got"] == 2
    first.ask(do="weights", version="2")
    assert first.ask(do="ask", verb="batch_exists", prompt="old weights", pages=2)["got"] == 0
    assert first.ask(do="ask", verb="batch_get_v1", prompt="old weights", pages=2)["got"] == [False] * 2
    assert first.ask(do="ask", verb="batch_set_v1", prompt="new weights", pages=2)["got"] == [False] * 2


def test_what_it_cannot_do_right_is_refused_at_start(first: HicacheProcess, node: Node, tmp_path: Path) -> None:
    assert "has no 'runtime_dri'" in refusal(first, node.run, settings={"runtime_dri": "x"})
    assert "must be a number from 0 to 4" in refusal(first, node.run, settings={"disk_wait_s": "2"})
    nameless = {"model_path": str(tmp_path)}
    assert "cannot be told from others" in refusal(first, node.run, settings={"revision": ""}, server=nameless)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    elsewhere = nameless | {"checkpoint_engine_wait_weights_before_ready": True}
    assert "cannot be told from others" in refusal(first, node.run, settings={"revision": ""}, server=elsewhere)
    adapters = nameless | {"enable_lora": True}
    assert "adapters are known by names" in refusal(first, node.run, settings={"revision": ""}, server=adapters)
    assert "beside KV (indexer)" in refusal(first, node.run, server=nameless, sidecar=True)
    assert "page_unified" in refusal(first, node.run, server=nameless, layout="page_unified")
    begin(first, node.run)  # and the process goes on


def test_sglang_hears_how_fast_pages_move(first: HicacheProcess, node: Node) -> None:
    begin(first, node.run)
    save(first, "timed", 3)
    first.ask(do="load", prompt="timed", pages=3)
    stats = first.ask(do="stats")["stats"]
    assert (stats["prefetch_pgs"], stats["backup_pgs"]) == ([3], [3])
    assert min(stats["prefetch_bandwidth"] + stats["backup_bandwidth"]) > 0
    assert first.ask(do="stats")["stats"]["prefetch_pgs"] == []


def test_disk_alone_answers_after_a_crash(first: HicacheProcess, second: HicacheProcess, node: Node) -> None:
    page_bytes = begin(first, node.run)
    begin(second, node.run)
    save(first, "on disk", 6)
    node.restart("--disk-admission", "all")
    node.assert_alive()
    assert until(lambda: second.ask(do="load", prompt="on disk", pages=8)["pages"] == 6)
    found = second.ask(do="load", prompt="on disk", pages=8)
    assert found["digests"][:6] == pages_of("on disk", range(6), page_bytes)


def test_a_daemon_that_dies_in_the_middle_is_a_miss_and_comes_back_by_itself(
    first: HicacheProcess, second: HicacheProcess, node: Node
) -> None:
    page_bytes = begin(first, node.run, **LARGE)
    begin(second, node.run, settings=IMPATIENT, **LARGE)
    assert until(lambda: first.ask(do="save", prompt="crash", pages=40)["pages"] == 40), "40 MiB want room in a ring"
    first.ask(do="settle")
    whole = pages_of("crash", range(40), page_bytes)
    assert until(lambda: second.ask(do="load", prompt="crash", pages=40)["digests"] == whole)
    assert until(lambda: second.ask(do="ask", verb="batch_exists", prompt="crash", pages=40)["got"] == 40)
    second.tell(do="load", prompt="crash", pages=40)
    node.kill()
    found = second.hear()
    assert found["digests"][: found["pages"]] == whole[: found["pages"]]
    assert second.ask(do="ask", verb="batch_get_v1", prompt="crash", pages=40)["got"] == [False] * 40
    assert second.ask(do="ask", verb="batch_exists", prompt="crash", pages=40)["got"] == 0
    assert second.ask(do="ask", verb="batch_set_v1", prompt="crash 2", pages=4)["got"] == [False] * 4
    assert second.ask(do="save", prompt="crash 2", pages=4)["pages"] == 0
    node.start("--disk-admission", "all")
    assert until(lambda: second.ask(do="load", prompt="crash", pages=40)["digests"] == whole)


def test_a_daemon_that_hangs_is_a_miss_until_it_goes_on(
    first: HicacheProcess, second: HicacheProcess, node: Node
) -> None:
    begin(first, node.run)
    save(first, "hangs", 3)
    begin(second, node.run, settings=IMPATIENT)
    assert until(lambda: second.ask(do="load", prompt="hangs", pages=3)["pages"] == 3)
    assert node.daemon is not None
    os.kill(node.daemon.process.pid, signal.SIGSTOP)
    try:
        assert second.ask(do="load", prompt="hangs", pages=3)["pages"] == 0
        assert second.ask(do="ask", verb="batch_get_v1", prompt="hangs", pages=3)["got"] == [False] * 3
        assert second.ask(do="save", prompt="hangs 2", pages=3)["pages"] == 0
    finally:
        os.kill(node.daemon.process.pid, signal.SIGCONT)
    assert until(lambda: second.ask(do="load", prompt="hangs", pages=3)["pages"] == 3)


def test_what_a_daemon_that_comes_later_cannot_take_is_a_miss_and_no_error(first: HicacheProcess) -> None:
    with Node(disks=0) as late:  # with arenas of 4 MiB
        assert begin(first, late.run, heads=8, dim=128, layers=8, page_tokens=256, pages=4) == 8 << 20
        said = len(first.log())
        late.start()
        late.assert_alive()
        for verb, miss in (("batch_set_v1", [False]), ("batch_get_v1", [False]), ("batch_exists", 0)):
            assert first.ask(do="ask", verb=verb, prompt="large", pages=1)["got"] == miss
        refused = "more than an arena holds"
        assert until(lambda: first.ask(do="save", prompt="large", pages=1)["pages"] == 0 and refused in first.log())
        assert "Traceback" not in first.log()[said:]
        first.ask(do="engine")  # lets go of it


def test_an_engine_starts_without_a_daemon_and_uses_it_once_it_is_there(first: HicacheProcess) -> None:
    with Node(disks=0) as late:
        page_bytes = begin(first, late.run)
        assert first.ask(do="save", prompt="early", pages=2)["pages"] == 0
        assert first.ask(do="load", prompt="early", pages=2)["hit"] == 0
        late.start()
        assert until(lambda: first.ask(do="save", prompt="early", pages=2)["pages"] == 2)
        first.ask(do="settle")
        assert first.ask(do="load", prompt="early", pages=2)["digests"] == pages_of("early", range(2), page_bytes)
        first.ask(do="engine")  # lets go of it
