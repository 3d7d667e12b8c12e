"""Where the daemon's sockets are."""

import os
from pathlib import Path
from typing import Final

HOT_SOCKET: Final = "hot.sock"
SYSTEM_DIR: Final = Path("/run/kvstored")


def runtime_dir(given: str | os.PathLike[str] | None) -> Path:
    """The daemon's runtime directory: the first of

    1. what the caller gave,
    2. `$KVSTORED_RUNTIME_DIR`,
    3. `/run/kvstored`, if a daemon's socket is there,
    4. `$XDG_RUNTIME_DIR/kvstored`,
    5. `~/.local/state/kvstored/run`, where there is no such variable.
    """
    if given is not None:
        return Path(given)
    if named := os.environ.get("KVSTORED_RUNTIME_DIR"):
        return Path(named)
    if os.access(SYSTEM_DIR / HOT_SOCKET, os.F_OK):  # unlike `exists`, says no where it may not look
        return SYSTEM_DIR
    if of_user := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(of_user) / "kvstored"
    try:
        return Path.home() / ".local" / "state" / "kvstored" / "run"
    except RuntimeError:  # no such user, as in some containers
        return SYSTEM_DIR
