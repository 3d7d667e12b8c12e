"""A router that knows what each host holds, and sends a request where its prefix is.

    kvstored --runtime-dir /tmp/kv-a --dram 64MiB --events-listen grpc &
    kvstored --runtime-dir /tmp/kv-b --dram 64MiB --events-listen grpc &
    python clients/examples/router.py TENANT /tmp/kv-a /tmp/kv-b

Then each line of its input is answered with the directory of the host that should have the request. A line is the
whole digest of the model's namespace (several with commas, one a rank: all of them must have a block) and block keys,
all in hex. The client's `namespace.identity.digest().hex()` is it; `kvctl namespaces -o json` has it, too.

What each host holds is followed by its events (WatchBlocks): a set of keys in memory, so that choosing asks nobody.
What was just sent to a host is taken to be there for a moment, until its events say so.
Equal keys in other namespaces are other blocks: of another model, or of another form of it.
Where several hosts hold most of a prefix, their match summaries tell which one has it soonest; else they take turns.
"""

import sys
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.control_token import TOKEN_KEY, ask_token

AGAIN_S = 0.2  # before a host that went away is asked again
ASKED_S = 1.0
EXPECTED_S = 1.0  # how long a host is believed to have what was sent there, without a word of it
EXPECTED = 1 << 16  # such blocks of a host
CLOSE = 0.9  # of the longest prefix: who has so much of it is asked what loading it takes
EVEN = 1.5  # times what the others were sent at least: who was sent more is not sent yet more for little


class Host:
    """One daemon: what it holds, as far as it has told."""

    def __init__(self, runtime_dir: Path, tenant: str) -> None:
        self.name = str(runtime_dir)
        self.routed = 0  # blocks of requests that were sent there
        self.up = False  # it tells
        self._runtime_dir, self._tenant = runtime_dir, tenant
        self._held: defaultdict[str, dict[bytes, bool]] = defaultdict(dict)  # by namespace and key: in DRAM?
        self._expected: OrderedDict[tuple[str, bytes], float] = OrderedDict()  # what it will tell of, until when
        self._next: int | None = None
        self._news = threading.Condition()
        self._channel = grpc.insecure_channel(f"unix:{runtime_dir}/control.sock")
        self._stub: Any = control_pb2_grpc.ControlStub(self._channel)  # type: ignore[no-untyped-call, unused-ignore]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def prefix(self, namespaces: Sequence[str], keys: Sequence[bytes]) -> int:
        """How many of the first blocks of a chain it has in all of these. Asks nobody."""
        now_s = time.monotonic()
        held = [(namespace, self._held.get(namespace, {})) for namespace in namespaces]

        def has(key: bytes) -> bool:
            return all(key in one or self._expected.get((name, key), 0.0) > now_s for name, one in held)

        return next((i for i, key in enumerate(keys) if not has(key)), len(keys))

    def expect(self, namespaces: Sequence[str], keys: Sequence[bytes]) -> None:
        """A request with these was sent there: soon it has them, and in a moment it tells of that."""
        until_s = time.monotonic() + EXPECTED_S
        with self._news:
            for name in ((namespace, key) for namespace in namespaces for key in keys):
                self._expected[name] = until_s
                self._expected.move_to_end(name)
            while len(self._expected) > EXPECTED:
                self._expected.popitem(last=False)

    def wait(self, namespaces: Sequence[str], keys: Sequence[bytes], blocks: int, timeout_s: float) -> bool:
        """Until it has told of so many of them."""
        with self._news:
            return self._news.wait_for(lambda: self.prefix(namespaces, keys) == blocks, timeout_s)

    def summary(self, namespaces: Sequence[str], keys: Sequence[bytes]) -> pb.SummariseMatchResponse | None:
        """As the host itself says now; None: it does not answer."""
        request = pb.SummariseMatchRequest(tenant=self._tenant, namespace_digests=namespaces, keys=keys)
        try:
            answer: pb.SummariseMatchResponse = self._stub.SummariseMatch(
                request, timeout=ASKED_S, metadata=self._token()
            )
        except grpc.RpcError:
            return None
        return answer

    def tenants(self) -> set[str] | None:
        """Those that it knows, as far as we may ask; None: it does not answer."""
        try:
            answer = self._stub.ListTenants(pb.ListTenantsRequest(), timeout=ASKED_S, metadata=self._token())
        except (grpc.RpcError, OSError, ValueError):
            return None
        return {one.name for one in answer.tenants}

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
                self.up = False
                with self._news:
                    self._held.clear()
                    self._expected.clear()
                    self._news.notify_all()
            self._over.wait(AGAIN_S)

    def _learn(self, message: pb.BlockChanges) -> None:
        with self._news:
            self.up = True
            if message.cleared:
                self._held.clear()
            held = self._held[message.namespace_digest] if message.changes else {}
            for change in message.changes:
                if change.dram or change.disk:
                    held[change.key] = change.dram
                else:
                    held.pop(change.key, None)
                    self._expected.pop((message.namespace_digest, change.key), None)
            self._next = message.next
            self._news.notify_all()


def choose(hosts: Sequence[Host], namespaces: Sequence[str], keys: Sequence[bytes]) -> Host:
    """The host that has most of a prefix, and of those that have about as much the one that has it soonest.

    For less than half of a prompt no host is sent much more than the others: all hosts' memories are to be used. What
    nobody has goes to the host that was sent least. A host that is down has no turn, unless all are.
    """
    hosts = [host for host in hosts if host.up] or list(hosts)
    has = {host: host.prefix(namespaces, keys) for host in hosts}
    longest = max(has.values())
    close = [host for host in hosts if has[host] >= CLOSE * longest]
    known = 2 * longest >= len(keys)
    if not known:
        most = EVEN * min(host.routed for host in hosts) + len(keys)
        close = [host for host in close if host.routed <= most] or hosts
    ask = known and len(close) > 1
    chosen = min(close, key=lambda host: (_load_s(host, namespaces, keys) if ask else 0.0, host.routed))
    chosen.routed += len(keys)
    chosen.expect(namespaces, keys)
    return chosen


def _load_s(host: Host, namespaces: Sequence[str], keys: Sequence[bytes]) -> float:
    """Seconds until the prefix could be used; where nobody has measured, what lies on disk is later."""
    summary = host.summary(namespaces, keys)
    if summary is None:
        return float("inf")
    return summary.load_s if summary.HasField("load_s") else float(summary.disk_blocks)


def main(tenant: str, *runtime_dirs: str) -> None:
    """Answer lines of a namespace and keys."""
    hosts = [Host(Path(runtime_dir), tenant) for runtime_dir in runtime_dirs]
    for text in unheard(hosts, tenant):
        print(text, file=sys.stderr, flush=True)
    for line in sys.stdin:
        namespaces, *keys = line.split() or [""]
        if not namespaces or not keys:
            print("a line is the digest of a namespace, and block keys", file=sys.stderr, flush=True)
            continue
        print(choose(hosts, namespaces.split(","), [bytes.fromhex(key) for key in keys]).name, flush=True)


def unheard(hosts: Sequence[Host], tenant: str) -> list[str]:
    """Hosts from which nothing can be learned now, in words: a name may be wrong, or nobody has come yet."""
    said = []
    for host in hosts:
        known = host.tenants()
        if known is None:
            said.append(f"{host.name} does not answer; it is asked again")
        elif tenant not in known:
            there = ", ".join(sorted(known)) or "none yet"
            said.append(f"{host.name} knows no tenant {tenant} (there are: {there}); it only takes its turn")
    return said


if __name__ == "__main__":
    main(*sys.argv[1:])
