"""Programs and workflows in the asyncio flavour: as in hints.py, but what names keys is awaited."""

from collections.abc import Sequence

from kvclient.aio_connection import AsyncConnection
from kvclient.hints import ProgramWords, RunWords, WorkflowWords
from kvclient.policy import PolicyVerbs
from kvclient.steps import Steps


class AsyncProgram(ProgramWords):
    """As `Program`; a plain context manager, since leaving it never waits."""

    def __init__(self, connection: AsyncConnection, name: str, idle_s: float | None) -> None:
        self._connection = connection
        super().__init__(connection, name, idle_s)

    async def context(self, namespace: PolicyVerbs, keys: Sequence[bytes]) -> None:
        """As `Program.context`."""
        await self._connection.run(self._context(namespace, keys))


class AsyncRun(RunWords):
    """As `Run`."""

    def __init__(
        self,
        connection: AsyncConnection,
        name: str | None,
        workflow: WorkflowWords | None,
        idle_s: float | None = None,
    ) -> None:
        self._connection = connection
        super().__init__(connection, name, workflow, idle_s)

    async def bind(self, step: str, namespace: PolicyVerbs, keys: Sequence[bytes]) -> None:
        """As `Run.bind`."""
        await self._connection.run(self._binding(step, namespace, keys))


class AsyncWorkflow(WorkflowWords):
    """As `Workflow`."""

    def __init__(self, connection: AsyncConnection, name: str, given: Steps) -> None:
        self._connection = connection
        super().__init__(connection, name, given)

    def run(self, id: str | None = None, idle_s: float | None = None) -> AsyncRun:  # noqa: A002
        """As `Workflow.run`."""
        return AsyncRun(self._connection, id, self, idle_s)
