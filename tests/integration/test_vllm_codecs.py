"""Codecs in the vLLM connector: its halves with plain tensors, and real engines that say the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.engines import VllmProcess
from bench.engines.model import SIZES, write_model
from bench.process import DaemonProcess
from kvclient.integrations.codec_choice import codec_for, encoded
from kvclient.integrations.vllm_settings import Settings
from kvproto.errors import UsageError
from kvproto.identity import NamespaceIdentity
from tests.integration.conftest import StartDaemon
from tests.integration.vllm_halves import Engine, again, load, patient, request_of
from tests.integration.vllm_kit import APART, BLOCK, SAME, ask, counts, difference, misread, prompt_of, start, stored
from tests.node import until

FROM, TO = [0, 1, 2, 3], [10, 11, 12, 13]
LOSSY = ("int8", "fp8", "int4-g64")


@pytest.fixture
def daemon(empty_daemon: DaemonProcess) -> DaemonProcess:
    """One for all: each test has a model of its own."""
    return empty_daemon


def there_and_back(daemon: DaemonProcess, settings: Settings, name: str, *, near: bool = False) -> Engine:
    """What one engine saved, loaded into other blocks. Stopped; its memory can be looked at."""
    engine = Engine(daemon.runtime_dir, settings, name=name, near=near, dtype=torch.bfloat16)
    request = request_of("a", 3)
    engine.save(request, FROM)
    load(engine, again(request, "b"), TO)
    engine.stop()
    assert engine.workers[0].worker.take_bad_blocks() == set()
    return engine


def apart(engine: Engine, others: list[int] = FROM[:3]) -> float:
    """The largest difference of any value that was loaded, of those that they should be; 0: not a bit differs."""
    caches = engine.workers[0].caches.values()
    return max(float((cache[TO[:3]].float() - cache[others].float()).abs().max()) for cache in caches)


@pytest.mark.parametrize("at_once", [32.0, 0.0], ids=["before the forward", "beside it"])
@pytest.mark.parametrize("near", [False, True], ids=["apart", "near"])
def test_without_loss_every_bit_comes_back(daemon: DaemonProcess, at_once: float, *, near: bool) -> None:
    name = f"lossless {at_once} {near}"
    engine = there_and_back(daemon, patient(codec="bf16-fixed", at_once_mib=at_once), name, near=near)
    for cache in engine.workers[0].caches.values():
        assert torch.equal(cache[TO[:3]].view(torch.int16), cache[FROM[:3]].view(torch.int16))
    assert apart(engine, [1, 2, 0]) > 1, "the control: other blocks differ"


@pytest.mark.parametrize("codec", LOSSY)
def test_with_loss_values_are_near_and_not_the_same(daemon: DaemonProcess, codec: str) -> None:
    engine = there_and_back(daemon, patient(codec=codec, lossy=True), f"lossy {codec}")
    assert 0 < apart(engine) < 0.5
    assert apart(engine, [1, 2, 0]) > 1, "the control: other blocks differ"


@pytest.mark.parametrize("codec", ["bf16-fixed", *LOSSY])
def test_what_one_engine_encoded_compiled_another_decodes_by_numpy_and_the_other_way_round(
    daemon: DaemonProcess, codec: str
) -> None:
    """Both begin with the same memory, so what lies there afterwards can be compared."""
    plain, compiled = (patient(codec=codec, lossy=True, accelerate=each) for each in ("", "numba"))
    found = []
    for number, (saves, loads) in enumerate([(plain, plain), (plain, compiled), (compiled, plain)]):
        name = f"compiled {codec} {number}"
        engine = Engine(daemon.runtime_dir, saves, name=name, dtype=torch.bfloat16)
        engine.save(request_of("a", 3), FROM)
        engine.stop()
        engine = Engine(daemon.runtime_dir, loads, name=name, dtype=torch.bfloat16)
        load(engine, again(request_of("a", 3), "b"), TO)
        engine.stop()
        assert engine.workers[0].worker.take_bad_blocks() == set()
        found.append([cache[TO[:3]].view(torch.int16).clone() for cache in engine.workers[0].caches.values()])
    for caches in found[1:]:
        for one, other in zip(caches, found[0], strict=True):
            assert torch.equal(one, other)
            assert not torch.equal(one, other[[1, 2, 0]]), "the control: other blocks differ"


def test_engines_of_other_codecs_share_nothing(daemon: DaemonProcess) -> None:
    there_and_back(daemon, patient(codec="bf16-fixed"), "shared")
    for settings, found in ((patient(), 0), (patient(codec="int8", lossy=True), 0), (patient(codec="bf16-fixed"), 48)):
        engine = Engine(daemon.runtime_dir, settings, name="shared", dtype=torch.bfloat16)
        request = request_of("a", 3)
        engine.scheduler.on_new_request(request)
        assert engine.scheduler.matched(request, 0)[0] == found, settings.codec
        engine.stop()


def test_a_block_that_does_not_fit_is_computed_and_those_before_it_are_not(daemon: DaemonProcess) -> None:
    engine = Engine(daemon.runtime_dir, patient(codec="int8", lossy=True), name="unfit", dtype=torch.bfloat16)
    next(iter(engine.workers[0].caches.values()))[2, 0, 0, 0] = float("nan")
    request = request_of("a", 4)
    engine.scheduler.on_new_request(request)
    engine.step({request.request_id: request.num_tokens}, {request.request_id: [*FROM, 4]})
    request.num_computed_tokens = request.num_tokens
    engine.scheduler.finished(request, [*FROM, 4])
    engine.step({}, {})
    worker = engine.workers[0].worker
    assert until(lambda: worker._patient.match(request.block_hashes).blocks == 2)
    assert until(lambda: worker.counts["refused_blocks"] >= 2)
    worker._patient.flush(5.0)
    assert worker._patient.match(request.block_hashes).blocks == 2
    engine.stop()


@pytest.mark.parametrize(
    ("given", "dtype", "row", "why"),
    [
        ({"codec": "bf16-fixed"}, torch.float16, 8, "takes dtype bfloat16 only"),
        ({"codec": "int8", "lossy": True}, torch.float32, 8, "bfloat16 or float16, not 'float32'"),
        ({"codec": "int8", "lossy": True}, "bfloat16 float16", 8, "bfloat16 or float16"),
        ({"codec": "fp8", "lossy": True}, torch.bfloat16, 0, "no whole heads of 0 values"),
        ({"codec": "fp8", "lossy": True}, torch.bfloat16, 7, "no whole heads of 7 values"),
    ],
)
def test_what_a_codec_does_not_take_stops_the_start_with_a_sentence(
    given: dict[str, Any], dtype: object, row: int, why: str
) -> None:
    settings = Settings.parse(given)
    with pytest.raises(UsageError, match=why):
        codec_for(settings.codec, lossy=settings.lossy, dtype=dtype, block_bytes=4096, row=row)


def test_a_namespace_has_the_codecs_name_and_the_size_of_an_encoded_block() -> None:
    plain = NamespaceIdentity("m", "e", "l", "bfloat16", 16, 65536)
    codec = codec_for("int8", lossy=True, dtype="bfloat16", block_bytes=65536, row=64)
    assert codec is not None
    named = encoded(plain, codec)
    assert (named.codec, named.block_bytes) == (codec.text, codec.stored_bytes)
    assert named.digest() != plain.digest()
    assert encoded(plain, None) == plain


def test_auto_is_a_codec_that_takes_such_values_or_none() -> None:
    found = codec_for("auto", lossy=False, dtype=torch.bfloat16, block_bytes=65536, row=64)
    assert found is None or found.encoding.is_lossless
    assert codec_for("auto", lossy=True, dtype=torch.float32, block_bytes=65536, row=64) is None


# -- real engines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, SIZES["tiny"], seed=0)
    return folder


@pytest.fixture
def served(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon("--dram", "128MiB", "--lock", "false")


def said(engine: VllmProcess, prompt: list[int], **more: Any) -> dict[str, Any]:
    return ask(engine, prompt, **more)[0]


@pytest.mark.engines
@pytest.mark.timeout(600)
@pytest.mark.parametrize("codec", ["bf16-fixed", "int8"])
def test_a_real_engine_says_without_loss_what_it_says_without_a_store_and_with_loss_not_quite(
    python: Path, model: Path, served: DaemonProcess, tmp_path: Path, codec: str
) -> None:
    extra = {"codec": codec, "lossy": codec == "int8"}
    prompt, run = prompt_of(codec, 5 * BLOCK + 40), served.runtime_dir
    with start(python, model, run, tmp_path / "log", extra=extra) as engine:
        right = said(engine, prompt, kv_transfer_params=APART)
        stored(engine, prompt)
        assert counts(engine)["saved blocks"] == 5
        loaded = said(engine, prompt)
        assert counts(engine)["loaded blocks"] == 5
    if codec == "bf16-fixed":
        assert difference(loaded, right) <= SAME
    else:
        assert difference(loaded, right) > SAME, "the control: this model notices what int8 changes"


@pytest.mark.engines
@pytest.mark.timeout(600)
def test_a_real_engine_starts_with_numba_and_shares_its_blocks_with_one_without(
    python: Path, model: Path, served: DaemonProcess, tmp_path: Path
) -> None:
    """vLLM on CPU ends if it finds numba before its kernels are in place. Compiled anew, as by a first start."""
    extra, prompt, run = {"codec": "bf16-fixed"}, prompt_of("numba", 5 * BLOCK + 40), served.runtime_dir
    kept, log = tmp_path / "compiled", tmp_path / "log"
    environment = {"NUMBA_CACHE_DIR": str(kept)}
    compiling = extra | {"accelerate": "numba"}
    with start(python, model, run, log, extra=compiling, environment=environment) as engine:
        assert list(kept.rglob("*_encode_fixed*.nbc")), "nothing was compiled while it started"
        assert list(kept.rglob("*_decode_fixed*.nbc"))
        compiled = sorted(kept.rglob("*.nbc"))
        right = said(engine, prompt, kv_transfer_params=APART)
        stored(engine, prompt)
        assert difference(said(engine, prompt), right) <= SAME
        assert sorted(kept.rglob("*.nbc")) == compiled, "something was compiled while it served"
        spoilt = misread(engine, prompt, right)
    with start(python, model, run, log, extra=extra) as engine:
        loaded = said(engine, prompt)
        assert counts(engine)["loaded blocks"] == 5
    assert difference(loaded, right) <= SAME < spoilt
