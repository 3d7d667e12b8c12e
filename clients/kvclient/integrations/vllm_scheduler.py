"""The scheduler's half of the vLLM connector: what is in the store, what to load, what to save, in no time.

    on_new_request        MATCH; blocks on disk: PREFETCH
    matched               MATCH again; None while blocks are on their way; how many tokens to load
    allocated             the load is planned for this step
    plan                  every step: saves of what it computes, fences, pins
    heard                 what became of it; what was refused is saved again, and no bad block stays in vLLM's cache
    finished              whether the engine must keep its blocks until the last save; what is held (`vllm_holds`)

A lookup is one round trip through shared memory's socket, bounded by the client's timeout; a daemon that does not
answer in time is not asked again for a while. This half moves no bytes and imports nothing of vLLM: requests are read
by the attributes that all tested versions have.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kvclient.client import Client
from kvclient.flows import NO_MATCH
from kvclient.integrations.trials import Trials
from kvclient.integrations.vllm_holds import Holds
from kvclient.integrations.vllm_jobs import LoadJob, Near, PinJob, Plan, Progress, WordJob
from kvclient.integrations.vllm_programs import Programs
from kvclient.integrations.vllm_saves import EngineMemory, Saves
from kvclient.integrations.vllm_settings import Settings, Wishes, wishes_of
from kvclient.integrations.vllm_steps import Steps
from kvclient.namespace import Namespace
from kvclient.policy import Prefetch
from kvclient.results import Match
from kvproto.errors import KvError

_log = logging.getLogger(__name__)
_clock = time.monotonic

SILENCE_S: Final = 1.0  # how long a daemon that has not answered is left alone, or that has answered slowly
QUICK_S: Final = 0.001  # what a lookup may take, however many come: several times what it does, less than it saves
WINDOW_S: Final = 0.1  # in which what lookups take beyond that may be as long as one alone may take
FRESH_S: Final = 0.002  # how long a lookup of a request that comes is good for its first step
AGAIN_S: Final = 0.002  # how often a request that waits for disk is looked up
ASK_EACH_S: Final = 0.05  # how often what another engine hands over is asked for
APART_S: Final = 0.0005  # between two lookups of all requests that wait for either: a step may look up many at once
STORE_S: Final = 0.05  # how long a request may wait for blocks that somebody is storing right now
SAME_S: Final = 5.0  # how long a request may wait for another one that loads the same
REFUSED_S: Final = 1.0  # how long a request's blocks are not saved again once some were refused
ROOMY_SHARE: Final = 0.25  # with so many free ones, what is freed last is not used again before it is saved


@dataclass(slots=True)
class Known:
    """What is known of one request of the engine."""

    request: Any
    wishes: Wishes
    stored: int = 0  # blocks from the front that are in the store, or will be
    save_after: float = 0.0  # not again before, as some were refused
    planned: tuple[int, int, bool, bool] | None = None  # a load: from, to, whether beside the forward, and from disk
    tried: bool | None = None  # loaded although computing is faster, decided once; None: it did not come to that
    found: tuple[float, Match] | None = None  # when it was looked up as it came, and what was there
    disk_until: float = 0.0  # how long it waits for what is on its way from disk,
    same_until: float = 0.0  # for what another request is loading,
    stored_until: float = 0.0  # and for what is just being stored
    handed_until: float = 0.0  # for what another engine is computing,
    ask_again: float = 0.0  # and when that is asked for by name, from disk or from beyond this host
    look_again: float = 0.0
    prefetches: list[Prefetch] = field(default_factory=list)  # one a rank
    loading: tuple[bytes, ...] = ()  # keys of a load that runs beside the forward,
    loading_into: tuple[int, ...] = ()  # and blocks of the engine that it fills
    outstanding: set[int] = field(default_factory=set)  # saves
    gone: bool = False  # the engine has finished it


class Scheduler:
    """One engine's. All methods on the scheduler's thread; none waits longer than the client's timeout."""

    def __init__(
        self,
        client: Client,
        shards: Sequence[Namespace],
        block_tokens: int,
        block_bytes: int,
        settings: Settings,
        *,
        memory: EngineMemory | None = None,
        near: Near | None = None,
    ) -> None:
        """`shards`: the namespace of every rank, made by `client`: a block is there if all of them have it.
        `near`: the only worker, if it is in this process and may begin a load while its step is planned.
        """
        self._client = client
        self._shards = shards
        self._near = near
        self._block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._settings = settings
        self._known: dict[str, Known] = {}
        self._loading: dict[bytes, str] = {}  # keys that some request is loading beside the forward
        self._plan = Plan()
        self._saves = Saves(len(shards))
        self._silent_until = 0.0
        self._slow: deque[tuple[float, float]] = deque()  # lookups that were not quick: when, and how long beyond that
        self._look_at = 0.0  # the last lookup that a request waits for
        self._off = False  # for good: see `reset`
        self._at_once: set[bytes] = set()  # keys of loads that are planned before the forward of the next step
        self._at_once_blocks = 0
        self._unsure: dict[str, tuple[int, ...]] = {}  # requests with such loads in the last step: their blocks
        self._memory = memory or EngineMemory()
        self.holds = Holds(self._memory, share=settings.hold_share, longest_s=settings.hold_longest_s)
        self._ready: set[str] = set()  # requests whose load beside the forward has ended, and that have not run since
        self._trials = Trials()
        self._programs = Programs(client, shards[0])
        self._steps = Steps(shards)
        self.counts: dict[str, float] = {}

    # -- requests come -------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """As early as anything is known of it: fetch from disk what it will need."""
        wishes = wishes_of(getattr(request, "kv_transfer_params", None))
        if _has_more_than_tokens(request):
            wishes = replace(wishes, load=False, store=False)
        known = self._known[request.request_id] = Known(request, wishes)
        if known.wishes.program:
            self._programs.begin_turn(known.wishes)
        keys = self._keys(known)
        if not known.wishes.load or not keys or known.wishes.priority == "low":
            return
        found = self._match(keys)
        known.found = (_clock(), found)
        known.stored = found.blocks  # also if the engine has all of it itself, and looks up nothing more
        if found.tiers.disk:
            self._prefetch(known, keys[: found.blocks])

    def matched(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load behind those that the engine has; None: ask again. And whether beside the forward."""
        known = self._known.get(request.request_id)
        if known is None:  # an engine that does not call `on_new_request`
            self.on_new_request(request)
            known = self._known[request.request_id]
        known.planned = None
        keys = self._keys(known)
        first = computed_tokens // self._block_tokens
        if self.holds:
            self.holds.make_room(request.num_tokens // self._block_tokens + 1 - first)
        if self._at_once and not self._at_once.isdisjoint(known.request.block_hashes[:first]):
            # vLLM's cache gives it what another request loads in this very step. If that load fails, whatever this
            # one computes is wrong, and vLLM would not make good all of it.
            return None, False
        if self._off or not known.wishes.load or len(keys) <= first or _has_more_than_tokens(known.request):
            return 0, False
        return self._look_up(known, keys, first)

    def _look_up(self, known: Known, keys: Sequence[bytes], first: int) -> tuple[int | None, bool]:
        now = _clock()
        if now < known.look_again or self._waits_for_another(known, keys[first], now):
            return None, False
        found = self._found_just_now(known, now) or self._match(keys)
        known.stored = max(known.stored, found.blocks)
        if self._waits_for_hand_over(known, found, keys, now) or self._waits_for_store(known, found, first, now):
            return None, False
        if found.blocks <= first or not self._is_to_load(known, found):
            return 0, False
        blocks, on_disk = found.blocks, found.tiers.disk
        if on_disk and self._waits_for_disk(known, keys[:blocks], now):
            return None, False
        count = blocks - first
        at_once_bytes = (self._at_once_blocks + count) * self._block_bytes  # of all requests of this step
        beside = bool(on_disk) or at_once_bytes > self._settings.at_once_bytes
        known.planned = (first, blocks, beside, bool(on_disk))
        if self._near is not None and not beside:
            self._near.ask_early(known.request.request_id, tuple(keys[first:blocks]))
        self._count("hit_tokens", count * self._block_tokens)
        return count * self._block_tokens, beside

    def allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """The engine has set memory aside; `external_tokens` of it are to be loaded."""
        known = self._known.get(request.request_id)
        if known is None:
            return
        planned, known.planned = known.planned, None
        known.prefetches.clear()
        if planned is None or not external_tokens:
            return
        first, stop, beside, from_disk = planned
        stop = min(stop, first + external_tokens // self._block_tokens)
        keys = tuple(self._keys(known)[first:stop])
        job = LoadJob(request.request_id, keys, tuple(block_ids[first:stop]), not beside, from_disk, bool(known.tried))
        fences = self._saves.readers(block_ids[first:])
        self._plan.loads.append(job)
        self._plan.fences |= fences
        if self._near is not None and not beside:
            self._near.begin_early(job, fences)
        if beside:
            known.loading, known.loading_into = keys, job.block_ids
            self._loading.update(dict.fromkeys(keys, request.request_id))
        else:
            self._at_once.update(keys)
            self._at_once_blocks += len(keys)

    # -- steps ---------------------------------------------------------------------------------------------------

    def plan(self, scheduled: dict[str, int], blocks_of: Callable[[str], Sequence[int]]) -> Plan:
        """What the workers do in this step. `scheduled`: tokens of each request in it."""
        plan, self._plan = self._plan, Plan()
        plan.forward = bool(scheduled)
        self._at_once.clear()
        self._at_once_blocks = 0
        self._unsure = {job.request: tuple(blocks_of(job.request)) for job in plan.loads if job.at_once}
        now = _clock()
        for request_id in scheduled:
            known = self._known.get(request_id)
            if known is None:  # whatever it writes, a save may read
                if self._saves:
                    plan.fences |= self._saves.readers(blocks_of(request_id))
                continue
            is_due = now >= known.save_after and self._to_save(known) > known.stored
            if not (is_due or self._saves):
                continue  # most steps of most requests; vLLM makes the list of its blocks when it is asked for
            block_ids = blocks_of(request_id)
            plan.fences |= self._saves.readers(block_ids[known.request.num_computed_tokens // self._block_tokens :])
            if is_due:
                self._save_into(plan, known, block_ids)
        self.holds.end_old()
        self._ready.difference_update(scheduled)
        if self._ready and not scheduled:  # they wait for memory, and nobody who runs will give it back
            self.holds.end_all()
        plan.timed = self._steps.begin(scheduled, self._known, loads=bool(plan.loads))
        return plan

    def reset(self) -> None:
        """The engine's weights may be others from now on: load and store nothing any more."""
        self._off = True
        self.holds.end_all()
        _log.warning(
            "the store is not used any more by this engine: its weights were changed, or its caches reset for that"
        )

    def finished(self, request: Any, block_ids: Sequence[int]) -> bool:
        """A request is over. Whether its blocks must stay until its saves have ended."""
        known = self._known.get(request.request_id)
        if known is None:
            return False
        known.gone = True
        self._ready.discard(request.request_id)
        if known.loading:  # the engine frees its blocks when the load has ended
            self._plan.dropped.add(request.request_id)
            self._end_load(known)
            self._programs.end_turn(known.wishes, ())
            del self._known[request.request_id]
            return False
        for prefetch in known.prefetches:
            prefetch.cancel()
        self._save_into(self._plan, known, block_ids)
        wishes = known.wishes
        keys = tuple(request.block_hashes[: known.stored])
        if keys and (wishes.pin_ttl_s is not None or wishes.retention):
            self._plan.pins.append(PinJob(keys, None if wishes.retention else wishes.pin_ttl_s, wishes.retention))
        if keys and wishes.priority:
            self._plan.pins.append(WordJob(keys, "soon" if wishes.priority == "high" else "hardly"))
        self._programs.end_turn(wishes, keys)
        held = wishes.hold_s > 0 and self.holds.add(block_ids, wishes.hold_s)
        if known.outstanding and (held or self._is_roomy()):
            return False  # its blocks are not written again for a while, and if they are, the save is withdrawn
        if known.outstanding:
            self._plan.closing.add(request.request_id)
            return True
        del self._known[request.request_id]
        return False

    def heard(self, progress: Progress | None, received: Iterable[str], bad_blocks: Collection[int] = ()) -> None:
        """What the workers have done. `bad_blocks`: of the engine, that they could not fill."""
        self._steps.end(progress.timed if progress is not None else 0)
        if progress is not None and progress.weights_changed and not self._off:
            self.reset()
        if bad_blocks:
            self._forget(bad_blocks)
        for request_id in received:
            known = self._known.get(request_id)
            if known is not None:
                self._end_load(known)
                self._ready.add(request_id)
        for heard in self._saves.heard(progress) if progress is not None else ():
            known = self._known.get(heard.request)
            if known is None:
                continue
            if heard.refused:
                known.stored, known.save_after = 0, _clock() + REFUSED_S
            if heard.over:
                known.outstanding.discard(heard.number)
                if known.gone and not known.outstanding:
                    del self._known[heard.request]

    # -- below them ----------------------------------------------------------------------------------------------

    def _keys(self, known: Known) -> Sequence[bytes]:
        """Of the blocks that may be loaded: at least one token of the prompt is left to compute."""
        request = known.request
        return list(request.block_hashes[: max(0, request.num_tokens - 1) // self._block_tokens])

    def _match(self, keys: Sequence[bytes]) -> Match:
        """What every rank has of this chain."""
        if _clock() < self._silent_until:
            return NO_MATCH
        began, patience = _clock(), self._settings.lookup_timeout_ms / 1000
        try:
            found = self._client.match(self._shards, keys)
        except KvError as error:
            _log.warning("lookup failed: %s", error)
            return NO_MATCH
        took = _clock() - began
        self._count("lookups", 1)
        self._count("lookup_seconds", took)
        if took >= patience or self._slow_s(began, took) >= patience:
            self._silent_until = _clock() + SILENCE_S
        return found

    def _slow_s(self, began: float, took: float) -> float:
        """What lookups of late, this one too, have taken beyond what each may."""
        if took > QUICK_S:
            self._slow.append((began, took - QUICK_S))
        while self._slow and self._slow[0][0] < began - WINDOW_S:
            self._slow.popleft()
        return sum(beyond for _, beyond in self._slow)

    def _is_to_load(self, known: Known, found: Match) -> bool:
        """Does loading pay, as far as is known? Now and then it is done anyway; a request asks again while it waits."""
        if known.tried is None and not found.worth_loading:
            known.tried = self._trials.due()
        return found.worth_loading or bool(known.tried)

    @staticmethod
    def _found_just_now(known: Known, now: float) -> Match | None:
        """What `on_new_request` found, if the engine asks straight afterwards and there is nothing to wait for."""
        looked, known.found = known.found, None
        if looked is None or now - looked[0] > FRESH_S or looked[1].tiers.disk or looked[1].pending:
            return None
        return looked[1]

    def _waits_for_store(self, known: Known, found: Match, first: int, now: float) -> bool:
        """Is more of it just being stored? That is over in a moment."""
        if found.blocks + found.pending <= max(found.blocks, first):
            return False
        known.stored_until = known.stored_until or now + STORE_S
        known.look_again = now + AGAIN_S
        return now < known.stored_until

    def _waits_for_hand_over(self, known: Known, found: Match, keys: Sequence[bytes], now: float) -> bool:
        """Is another engine, here or on another host, computing the rest of this prompt?"""
        if not known.wishes.handed_over_s or found.blocks == len(keys):
            return False
        known.handed_until = known.handed_until or now + known.wishes.handed_over_s
        self._look_later(known, now)
        if now >= known.ask_again:
            known.ask_again = now + ASK_EACH_S
            known.prefetches.clear()
            self._prefetch(known, keys)
        return now < known.handed_until

    def _waits_for_another(self, known: Known, key: bytes, now: float) -> bool:
        """Is another request loading what this one needs next? Then that will be there without a second load."""
        owner = self._loading.get(key)
        if owner is None or owner == known.request.request_id:
            return False
        known.same_until = known.same_until or now + SAME_S
        return now < known.same_until

    def _waits_for_disk(self, known: Known, keys: Sequence[bytes], now: float) -> bool:
        if not known.disk_until:
            known.disk_until = now + self._settings.disk_wait_s
            if not known.prefetches:
                self._prefetch(known, keys)
        self._look_later(known, now)
        return now < known.disk_until

    def _look_later(self, known: Known, now: float) -> None:
        """Again, but not in the same moment as all others."""
        known.look_again = self._look_at = max(now + AGAIN_S, self._look_at + APART_S)

    def _prefetch(self, known: Known, keys: Sequence[bytes]) -> None:
        if _clock() >= self._silent_until:
            deadline_s = max(0.001, self._settings.disk_wait_s)
            known.prefetches += [shard.prefetch(keys, deadline_s=deadline_s) for shard in self._shards]

    def _to_save(self, known: Known) -> int:
        """Blocks that are full and whose keys are known, of the steps that the engine has heard the end of.

        Not those of the step that begins: a load before it may fail, and the engine then computes it once more.
        """
        request = known.request
        if self._off or not (self._settings.store and known.wishes.store) or _has_more_than_tokens(request):
            return 0
        computed_tokens = request.num_computed_tokens - getattr(request, "num_in_flight_tokens", 0)
        return min(int(computed_tokens) // self._block_tokens, len(request.block_hashes))

    def _save_into(self, plan: Plan, known: Known, block_ids: Sequence[int]) -> None:
        """Save what there is to save and is not in the store yet."""
        hashes = known.request.block_hashes
        first, full = known.stored, min(self._to_save(known), len(block_ids))
        if full <= first:
            return
        parent = bytes(hashes[first - 1]) if first else None
        job = self._saves.begin(known.request.request_id, hashes[first:full], parent, block_ids[first:full])
        plan.saves.append(job)
        known.stored = full
        known.outstanding.add(job.number)

    def _forget(self, bad_blocks: Collection[int]) -> None:
        """What was computed on bad blocks is computed again, bit by bit; until then vLLM must not give it to others.

        It found its way into vLLM's cache when it was planned, and stays there if the request is aborted now.
        """
        for request_id, block_ids in self._unsure.items():
            first = next((at for at, block in enumerate(block_ids) if block in bad_blocks), len(block_ids))
            if first < len(block_ids):
                self._memory.forget(set(block_ids[first:]))
                known = self._known.get(request_id)
                if known is not None:
                    known.stored = 0  # whatever the lookup said
        for known in self._known.values():
            if not set(known.loading_into).isdisjoint(bad_blocks):
                # vLLM looks it up again if all of it failed. What fails once may fail for ever, and would never run.
                known.stored, known.wishes = 0, replace(known.wishes, load=False)

    def _is_roomy(self) -> bool:
        """Do blocks that are freed now keep what they hold for a while?"""
        memory = self._memory
        return memory.reuses_oldest and memory.free() >= ROOMY_SHARE * memory.blocks

    def _end_load(self, known: Known) -> None:
        for key in known.loading:
            self._loading.pop(key, None)
        known.loading = known.loading_into = ()

    def _count(self, name: str, value: float) -> None:
        self.counts[name] = self.counts.get(name, 0) + value

    def take_counts(self) -> dict[str, float]:
        """Totals since the last time."""
        counts, self.counts = self.counts, {}
        return counts


def _has_more_than_tokens(request: Any) -> bool:
    """Images and adapters are known to vLLM by names that others may have, too. A session may be given some later."""
    return bool(getattr(request, "mm_features", None) or getattr(request, "lora_request", None))
