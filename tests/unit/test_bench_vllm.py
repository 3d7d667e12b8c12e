"""What drives servers and counts for `bench vllm`: conversations, their order, and the figures made of them."""

import threading
from dataclasses import dataclass

import pytest

from bench.vllm_serve import table
from bench.vllm_steps import WINDOW, figures
from bench.vllm_talks import Measured, Traffic, Turn, talk

TRAFFIC = Traffic(conversations=5, turns=3, clients=2, system=8, first=4, later=3, answer=2, pause_s=0.0)


@dataclass
class Said:
    """A reply."""

    tokens: list[int]
    first_token_s: float = 0.25
    all_s: float = 0.5
    cached_tokens: int = 3


class Server:
    """Answers at once, and remembers what each client's thread has asked."""

    def __init__(self, fail_at: int = -1) -> None:
        self.asked: dict[str, list[list[int]]] = {}
        self._fail_at = fail_at
        self._lock = threading.Lock()

    def ask(self, prompt: list[int], tokens: int) -> Said:
        """Tokens that follow from the prompt."""
        with self._lock:
            client = threading.current_thread().name.split("-")[-1]
            self.asked.setdefault(client, []).append(list(prompt))
            if sum(map(len, self.asked.values())) == self._fail_at:
                raise OSError("gone")
        return Said([len(prompt)] * tokens)

    @property
    def prompts(self) -> list[list[int]]:
        """All of them, in no order."""
        return sorted(prompt for prompts in self.asked.values() for prompt in prompts)


def orders(server: Server) -> list[list[list[int]]]:
    """What clients asked, each in its order."""
    return sorted(server.asked.values())


def test_every_turn_says_all_that_was_said_before_and_something_new() -> None:
    server = Server()
    measured = talk(server.ask, TRAFFIC, seed=1)
    assert len(measured.turns) == TRAFFIC.requests == 15
    assert sum(map(len, server.prompts)) == TRAFFIC.prompt_tokens == sum(turn.prompt_tokens for turn in measured.turns)
    by_length = {length: [each for each in server.prompts if len(each) == length] for length in (12, 17, 22)}
    assert [len(each) for each in by_length.values()] == [5, 5, 5]
    for shorter, longer in ((12, 17), (17, 22)):
        for prompt in by_length[longer]:
            before = prompt[:shorter]
            assert before in by_length[shorter], "a conversation goes on"
            assert prompt[shorter : shorter + 2] == [shorter] * 2, "with what the server has said"
    assert len({tuple(each[:8]) for each in server.prompts}) == 1, "all begin with the same"
    assert len({tuple(each[8:12]) for each in server.prompts}) == 5, "and go on with their own"


def test_a_seed_decides_what_each_client_asks_and_in_which_order() -> None:
    servers = [Server(), Server(), Server()]
    for server, seed in zip(servers, (1, 1, 2), strict=True):
        talk(server.ask, TRAFFIC, seed)
    one, same, other = map(orders, servers)
    assert one == same
    assert one != other, "the control"
    for prompts in one:
        assert list(map(len, prompts)) == sorted(map(len, prompts)), "all pause until all others have had a turn"
        turns = [[tuple(each[:12]) for each in prompts if len(each) == length] for length in (12, 17, 22)]
        assert set(turns[0]) == set(turns[1]) == set(turns[2])
    assert any(turns[0] != each for each in turns), "in another order each time"


def test_a_server_that_goes_away_is_told() -> None:
    with pytest.raises(OSError, match="gone"):
        talk(Server(fail_at=7).ask, TRAFFIC, seed=1)


def test_the_figures_of_a_server_count_all_turns() -> None:
    turns = [Turn(100, 0, 1.0, 2.0), Turn(200, 150, 0.5, 1.5), Turn(300, 150, 0.3, 1.0)]
    assert Measured(turns, 4.0).figures(answer_tokens=10) == pytest.approx(
        {"ttft_mean_ms": 600.0, "ttft_p99_ms": 1000.0, "tokens_per_s": 157.5, "hit_share": 0.5}
    )


def test_the_table_has_a_line_for_each_server() -> None:
    figures_of = {"ttft_mean_ms": 600.4, "ttft_p99_ms": 1000.0, "tokens_per_s": 157.5, "hit_share": 0.5}
    title, *lines = table({"none": figures_of, "kvstored": figures_of}).splitlines()
    assert title.split() == ["mean", "to", "first", "token", "p99", "tokens", "a", "second", "hit", "tokens"]
    assert [line.split() for line in lines] == [
        [name, "600", "ms", "1000", "ms", "158", "50%"] for name in ("none", "kvstored")
    ]


def test_what_a_step_loses_is_counted_in_copies_and_against_the_round_it_was_in() -> None:
    """The machine slows down by a second from round to round, which must not count."""
    plain = [1.0, 2.0, 3.0]
    seconds = {
        "plain": plain,
        "again": plain,
        "store": [each + 0.020 for each in plain],
        "load": [plain[0] + 0.005, plain[1] + 9.0, plain[2] + 0.005],
        "copy": [0.010, 0.010, 5.0],
    }
    assert figures(seconds) == pytest.approx(
        {
            "step_extra_over_copy_time": 2.0,
            "step_extra_load_over_copy_time": 0.5,
            "step_extra_store_over_copy_time": 2.0,
            "step_extra_nothing_over_copy_time": 0.0,
            "step_plain_ms": 2000.0 / WINDOW,
            "step_copy_ms": 10.0,
        }
    )
