"""What clients know of the future: programs of agents and their tools, workflows and their runs. All one way.

    program = client.program("agent 7")                       run = client.workflow("review", steps).run()
    program.context(ns, keys)      what it used last          run.bind("plan", ns, keys)    what a step will read
    program.tool_started("search")                            run.enter("plan")             it runs now
    program.tool_finished()                                   run.finished()
    program.finished()

Every word is sent at once if there is a session and room in its socket, and is dropped and counted otherwise
(`Status.hints_dropped`). A daemon that restarts has heard of nothing, so what is spoken of is announced anew to each
session before anything else is said of it: the program; the workflow and the run. So it is after a silence of half the
time in which a daemon forgets it. A daemon that has not knows them by their versions, and goes on with them. What was
bound, entered or named as context before is not repeated: the next turn says it anyway.

The two flavours differ in one thing: what names keys may have to open their namespace first, which waits.
"""

import contextlib
import dataclasses
import time
import uuid
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Self

from kvclient import flows
from kvclient.checks import duration_if_known, hinted_keys, name_of
from kvclient.endpoint import Endpoint
from kvclient.policy import PolicyVerbs
from kvclient.steps import Steps, steps_of, text_of
from kvproto.errors import ClosedError, ForkError, UsageError
from kvproto.policy_frames import Event, Hint, build_hint

if TYPE_CHECKING:
    from types import TracebackType

    from kvclient.connection import Connection
    from kvclient.protocol import Session

_VERSIONED: Final = frozenset({Event.BIND, Event.ENTER})
IDLE_S: Final = 3600  # a daemon forgets programs and runs that are silent for so long, unless told to wait longer,
WORKFLOW_IDLE_S: Final = 24 * 3600  # and workflows that nobody begins a run of


class Subject:
    """What hints are about. Words about it reach the daemon in the order of their versions, from whatever thread; of an
    asyncio client, only that of its loop may say any.
    """

    _heard_by: "weakref.ref[Session] | None" = None  # the session that it was announced to
    _said_ns = 0  # the last word of it there
    _over = False

    def __init__(
        self, endpoint: Endpoint, name: str, beginning: Hint | None, before: "Subject | None" = None,
        idle_s: float | None = None,
    ) -> None:  # fmt: skip
        """`beginning` announces it, to every session anew (None: others do), and `before` has to be known by then.

        A daemon forgets it after `idle_s` without a word.
        """
        self._endpoint = endpoint
        self.name = name
        self._beginning = beginning
        self._before = before
        self._idle_ns = int((IDLE_S if idle_s is None else idle_s) * 1e9)
        self.announce()

    def announce(self) -> None:
        """Say what it is, if there is anybody to tell who has not heard it; else the next word about it begins so."""
        session = self._endpoint.session()
        if session is not None:
            with self._endpoint.telling:
                self.introduce(session)

    def introduce(self, session: "Session") -> bool:
        """Announce it unless that session heard of it and knows it still; whether it does by now. Under `telling`."""
        if self._beginning is None or self._is_known_to(session):
            return True
        if self._before is not None and not self._before.introduce(session):
            return False
        if not self._endpoint.say(session, build_hint(self._beginning)):
            return False
        self._heard_by, self._said_ns = weakref.ref(session), time.monotonic_ns()
        return True

    def _is_known_to(self, session: "Session") -> bool:
        """Has it heard of this, and lately enough not to have forgotten it?"""
        heard_by = self._heard_by() if self._heard_by is not None else None
        return heard_by is session and time.monotonic_ns() - self._said_ns < self._idle_ns // 2

    def _tell(self, hint: Hint) -> None:
        self._tell_to(self._endpoint.session(), hint)

    def _tell_to(self, session: "Session | None", hint: Hint) -> None:
        if session is None:
            self._endpoint.drop_hint()
            return
        with self._endpoint.telling:
            self._over = False
            if self.introduce(session):
                if hint.event in _VERSIONED:
                    hint = dataclasses.replace(hint, version=time.monotonic_ns())
                if self._endpoint.say(session, build_hint(hint)):
                    self._said_ns = time.monotonic_ns()

    def _naming(self, namespace: PolicyVerbs, keys: Sequence[bytes], hint: Hint) -> flows.Flow[None]:
        """Tell something of the first 1,024 keys of a chain; nothing if there are none."""
        if not isinstance(namespace, PolicyVerbs):
            raise UsageError(f"keys are those of a namespace of a client, not of {type(namespace).__name__}")
        joined = hinted_keys(keys)
        if not joined:
            return flows.nothing()
        return namespace.naming(
            self._endpoint,
            lambda session, number: self._tell_to(session, dataclasses.replace(hint, namespace=number, keys=joined)),
        )

    def _end(self, event: Event) -> None:
        if not self._over:
            self._tell(Hint(event, self.name))
            self._over = True
            self._heard_by = None  # a word after the end is one about a new beginning
            if self._beginning is not None and self._beginning.version:
                self._beginning = dataclasses.replace(self._beginning, version=time.monotonic_ns())


class ProgramWords(Subject):
    """What both flavours say of a program."""

    def __init__(self, endpoint: Endpoint, name: str, idle_s: float | None) -> None:
        name = name_of("id", name)
        beginning = Hint(Event.PROGRAM, name, seconds=duration_if_known("idle_s", idle_s))
        super().__init__(endpoint, name, beginning, idle_s=idle_s)

    def tool_started(self, name: str, expected_s: float | None = None) -> None:
        """It waits for a tool from now on, for about `expected_s` seconds if that is known. Never waits."""
        seconds = duration_if_known("expected_s", expected_s)
        self._tell(Hint(Event.TOOL_STARTED, self.name, other=name_of("name", name), seconds=seconds))

    def tool_finished(self) -> None:
        """The tool has answered: the next turn is near. Never waits."""
        self._tell(Hint(Event.TOOL_FINISHED, self.name))

    def turn_finished(self) -> None:
        """The model has answered. Never waits."""
        self._tell(Hint(Event.TURN_FINISHED, self.name))

    def finished(self) -> None:
        """It will not come back: what is kept for it is let go. Never waits; any number of times."""
        self._end(Event.PROGRAM_FINISHED)

    def _context(self, namespace: PolicyVerbs, keys: Sequence[bytes]) -> flows.Flow[None]:
        return self._naming(namespace, keys, Hint(Event.CONTEXT, self.name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        with contextlib.suppress(ClosedError, ForkError):  # then the daemon hears no more of it anyway
            self.finished()


class Program(ProgramWords):
    """Made by `Client.program`: a context manager; leaving it says that the program is finished. Any thread."""

    def __init__(self, connection: "Connection", name: str, idle_s: float | None) -> None:
        self._connection = connection
        super().__init__(connection, name, idle_s)

    def context(self, namespace: PolicyVerbs, keys: Sequence[bytes]) -> None:
        """The program has used or stored this chain: that is its context now. Of a longer chain the first 1,024 keys.

        Waits only where the namespace is not open in this session yet, as every verb does then.
        """
        self._connection.run(self._context(namespace, keys))


class RunWords(Subject):
    """What both flavours say of one execution of a workflow."""

    def __init__(
        self, endpoint: Endpoint, name: str | None, workflow: "WorkflowWords | None", idle_s: float | None = None
    ) -> None:
        """`workflow` None: another client has begun this run and announces it."""
        name = uuid.uuid4().hex if name is None else name_of("id", name)
        self._steps = workflow.steps if workflow is not None else None
        beginning = None
        if workflow is not None:
            seconds = duration_if_known("idle_s", idle_s)
            beginning = Hint(Event.RUN, name, other=workflow.name, seconds=seconds, version=time.monotonic_ns())
        super().__init__(endpoint, name, beginning, workflow, idle_s)

    def enter(self, step: str) -> None:
        """A step runs from now on. Only beginnings are told: which steps are over follows from them. Never waits."""
        self._tell(Hint(Event.ENTER, self.name, other=self._step(step)))

    def finished(self) -> None:
        """This execution is over. Never waits; any number of times."""
        self._end(Event.RUN_FINISHED)

    def _binding(self, step: str, namespace: PolicyVerbs, keys: Sequence[bytes]) -> flows.Flow[None]:
        return self._naming(namespace, keys, Hint(Event.BIND, self.name, other=self._step(step)))

    def _step(self, name: str) -> str:
        if self._steps is not None and name not in self._steps:
            raise UsageError(f"the workflow has no step {name!r:.200}")
        return name_of("step", name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        with contextlib.suppress(ClosedError, ForkError):
            self.finished()


class Run(RunWords):
    """Made by `Workflow.run`, or by `Client.run` for one that another client began; leaving it says it is finished."""

    def __init__(
        self, connection: "Connection", name: str | None, workflow: "WorkflowWords | None", idle_s: float | None = None
    ) -> None:
        self._connection = connection
        super().__init__(connection, name, workflow, idle_s)

    def bind(self, step: str, namespace: PolicyVerbs, keys: Sequence[bytes]) -> None:
        """What a step will read, as far as it is known: a chain, instead of what was bound to it before.

        Of a longer chain the first 1,024 keys. Waits only where the namespace is not open in this session yet.
        """
        self._connection.run(self._binding(step, namespace, keys))


class WorkflowWords(Subject):
    """A graph of steps with a name. Who defines the same name later defines it anew; runs keep what they began with."""

    def __init__(self, endpoint: Endpoint, name: str, given: Steps) -> None:
        name, steps = name_of("name", name), steps_of(given)
        self.steps = frozenset(step.name for step in steps)
        # The version is that of the description, so that announcing it again neither ousts a newer one nor is refused.
        beginning = Hint(Event.WORKFLOW, name, text=text_of(steps), version=time.monotonic_ns())
        super().__init__(endpoint, name, beginning, idle_s=WORKFLOW_IDLE_S)


class Workflow(WorkflowWords):
    """Made by `Client.workflow`. Any thread."""

    def __init__(self, connection: "Connection", name: str, given: Steps) -> None:
        self._connection = connection
        super().__init__(connection, name, given)

    def run(self, id: str | None = None, idle_s: float | None = None) -> Run:  # noqa: A002
        """Begin an execution, under a new name unless `id` says which; one of that name before it is over.

        Over, too, once nothing was said of it for `idle_s` seconds (an hour by default). Never waits.
        """
        return Run(self._connection, id, self, idle_s)
