"""What SGLang's hierarchical cache imports and never calls on CPU, replaced; import this before anything of SGLang.

    triton, torchvision          compilers of kernels and of pictures: any name is there, and none does anything
    the index of quantizations   a list of all schemes and what they need; its submodules stay real
    torch.compile                leaves functions as they are
    the page hash                SGLang compiles it from C++ at first use; the same SHA-256 from the standard library

Host memory, its layouts, the backend factory and the controller with its threads are SGLang's own.
"""

import hashlib
import importlib.util
import struct
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch.utils import _triton, flop_counter  # noqa: F401 -- must see that there is no triton
from transformers.utils import import_utils

NAMES = ("triton", "torchvision")
QUANTIZATIONS = "sglang.srt.layers.quantization"


class _Nothing:
    """Can be called, subscripted, and used as a decorator, with or without arguments."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) and not named else self

    def __getattr__(self, name: str) -> Any:
        return _attribute(name)

    def __getitem__(self, _key: Any) -> "_Nothing":
        return self


def _attribute(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {}) if name[0].isupper() else _Nothing()


class _Module(ModuleType):
    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__ = spec
        self.__path__ = list(spec.submodule_search_locations or ())

    def __getattr__(self, name: str) -> Any:
        return _attribute(name)


class _Finder:
    """Finds what is in NAMES, and all below."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".", maxsplit=1)[0] in NAMES else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec)

    def exec_module(self, _module: ModuleType) -> None:
        pass


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return _Nothing() if function is None else function


class _Hash:
    """As SGLang's `hash_binding.cpp`: SHA-256 of the digest before it and the tokens of a page, 32 bits each."""

    @staticmethod
    def get_hash(
        tokens: Sequence[int], length: int, width: int, _bigram: bool, before: bytes | None, page: int | None
    ) -> str | list[str]:
        digests = []
        for first in range(0, length, page or length):
            some = tokens[first * width : min(first + (page or length), length) * width]
            before = hashlib.sha256((before or b"") + struct.pack(f"<{len(some)}I", *some)).digest()
            digests.append(before.hex())
        return digests if page is not None else digests[0]


_triton.has_triton_package()  # both are asked once, and remembered
import_utils.is_torchvision_available()
setattr(torch, "compile", _as_it_is)  # noqa: B010 -- a type of its own
sys.meta_path.insert(0, _Finder())
_spec = importlib.util.find_spec("sglang")
assert _spec is not None
assert _spec.submodule_search_locations is not None
_index = ModuleSpec(QUANTIZATIONS, None, is_package=True)
_index.submodule_search_locations = [f"{_spec.submodule_search_locations[0]}/srt/layers/quantization"]
sys.modules[QUANTIZATIONS] = _Module(_index)

from sglang.srt.mem_cache.cpp_utils import native_hash  # noqa: E402 -- with the stand-ins

native_hash._load_native_hash_module = _Hash  # noqa: SLF001
