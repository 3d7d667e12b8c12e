"""Weights of a vLLM engine that change in place: vLLM tells a connector nothing of it, so its workers are watched.

A plain reset of its prefix cache does not ask the connector either; `reset_connector=True` does. Whoever changes
weights in a way of his own, with a method that is not among these, must ask for that.
"""

import functools
import logging
import pkgutil
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

_log = logging.getLogger(__name__)

METHODS: Final = ("reload_weights", "start_weight_update", "start_draft_weight_update", "update_weights")


class Watcher(Protocol):
    """Who is to know."""

    def leave(self) -> None:
        """Weights are about to be others, perhaps."""


_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()  # of this process; an engine too many is no harm


def watch(worker: type | str | None, watcher: Watcher) -> None:
    """Tell `watcher`, for as long as it lives, when a worker of this class is given other weights.

    `worker`: a class or its full name; what cannot be found is not watched.
    """
    _watchers.add(watcher)
    try:
        found: Any = pkgutil.resolve_name(worker) if isinstance(worker, str) else worker
    except (ImportError, AttributeError, ValueError) as error:
        _log.warning("weights that change in place go unnoticed: no worker %r: %s", worker, error)
        return
    for name in METHODS:
        method = getattr(found, name, None)
        if callable(method) and not hasattr(method, "tells_kvstored"):
            setattr(found, name, _telling(method))


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def tell(*given: Any, **named: Any) -> Any:
        for watcher in list(_watchers):
            watcher.leave()
        return method(*given, **named)

    tell.tells_kvstored = True  # type: ignore[attr-defined]
    return tell
