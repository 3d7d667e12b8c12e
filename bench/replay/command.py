"""`python -m bench replay SOURCE`: what every rule is worth on a trace or a synthetic workload, by capacity.

    python -m bench replay ../shared/traces/mooncake_conversation.jsonl --rivals --png curves.png
    python -m bench replay agents --seed 101,102,103 --policy lru,density --capacity 5,10

Capacities are per cent of the footprint. Of several seeds the means are shown; the record has each. `--json FILE`
writes the record: `results` maps policy -> capacity share -> hit, token_hit, compute_saved.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Final, TypeAlias

from bench.harness import Figures, record, say
from bench.replay import mooncake
from bench.replay.draw import BOUND, RIVAL, Curve, draw, tables, why_no_picture
from bench.replay.hinted import replay_hinted
from bench.replay.lab import Setting, replay
from bench.replay.oracle import Hints, next_use, one_bit
from bench.replay.pinned import replay_pinned
from bench.replay.profiles import PROFILES, profile_named
from bench.replay.rivals import RIVALS, TooSmallError, belady_bound, rival
from bench.replay.score import Score, infinite
from bench.replay.synthetic import GENERATORS
from bench.replay.workload import Workload
from kvstore.policy import Rule

Contestant: TypeAlias = Callable[[Workload, int], Score]

# What a client might say of each block's next use, and how often it is right. At half, one bit says nothing.
HINTERS: Final[dict[str, Callable[[Workload], list[Hints]]]] = {
    "one bit 80 %": partial(one_bit, truth=0.8, seed=1),
    "next use 80 %": partial(next_use, truth=0.8, seed=1),
    "random": partial(one_bit, truth=0.5, seed=1),
    "inverted": partial(one_bit, truth=0.0, seed=1),
}
_RULES: Final = tuple(rule.value for rule in Rule)


@dataclass(frozen=True, slots=True)
class Trial:
    """One workload under everybody; scores and seconds by policy, a score for each capacity."""

    workload: Workload
    scores: dict[str, tuple[Score, ...]]
    seconds: dict[str, float]
    ceiling: Score


def run(arguments: Sequence[str]) -> None:
    """Replay what was asked for, show it, and write the record where one is wanted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.png and (trouble := why_no_picture()):
        parser.error(f"--png: {trouble}")
    try:
        policies, shares = _policies(options.policy), _shares(options.capacity)
        workloads = {str(seed): _workload(options, seed) for seed in _seeds(options)}
    except (ValueError, OSError) as trouble:
        parser.error(str(trouble))
    if options.rivals and find_spec("libcachesim") is None:
        say("libCacheSim is not installed, and its rows are missing: pip install libcachesim")
    contestants = _contestants(
        policies,
        rivals=options.rivals and find_spec("libcachesim") is not None,
        hints=options.hints,
        agents=any(len(workload.events) > len(workload.requests) for workload in workloads.values()),
    )
    try:
        trials = {seed: hold(workload, contestants, shares) for seed, workload in workloads.items()}
    except TooSmallError as trouble:
        parser.error(f"{trouble}: leave out --rivals")
    _show(trials, shares, options.png)
    if options.json:
        line = _record(trials, shares, quick=options.minutes is not None)
        options.json.write_text(json.dumps(json.loads(line), indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench replay")
    parser.add_argument("source", help=f"a trace in Mooncake's format, or one of {', '.join(GENERATORS)}")
    parser.add_argument("--seed", default="1", help="of a synthetic workload; several with commas")
    parser.add_argument("--minutes", type=float, help="listen for so long to a synthetic workload; for a look")
    parser.add_argument("--half", type=int, choices=(1, 2), help="the accesses before or after the middle alone")
    parser.add_argument("--policy", default="all", help=f"of {', '.join(_RULES)}, with commas; or all")
    parser.add_argument("--capacity", default="1,5,10,20", help="per cent of the footprint, with commas")
    parser.add_argument("--block-bytes", type=int, help="of a block, where there is one model")
    parser.add_argument("--cost", help=f"prefill profile: {', '.join(profile.name for profile in PROFILES)}")
    parser.add_argument("--rivals", action="store_true", help="libCacheSim's policies, too")
    parser.add_argument("--hints", action="store_true", help="density with hints, too, and a rival that pins")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves")
    return parser


def _policies(text: str) -> tuple[Rule, ...]:
    """Raises ValueError and names those there are."""
    if text == "all":
        return tuple(Rule)
    unknown = sorted(set(text.split(",")) - set(_RULES))
    if unknown:
        raise ValueError(f"no policy {unknown[0]!r}: choose from {', '.join(_RULES)}")
    return tuple(Rule(name) for name in text.split(","))


def _shares(text: str) -> tuple[float, ...]:
    """Rising, from per cent. Raises ValueError."""
    shares = sorted({float(each) / 100 for each in text.split(",")})
    if not (shares[0] > 0 and shares[-1] <= 1):
        raise ValueError("capacities are above 0 and up to 100 % of the footprint")
    return tuple(shares)


def _seeds(options: argparse.Namespace) -> list[int]:
    """Those of a synthetic workload; a trace has one row of results, and no seed. Raises ValueError."""
    return [int(each) for each in options.seed.split(",")] if options.source in GENERATORS else [0]


def _workload(options: argparse.Namespace, seed: int) -> Workload:
    """As asked for. Raises ValueError or OSError."""
    if options.source in GENERATORS:
        generate = GENERATORS[options.source]
        workload = generate(seed) if options.minutes is None else generate(seed, minutes=options.minutes)
    else:
        workload = mooncake.read(Path(options.source))
    models = workload.models
    if options.cost is not None:
        profile = profile_named(options.cost)
        models = tuple(replace(model, profile=profile) for model in models)
    if options.block_bytes is not None:
        if len(models) > 1 or options.block_bytes < 1:
            raise ValueError("--block-bytes is above 0, and for workloads of one model")
        models = (replace(models[0], block_bytes=options.block_bytes),)
    workload = replace(workload, models=models)
    return workload if options.half is None else workload.halves()[options.half - 1]


def _contestants(
    policies: Sequence[Rule], *, rivals: bool, hints: bool = False, agents: bool = False
) -> dict[str, Contestant]:
    """The rules of the daemon; with `hints` of known accuracy, and of `agents` that say what they do; and the bound."""
    contestants: dict[str, Contestant] = {rule.value: partial(_ours, rule=rule) for rule in policies}
    if hints:
        contestants |= {f"density, {name}": partial(_told, hinter) for name, hinter in HINTERS.items()}
    if hints and agents:
        contestants["density, agents"] = partial(replay_hinted, setting=Setting(Rule.DENSITY))
        contestants["lru, agents"] = partial(replay_hinted, setting=Setting(Rule.LRU))
        contestants["lru, pins of 5 min"] = replay_pinned
    if rivals:
        contestants |= {RIVAL + name: partial(rival, name) for name in RIVALS}
    contestants[BOUND] = belady_bound
    return contestants


def _ours(workload: Workload, capacity_bytes: int, *, rule: Rule) -> Score:
    return replay(workload, capacity_bytes, Setting(rule))


def _told(hinter: Callable[[Workload], list[Hints]], workload: Workload, capacity_bytes: int) -> Score:
    return replay(workload, capacity_bytes, Setting(Rule.DENSITY), hinter(workload))


def hold(workload: Workload, contestants: dict[str, Contestant], shares: Sequence[float]) -> Trial:
    """Everybody at every capacity. A first replay that does not count leaves nothing to compile."""
    capacities = [int(share * workload.footprint_bytes) for share in shares]
    replay(workload, capacities[0], Setting(Rule.LRU))
    scores: dict[str, tuple[Score, ...]] = {}
    seconds: dict[str, float] = {}
    for name, contestant in contestants.items():
        say(f"{workload.name}: {name}")
        begun = time.perf_counter()
        scores[name] = tuple(contestant(workload, capacity_bytes) for capacity_bytes in capacities)
        seconds[name] = time.perf_counter() - begun
    return Trial(workload, scores, seconds, infinite(workload))


def _show(trials: dict[str, Trial], shares: tuple[float, ...], png: Path | None) -> None:
    """How fast it went, the tables, and the picture. The tables are what is printed; the rest is said beside."""
    all_trials = list(trials.values())
    ceiling = mean([trial.ceiling for trial in all_trials])
    curves = [Curve(name, shares, means) for name, means in _means(all_trials).items()]
    for name, speed in _speeds(all_trials, shares).items():
        say(f"{name:24} {speed:12,.0f} block accesses a second")
    footprint = fmean(trial.workload.footprint_bytes for trial in all_trials)
    print(tables(curves, ceiling))
    print(f"\nColumns are memory, as a share of the footprint: {footprint / 2**30:,.2f} GiB, which is all")
    print("different blocks that were asked for or stored.")
    if png:
        title = all_trials[0].workload.name + (f", mean of seeds {', '.join(trials)}" if len(trials) > 1 else "")
        draw(title, curves, ceiling, png)


def _record(trials: dict[str, Trial], shares: Sequence[float], *, quick: bool) -> str:
    """Means beside what they were made from."""
    all_trials = list(trials.values())
    first = all_trials[0].workload
    configuration: dict[str, float | str | dict[str, str]] = {
        "workload": first.name,
        "models": ", ".join(f"{model.name} {model.block_tokens} x {model.block_bytes}" for model in first.models),
        "costs": ", ".join(model.profile.name for model in first.models),
        "digests": {seed: trial.workload.digest()[:32] for seed, trial in trials.items()},
        "accesses": fmean(trial.workload.accesses for trial in all_trials),
        "unique_blocks": fmean(trial.workload.unique_blocks for trial in all_trials),
    }
    return record(
        "replay",
        _figures(_means(all_trials), shares),
        quick=quick,
        configuration=configuration,
        infinite=_figure(mean([trial.ceiling for trial in all_trials])),
        accesses_a_second=_speeds(all_trials, shares),
        by_seed={seed: _figures(trial.scores, shares) for seed, trial in trials.items()} if len(trials) > 1 else {},
    )


def _speeds(trials: Sequence[Trial], shares: Sequence[float]) -> dict[str, float]:
    """Block accesses a second by policy, over all seeds and capacities."""
    accesses = len(shares) * sum(trial.workload.accesses for trial in trials)
    return {name: round(accesses / sum(trial.seconds[name] for trial in trials)) for name in trials[0].seconds}


def _means(trials: Sequence[Trial]) -> dict[str, tuple[Score, ...]]:
    """By policy, over the trials."""
    return {
        name: tuple(mean(scores) for scores in zip(*(trial.scores[name] for trial in trials), strict=True))
        for name in trials[0].scores
    }


def mean(scores: Sequence[Score]) -> Score:
    """Each measure by itself; every trial counts the same."""
    return Score(
        hit=fmean(score.hit for score in scores),
        token_hit=fmean(score.token_hit for score in scores),
        compute_saved=fmean(score.compute_saved for score in scores),
    )


def _figures(scores: dict[str, tuple[Score, ...]], shares: Sequence[float]) -> Figures:
    return {
        name: {f"{share:g}": _figure(score) for share, score in zip(shares, each, strict=True)}
        for name, each in scores.items()
    }


def _figure(score: Score) -> Figures:
    return {"hit": score.hit, "token_hit": score.token_hit, "compute_saved": score.compute_saved}
