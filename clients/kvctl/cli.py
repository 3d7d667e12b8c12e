"""The commands of kvctl, room by room.

Exit codes:

     0  done
     1  refused: by the daemon, or by you at the prompt; doctor: a check failed; scrub --wait: found damage
     2  usage: the command line is wrong, or a clear was neither confirmed nor told --yes
     3  no daemon is reachable
     4  no such tenant, namespace, block or pin
     5  timed out
    78  configuration: the runtime directory can never hold a socket

Answers go to stdout, as tables or (-o json) as one object with "version": 1; questions and errors to stderr. The
options before the command may also be written after it.
"""

import sys

from kvctl import acting, archive, bundle, checkup, completion, evict, live, move, prefixes, reading, routing
from kvctl.program import app, globals_first

__all__ = ["app", "globals_first", "main"]

# Each registers its commands when it is imported; `kvctl --help` lists them in this order.
ROOMS = (reading, live, prefixes, routing, acting, evict, move, archive, checkup, bundle, completion)
_PLACES = {room.__name__: place for place, room in enumerate(ROOMS)}
app.registered_commands.sort(key=lambda one: _PLACES.get(one.callback.__module__ if one.callback else "", len(ROOMS)))


def main() -> None:
    """The console script."""
    completion.prepare()
    app(args=globals_first(sys.argv[1:]), prog_name="kvctl")
