"""What the namespace of a vLLM engine says of its weights and of how they are computed with, and who is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.engine_kit import hub, vllm_identity

MODEL = "org/model"


@pytest.fixture
def identity() -> Any:
    """The module."""
    return vllm_identity()


def engine(**model: Any) -> Any:
    """A configuration of vLLM, as far as it is read."""
    plain = {
        "model": MODEL, "revision": None, "seed": 0, "max_model_len": 4096, "architectures": ["Llama"],
        "dtype": "torch.bfloat16", "quantization": None, "quantization_config": None, "runner_type": "generate",
        "is_prefix_caching_supported": True, "hf_config": SimpleNamespace(to_dict=dict),
    }  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(**(plain | model)),
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256", cache_dtype="auto"),
        parallel_config=SimpleNamespace(),
        speculative_config=None,
        kv_transfer_config=SimpleNamespace(kv_role="kv_both"),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
    )


def test_weights_are_those_of_the_folder_that_they_are_loaded_from(
    identity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, other = hub(monkeypatch, tmp_path / "usual", MODEL), hub(None, tmp_path / "other", MODEL)
    for folder, weights in ((usual, b"old"), (other, b"new")):
        (folder / "model.safetensors").write_bytes(weights)
    config = engine()
    first = identity._weights(config)
    assert first == identity._weights(config) != ""
    config.load_config.download_dir = str(tmp_path / "other")
    second = identity._weights(config)
    assert second not in {first, ""}, "vLLM loads them with --download-dir from there"
    (usual / "modeling.py").write_text("scale = 2")
    assert identity._weights(config) not in {second, ""}, "code comes out of the usual cache all the same"
    config.load_config.download_dir = str(tmp_path / "neither")
    assert identity._weights(config) == ""


def test_a_model_whose_pooling_takes_no_prompt_in_parts_is_refused(identity: Any) -> None:
    def trouble(**model: Any) -> str:
        return str(identity.engine_trouble(engine(**model), any_version=False))

    assert "pooling" in trouble(runner_type="pooling", is_prefix_caching_supported=False)
    assert trouble(runner_type="pooling") == "", "the control: one that takes the last token"
    assert trouble(is_prefix_caching_supported=False) == "", "which vLLM says of generating models for other reasons"


def test_what_an_engine_quantizes_at_its_start_is_told_apart(identity: Any) -> None:
    def dtype(**model: Any) -> str:
        given = {"layout": "", "dtype": "torch.bfloat16", "block_tokens": 16, "block_bytes": 4096, "revision": "mine"}
        return str(identity.engine_identity(engine(**model), tp=(0, 1), **given).dtype)

    assert dtype() == "bfloat16 auto bfloat16 None", "as ever where nothing is"
    one = dtype(quantization="online", quantization_config={"linear": "fp8_per_tensor", "ignore": ["lm_head"]})
    same = dtype(quantization="online", quantization_config={"ignore": ["lm_head"], "linear": "fp8_per_tensor"})
    other = dtype(quantization="online", quantization_config={"linear": "fp8_per_tensor"})
    third = dtype(quantization="online", quantization_config=SimpleNamespace(linear="fp8_per_tensor"))
    assert one == same
    assert len({dtype(quantization="online"), one, other, third}) == 4


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer", None])
def test_an_engine_that_only_stores_or_only_loads_by_its_role_is_refused(identity: Any, role: str | None) -> None:
    config = engine()
    assert identity.engine_trouble(config, any_version=False) == "", "the control"
    config.kv_transfer_config.kv_role = role
    assert 'must be "kv_both"' in identity.engine_trouble(config, any_version=False)
