"""Programs that the requests of an engine are turns of: what `kv_transfer_params` says of them, told to the daemon."""

from collections.abc import Sequence
from typing import Final

from kvclient.client import Client
from kvclient.hints import Program
from kvclient.integrations.vllm_settings import Wishes
from kvclient.namespace import Namespace

PROGRAMS: Final = 1024  # that are remembered; of the oldest the daemon hears no more


class Programs:
    """One engine's, the one that was used last at the end. Scheduler's thread; never waits for an open namespace."""

    def __init__(self, client: Client, shard: Namespace) -> None:
        """`shard`: the namespace in which contexts are named. One rank speaks for all."""
        self._client = client
        self._shard = shard
        self._programs: dict[str, Program] = {}

    def begin_turn(self, wishes: Wishes) -> None:
        """A request has come."""
        name = wishes.program
        program = self._programs.pop(name, None)
        if program is None:
            program = self._client.program(name)
        else:
            program.tool_finished()
        self._programs[name] = program
        if len(self._programs) > PROGRAMS:
            del self._programs[next(iter(self._programs))]

    def end_turn(self, wishes: Wishes, keys: Sequence[bytes]) -> None:
        """It is over, if it was a program's; `keys`: its context."""
        program = self._programs.get(wishes.program)
        if program is None:
            return
        if keys:
            program.context(self._shard, keys)
        if wishes.tool:
            program.tool_started(wishes.tool, wishes.tool_expected_s)
        elif wishes.program_finished:
            program.finished()
            del self._programs[wishes.program]
        else:
            program.turn_finished()
