"""A router that knows what each host holds, and sends a request where its prefix is.

    kvstored --runtime-dir /tmp/kv-a --dram 64MiB --events-listen grpc &
    kvstored --runtime-dir /tmp/kv-b --dram 64MiB --events-listen grpc &
    python clients/examples/router.py TENANT /tmp/kv-a /tmp/kv-b

Then each line of its input, block keys in hex, is answered with the directory of the host that should have the request.

What each host holds is followed by its events (WatchBlocks): a set of keys in memory, so that choosing asks nobody.
Where several hosts hold most of a prefix, their match summaries tell which one has it soonest; else they take turns.
"""

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.control_token import TOKEN_KEY, ask_token

AGAIN_S = 0.2  # before a host that went away is asked again
ASKED_S = 1.0
CLOSE = 0.9  # of the longest prefix: who has so much of it is asked what loading it takes


class Host:
    """One daemon: what it holds, as far as it has told."""

    def __init__(self, runtime_dir: Path, tenant: str) -> None:
        self.name = str(runtime_dir)
        self.routed = 0  # blocks of requests that were sent there
        self._runtime_dir, self._tenant = runtime_dir, tenant
        self._held: dict[bytes, bool] = {}  # by key: in DRAM?
        self._next: int | None = None
        self._news = threading.Condition()
        self._channel = grpc.insecure_channel(f"unix:{runtime_dir}/control.sock")
        self._stub: Any = control_pb2_grpc.ControlStub(self._channel)  # type: ignore[no-untyped-call, unused-ignore]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def prefix(self, keys: Sequence[bytes]) -> int:
        """How many of the first blocks of a chain it has. Asks nobody."""
        return next((i for i, key in enumerate(keys) if key not in self._held), len(keys))

    def wait(self, keys: Sequence[bytes], blocks: int, timeout_s: float) -> bool:
        """Until it has told of so many of them."""
        with self._news:
            return self._news.wait_for(lambda: self.prefix(keys) == blocks, timeout_s)

    def summary(self, keys: Sequence[bytes]) -> pb.SummariseMatchResponse | None:
        """As the host itself says now; None: it does not answer."""
        request = pb.SummariseMatchRequest(tenant=self._tenant, keys=keys)
        try:
            answer: pb.SummariseMatchResponse = self._stub.SummariseMatch(
                request, timeout=ASKED_S, metadata=self._token()
            )
        except grpc.RpcError:
            return None
        return answer

    def close(self) -> None:
        """Follow it no more."""
        self._over.set()
        self._channel.close()
        self._thread.join()

    def _token(self) -> tuple[tuple[str, str], ...]:
        token = ask_token(self._runtime_dir, ASKED_S)
        return ((TOKEN_KEY, token.token),) if token is not None else ()

    def _follow(self) -> None:
        while not self._over.is_set():
            request = pb.WatchBlocksRequest(tenant=self._tenant, start_from=self._next, follow=True)
            try:
                for message in self._stub.WatchBlocks(request, metadata=self._token()):
                    self._learn(message)
            except (grpc.RpcError, OSError, ValueError):  # it went away, or this is over: another life counts anew
                self._next = None
                with self._news:
                    self._held.clear()
                    self._news.notify_all()
            self._over.wait(AGAIN_S)

    def _learn(self, message: pb.BlockChanges) -> None:
        with self._news:
            if message.cleared:
                self._held.clear()
            for change in message.changes:
                if change.dram or change.disk:
                    self._held[change.key] = change.dram
                else:
                    self._held.pop(change.key, None)
            self._next = message.next
            self._news.notify_all()


def choose(hosts: Sequence[Host], keys: Sequence[bytes]) -> Host:
    """The host that has most of a prefix, and of those that have about as much the one that has it soonest."""
    longest = max(host.prefix(keys) for host in hosts)
    close = [host for host in hosts if longest and host.prefix(keys) >= CLOSE * longest] or list(hosts)
    chosen = min(close, key=lambda host: (_load_s(host, keys) if longest and len(close) > 1 else 0.0, host.routed))
    chosen.routed += len(keys)
    return chosen


def _load_s(host: Host, keys: Sequence[bytes]) -> float:
    """Seconds until the prefix could be used; where nobody has measured, what lies on disk is later."""
    summary = host.summary(keys)
    if summary is None:
        return float("inf")
    return summary.load_s if summary.HasField("load_s") else float(summary.disk_blocks)


def main(tenant: str, *runtime_dirs: str) -> None:
    """Answer lines of keys."""
    hosts = [Host(Path(runtime_dir), tenant) for runtime_dir in runtime_dirs]
    for line in sys.stdin:
        print(choose(hosts, [bytes.fromhex(key) for key in line.split()]).name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
