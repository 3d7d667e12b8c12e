"""Acts on the owner thread, and what is known of one when its caller's time is over.

    it waits for its turn yet     it is withdrawn: nothing was done, and nothing will be
    it has begun                  it goes on, and its end is heard of later: by the audit, and so by `kvctl audit`

Handler threads.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from kvstored.control_port import AdminPort, Owner

Report = TypeVar("Report")


class GoesOnError(Exception):
    """The caller's time is over, and what they asked for is finished without them."""

    def __init__(self, end: "Future[Any]") -> None:
        """`end` will have the report, or what went wrong; its callbacks run on the owner thread."""
        super().__init__("it has begun, and goes on")
        self.end = end


def carry_out(owner: Owner, act: Callable[[AdminPort], "Future[Report]"], wait_s: float) -> Report:
    """Have the owner do something, and wait for its end. Raises what it raises.

    After `wait_s` seconds: TimeoutError if it has not begun, and then it never does; GoesOnError if it has.
    """
    end: Future[Report] = Future()

    def begin(port: AdminPort) -> None:
        if not end.set_running_or_notify_cancel():
            return
        try:
            act(port).add_done_callback(lambda done: _pass_on(done, end))
        except Exception as error:  # noqa: BLE001  it is raised again in the thread that asked
            end.set_exception(error)

    until_s = time.monotonic() + wait_s
    try:
        owner.ask(begin, wait_s)
        return end.result(max(0.0, until_s - time.monotonic()))
    except TimeoutError:
        if end.cancel():
            raise
    if end.done():  # at the last moment
        return end.result()
    raise GoesOnError(end)


def at_once(report: Report) -> "Future[Report]":
    """Of an act that is over when it has begun."""
    done: Future[Report] = Future()
    done.set_result(report)
    return done


def _pass_on(done: "Future[Report]", end: "Future[Report]") -> None:
    error = done.exception()
    if error is None:
        end.set_result(done.result())
    else:
        end.set_exception(error)
