"""Questions over documents that a retriever puts in front of them: the same documents, rarely in the same order."""

from dataclasses import dataclass
from typing import Final

from bench.replay.draws import MINUTE_MS, SECOND_MS, Draws, Zipf
from bench.replay.script import Script

_TOPICS: Final = 3_000
_DOCUMENTS: Final = 12_000
_NEAR: Final = 8  # documents a topic that a retriever may bring
_PRODUCTS: Final = 4  # system prompts
_DRIFT_MS: Final = 5 * MINUTE_MS


@dataclass(frozen=True, slots=True)
class _Document:
    segment: int
    tokens: int


class _Library:
    """Documents, and topics that share the popular ones."""

    def __init__(self, script: Script, draws: Draws) -> None:
        documents = [
            _Document(script.segment(), draws.lognormal(1_400, 0.8, least=150, most=16_000)) for _ in range(_DOCUMENTS)
        ]
        shared = Zipf(_DOCUMENTS, 0.8)
        self._near = [[documents[shared.draw(draws)] for _ in range(_NEAR)] for _ in range(_TOPICS)]
        self._popularity = Zipf(_TOPICS, 1.0)

    def topic(self, draws: Draws) -> int:
        return self._popularity.draw(draws)

    def drift(self, draws: Draws) -> None:
        """News: topics that hardly anyone asked for change places with much asked ones."""
        for _ in range(_TOPICS // 100):
            one, other = self._popularity.draw(draws), draws.below(_TOPICS)
            self._near[one], self._near[other] = self._near[other], self._near[one]

    def retrieve(self, draws: Draws, topic: int) -> list[_Document]:
        """Two to five documents, best first. Relevance falls with the place, and depends on how one asks."""
        ranked = sorted(range(_NEAR), key=lambda place: place + 1.2 * draws.unit() * _NEAR / 2)
        found: list[_Document] = []
        for place in ranked[: draws.between(2, 5)]:
            if self._near[topic][place] not in found:
                found.append(self._near[topic][place])
        return found


def write_rag(script: Script, model: int, draws: Draws, questions_per_minute: float) -> None:
    """Questions that begin at random, three in ten with follow-ups that bring one more document or none.

    Documents have 1,400 tokens in the median. A topic is asked for by Zipf's law (exponent 1.0), and its documents
    belong to other topics, too (0.8); what is popular drifts every five minutes.
    """
    prompts = [_Document(script.segment(), draws.lognormal(500, 0.4, least=100, most=2_000)) for _ in range(_PRODUCTS)]
    library = _Library(script, draws)
    drifted_ms = 0
    for start_ms in draws.arrivals(script.until_ms, questions_per_minute):
        while drifted_ms + _DRIFT_MS <= start_ms:
            library.drift(draws)
            drifted_ms += _DRIFT_MS
        _inquire(script, model, draws, library, draws.pick(prompts), start_ms)


def _inquire(script: Script, model: int, draws: Draws, library: _Library, prompt: _Document, at_ms: int) -> None:
    """A question and its follow-ups."""
    program, topic, context = script.program(), library.topic(draws), script.context(model)
    context.append(prompt.segment, prompt.tokens)
    documents = library.retrieve(draws, topic)
    while True:
        for document in documents:
            context.append(document.segment, document.tokens)
        context.append(script.segment(), draws.lognormal(40, 0.8, least=5, most=1_000))
        done_ms = script.ask(at_ms, context, draws.lognormal(180, 0.7, least=5, most=2_000), program).done_ms
        script.turn_finished(done_ms, program)
        at_ms = done_ms + draws.lognormal(30 * SECOND_MS, 1.0, least=3 * SECOND_MS, most=20 * MINUTE_MS)
        if not draws.chance(0.3) or at_ms >= script.until_ms:
            return
        documents = library.retrieve(draws, topic)[: draws.below(2)]
