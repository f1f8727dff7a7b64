"""The engine's heart: step = schedule -> execute -> commit. Single-threaded; whoever runs it owns it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gyrfalcon.engine.beams import Proposals
from gyrfalcon.engine.block_pool import PADDING_BLOCK, BlockPool
from gyrfalcon.engine.branching import Draw, report_search, settle
from gyrfalcon.engine.interface import EngineEvent, EngineFacts, EngineRequest, EngineStats, PromptEvent, StepReading
from gyrfalcon.engine.plan import gather_plan, gather_samples, wave_draws
from gyrfalcon.engine.scheduler import ScheduledRow, Scheduler
from gyrfalcon.engine.sequence import SequenceGroup
from gyrfalcon.errors import ModelLoadError, OutOfCache
from gyrfalcon.runner.interface import NOT_FINITE, NOTHING_LEFT, Executor, SamplingColumns, StepPlan, StepResult

logger = logging.getLogger(__name__)


WARM_UP_TOKENS = 32
"""Of the prompt that shows, before anyone is served, what a token costs beside a step's fixed part."""


AHEAD_S = 0.002
MOST_AHEAD = 7
"""Short steps of plain decoding run several at once, as many as end within about AHEAD_S and at most so many further
ones: what a step costs around the model would be a third of it. Nobody notices that a token comes 2 ms later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreLimits:
    """What the operator allows the engine; None means what start-up found."""

    max_total_tokens: int | None = None  # of one sequence, prompt included
    token_budget: int = 512  # tokens computed in a step
    max_rows: int = 64  # sequences in the batch
    prefix_caching: bool = True  # share computed prefixes between requests
    max_draft_tokens: int = 0  # longest draft of a sequence in a step; 0 speculates on nothing
    step_cost_tokens: int = 8  # what a step costs besides its tokens, in tokens: see `speculation.least_chance`


@dataclass(slots=True)
class StepOutcome:
    """What one step, or the commands before it, have to say; keyed by request id."""

    events: dict[str, list[EngineEvent]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)  # no choice has anything more to come
    failures: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)  # failures that the request's own parameters caused
    overdue: dict[str, str] = field(default_factory=dict)  # waited too long before they began
    step: StepReading | None = None

    def add(self, request_id: str, event: EngineEvent) -> None:
        self.events.setdefault(request_id, []).append(event)


class EngineCore:
    """Holds the live requests and advances them, one step at a time."""

    def __init__(self, executor: Executor, limits: CoreLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OutOfCache when the cache cannot hold one sequence of `limits.max_total_tokens`."""
        found = executor.facts
        cache_tokens = (found.num_blocks - 1) * found.block_size
        max_total_tokens = limits.max_total_tokens or min(found.max_context, cache_tokens)
        if max_total_tokens > cache_tokens:
            raise OutOfCache(
                f"the KV cache holds {cache_tokens} tokens, but --max-total-tokens promises {max_total_tokens} to one "
                "request: give the cache more memory (--kv-cache-memory, --max-batch-total-tokens) or promise less"
            )
        self.facts = EngineFacts(
            vocab_size=found.vocab_size,
            max_context=found.max_context,
            max_total_tokens=min(max_total_tokens, found.max_context),
            cache_tokens=cache_tokens,
            cache_bytes=found.cache_bytes,
            weight_bytes=found.weight_bytes,
            num_parameters=found.num_parameters,
            dtype=found.dtype,
            device=found.device,
        )
        self._executor = executor
        self._limits = limits
        self._clock = clock
        self._pool = BlockPool(found.num_blocks, found.block_size)
        self._scheduler = Scheduler(
            self._pool,
            token_budget=max(limits.token_budget, limits.max_rows),
            max_rows=limits.max_rows,
            max_draft_tokens=limits.max_draft_tokens,
            step_cost_tokens=limits.step_cost_tokens,
        )
        self._groups: dict[str, SequenceGroup] = {}
        self._num_steps = 0
        self._prefill_tokens = 0
        self._decode_tokens = 0
        self._draft_tokens = 0
        self._accepted_tokens = 0
        self._last_step_s = 0.0

    def warm_up(self) -> None:
        """Run some tokens, outside of all bookkeeping: what cannot compute is found before anyone is served.

        How long they take is where the pace of prompts beside decoding begins. Raises ModelLoadError when the model's
        logits are not finite, and whatever the executor raises.
        """
        self._try(1)  # the first step also asks for memory that the others have then
        num_tokens = min(WARM_UP_TOKENS, self.facts.max_total_tokens)
        calm_s, full_s = self._try(1), self._try(num_tokens)
        if num_tokens > 1:
            self._scheduler.pace.begin(calm_s, (full_s - calm_s) / (num_tokens - 1))

    def _try(self, num_tokens: int) -> float:
        """Seconds that a step of one prompt takes."""
        request = EngineRequest(request_id="warm-up", prompt_ids=(0,) * num_tokens, max_new_tokens=1)
        group = SequenceGroup(request, 0.0, "")
        # The padding block's content nobody ever uses.
        group.sequences[0].blocks = [PADDING_BLOCK] * self._pool.num_blocks_for(num_tokens)
        plan = gather_plan([ScheduledRow(group, group.sequences[0], num_tokens)])
        started_s = self._clock()
        result = self._executor.execute(plan)
        if NOT_FINITE in result.token_ids_S:
            raise ModelLoadError(
                "the model's logits after its first token are not finite numbers: its weights are damaged, or "
                f"too large for {self.facts.dtype} (--dtype)"
            )
        return self._clock() - started_s

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def submit(self, request: EngineRequest, outcome: StepOutcome) -> None:
        """Take a request in; one that can never run fails at once, in `outcome`."""
        # Without prefix caching a request still shares prefixes with itself: forked and resumed sequences need it.
        salt = request.cache_salt if self._limits.prefix_caching else f"{request.cache_salt}\0{request.request_id}"
        group = SequenceGroup(request, self._clock(), salt)
        num_total = len(request.prompt_ids) + request.max_new_tokens
        if num_total > self.facts.max_total_tokens or not self._scheduler.can_ever_run(group):
            outcome.failures[request.request_id] = (
                f"{request.num_choices} sequences of {num_total} tokens do not fit: a sequence may have "
                f"{self.facts.max_total_tokens} tokens, the batch {self._limits.max_rows} sequences, "
                f"the cache {self.facts.cache_tokens} tokens"
            )
            return
        self._groups[request.request_id] = group
        self._scheduler.add(group)

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; unknown ids are those that have just finished."""
        group = self._groups.pop(request_id, None)
        if group is not None:
            self._scheduler.remove(group)

    def end_choice(self, request_id: str, choice: int, outcome: StepOutcome) -> None:
        """Stop one choice; with the last one the request has finished, which `outcome` says."""
        group = self._groups.get(request_id)
        if group is not None:
            self._scheduler.end_choice(group, choice)
            self._finish_if_done(group, outcome)

    def step(self, outcome: StepOutcome) -> None:
        """Advance every request the scheduler chooses by one step; what came of it is added to `outcome`."""
        started_s = self._clock()
        num_ahead = 0
        rows = self._scheduler.schedule()
        self._end_overdue(started_s, outcome)
        if rows:
            num_admitted = _mark_started(rows, started_s)
            num_decode_rows = sum(row.is_decoding for row in rows)
            num_draft_tokens = sum(len(row.draft_ids) for row in rows)
            num_ahead = self._scheduler.make_room_ahead(rows, self._most_ahead(num_decode_rows))
            scheduled_s = self._clock()
            parts = self._run(rows, num_ahead, outcome)
            outcome.step = StepReading(
                num_prefill_tokens=sum(row.num_query_tokens for row in rows) - num_decode_rows,
                num_decode_rows=num_decode_rows,
                num_admitted=num_admitted,
                has_succeeded=len(parts) == 1 and parts[0].has_succeeded,
                num_ahead=num_ahead,
                num_draft_tokens=num_draft_tokens,
                num_accepted_tokens=tuple(count for part in parts for count in part.num_accepted_tokens),
                schedule_s=scheduled_s - started_s + sum(part.gather_s for part in parts),
                forward_s=sum(part.forward_s for part in parts),
                sample_s=sum(part.sample_s for part in parts),
                commit_s=sum(part.commit_s for part in parts),
            )
            if outcome.step.has_succeeded:
                num_others = outcome.step.num_prefill_tokens + num_draft_tokens
                step_s = (parts[0].forward_s + parts[0].sample_s) / (1 + num_ahead)
                self._scheduler.pace.observe(num_decode_rows, num_others, step_s)
            self._draft_tokens += num_draft_tokens
            self._accepted_tokens += sum(outcome.step.num_accepted_tokens)
        self._num_steps += 1 + num_ahead
        self._last_step_s = (self._clock() - started_s) / (1 + num_ahead)

    def _most_ahead(self, num_decode_rows: int) -> int:
        """Steps that a plan of so many decoding rows may have besides its own."""
        if not self._executor.facts.can_run_ahead or num_decode_rows == 0:
            return 0
        calm_s = self._scheduler.pace.calm_s(num_decode_rows)
        return 0 if calm_s is None else min(int(AHEAD_S / calm_s) - 1, MOST_AHEAD)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            num_promised_tokens=self._scheduler.num_promised_tokens,
            cache_usage=self._pool.usage,
            num_steps=self._num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            prefix_hit_tokens=self._scheduler.prefix_hit_tokens,
            prefix_query_tokens=self._scheduler.prefix_query_tokens,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            draft_tokens=self._draft_tokens,
            accepted_tokens=self._accepted_tokens,
            last_step_s=self._last_step_s,
        )

    def close(self) -> None:
        self._executor.close()

    def _run(self, rows: list[ScheduledRow], num_ahead: int, outcome: StepOutcome) -> list[_Part]:
        """Execute and commit the rows: together, and if that fails request by request, so that only its cause ends.

        Running a row again writes the same keys and values to the same places, and its bits do not depend on its
        neighbours, so those who go on do not notice. A step too large for the memory is done in parts in the same way.
        """
        part = self._run_part(rows, num_ahead, outcome)
        if part.has_succeeded:
            return [part]
        by_group: dict[int, list[ScheduledRow]] = {}
        for row in rows:
            by_group.setdefault(id(row.group), []).append(row)
        if len(by_group) == 1:
            self._fail(rows[0].group, "the step that computed this request failed", outcome)
            return [part]
        parts = [part]
        for own in by_group.values():
            parts.append(self._run_part(own, num_ahead, outcome))
            if not parts[-1].has_succeeded:
                self._fail(own[0].group, "the step that computed this request failed", outcome)
        return parts

    def _run_part(self, rows: list[ScheduledRow], num_ahead: int, outcome: StepOutcome) -> _Part:
        """Execute and commit rows as one plan; where that cannot be executed, nothing is committed."""
        started_s = planned_s = self._clock()
        try:
            plan = gather_plan(rows, num_ahead)
            planned_s = self._clock()
            result = self._executor.execute(plan)
        except Exception:
            logger.exception("a step of %d rows failed", len(rows))
            return _Part(planned_s - started_s, forward_s=self._clock() - planned_s)
        executed_s = self._clock()
        accepted = self._commit(plan, rows, result, outcome)
        return _Part(
            planned_s - started_s, result.forward_s, result.sample_s, self._clock() - executed_s, True, accepted
        )

    def _commit(self, plan: StepPlan, rows: list[ScheduledRow], result: StepResult, outcome: StepOutcome) -> list[int]:
        """Append, fork, end and report as the step's draws say; of each draft, how many of its tokens were drawn."""
        self._collect_prompt_logprobs(plan, rows, result)
        samples = _samples_by_row(plan.samples)
        searches: dict[str, dict[int, ScheduledRow]] = {}
        num_accepted_tokens = []
        for index, row in enumerate(rows):
            group, sequence = row.group, row.sequence
            if group.request.request_id not in self._groups:
                continue  # failed a moment ago, by another of its rows
            reaches_end = row.reaches_end
            self._prefill_tokens += 0 if row.is_decoding else row.num_query_tokens
            self._scheduler.mark_computed(sequence, row.num_query_tokens)
            if not reaches_end:
                continue
            if group.search is None:
                try:
                    num_accepted = self._take_draws(row, samples[index], result, outcome)
                except Exception:
                    logger.exception("the tokens of request %s could not be taken", group.request.request_id)
                    self._fail(group, "the tokens drawn for this request could not be taken", outcome)
                    continue
                if len(row.draft_ids):
                    num_accepted_tokens.append(num_accepted)
            elif self._is_sound(group, result, samples.get(index, []), outcome):
                searches.setdefault(group.request.request_id, {})[index] = row
        self._advance_searches([*searches.values()], samples, result, outcome)
        return num_accepted_tokens

    def _take_draws(self, row: ScheduledRow, samples: list[int], result: StepResult, outcome: StepOutcome) -> int:
        """Append what a row's choices drew, and what was drawn after that: ahead, or by a draft as far as it agrees.

        Returns how many of the draft's tokens were drawn.
        """
        if result.ahead:
            self._take_draws_ahead(row, samples, result, outcome)
            return 0
        draft = row.draft_ids.tolist()
        drawn = self._take_draw(row, samples[: len(samples) - len(draft)], result, outcome)
        num_accepted = 0
        while num_accepted < len(draft) and drawn == [draft[num_accepted]]:
            num_accepted += 1
            # The token's keys and values are in the cache already, so the draw after it counts.
            self._scheduler.mark_computed(row.sequence, 1)
            drawn = self._take_draw(row, [samples[num_accepted]], result, outcome)
        if draft:
            self._scheduler.drop_draft(row.sequence)
        return num_accepted

    def _take_draws_ahead(
        self, row: ScheduledRow, samples: list[int], result: StepResult, outcome: StepOutcome
    ) -> None:
        """Append what the row drew in each of the steps that ran at once, until it ends."""
        going_on = self._take_draw(row, samples, result, outcome)
        for later in result.ahead:
            if not going_on:
                return
            self._scheduler.mark_computed(row.sequence, 1)
            going_on = self._take_draw(row, samples, later, outcome)

    def _take_draw(self, row: ScheduledRow, samples: list[int], result: StepResult, outcome: StepOutcome) -> list[int]:
        """Append one token to each of a row's choices; those that go on with it."""
        group, sequence = row.group, row.sequence
        if not self._is_sound(group, result, samples, outcome):
            return []
        draws = [
            _draw(result, sample, choice, group.request.top_n)
            for sample, choice in zip(samples, sequence.choices, strict=True)
        ]
        self._decode_tokens += len(draws)
        self._report_prompt(group, outcome)
        events, going_on = settle(group, sequence, draws)
        for event in events:
            outcome.add(group.request.request_id, event)
        self._scheduler.continue_with(group, sequence, going_on)
        self._finish_if_done(group, outcome)
        return [token_id for _, token_id in going_on]

    def _advance_searches(
        self,
        searches: list[dict[int, ScheduledRow]],
        samples: dict[int, list[int]],
        result: StepResult,
        outcome: StepOutcome,
    ) -> None:
        """Take one step of every search whose rows have come to their end; `searches`: rows by index, each."""
        wave = 0
        while taking_part := [rows for rows in searches if self._is_live(rows) and _num_waves(rows) > wave]:
            if wave > 0:
                columns = gather_samples(
                    [
                        draw
                        for rows in taking_part
                        for index, row in rows.items()
                        for draw in wave_draws(index, row.group, row.sequence, wave)
                    ]
                )
                try:
                    samples, result = _samples_by_row(columns), self._executor.choose(columns)
                except Exception:
                    logger.exception("choosing for %d searches failed", len(taking_part))
                    for rows in taking_part:
                        self._fail(_group_of(rows), "the step that computed this request failed", outcome)
                    break
            for rows in taking_part:
                try:
                    self._take_wave(rows, wave, samples, result, outcome)
                except Exception:
                    logger.exception("the search of request %s could not go on", _group_of(rows).request.request_id)
                    self._fail(_group_of(rows), "the beams of this request could not be taken further", outcome)
            wave += 1
        for rows in searches:
            if self._is_live(rows):
                try:
                    self._continue_search(rows, outcome)
                except Exception:
                    logger.exception("the search of request %s could not go on", _group_of(rows).request.request_id)
                    self._fail(_group_of(rows), "the beams of this request could not be taken further", outcome)

    def _take_wave(
        self,
        rows: dict[int, ScheduledRow],
        wave: int,
        samples: dict[int, list[int]],
        result: StepResult,
        outcome: StepOutcome,
    ) -> None:
        """Give one search the proposals of one wave's beams."""
        group = _group_of(rows)
        assert group.search is not None
        if self._is_sound(group, result, [sample for index in rows for sample in samples.get(index, [])], outcome):
            by_beam = {
                beam: _proposals(result, samples[index][0])
                for index, row in rows.items()
                for beam in row.sequence.choices
                if index in samples
            }
            group.search.advance(wave, [by_beam[beam] for beam in group.search.beams_of(wave)])

    def _is_live(self, rows: dict[int, ScheduledRow]) -> bool:
        return _group_of(rows).request.request_id in self._groups

    def _is_sound(self, group: SequenceGroup, result: StepResult, samples: list[int], outcome: StepOutcome) -> bool:
        """Whether something could be chosen for all these samples; if not, the request ends."""
        codes = result.token_ids_S[samples].tolist()
        if NOT_FINITE in codes:
            self._fail(group, "the model's logits are not finite", outcome)
            return False
        if NOTHING_LEFT in codes:
            self._refuse(group, outcome)
            return False
        return True

    def _continue_search(self, rows: dict[int, ScheduledRow], outcome: StepOutcome) -> None:
        """Fork, extend and free a search's rows as it has chosen, or report what it found."""
        group = _group_of(rows)
        assert group.search is not None
        self._decode_tokens += group.num_rows
        self._report_prompt(group, outcome)
        beams = group.search.end_step()
        if not beams:
            for event in report_search(group, group.search):
                outcome.add(group.request.request_id, event)
            self._scheduler.remove(group)
            self._finish_if_done(group, outcome)
            return
        for sequence in list(group.sequences):
            children = [(beam, one.token_id) for beam, one in enumerate(beams) if one.parent in sequence.choices]
            self._scheduler.continue_with(group, sequence, children)

    def _collect_prompt_logprobs(self, plan: StepPlan, rows: list[ScheduledRow], result: StepResult) -> None:
        start = 0
        for index in plan.scored_rows:
            row = rows[index]
            stop = start + row.num_query_tokens
            known = plan.scored_ids[start:stop] >= 0
            if row.group.prompt_logprobs is not None:
                row.group.prompt_logprobs.extend(result.scored_logprobs[start:stop][known].tolist())
            start = stop

    def _report_prompt(self, group: SequenceGroup, outcome: StepOutcome) -> None:
        if group.prompt_reported or group.started_s is None:
            return
        group.prompt_reported = True
        logprobs = None if group.prompt_logprobs is None else tuple(group.prompt_logprobs)
        queue_s = group.started_s - group.arrival_s
        outcome.add(group.request.request_id, PromptEvent(queue_s, group.num_cached_tokens, logprobs))

    def _finish_if_done(self, group: SequenceGroup, outcome: StepOutcome) -> None:
        if group.is_finished:
            del self._groups[group.request.request_id]
            outcome.finished.append(group.request.request_id)

    def _fail(self, group: SequenceGroup, message: str, outcome: StepOutcome) -> None:
        self._scheduler.forget_prefixes(group)  # whatever went wrong may have left its traces there
        if self._drop(group):
            outcome.failures[group.request.request_id] = message

    def _refuse(self, group: SequenceGroup, outcome: StepOutcome) -> None:
        """End a request whose parameters left no token to choose."""
        num_generated = max(group.num_generated(sequence) for sequence in group.sequences)
        if self._drop(group):
            outcome.refusals[group.request.request_id] = (
                f"the parameters rule out every token after {num_generated} new ones, or overflow single precision"
            )

    def _end_overdue(self, now_s: float, outcome: StepOutcome) -> None:
        """End what this step had no room for either, and may not wait for another."""
        for group in self._scheduler.overdue(now_s):
            self._drop(group)
            outcome.overdue[group.request.request_id] = (
                f"model is overloaded: the engine had no room for the request for {now_s - group.arrival_s:.3g} seconds"
            )

    def _drop(self, group: SequenceGroup) -> bool:
        """Forget a group; False if it had ended already."""
        if self._groups.pop(group.request.request_id, None) is None:
            return False
        self._scheduler.remove(group)
        return True


@dataclass(frozen=True, slots=True)
class _Part:
    """How the rows of a step that were executed together went."""

    gather_s: float
    forward_s: float
    sample_s: float = 0.0
    commit_s: float = 0.0
    has_succeeded: bool = False
    num_accepted_tokens: list[int] = field(default_factory=list)


def _mark_started(rows: list[ScheduledRow], now_s: float) -> int:
    """Note when groups run for the first time; the number of those that do."""
    fresh = {id(row.group): row.group for row in rows if row.group.started_s is None}
    for group in fresh.values():
        group.started_s = now_s
    return len(fresh)


def _samples_by_row(columns: SamplingColumns) -> dict[int, list[int]]:
    samples: dict[int, list[int]] = {}
    for sample, index in enumerate(columns.rows_S.tolist()):
        samples.setdefault(index, []).append(sample)
    return samples


def _group_of(rows: dict[int, ScheduledRow]) -> SequenceGroup:
    return next(iter(rows.values())).group


def _num_waves(rows: dict[int, ScheduledRow]) -> int:
    search = _group_of(rows).search
    return 0 if search is None else search.num_waves


def _proposals(result: StepResult, sample: int) -> Proposals:
    own = slice(*result.proposed.starts[sample : sample + 2])
    return Proposals(result.proposed.ids[own], result.proposed.scores[own], result.proposed.keys[own])


def _draw(result: StepResult, sample: int, choice: int, top_n: int) -> Draw:
    top = _top_of(result, sample) if top_n else None
    return Draw(choice, int(result.token_ids_S[sample]), float(result.logprobs_S[sample]), top)


def _top_of(result: StepResult, sample: int) -> tuple[tuple[int, float], ...]:
    start, stop = result.top_starts[sample : sample + 2]
    return tuple(
        zip(result.top_ids[start:stop].tolist(), np.asarray(result.top_logprobs[start:stop]).tolist(), strict=True)
    )
