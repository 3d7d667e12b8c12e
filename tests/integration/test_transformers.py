"""The transformers adapter against a real daemon: right bytes, one token left, and every bypass says so.

Equality is to the last bit, and every such test has its control: with one block that is another, it is equal no more
(`another_beginning`, and `test_a_corrupted_block_changes_the_logits`).
"""

import math
import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kvclient
from bench.process import DaemonProcess
from bench.quality import logits_moved
from kvclient import Reason
from kvclient.codecs import Codec, codec_of
from kvclient.integrations import transformers as adapter
from kvclient.integrations.transformers import TransformersKV
from kvclient.integrations.trials import TRIED_ANYWAY
from tests.node import PATIENCE_S

StartDaemon = Callable[..., DaemonProcess]

BLOCK = 16
DOCUMENT = 8 * BLOCK
REST = 32  # enough rows for the matrix product to take the same routines as for a whole prompt
LLAMA: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 1024,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GREEDY: dict[str, Any] = {"do_sample": False, "output_logits": True}


def with_gain(model: Any, seed: int = 1) -> Any:
    """Random weights under which every block of the cache matters (see `bench.demo_engine.build_model`)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                sharp = any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head"))
                deviation = 1.0 if "embed" in name else (3.0 if sharp else 0.7) / float(weight.shape[1]) ** 0.5
                weight.normal_(0.0, deviation, generator=generator)
    return model.eval()


def llama(seed: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return with_gain(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes)), seed).to(dtype)


def prompt_of(tokens: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(1, 256, (1, tokens), generator=torch.Generator().manual_seed(seed))


def plain(model: Any, prompt: torch.Tensor, new_tokens: int = 4, **options: Any) -> Any:
    """What transformers makes of it by itself."""
    options = {"return_dict_in_generate": True, "max_new_tokens": new_tokens} | GREEDY | options
    return model.generate(prompt, **options)


def computed_cache(model: Any, tokens: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(tokens, use_cache=True).past_key_values


def same_logits(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


def same_bytes(one: Any, other: Any, tokens: int) -> bool:
    return all(
        torch.equal(a.keys[:, :, :tokens], b.keys[:, :, :tokens])
        and torch.equal(a.values[:, :, :tokens], b.values[:, :, :tokens])
        for a, b in zip(one.layers, other.layers, strict=True)
    )


def another_beginning(prompt: torch.Tensor) -> torch.Tensor:
    """The prompt with another first block: what follows from it must be told from what is right."""
    return torch.cat([prompt_of(BLOCK, seed=11).expand(len(prompt), -1), prompt[:, BLOCK:]], dim=1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and wait long for them on a busy machine
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture
def salt(request: pytest.FixtureRequest) -> bytes:
    """Keeps the tests of the module apart in their one daemon."""
    name: str = request.node.name
    return name.encode()


@pytest.fixture
def other_client(daemon: DaemonProcess) -> Iterator[kvclient.Client]:
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as connected:
        assert connected.wait_connected(10.0)
        yield connected


# -- right bytes ------------------------------------------------------------------------------------------------


def test_a_prefix_saved_by_one_client_resumes_in_another_with_equal_logits(
    client: kvclient.Client, other_client: kvclient.Client, model: Any, salt: bytes
) -> None:
    prompt = prompt_of(DOCUMENT + REST)
    document = prompt[:, :DOCUMENT]
    saved = TransformersKV(client, model).save(document, computed_cache(model, document), salt=salt, wait=True)
    assert (saved.accepted, saved.known, saved.refused, saved.why_not) == (8, 0, {}, "")

    answer = TransformersKV(other_client, llama()).generate(prompt, salt=salt, max_new_tokens=4, **GREEDY)
    assert answer.cached_tokens == DOCUMENT
    assert answer.tiers.dram == 8
    assert answer.why_not == ""
    reference = plain(model, prompt)
    assert torch.equal(answer.sequences, reference.sequences)
    assert same_logits(answer, reference)


def test_a_corrupted_block_changes_the_logits(client: kvclient.Client, model: Any, salt: bytes) -> None:
    kv, prompt = TransformersKV(client, model), prompt_of(DOCUMENT + REST)
    cache = computed_cache(model, prompt[:, :DOCUMENT])
    cache.layers[1].values[:, :, 3 * BLOCK : 4 * BLOCK].neg_()
    assert kv.save(prompt, cache, salt=salt, wait=True).accepted == 8
    answer = kv.generate(prompt, salt=salt, max_new_tokens=4, **GREEDY)
    assert answer.cached_tokens == DOCUMENT
    assert not torch.equal(answer.output.logits[0], plain(model, prompt).logits[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("staging_bytes", [1, adapter.STAGING_BYTES], ids=["a block at a time", "all at once"])
def test_a_cache_comes_back_byte_for_byte(
    client: kvclient.Client, salt: bytes, dtype: torch.dtype, staging_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "STAGING_BYTES", staging_bytes)
    model = llama(dtype=dtype)
    kv, prompt = TransformersKV(client, model), prompt_of(DOCUMENT + 5)
    cache = computed_cache(model, prompt)
    assert kv.save(prompt, cache, salt=salt, wait=True).accepted == 8
    loaded, tokens = kv.load(prompt, salt=salt)
    assert tokens == loaded.get_seq_length() == DOCUMENT
    assert loaded.layers[0].keys.dtype == dtype
    assert same_bytes(loaded, cache, DOCUMENT)
    loaded.layers[-1].values[0, -1, DOCUMENT - 1, -1].neg_()
    assert not same_bytes(loaded, cache, DOCUMENT), "the control: one value is noticed"


def test_an_encoded_cache_comes_back_and_the_lossless_one_bit_for_bit(client: kvclient.Client, salt: bytes) -> None:
    model, prompt = llama(dtype=torch.bfloat16), prompt_of(DOCUMENT + REST)
    cache = computed_cache(model, prompt[:, :DOCUMENT])
    wrong = computed_cache(model, another_beginning(prompt[:, :DOCUMENT]))
    for codec in ("bf16-fixed", "int8"):
        kv = TransformersKV(client, model, codec=codec, lossy=codec == "int8")
        assert kv.namespace is not None
        assert kv.namespace.identity.block_bytes < kv.namespace.block_bytes
        assert kv.save(prompt[:, :DOCUMENT], cache, salt=salt, wait=True).accepted == 8
        loaded, tokens = kv.load(prompt, salt=salt)
        assert tokens == DOCUMENT
        assert same_bytes(loaded, cache, DOCUMENT) == (codec == "bf16-fixed")
        for one, other, control in zip(loaded.layers, cache.layers, wrong.layers, strict=True):
            near = 0.02 * float(other.keys.max())
            assert torch.allclose(one.keys.float(), other.keys.float(), rtol=0.02, atol=near)
            assert not torch.allclose(one.keys.float(), control.keys.float(), rtol=0.02, atol=near)
    with pytest.raises(kvclient.UsageError, match="lossy=True"):
        TransformersKV(client, model, codec="int8")
    with pytest.raises(kvclient.UsageError, match="dtype bfloat16 or float16"):
        TransformersKV(client, llama(), codec="bf16-fixed")


def test_what_numba_encoded_numpy_decodes_and_it_was_compiled_before_the_first_prompt(
    client: kvclient.Client, salt: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = llama(dtype=torch.bfloat16), prompt_of(DOCUMENT + REST)
    cache = computed_cache(model, prompt[:, :DOCUMENT])
    warmed: list[str] = []
    monkeypatch.setattr(Codec, "warm_up", lambda codec: warmed.append(codec.text))
    compiled = TransformersKV(client, model, codec="bf16-fixed", accelerate="numba")
    plain = TransformersKV(client, model, codec="bf16-fixed")
    assert compiled.namespace is not None
    assert compiled.namespace.codec is not None
    assert warmed == [compiled.namespace.codec.text] * 2, "one namespace"
    assert compiled.save(prompt[:, :DOCUMENT], cache, salt=salt, wait=True).accepted == 8
    for kv in (plain, compiled):
        loaded, tokens = kv.load(prompt, salt=salt)
        assert tokens == DOCUMENT
        assert same_bytes(loaded, cache, DOCUMENT)
    assert not same_bytes(loaded, computed_cache(model, another_beginning(prompt[:, :DOCUMENT])), DOCUMENT)
    with pytest.raises(kvclient.UsageError, match="accelerate is for codecs"):
        TransformersKV(client, model, accelerate="numba")
    monkeypatch.delitem(sys.modules, "kvkernels.encodings_compiled")
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(kvclient.UsageError, match="accelerate='numba'"):
        TransformersKV(client, model, codec="bf16-fixed", accelerate="numba")


def test_what_a_codec_does_to_logits_is_measured_on_any_model() -> None:
    model, prompt = llama(dtype=torch.bfloat16), prompt_of(DOCUMENT + REST)
    shape = (LLAMA["num_hidden_layers"], 2, LLAMA["num_key_value_heads"], BLOCK, LLAMA["head_dim"])
    moved = {}
    for name in ("bf16-fixed", "int8", "int4-g64"):
        codec = codec_of(name, dtype="bfloat16", block_bytes=2 * math.prod(shape), block_shape=shape, lossy=True)
        assert codec is not None
        moved[name] = logits_moved(model, prompt, codec)["codec_logit_kl_mean"]
    assert 0 == moved["bf16-fixed"] < moved["int8"] < moved["int4-g64"]


def test_what_was_generated_is_there_for_the_next_turn(client: kvclient.Client, model: Any, salt: bytes) -> None:
    kv, prompt = TransformersKV(client, model), prompt_of(40)
    first = kv.generate(prompt, salt=salt, max_new_tokens=30, **GREEDY)
    assert (first.cached_tokens, first.saved.accepted) == (0, 4)  # 69 tokens have KV: the last one has none yet
    assert kv.flush(10.0).visible == 4
    next_prompt = torch.cat([first.sequences, prompt_of(20, seed=3)], dim=1)
    second = kv.generate(next_prompt, salt=salt, max_new_tokens=2, **GREEDY)
    assert second.cached_tokens == 64
    assert (second.saved.known, second.saved.accepted) == (4, 1)


def test_blocks_that_are_stored_are_not_stored_again(client: kvclient.Client, model: Any, salt: bytes) -> None:
    kv, tokens = TransformersKV(client, model), prompt_of(DOCUMENT)
    cache = computed_cache(model, tokens)
    assert kv.save(tokens[:, :50], cache, salt=salt, wait=True).accepted == 3
    again = kv.save(tokens, cache, salt=salt, wait=True)
    assert (again.known, again.accepted) == (3, 5)
    once_more = kv.save(tokens, cache, salt=salt)
    assert (once_more.known, once_more.accepted) == (8, 0)


# -- which bytes ------------------------------------------------------------------------------------------------


def test_at_least_one_token_is_left_to_compute(client: kvclient.Client, model: Any, salt: bytes) -> None:
    kv, tokens = TransformersKV(client, model), prompt_of(4 * BLOCK + 1)
    kv.save(tokens, computed_cache(model, tokens), salt=salt, wait=True)
    for prompt_tokens, cached in ((65, 64), (64, 48), (49, 48), (17, 16), (16, 0), (1, 0), (0, 0)):
        cache, found = kv.load(tokens[:, :prompt_tokens], salt=salt)
        assert found == cache.get_seq_length() == cached, prompt_tokens
    assert kv.load(tokens[0].tolist(), salt=salt).tokens == 64


def test_another_salt_or_another_token_does_not_hit(client: kvclient.Client, model: Any, salt: bytes) -> None:
    kv, tokens = TransformersKV(client, model), prompt_of(DOCUMENT + 1)
    kv.save(tokens, computed_cache(model, tokens), salt=salt, wait=True)
    assert kv.load(tokens, salt=salt + b"!").tokens == 0
    assert kv.load(tokens).tokens == 0
    tokens[0, 5 * BLOCK] += 1
    assert kv.load(tokens, salt=salt).tokens == 5 * BLOCK


def test_other_weights_never_hit_however_small_the_difference(client: kvclient.Client, model: Any, salt: bytes) -> None:
    tokens = prompt_of(DOCUMENT + 1)
    TransformersKV(client, model).save(tokens, computed_cache(model, tokens), salt=salt, wait=True)
    assert TransformersKV(client, llama()).load(tokens, salt=salt).tokens == DOCUMENT
    changed = llama()
    with torch.no_grad():
        weight = changed.model.layers[0].mlp.down_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert TransformersKV(client, changed).load(tokens, salt=salt).tokens == 0
    other_buffer = llama()
    other_buffer.model.rotary_emb.inv_freq *= 2
    assert TransformersKV(client, other_buffer).load(tokens, salt=salt).tokens == 0
    assert TransformersKV(client, llama(rope_theta=5e5)).load(tokens, salt=salt).tokens == 0


def test_block_size_type_adapter_and_revision_each_have_a_namespace_of_their_own(
    client: kvclient.Client, model: Any
) -> None:
    def digest(of: Any = model, **arguments: Any) -> bytes:
        namespace = TransformersKV(client, of, **arguments).namespace
        assert namespace is not None
        return bytes(namespace.identity.digest())

    assert digest() == digest(llama())
    assert digest(revision="r1") == digest(llama(seed=9), revision="r1")  # the caller vouches for the weights
    different = [
        digest(), digest(block_tokens=32), digest(adapter="a"), digest(adapter="b"), digest(revision="r1"),
        digest(revision="r2"), digest(llama(seed=9)), digest(llama(dtype=torch.bfloat16)),
        digest(llama(attn_implementation="eager")),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def test_weights_that_change_later_are_bypassed(client: kvclient.Client, salt: bytes) -> None:
    model, prompt = llama(), prompt_of(DOCUMENT + REST)
    kv, stale = TransformersKV(client, model), computed_cache(model, prompt[:, :DOCUMENT])
    assert kv.generate(prompt, salt=salt, max_new_tokens=2, **GREEDY).saved.accepted == 10
    kv.flush(10.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
        model.model.layers[0].self_attn.k_proj.weight.mul_(0.5)
    answer = kv.generate(prompt, salt=salt, max_new_tokens=4, **GREEDY)
    assert "weights have changed" in answer.why_not
    assert (answer.cached_tokens, answer.saved.accepted) == (0, 0)
    assert "weights have changed" in answer.saved.why_not
    assert same_logits(answer, plain(model, prompt))
    assert not same_logits(answer, plain(model, prompt, past_key_values=stale)), "the control: what is stored"


def test_a_lease_that_lapses_while_it_is_read_is_a_miss(client: kvclient.Client, model: Any, salt: bytes) -> None:
    kv, tokens = TransformersKV(client, model), prompt_of(DOCUMENT + 1)
    kv.save(tokens, computed_cache(model, tokens), salt=salt, wait=True)
    late = kv.load(tokens, salt=salt, ttl_s=1e-9)
    assert (late.tokens, late.cache.get_seq_length()) == (0, 0)
    assert "lapsed" in late.why_not
    assert kv.load(tokens, salt=salt).tokens == DOCUMENT


# -- bypasses: models -------------------------------------------------------------------------------------------


def mistral(**changes: Any) -> Any:
    return with_gain(transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA | changes)))


def t5() -> Any:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=256, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def mamba() -> Any:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=256, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: mistral(sliding_window=32), "DynamicSlidingWindowLayer"),
        (t5, "encoder-decoder"),
        (mamba, "no cache"),
        (lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "whole sequence"),
    ],
    ids=["sliding window", "encoder-decoder", "recurrent", "rotary embedding that grows"],
)
def test_a_model_that_cannot_be_cached_runs_as_if_there_were_no_store(
    client: kvclient.Client, build: Callable[[], Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompt = build(), prompt_of(70)
    kv = TransformersKV(client, model)
    assert why in kv.why_not
    said = [record.getMessage() for record in caplog.records if record.name == adapter.__name__]
    assert said == [f"bypass model={type(model).__name__} why={kv.why_not!r}"]
    assert kv.namespace is None
    for _ in range(2):
        answer = kv.generate(prompt, max_new_tokens=3, **GREEDY)
        assert (answer.why_not, answer.saved.why_not, answer.cached_tokens) == (kv.why_not, kv.why_not, 0)
        assert same_logits(answer, plain(model, prompt, 3))
        assert not same_logits(answer, plain(model, another_beginning(prompt), 3)), "the control"
    assert kv.load(prompt) == adapter.Prefix(None, 0, why_not=kv.why_not)
    assert kv.save(prompt, None).why_not == kv.why_not
    assert kv.flush(0.0).visible == 0


def test_a_model_without_sliding_window_of_the_same_family_is_not_bypassed(client: kvclient.Client) -> None:
    assert TransformersKV(client, mistral(sliding_window=None)).why_not == ""


def test_a_model_that_wants_more_than_tokens_is_bypassed(
    client: kvclient.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise ValueError("pixels, please")

    model = llama()
    monkeypatch.setattr(model, "forward", forward)
    assert "pixels, please" in TransformersKV(client, model).why_not


def test_a_model_with_adapters_is_bypassed_until_its_adapter_is_named(client: kvclient.Client) -> None:
    model = llama()
    model._hf_peft_config_loaded = True
    assert "`adapter`" in TransformersKV(client, model).why_not
    assert TransformersKV(client, model, adapter="french").why_not == ""


def test_weights_that_cannot_be_read_want_a_revision(client: kvclient.Client) -> None:
    model = llama()
    model.register_buffer("elsewhere", torch.empty(4, device="meta"))
    assert "`revision`" in TransformersKV(client, model).why_not
    assert TransformersKV(client, model, revision="r1").why_not == ""


def test_a_model_in_training_mode_or_under_autocast_is_bypassed_while_it_lasts(
    client: kvclient.Client, salt: bytes
) -> None:
    model, prompt = llama(), prompt_of(DOCUMENT + REST)
    kv = TransformersKV(client, model)
    kv.save(prompt, computed_cache(model, prompt), salt=salt, wait=True)
    model.train()
    assert "training mode" in kv.load(prompt, salt=salt).why_not
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in kv.load(prompt, salt=salt).why_not
    assert kv.load(prompt, salt=salt).tokens == DOCUMENT + BLOCK


# -- bypasses: requests -----------------------------------------------------------------------------------------


def hiding_mask() -> torch.Tensor:
    mask = torch.ones((1, DOCUMENT + REST), dtype=torch.int64)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_beams": 2, "output_logits": False}, "num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"generation_config": transformers.GenerationConfig(cache_implementation="static")}, "cache_implementation"),
        ({"attention_mask": hiding_mask()}, "hides tokens"),
        ({"pad_token_id": int(prompt_of(DOCUMENT + REST)[0, 0])}, "pad token"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"prefill_chunk_size": 64}, "prefill_chunk_size"),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_cannot_use_the_store_runs_as_if_there_were_none(
    client: kvclient.Client, model: Any, salt: bytes, options: dict[str, Any], why: str
) -> None:
    kv, prompt = TransformersKV(client, model), prompt_of(DOCUMENT + REST)
    wrong = computed_cache(model, another_beginning(prompt))  # so that whoever loads it is noticed
    assert kv.save(prompt, wrong, salt=salt, wait=True).accepted == 10
    torch.manual_seed(7)
    answer = kv.generate(prompt, salt=salt, max_new_tokens=4, **GREEDY | options)
    assert why in answer.why_not
    assert (answer.cached_tokens, answer.saved.accepted) == (0, 0)
    torch.manual_seed(7)
    fresh = options | ({"past_key_values": transformers.DynamicCache()} if "past_key_values" in options else {})
    assert torch.equal(answer.sequences, plain(model, prompt, **fresh).sequences)
    loaded = kv.generate(prompt, salt=salt, max_new_tokens=4, **GREEDY)
    assert loaded.cached_tokens == DOCUMENT + BLOCK
    assert not torch.equal(loaded.sequences, plain(model, prompt).sequences), "the control: one that can use it"


def test_a_batch_of_two_is_bypassed(client: kvclient.Client, model: Any, salt: bytes) -> None:
    kv, prompt = TransformersKV(client, model), prompt_of(DOCUMENT + REST)
    kv.save(prompt, computed_cache(model, prompt), salt=salt, wait=True)
    batch = torch.cat([prompt, prompt])
    answer = kv.generate(batch, salt=salt, max_new_tokens=4, **GREEDY)
    assert "(2, 160)" in answer.why_not
    assert same_logits(answer, plain(model, batch))
    assert not same_logits(answer, plain(model, another_beginning(batch))), "the control"
    cache, tokens = kv.load(batch, salt=salt)
    assert (cache.get_seq_length(), tokens) == (0, 0)
    assert "batch of 2" in kv.load(batch, salt=salt).why_not
    assert "batch of 2" in kv.save(batch, computed_cache(model, batch), salt=salt).why_not


def test_caches_of_other_kinds_are_not_saved(client: kvclient.Client, model: Any, salt: bytes) -> None:
    kv, tokens = TransformersKV(client, model), prompt_of(DOCUMENT)
    static = transformers.StaticCache(config=model.config, max_cache_len=256)
    with torch.no_grad():
        model(tokens, past_key_values=static)
    sliding = computed_cache(mistral(sliding_window=32), tokens)
    of_two = computed_cache(model, torch.cat([tokens, tokens]))
    other_type = computed_cache(llama(dtype=torch.bfloat16), tokens)
    fewer_layers = computed_cache(llama(num_hidden_layers=2), tokens)
    empty = transformers.DynamicCache(config=model.config)
    for cache, why in (
        (static, "StaticCache"), (sliding, "SlidingWindow"), (of_two, "(2, 2, 128, 16)"), (other_type, "bfloat16"),
        (fewer_layers, "2 layers"), (empty, "empty"), (None, "no cache"),
    ):  # fmt: skip
        saved = kv.save(tokens, cache, salt=salt)
        assert why in saved.why_not
        assert (saved.accepted, saved.known) == (0, 0)
    assert kv.load(tokens, salt=salt).tokens == 0


def test_options_that_leave_the_cache_alone_are_passed_on(client: kvclient.Client, model: Any, salt: bytes) -> None:
    kv, prompt = TransformersKV(client, model), prompt_of(DOCUMENT + REST)
    kv.save(prompt[:, :DOCUMENT], computed_cache(model, prompt[:, :DOCUMENT]), salt=salt, wait=True)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 5, "output_scores": True, "repetition_penalty": 1.1}
    torch.manual_seed(3)
    answer = kv.generate(prompt, salt=salt, max_new_tokens=6, attention_mask=torch.ones_like(prompt), **options)
    torch.manual_seed(3)
    reference = plain(model, prompt, 6, **options)
    assert answer.cached_tokens == DOCUMENT
    assert torch.equal(answer.sequences, reference.sequences)
    torch.manual_seed(3)
    wrong = computed_cache(model, another_beginning(prompt[:, :DOCUMENT]))
    misled = plain(model, prompt, 6, past_key_values=wrong, **options)
    assert not torch.equal(answer.sequences, misled.sequences), "the control: another's cache is noticed"
    assert len(answer.output.scores) == 6


# -- the daemon comes and goes ----------------------------------------------------------------------------------


def test_without_a_daemon_it_is_plain_transformers(tmp_path: Path, model: Any) -> None:
    prompt = prompt_of(DOCUMENT + REST)
    with kvclient.connect(tmp_path, timeout_s=0.05) as nobody:
        kv = TransformersKV(nobody, model)
        assert kv.why_not == ""
        answer = kv.generate(prompt, max_new_tokens=4, **GREEDY)
        assert (answer.cached_tokens, answer.saved.refused) == (0, {Reason.UNREACHABLE: 10})
        assert str(tmp_path) in answer.why_not
        assert same_logits(answer, plain(model, prompt))
        assert not same_logits(answer, plain(model, another_beginning(prompt))), "the control"
        assert kv.load(prompt).tokens == 0


def test_a_daemon_killed_and_restarted_is_a_miss_and_then_a_store_again(start_daemon: StartDaemon, model: Any) -> None:
    prompt = prompt_of(DOCUMENT + REST)
    reference = plain(model, prompt)
    first = start_daemon("--dram", "64MiB")
    with kvclient.connect(first.runtime_dir, timeout_s=PATIENCE_S) as client:
        kv = TransformersKV(client, model)
        kv.save(prompt[:, :DOCUMENT], computed_cache(model, prompt[:, :DOCUMENT]), wait=True)
        prefix = kv.load(prompt)
        assert prefix.tokens == DOCUMENT
        first.kill()
        assert same_bytes(prefix.cache, computed_cache(model, prompt), DOCUMENT)
        assert not same_bytes(prefix.cache, computed_cache(model, another_beginning(prompt)), DOCUMENT), "the control"
        orphaned = kv.generate(prompt, max_new_tokens=4, **GREEDY)
        assert (orphaned.cached_tokens, orphaned.saved.accepted) == (0, 0)
        assert same_logits(orphaned, reference)

        start_daemon("--dram", "64MiB")
        assert client.wait_connected(20.0), client.status
        cold = kv.generate(prompt, max_new_tokens=4, **GREEDY)
        assert (cold.cached_tokens, cold.saved.accepted) == (0, 10)
        warm = kv.generate(prompt, max_new_tokens=4, **GREEDY)
        assert warm.cached_tokens == DOCUMENT + BLOCK
        assert same_logits(cold, reference)
    assert not same_logits(plain(model, another_beginning(prompt)), reference), "the control of both"


def test_a_closed_client_is_an_error_of_the_caller(daemon: DaemonProcess, model: Any) -> None:
    client = kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S)
    kv = TransformersKV(client, model)
    client.close()
    with pytest.raises(kvclient.ClosedError):
        kv.load(prompt_of(40))


def test_blocks_larger_than_the_arenas_are_an_error_at_once_and_a_miss_when_a_smaller_daemon_comes_later(
    start_daemon: StartDaemon, model: Any
) -> None:
    prompt = prompt_of(40)
    first = start_daemon("--dram", "64MiB", "--arena", "32MiB")
    with kvclient.connect(first.runtime_dir, timeout_s=PATIENCE_S) as client:
        with pytest.raises(kvclient.UsageError, match="arena"):
            TransformersKV(client, llama(num_hidden_layers=6), block_tokens=1 << 16)
        kv = TransformersKV(client, model, block_tokens=1 << 14)  # 12 MiB
        first.kill()
        start_daemon("--dram", "64MiB", "--arena", "8MiB")
        assert client.wait_connected(20.0), client.status
        answer = kv.generate(prompt, max_new_tokens=4, **GREEDY)
        assert "arena" in answer.why_not
        assert same_logits(answer, plain(model, prompt))
        assert not same_logits(answer, plain(model, another_beginning(prompt))), "the control"


# -- load or compute --------------------------------------------------------------------------------------------


def known(namespace: kvclient.Namespace, prefix: Any, *, prefill_s: float, load_s: float) -> kvclient.Match:
    """Tell the daemon what a token costs and what 1 MiB costs, until it answers by that."""
    for tokens in range(16, 512, 16):
        namespace.report_prefill(0, tokens, tokens * prefill_s)
    for _ in range(64):
        namespace.report_load("dram", 1 << 20, load_s)
    match = namespace.match(prefix)
    for _ in range(1000):
        if match.load_s is not None and match.recompute_s is not None:
            break
        match = namespace.match(prefix)
    return match


@pytest.mark.parametrize(
    ("prefill_s", "load_s", "cached"), [(1e-6, 10.0, 0), (1.0, 1e-4, DOCUMENT)], ids=["compute", "load"]
)
def test_what_is_computed_faster_than_loaded_is_computed(
    start_daemon: StartDaemon, model: Any, prefill_s: float, load_s: float, cached: int
) -> None:
    prompt = prompt_of(DOCUMENT + REST)
    with kvclient.connect(start_daemon("--dram", "64MiB").runtime_dir, timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(10.0)
        kv = TransformersKV(client, model)
        assert kv.namespace is not None
        kv.save(prompt[:, :DOCUMENT], computed_cache(model, prompt[:, :DOCUMENT]), wait=True)
        match = known(kv.namespace, kv.namespace.keys(prompt[0, :DOCUMENT].numpy()), prefill_s=prefill_s, load_s=load_s)
        assert match.blocks == DOCUMENT // BLOCK
        assert match.worth_loading is (cached > 0)
        answer = kv.generate(prompt, max_new_tokens=4, **GREEDY)
        assert answer.cached_tokens == cached
        assert answer.why_not == ("" if cached else adapter.SLOWER)
        assert same_logits(answer, plain(model, prompt))
        assert not same_logits(answer, plain(model, another_beginning(prompt))), "the control"
        tried = [kv.load(prompt).tokens > 0 for _ in range(2 * TRIED_ANYWAY)]
        assert sum(tried) == (len(tried) if cached else 2), "now and then a load is tried all the same"


def test_a_daemon_that_hangs_costs_a_load_one_wait(
    start_daemon: StartDaemon, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(DOCUMENT + REST)
    daemon = start_daemon("--dram", "64MiB")
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(10.0)
        kv = TransformersKV(client, model)
        assert kv.namespace is not None
        fetches: list[int] = []
        honest = kvclient.Namespace.fetch

        def fetch(namespace: kvclient.Namespace, keys: Any, **given: Any) -> Any:
            fetches.append(len(keys))
            return honest(namespace, keys, **given)

        monkeypatch.setattr(kvclient.Namespace, "fetch", fetch)
        assert kv.load(prompt).tokens == 0
        assert len(fetches) == 1, "the control: what is not there is asked for"
        client._connection.timeout_ns = kv.namespace._timeout_ns = 3 * 10**8
        os.kill(daemon.process.pid, signal.SIGSTOP)
        hung = kv.load(prompt)
        os.kill(daemon.process.pid, signal.SIGCONT)
        assert (hung.tokens, hung.why_not) == (0, "the daemon has not answered in time")
        assert len(fetches) == 1


def test_prefills_teach_the_daemon_what_computing_costs(start_daemon: StartDaemon, model: Any) -> None:
    prompt = prompt_of(DOCUMENT + REST)
    with kvclient.connect(start_daemon("--dram", "64MiB").runtime_dir, timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(10.0)
        kv = TransformersKV(client, model)
        assert kv.namespace is not None
        stops: list[int] = []

        def stop(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            stops.append(ids.shape[1])
            return torch.zeros(1, dtype=torch.bool)

        kv.generate(prompt[:, : adapter.PROFILED_TOKENS - 1], max_new_tokens=1)
        assert client.ping() is not None
        keys = kv.namespace.keys(prompt[0, :DOCUMENT].numpy())
        assert kv.namespace.match(keys).recompute_s is None, "too short to say anything"
        kv.generate(prompt, max_new_tokens=2, stopping_criteria=[stop])
        assert stops == [DOCUMENT + REST + 1, DOCUMENT + REST + 2], "what the caller wants is asked too"
        kv.flush(10.0)
        cost_s = kv.namespace.match(keys).recompute_s
        assert cost_s is not None
        assert 0 < cost_s < 60
