"""vLLM's OpenAI-compatible server under conversations of several clients, with and without somewhere to keep KV blocks.

Four servers of the same model run side by side and have the same conversations, one server at a time:

    none      computes everything: no prefix cache, no connector
    native    vLLM's own prefix cache alone, as it comes
    lmcache   that, and LMCache's connector with its server
    kvstored  that, and our connector with a daemon

The engine's memory holds less than half of what the conversations come to, so that those which pause fall out of it.
Arithmetic has one thread; a core is left to whoever stores, and to the server's own process.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench.engines import EngineGoneError, transfer_config
from bench.engines.server import ServerProcess
from bench.harness import Findings, say
from bench.process import DaemonProcess
from bench.vllm_peer import LmcacheServer
from bench.vllm_talks import Measured, Reply, Traffic, talk

ENGINE: dict[str, Any] = {
    "max_model_len": 2048, "max_num_batched_tokens": 2048, "max_num_seqs": 4, "num_gpu_blocks_override": 32,
}  # fmt: skip
CHUNK = 128  # of LMCache's; its best here
START_S = 400.0  # four servers start side by side on two cores
NAMES = ("none", "native", "lmcache", "kvstored")
SHOWN = ("ttft_mean_ms", "ttft_p99_ms", "tokens_per_s", "hit_share")
TITLES = ("mean to first token", "p99", "tokens a second", "hit tokens")


def serve(home: Path, python: Path, model: Path, peer: Path | None, *, quick: bool) -> Findings:
    """`serve_*`: figures by server. `peer`: the interpreter with LMCache, if there is one."""
    traffic = Traffic(conversations=6, turns=3) if quick else Traffic()
    measured: dict[str, Measured] = {}
    with ExitStack() as stack:
        servers = _servers(stack, home, python, model, peer)
        findings = _await_ready(servers)
        for seed in range(1 if quick else 2):
            for name in list(servers)[:: -1 if seed % 2 else 1]:
                try:
                    heard = talk(partial(_ask, servers[name]), traffic, seed)
                except (OSError, RuntimeError) as error:
                    if name != "lmcache":
                        raise
                    findings |= give_up(servers, name, str(error))
                    continue
                total = measured.setdefault(name, Measured())
                total.turns += heard.turns
                total.seconds += heard.seconds
                say(f"conversations of {name}: {heard.seconds:.1f} s")
    figures = {name: measured[name].figures(traffic.answer) for name in servers}
    say(table(figures))
    for name, each in figures.items():
        findings |= {f"serve_{name}_{what}": value for what, value in each.items()}
    return findings


def give_up(servers: dict[str, ServerProcess], name: str, reason: str) -> Findings:
    """No figures of this one."""
    servers.pop(name).kill()
    say(f"{name} does not run: {reason[-300:]}")
    findings: Findings = {f"serve_{name}_{what}": None for what in SHOWN}
    return findings | {f"serve_{name}_why_not": reason[-500:]}


def table(figures: dict[str, dict[str, float]]) -> str:
    """A line a server."""
    lines = ["".join(f"{title:>22}" for title in ("", *TITLES))]
    for name, each in figures.items():
        mean, p99, rate, share = (each[what] for what in SHOWN)
        lines.append(f"{name:>22}{f'{mean:.0f} ms':>22}{f'{p99:.0f} ms':>22}{rate:>22.0f}{f'{share:.0%}':>22}")
    return "\n".join(lines)


def _servers(stack: ExitStack, home: Path, python: Path, model: Path, peer: Path | None) -> dict[str, ServerProcess]:
    """All that can run, on their way up."""
    run = home / "serve"
    daemon = DaemonProcess(
        run, "--dram", "2GiB", "--lock", "false", "--log-level", "warning", log_file=home / "serve-log"
    )
    stack.enter_context(daemon).await_memory()
    transfers: dict[str, dict[str, Any]] = {"none": {}, "native": {}, "kvstored": transfer_config(run)}
    if peer is not None:
        lmcache = stack.enter_context(LmcacheServer(peer, CHUNK, log_file=home / "serve-lmcache"))
        transfers["lmcache"] = lmcache.transfer()
    servers = {}
    for name in NAMES:
        if name not in transfers:
            continue
        engine = ENGINE | {"model": model, "enable_prefix_caching": name != "none"}
        if transfers[name]:
            engine["kv_transfer_config"] = transfers[name]
        server = ServerProcess(
            peer if name == "lmcache" and peer else python, engine, socket_file=home / f"{name}.sock",
            log_file=home / f"serve-{name}", threads=1, deadline_s=START_S,
        )  # fmt: skip
        servers[name] = stack.enter_context(server)
    return servers


def _await_ready(servers: dict[str, ServerProcess]) -> Findings:
    """Until all have answered a request; without one of a peer that does not start."""
    findings: Findings = {}
    for name in list(servers):
        try:
            servers[name].await_ready()
            servers[name].complete([2, 3], 2)  # the first one takes seconds
        except (EngineGoneError, OSError, RuntimeError) as error:
            if name != "lmcache":
                raise
            findings |= give_up(servers, name, str(error))
    say(f"servers that are ready: {', '.join(servers)}")
    return findings


def _ask(server: ServerProcess, prompt: list[int], tokens: int) -> Reply:
    return server.complete(prompt, tokens)
