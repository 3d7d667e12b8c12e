"""LMCache's own connector for vLLM, as `kv_connector_module_path`, made to run beside vLLM 0.32 on CPU.

LMCache imports numba, and vLLM looks into every object of every module when it puts its kernels in place. One of
llvmlite's objects has another object where its dictionary should be, and vLLM ends. Here there is nothing in it.
"""

import builtins
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def _vars(value: object) -> Mapping[str, Any]:
    found = builtins.vars(value)
    return found if isinstance(found, Mapping) else {}


vars(import_module("vllm.triton_utils.dispatcher"))["vars"] = _vars
LMCacheMPConnector = import_module("lmcache.integration.vllm.lmcache_mp_connector").LMCacheMPConnector
