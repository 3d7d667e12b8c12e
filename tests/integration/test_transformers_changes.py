"""A model that computes something else than when its TransformersKV was made is bypassed, for loads and for saves.

Each case has its controls: as the model was, its prefix is loaded and the logits are equal to the last bit; and on what
was stored of the model as it was, the changed one says something else.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import kvclient
from kvclient.integrations.transformers import TransformersKV
from kvclient.integrations.transformers_watch import ModelWatch
from tests.integration.test_transformers import (
    DOCUMENT,
    GREEDY,
    REST,
    another_beginning,
    computed_cache,
    llama,
    plain,
    prompt_of,
    salt,
    same_logits,
)

pytestmark = pytest.mark.slow

__all__ = ["salt"]  # the fixture

Undo = Callable[[], object] | None


class Lora(torch.nn.Module):
    """As PEFT's layers: the weights of all adapters are there, and a plain attribute says which one is active."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer: Any = base
        self.lora: Any = torch.nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        for seed, name in enumerate(("french", "german")):
            self.lora[name] = added = torch.nn.Linear(base.in_features, base.out_features, bias=False)
            self.scaling[name] = 1.0
            with torch.no_grad():
                added.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
        self._active_adapter = ["french"]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def forward(self, x: torch.Tensor) -> Any:
        y = self.base_layer(x)
        if self._disable_adapters:
            return y
        return y + sum(self.lora[name](x) * self.scaling[name] for name in self._active_adapter)


def add_lora(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.k_proj = Lora(layer.self_attn.k_proj)
        layer.self_attn.v_proj = Lora(layer.self_attn.v_proj)
    model._hf_peft_config_loaded = True
    model.peft_config = {"french": None, "german": None}
    model.eval()


def with_lora() -> Any:
    model = llama(3)
    add_lora(model)
    return model


def switch(model: Any, **values: Any) -> None:
    for module in model.modules():
        if isinstance(module, Lora):
            for name, value in values.items():
                setattr(module, name, value)


def set_adapter(model: Any) -> Undo:
    switch(model, _active_adapter=["german"])
    return lambda: switch(model, _active_adapter=["french"])


def add_adapter_in_place(model: Any) -> Undo:
    for module in model.modules():
        if isinstance(module, Lora):
            module._active_adapter.append("german")
    return lambda: switch(model, _active_adapter=["french"])


def disable_adapters(model: Any) -> Undo:
    switch(model, _disable_adapters=True)
    return lambda: switch(model, _disable_adapters=False)


def load_adapters(model: Any) -> Undo:
    add_lora(model)
    return None


def merge(model: Any) -> Undo:
    """As PEFT does it, through `.data`: torch does not count it."""
    for module in model.modules():
        if isinstance(module, Lora):
            module.base_layer.weight.data += module.lora["german"].weight.data
            module.merged_adapters.append("german")
    return None


def scale_adapter(model: Any) -> Undo:
    for module in model.modules():
        if isinstance(module, Lora):
            module.scaling["french"] = 0.5
    return None


def change_weights(model: Any) -> Undo:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(0.5)
    return None


def replace_weights_twice(model: Any) -> Undo:
    """The second may come to lie where the first one lay."""
    attention = model.model.layers[0].self_attn
    for factor in (2.0, 0.25):
        attention.k_proj.weight = torch.nn.Parameter(attention.k_proj.weight.detach() * factor)
    return None


def change_buffer(model: Any) -> Undo:
    model.model.rotary_emb.inv_freq.mul_(0.25)
    return None


def train_layers(model: Any) -> Undo:
    model.model.layers.train()
    return model.eval  # type: ignore[no-any-return]


def steer(_: Any, _args: Any, output: Any) -> Any:
    return (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5


def steer_before(_: Any, args: Any) -> Any:
    return (args[0] + 0.5, *args[1:])


def steer_everything(module: Any, args: Any, output: Any) -> Any:
    return steer(module, args, output) if type(module).__name__ == "LlamaDecoderLayer" else None


def add_hook(model: Any) -> Undo:
    return model.model.layers[0].register_forward_hook(steer).remove  # type: ignore[no-any-return]


def add_pre_hook(model: Any) -> Undo:
    return model.model.layers[1].mlp.register_forward_pre_hook(steer_before).remove  # type: ignore[no-any-return]


def add_global_hook(_: Any) -> Undo:
    return register_module_forward_hook(steer_everything).remove


def add_global_pre_hook(_: Any) -> Undo:
    def steer_some(module: Any, args: Any) -> Any:
        return steer_before(module, args) if type(module).__name__ == "LlamaMLP" else None

    return register_module_forward_pre_hook(steer_some).remove


def add_forward(model: Any) -> Undo:
    attention = model.model.layers[0].mlp
    honest = attention.forward
    attention.forward = lambda x: honest(x) * 0.5
    return lambda: delattr(attention, "forward")


def other_attention(model: Any) -> Undo:
    model.set_attn_implementation("eager")
    return lambda: model.set_attn_implementation("sdpa")


FRENCH: dict[str, Any] = {"adapter": "french"}
PINNED: dict[str, Any] = {"revision": "r"}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], Callable[[Any], Undo], str]] = {
    "another adapter": (with_lora, FRENCH, set_adapter, "other adapters are active"),
    "another adapter, revision": (with_lora, FRENCH | PINNED, set_adapter, "other adapters are active"),
    "one more adapter": (with_lora, FRENCH, add_adapter_in_place, "other adapters are active"),
    "no adapter": (with_lora, FRENCH, disable_adapters, "other adapters are active"),
    "an adapter merged": (with_lora, FRENCH, merge, "other adapters are active"),
    "an adapter scaled": (with_lora, FRENCH, scale_adapter, "other adapters are active"),
    "adapters loaded": (lambda: llama(4), {}, load_adapters, "has adapters"),
    "adapters loaded, revision": (lambda: llama(4), PINNED, load_adapters, "has adapters"),
    "weights": (lambda: llama(4), {}, change_weights, "weights have changed"),
    "weights, revision": (lambda: llama(4), PINNED, change_weights, "weights have changed"),
    "weights twice": (lambda: llama(4), {}, replace_weights_twice, "weights have changed"),
    "a buffer": (lambda: llama(5), {}, change_buffer, "weights have changed"),
    "a buffer, revision": (lambda: llama(5), PINNED, change_buffer, "weights have changed"),
    "layers in training": (
        lambda: llama(6, attention_dropout=0.5),
        {},
        train_layers,
        "a part of the model is in",
    ),
    "a hook": (lambda: llama(7), {}, add_hook, "a forward hook on LlamaDecoderLayer"),
    "a pre-hook": (lambda: llama(7), {}, add_pre_hook, "a forward hook on LlamaMLP"),
    "a global hook": (lambda: llama(7), {}, add_global_hook, "a forward hook on all modules"),
    "a global pre-hook": (lambda: llama(7), {}, add_global_pre_hook, "a forward hook on all modules"),
    "a forward of its own": (lambda: llama(7), {}, add_forward, "weights have changed"),
    "another attention": (lambda: llama(7), {}, other_attention, "another attention"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_makes_a_model_compute_something_else_is_noticed(client: kvclient.Client, salt: bytes, case: str) -> None:
    build, arguments, change, why = CASES[case]
    model, prompt, others = build(), prompt_of(DOCUMENT + REST), prompt_of(DOCUMENT + REST, seed=9)
    kv = TransformersKV(client, model, **arguments)
    document = prompt[:, :DOCUMENT]
    stale = computed_cache(model, document)
    assert kv.save(document, stale, salt=salt, wait=True).accepted == DOCUMENT // 16

    def generated(tokens: torch.Tensor) -> Any:
        torch.manual_seed(7)  # of what drops out
        answer = kv.generate(tokens, salt=salt, max_new_tokens=4, **GREEDY)
        torch.manual_seed(7)
        assert same_logits(answer, plain(model, tokens))
        return answer

    answer = generated(prompt)
    assert (answer.cached_tokens, answer.why_not) == (DOCUMENT, ""), "the control"
    undo = change(model)
    try:
        for tokens in (prompt, others):
            answer = generated(tokens)
            assert why in answer.why_not
            assert (answer.cached_tokens, answer.saved.accepted) == (0, 0)
            saved = kv.save(tokens, computed_cache(model, tokens), salt=salt, wait=True)
            assert why in saved.why_not
            assert (saved.accepted, saved.known) == (0, 0)
        right = generated(prompt)
        torch.manual_seed(7)
        misled = plain(model, prompt, past_key_values=stale)
        assert not same_logits(right, misled), "the control: what is stored is of another model"
    finally:
        if undo is not None:
            undo()
    if undo is not None:
        assert kv.load(others, salt=salt).tokens == 0, "nothing of it was stored"
        assert kv.load(prompt, salt=salt).tokens == DOCUMENT + 16, "the control: as it was it goes on"


def test_a_model_with_a_hook_from_the_start_is_bypassed_until_it_is_gone(client: kvclient.Client, salt: bytes) -> None:
    model, prompt = llama(8), prompt_of(DOCUMENT + REST)
    TransformersKV(client, llama(8)).save(prompt, computed_cache(model, prompt), salt=salt, wait=True)
    handle = model.model.layers[0].register_forward_hook(steer)
    kv = TransformersKV(client, model)
    answer = kv.generate(prompt, salt=salt, max_new_tokens=4, **GREEDY)
    assert (answer.cached_tokens, answer.saved.accepted) == (0, 0)
    assert "a forward hook on LlamaDecoderLayer" in answer.why_not
    assert same_logits(answer, plain(model, prompt))
    stale = computed_cache(llama(8), prompt[:, :DOCUMENT])
    assert not same_logits(answer, plain(model, prompt, past_key_values=stale)), "the control: what is stored"
    handle.remove()
    assert kv.load(prompt, salt=salt).tokens == DOCUMENT + 16


def test_hooks_by_which_transformers_itself_looks_on_are_none(client: kvclient.Client, salt: bytes) -> None:
    model, prompt = llama(8), prompt_of(DOCUMENT + REST)
    kv = TransformersKV(client, model)
    with torch.no_grad():
        assert model(prompt, output_hidden_states=True).hidden_states
    model.enable_input_require_grads()
    assert any(module._forward_hooks for module in model.modules())
    kv.save(prompt[:, :DOCUMENT], computed_cache(model, prompt[:, :DOCUMENT]), salt=salt, wait=True)
    answer = kv.generate(prompt, salt=salt, max_new_tokens=4, **GREEDY)
    assert (answer.cached_tokens, answer.why_not) == (DOCUMENT, "")
    assert same_logits(answer, plain(model, prompt))
    assert not same_logits(answer, plain(model, another_beginning(prompt))), "the control"


def test_a_forward_that_was_there_from_the_start_is_the_models_own(client: kvclient.Client) -> None:
    """As accelerate places layers, and as `model.forward = torch.compile(model.forward)` does."""
    model = llama(8)
    add_forward(model)
    assert TransformersKV(client, model).load(prompt_of(40)).why_not == ""


def test_weights_that_are_elsewhere_are_watched_as_far_as_they_can_be() -> None:
    """Offloaded ones are others after each pass; some have no address."""
    model = llama()
    model.register_buffer("elsewhere", torch.empty(4, device="meta"))
    model.register_buffer("sparse", torch.eye(4).to_sparse())
    model.register_buffer("none", None)
    with torch.inference_mode():
        model.register_buffer("uncounted", torch.ones(4))
    watch = ModelWatch(model)
    model.elsewhere = torch.empty(4, device="meta")
    assert watch.trouble() == ""
    model.sparse = torch.eye(4).to_sparse()
    assert "weights have changed" in watch.trouble()
    other = ModelWatch(model)
    del model.uncounted
    assert "weights have changed" in other.trouble()


def test_what_is_watched_is_not_kept_alive() -> None:
    model = llama()
    watch = ModelWatch(model)
    gone = watch._modules[-1]
    assert gone() is model.lm_head
    model.lm_head = torch.nn.Linear(4, 4)
    assert gone() is None
    assert "weights have changed" in watch.trouble()
