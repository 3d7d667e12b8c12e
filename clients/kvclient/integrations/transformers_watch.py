"""Whether a model still computes what it did when its KV was named: asked before each load and each save.

    made     after the probe, before the digest    what is there is noted: modules, tensors, adapters
    asked    `trouble`                             a sentence, or nothing: all is as it was

Nothing is copied and nothing kept alive: of tensors their addresses and torch's counts of changes are compared. 0.5 ms
for 1,000 modules. Not seen is what torch does not count (writes through `.data` or NumPy, tensors of inference mode),
and plain attributes of modules (a `scaling`, say), but for those by which adapters are switched and `forward`.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, Final

import torch
from torch.nn.modules import module as torch_module

# By which PEFT's layers and models say what is active, turned off, and added to the weights.
_SWITCHES: Final = ("_active_adapter", "active_adapter", "_disable_adapters", "merged_adapters")

# Who places forward hooks that look on, and change nothing: for `output_hidden_states`, and for gradients.
_LOOKING_ON: Final = frozenset({"transformers.utils.output_capturing", "transformers.modeling_utils"})

_PLAIN: Final = (torch.Tensor, torch.nn.Parameter)
_training = attrgetter("training")
_changes = attrgetter("_version")


class ModelWatch:
    """One model as it was when this was made. Any thread that may use the model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        modules: list[Any] = list(model.modules())
        tensors = _tensors(modules)
        # Not held: who replaces weights must not have both in memory.
        self._modules = [weakref.ref(module) for module in modules]
        self._noted = [weakref.ref(tensor, self._note_gone) for tensor in tensors if not tensor.is_meta]
        self._gone = False  # what has taken an address since may be another tensor
        self._switched = [_has_switches(module) for module in modules]
        self._choices = self._choices_of(modules)
        self._there = _identities(modules, tensors)
        self._placed = [type(tensor) in _PLAIN and tensor.layout is torch.strided for tensor in tensors]
        self._counted = [not (tensor.is_meta or tensor.is_inference()) for tensor in tensors]
        self._marks = self._marks_of(tensors)

    def trouble(self) -> str:
        """Why what the model computes now may be something else, or is by chance; empty if it is what it was."""
        modules = [ref() for ref in self._modules]
        if self._gone or None in modules:
            return _OTHER_WEIGHTS
        if any(map(_training, modules)):
            whole = "the model" if self._model.training else "a part of the model"
            return f"{whole} is in training mode; call model.eval()"
        if hooked := _hooked(modules):
            return f"a forward hook on {hooked} may change what the model computes"
        if self._choices_of(modules) != self._choices:
            return _OTHER_CHOICES
        tensors = _tensors(modules)
        if _identities(modules, tensors) != self._there or self._marks_of(tensors) != self._marks:
            return _OTHER_WEIGHTS
        return ""

    def _note_gone(self, _: object) -> None:
        self._gone = True

    def _marks_of(self, tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
        """Where those that were noted lie, as far as that can be asked, and how often they were changed."""
        return (
            [tensor.data_ptr() for tensor in compress(tensors, self._placed)],  # subclasses may have none
            [*map(_changes, compress(tensors, self._counted))],
        )

    def _choices_of(self, modules: Sequence[Any]) -> list[Any]:
        """How attention is computed, which adapters are loaded, and what of them is in use."""
        loaded = getattr(self._model, "peft_config", None)
        return [
            getattr(self._model.config, "_attn_implementation", None),
            getattr(self._model, "_hf_peft_config_loaded", False),
            sorted(loaded) if isinstance(loaded, Mapping) else loaded is not None,
            *(_switches(module) for module in compress(modules, self._switched)),
        ]


_OTHER_WEIGHTS: Final = "the weights have changed; make a new TransformersKV"
_OTHER_CHOICES: Final = (
    "other adapters are active than when this TransformersKV was made, or another attention; make a new one for them"
)


def _tensors(modules: Sequence[Any]) -> list[torch.Tensor]:
    """All parameters and buffers, in order; those that are shared more than once."""
    return [
        tensor
        for module in modules
        for tensors in (module._parameters, module._buffers)  # noqa: SLF001  # `parameters()` takes twice as long
        if tensors
        for tensor in tensors.values()
        if tensor is not None
    ]


def _identities(modules: Sequence[Any], tensors: Sequence[torch.Tensor]) -> tuple[list[Any], ...]:
    """Which modules, tensors and `forward`s of a module's own there are."""
    return (
        [id(child) for module in modules for child in module._modules.values()],  # noqa: SLF001  # as below
        [0 if tensor.is_meta else id(tensor) for tensor in tensors],  # one that is offloaded is new after each pass
        [module.__dict__.get("forward") for module in modules],
    )


def _has_switches(module: Any) -> bool:
    return any(name in module.__dict__ or hasattr(type(module), name) for name in _SWITCHES)


def _switches(module: Any) -> list[Any]:
    """How they stand, and the factors by which adapters are added: copied where they are lists."""
    values = [getattr(module, name, None) for name in _SWITCHES]
    factors = module.__dict__.get("scaling")
    if isinstance(factors, Mapping):
        values += (factor for factor in factors.values() if isinstance(factor, int | float))
    return [tuple(value) if isinstance(value, list | set) else value for value in values]


def _hooked(modules: Sequence[Any]) -> str:
    """What has a hook that may change what goes in or comes out; empty if nothing has.

    Accelerate's are none of torch's: it puts another `forward` into a module.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:  # noqa: SLF001  # not to be asked for
        return "all modules"
    for module in modules:
        if (module._forward_hooks or module._forward_pre_hooks) and any(map(_may_change, _hooks(module))):  # noqa: SLF001
            return type(module).__name__
    return ""


def _hooks(module: Any) -> Iterator[Any]:
    yield from module._forward_hooks.values()  # noqa: SLF001
    yield from module._forward_pre_hooks.values()  # noqa: SLF001


def _may_change(hook: Any) -> bool:
    return getattr(hook, "__module__", None) not in _LOOKING_ON
