"""vLLM's own OpenAI-compatible server in a process of its own, and requests to it, as a client of it would send them.

It listens on a Unix socket. Prompts are token ids and answers are token ids: the models of `model` have no tokenizer.
Imports nothing but the standard library.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.engines import ENVIRONMENT, PATHS, ROOT, THREADS, EngineGoneError

START_S = 300.0
ANSWER_S = 180.0
POLL_S = 0.05
END_S = 10.0  # for ending by itself, which one that is still starting does not
LOG_CHARACTERS = 12000  # of the end of its log: the engine says first why it ends, and then the server at length
FLAGS = ("--skip-tokenizer-init", "--enforce-eager", "--generation-config", "vllm", "--enable-prompt-tokens-details",
         "--no-enable-log-requests", "--disable-uvicorn-access-log", "--seed", "0")  # fmt: skip


@dataclass(slots=True)
class Completion:
    """What a request got. Seconds count from when it was sent."""

    tokens: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    all_s: float = 0.0
    cached_tokens: int = 0  # of the prompt, that were not computed


class ServerError(RuntimeError):
    """The server answered with an error, or in the middle of an answer with nothing more."""


class ServerProcess:
    """A server that answers. A context manager that ends it on the way out, and the engine's process below it.

    `engine` are options by name as the server's command line has them: a flag is True or False, a dict is sent as
    JSON. It needs `model`. Requests may be sent by any thread. Raises EngineGoneError, with the end of the log, if it
    does not answer within `deadline_s`.
    """

    def __init__(
        self,
        python: Path,
        engine: dict[str, Any],
        *,
        socket_file: Path,
        log_file: Path,
        threads: int = THREADS,
        environment: dict[str, str] | None = None,
        deadline_s: float = START_S,
    ) -> None:
        self._socket_file = socket_file
        self._log_file = log_file
        self._model = str(engine["model"])
        self._ended = False
        path = os.pathsep.join(map(str, PATHS))
        own = os.environ | ENVIRONMENT | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | (environment or {})
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--uds", str(socket_file), *FLAGS]
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command + list(_options(engine)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=own, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        self._deadline = time.monotonic() + deadline_s

    def await_ready(self) -> None:
        """Until it answers, so that several can start side by side. Raises EngineGoneError."""
        while not self._answers():
            if self.process.poll() is not None:
                raise EngineGoneError(f"the server has ended\n{self.log()[-LOG_CHARACTERS:]}")
            if time.monotonic() > self._deadline:
                raise EngineGoneError(f"the server does not answer\n{self.log()[-LOG_CHARACTERS:]}")
            time.sleep(POLL_S)

    def complete(self, prompt: list[int], max_tokens: int, **more: Any) -> Completion:
        """Have a prompt completed, token by token. Raises ServerError, OSError.

        `more` goes into the request as it is, such as `kv_transfer_params`.
        """
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "detokenize": False, "return_token_ids": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        got = Completion()
        began = time.perf_counter()
        with closing(_Link(self._socket_file, ANSWER_S)) as link:
            link.request("POST", "/v1/completions", json.dumps(body | more), {"Content-Type": "application/json"})
            answer = link.getresponse()
            if answer.status != 200:
                raise ServerError(f"status {answer.status}: {answer.read()[:500]!r}")
            for event in _events(answer):
                if "error" in event:
                    raise ServerError(str(event["error"])[:500])
                for choice in event.get("choices", ()):
                    tokens = choice.get("token_ids") or []
                    if tokens and not got.tokens:
                        got.first_token_s = time.perf_counter() - began
                    got.tokens += tokens
                if event.get("usage"):
                    got.cached_tokens = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        got.all_s = time.perf_counter() - began
        if len(got.tokens) != max_tokens:
            raise ServerError(f"{len(got.tokens)} of {max_tokens} tokens came")
        return got

    def log(self) -> str:
        """All that it has said."""
        return self._log_file.read_text(errors="replace")

    def stop(self, deadline_s: float = 90.0) -> int:
        """Ask it to end; its exit code. Raises subprocess.TimeoutExpired."""
        self.process.terminate()
        return self.process.wait(timeout=deadline_s)

    def kill(self) -> None:
        """`kill -9` it and its engine, and wait until it is gone. Any number of times."""
        if self._ended:  # its number may be somebody else's by now
            return
        self._ended = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            with closing(_Link(self._socket_file, POLL_S * 20)) as link:
                link.request("GET", "/health")
                return link.getresponse().status == 200
        except (OSError, HTTPException):
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            with suppress(subprocess.TimeoutExpired):  # only when it ends by itself it gives back its shared memory
                self.stop(END_S)
        self.kill()


class _Link(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = str(path)

    def connect(self) -> None:
        """Called by the first request."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _options(engine: dict[str, Any]) -> Iterator[str]:
    """A dict as a command line."""
    for name, value in engine.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        else:
            yield f"--{option}"
            yield json.dumps(value) if isinstance(value, dict) else str(value)


def _events(answer: Iterator[bytes] | Any) -> Iterator[dict[str, Any]]:
    """The server's events, until it says that there are no more."""
    for line in answer:
        if line.startswith(b"data: "):
            if line[6:].strip() == b"[DONE]":
                return
            event: dict[str, Any] = json.loads(line[6:])
            yield event
