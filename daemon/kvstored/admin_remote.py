"""How the remote tier stands: for status, metrics and warnings. Owner thread; threads count meanwhile."""

from collections.abc import Iterator
from typing import Final

from kvstore.report import RemoteReport
from kvstore.store import Store
from kvstore.tier.remote_breaker import Breaker, Circuit
from kvstored.remote import RemoteThreads

GOES_ON: Final = "goes on"
FAILING: Final = "fails"  # the last call did; calls still go through
STOPPED: Final = "stopped"
TRIES: Final = "tries again"
_OFF: Final = frozenset({STOPPED, TRIES})


def standing(breaker: Breaker) -> str:
    """How one kind of call stands, in a word of these."""
    if breaker.state is Circuit.CLOSED:
        return FAILING if breaker.reason else GOES_ON
    return STOPPED if breaker.state is Circuit.OPEN else TRIES


def remote_report(store: Store, threads: RemoteThreads, url: str) -> RemoteReport:
    """A copy of its counters."""
    remote, jobs, far = store.remote, threads.jobs, threads.far
    tally, writing, seen, calls = remote.tally, remote.writing, jobs.holdings.seen, far.tally
    reads, writes = standing(far.reading), standing(far.writing)
    if jobs.keeping.short and writes not in _OFF:  # who writes deletes first
        writes = standing(far.deleting)
    if reads in _OFF:  # who writes looks first what is there
        writes = reads
    return RemoteReport(
        url=url,
        reading=reads,
        writing=writes,
        reason=far.reading.reason or far.writing.reason or far.deleting.reason,
        capacity_bytes=threads.limits.quota_bytes,
        used_bytes=threads.ledger.total_bytes,
        objects=len(threads.ledger),
        bytes_per_s=int(remote.way.speed() or 0),
        sought=tally.sought,
        sought_empty=tally.seeks_empty,
        sought_dropped=tally.seeks_dropped,
        promoted=tally.promoted,
        promoted_bytes=tally.promoted_bytes,
        no_room=tally.no_room,
        kept=writing.tally.kept,
        kept_bytes=writing.tally.kept_bytes,
        not_worth=writing.tally.not_worth,
        not_kept=writing.tally.dropped + writing.tally.gone,
        shared=seen.skipped,
        removed=seen.removed,
        damaged=seen.damaged + tally.changed,
        absent=seen.absent,
        quarantined=jobs.holdings.known.bad,
        reads=calls.reads,
        writes=calls.writes,
        read_bytes=calls.read_bytes,
        written_bytes=calls.written_bytes,
        unreachable=calls.unreachable,
        refused=calls.refused,
        full=calls.full,
        queued_runs=writing.waiting,
        running=writing.running + remote.seeking,
        owed=threads.ledger.owed,
        not_noted=tally.not_noted,
        not_remembered=threads.ledger.unnoted + jobs.holdings.removals.dropped,
        closed=threads.ledger.closed,
        uncounted=threads.ledger.uncounted,
    )


def remote_warnings(report: RemoteReport) -> Iterator[str]:
    """Each names what is wrong and, after a semicolon, what to do."""
    if report.reading in _OFF:
        what = "the remote tier neither reads nor writes"
    elif report.writing in _OFF:
        what = "the remote tier does not write"
    elif FAILING in {report.reading, report.writing}:
        what = "the last request to the remote tier failed"
    else:
        what = ""
    if what:
        yield (
            f"{what} ({report.reason}): what only it has is missed, what cannot be written is given up; it tries again "
            "by itself, see that the far side answers, that credentials and the clock are right, and that there "
            "is room"
        )
    if report.uncounted:
        yield (
            f"{report.uncounted:,} objects of this host lie in the remote tier that it does not remember: remote.size "
            "does not bound what it has there; have a rule of the bucket remove what is old"
        )
    if report.closed:
        yield (
            f"of {report.closed:,} namespaces more was deleted than can be noted, so the remote tier neither reads nor "
            "writes them until all of them is removed there; that is done by itself where the far side can list what "
            "it has (S3), else clear them with kvctl clear"
        )
    if report.quarantined:
        yield (
            f"the remote tier has {report.quarantined:,} damaged objects, which are read again after a minute to an "
            "hour only; see the log for their names and remove them, or leave them to the bucket's rule"
        )
