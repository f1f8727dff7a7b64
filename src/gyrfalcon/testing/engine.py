"""An `Engine` without a model: deterministic tokens at no cost, delays and failures on demand, and a memory of what
it was asked.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence

from gyrfalcon.engine.interface import (
    EngineEvent,
    EngineFacts,
    EngineHealth,
    EngineRequest,
    EngineState,
    EngineStats,
    FinishReason,
    PromptEvent,
    TokenEvent,
)
from gyrfalcon.errors import EngineDead, GenerationFailed, QueueTimeout


class FakeEngine:
    """Plays a script, or tokens that a hash draws from the request, its choice's seed and the position.

    requests: every request that began, in order. aborted: ids of those whose iterator was closed early.
    ended_choices: what `end_choice` was told.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 512,
        max_context: int = 256,
        script: Sequence[int] | None = None,
        step_s: float = 0.0,
        start_s: float = 0.0,
        tokens_per_batch: int = 1,
        fail_after: int | None = None,
    ) -> None:
        """script: ids that every choice generates, then its first stop id if it has one, else the script again.
        step_s, start_s: seconds a batch of events takes, and the first one in addition. tokens_per_batch: tokens
        of a choice that become ready together. fail_after: tokens of a choice after which its request fails.
        """
        self.facts = EngineFacts(
            vocab_size=vocab_size,
            max_context=max_context,
            max_total_tokens=max_context,
            cache_tokens=max_context * 8,
            cache_bytes=0,
            weight_bytes=0,
            num_parameters=0,
            dtype="float32",
            device="cpu",
        )
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.ended_choices: list[tuple[str, int]] = []
        self.state = EngineState.READY
        self.is_closed = False
        self._script = None if script is None else tuple(script)
        self._step_s = step_s
        self._start_s = start_s
        self._tokens_per_batch = tokens_per_batch
        self._fail_after = fail_after
        self._waiting: set[str] = set()
        self._live: dict[str, set[int]] = {}  # choices still generating, by request
        self._decode_tokens = 0
        self._prefill_tokens = 0
        self._num_steps = 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[list[EngineEvent], None]:
        self._require_alive()
        self.requests.append(request)
        live = set(range(request.num_choices))
        self._waiting.add(request.request_id)
        try:
            await self._wait_for_turn(request)
            self._waiting.discard(request.request_id)
            self._live[request.request_id] = live
            self._prefill_tokens += len(request.prompt_ids)
            yield [self._prompt_event(request)]
            position = 0
            while live:
                await asyncio.sleep(self._step_s)
                self._require_alive()
                self._num_steps += 1
                events: list[EngineEvent] = []
                for at in range(position, min(position + self._tokens_per_batch, request.max_new_tokens)):
                    events += self._step(request, live, at)
                position += self._tokens_per_batch
                yield events
        except (GeneratorExit, asyncio.CancelledError):
            if live:  # else there was nothing left to abort
                self.aborted.append(request.request_id)
            raise
        finally:
            self._waiting.discard(request.request_id)
            self._live.pop(request.request_id, None)

    def end_choice(self, request_id: str, choice: int) -> None:
        self.ended_choices.append((request_id, choice))
        self._live.get(request_id, set()).discard(choice)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=len(self._waiting),
            num_running=sum(len(choices) for choices in self._live.values()),
            num_steps=self._num_steps,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
        )

    async def health(self) -> EngineHealth:
        detail = "" if self.state is EngineState.READY else f"the engine is {self.state.value}"
        return EngineHealth(state=self.state, detail=detail)

    async def close(self) -> None:
        self.is_closed = True
        self.state = EngineState.DEAD

    def die(self) -> None:
        """End as a killed process does: what runs fails at its next step."""
        self.state = EngineState.DEAD

    async def _wait_for_turn(self, request: EngineRequest) -> None:
        most_s = request.begin_within_s
        await asyncio.sleep(self._start_s if most_s is None else min(self._start_s, most_s))
        if most_s is not None and most_s < self._start_s:
            raise QueueTimeout(f"the fake engine begins after {self._start_s:g} seconds, the request waits {most_s:g}")

    def _require_alive(self) -> None:
        if self.state is EngineState.DEAD:
            raise EngineDead("the engine process ended")

    def _prompt_event(self, request: EngineRequest) -> PromptEvent:
        logprobs = None
        if request.prompt_logprobs:
            logprobs = (None, *(_logprob(id_) for id_ in request.prompt_ids[1:]))
        return PromptEvent(queue_s=self._start_s, num_cached_tokens=0, logprobs=logprobs)

    def _step(self, request: EngineRequest, live: set[int], position: int) -> list[TokenEvent]:
        """The events of every live choice at one position."""
        events = []
        for choice in sorted(live):
            if self._fail_after is not None and position >= self._fail_after:
                raise GenerationFailed("the fake engine fails here")
            token_id = self._token(request, choice, position)
            reason = None
            if position + 1 == request.max_new_tokens:
                reason = FinishReason.LENGTH
            elif token_id in request.stop_token_ids:
                reason = FinishReason.EOS
            if reason is not None:
                live.discard(choice)
            self._decode_tokens += 1
            top = None
            if request.top_n:
                ids = [(token_id + rank) % self.facts.vocab_size for rank in range(request.top_n)]
                top = tuple((id_, _logprob(token_id) - rank) for rank, id_ in enumerate(ids))
            events.append(TokenEvent(choice, token_id, _logprob(token_id), reason, top))
        return events

    def _token(self, request: EngineRequest, choice: int, position: int) -> int:
        if self._script is not None and (position < len(self._script) or not request.stop_token_ids):
            return self._script[position % len(self._script)]
        if self._script is not None and position >= request.min_new_tokens:
            return request.stop_token_ids[0]
        sampling = request.sampling
        stream = (sampling.seed + choice) % 2**64 if sampling.do_sample else 0
        drawn = hashlib.sha256(repr((request.prompt_ids, stream, position)).encode()).digest()
        allowed = [id_ for id_ in range(self.facts.vocab_size) if id_ not in request.stop_token_ids]
        return allowed[int.from_bytes(drawn[:8], "big") % len(allowed)]


def _logprob(token_id: int) -> float:
    """A negative number that depends on the id alone and has an exact short form."""
    return -(1 + token_id % 8) / 8
