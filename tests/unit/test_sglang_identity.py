"""What the namespace of an SGLang engine says of its weights and of how they are computed with, and who is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvclient.integrations.sglang_settings import Settings
from kvproto.errors import UsageError
from tests.unit.engine_kit import hub, sglang_backend

MODEL = "org/model"


@pytest.fixture
def backend() -> Any:
    """The module."""
    return sglang_backend()


def identity(backend: Any, settings: Settings | None = None, **arguments: Any) -> Any:
    """Of an engine that was started with these arguments."""
    bag = SimpleNamespace(**({"model_path": MODEL, "load_format": "auto", "revision": None} | arguments))
    for name in ("get_model", "get_lora", "get_device"):
        setattr(backend.runtime_context, name, lambda: bag)
    config = SimpleNamespace(
        model_name="model", is_mla_model=False, attn_cp_rank=0, attn_cp_size=1,
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1,
    )  # fmt: skip
    pages = SimpleNamespace(words="pages", dtype="bfloat16", tokens=16, page_bytes=4096, latent=False)
    return backend._identity(config, pages, settings or Settings(), "default")


def test_weights_are_those_of_the_folder_that_they_are_loaded_from(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, other = hub(monkeypatch, tmp_path / "usual", MODEL), hub(None, tmp_path / "other", MODEL)
    for folder, weights in ((usual, b"old"), (other, b"new")):
        (folder / "model.safetensors").write_bytes(weights)
    first, download_dir = identity(backend), str(tmp_path / "other")
    assert first == identity(backend, download_dir=None)
    second = identity(backend, download_dir=download_dir)
    assert second.revision != first.revision, "SGLang loads them with --download-dir from there"
    assert second.model == first.model, "the control"
    (usual / "config.json").write_text('{"architectures": ["Llama"]}')
    third = identity(backend, download_dir=download_dir)
    assert third.model.startswith("Llama "), "what says how to compute comes out of the usual cache all the same"
    (usual / "modeling.py").write_text("scale = 2")
    assert identity(backend, download_dir=download_dir).revision != third.revision


def test_scales_are_told_apart_by_what_is_in_their_file(backend: Any, tmp_path: Path) -> None:
    def model(path: Path | None) -> str:
        arguments = {"model_path": str(tmp_path), "quantization_param_path": path and str(path)}
        return str(identity(backend, Settings(revision="mine"), **arguments).model)

    scales, moved = tmp_path / "scales.json", tmp_path / "moved.json"
    scales.write_text('{"1": 0.5}')
    moved.write_text('{"1": 0.5}')
    first = model(scales)
    assert first == model(moved) != model(None)
    scales.write_text('{"1": 0.7}')
    assert model(scales) != first
    with pytest.raises(UsageError, match="quantization_param_path names cannot be read"):
        model(tmp_path / "none")


def test_a_model_that_takes_images_is_refused_unless_whoever_runs_it_answers_for_their_names(backend: Any) -> None:
    config = SimpleNamespace(dcp_size=1)

    def trouble(model: Any, *, images: bool = False) -> str:
        def found() -> Any:
            if model is None:
                raise ValueError("Global server args is not set yet!")
            return model

        backend.runtime_context.process_model_config = found
        return str(backend._trouble(config, Settings(images=images)))

    sees, hears = SimpleNamespace(is_multimodal=True), SimpleNamespace(is_multimodal=False, is_audio_model=True)
    for model in (sees, hears):
        assert '"images": true' in trouble(model)
        assert trouble(model, images=True) == ""
    assert trouble(SimpleNamespace(is_multimodal=False, is_audio_model=False)) == "", "the control"
    assert trouble(None) == ""
