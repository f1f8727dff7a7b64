"""Who runs in the next step. One rule: every sequence's computed tokens catch up with its tokens, within a budget.

Prefill, chunked prefill, decoding, prefix hits and resuming after preemption are all that one rule. Order of
precedence is admission, which is arrival but for a few small requests: when blocks run out, a sequence may take them
from those behind it, never from those before it, so the oldest always advances and nothing can wait in a circle.
Drafts get what all of these leave over.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from gyrfalcon.engine.block_pool import BlockPool
from gyrfalcon.engine.pace import Pace
from gyrfalcon.engine.sequence import Sequence, SequenceGroup
from gyrfalcon.engine.speculation import least_chance
from gyrfalcon.runner.interface import NO_IDS, Ints

MOST_PREEMPTIONS = 4
"""After so many a request comes back only where nothing can preempt it any more."""

MOST_OVERTAKINGS = 8
"""How often a request that does not fit yet is overtaken; also how many such are passed in search of one that fits."""


@dataclass(slots=True)
class ScheduledRow:
    """A sequence's part in a step, after the block copies: its next `num_query_tokens` pending tokens, then a draft."""

    group: SequenceGroup
    sequence: Sequence
    num_query_tokens: int
    draft_ids: Ints = field(default_factory=lambda: NO_IDS)  # run as if they followed the newest token
    block_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def reaches_end(self) -> bool:
        """Whether the row computes its last known token, so that the next one can be drawn."""
        return self.num_query_tokens == self.sequence.num_pending_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the row only computes the token drawn last."""
        return self.sequence.num_pending_tokens == 1 and self.group.num_generated(self.sequence) > 0


class Scheduler:
    """Owns the waiting and running groups and every change to their sequences and blocks."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        token_budget: int,
        max_rows: int,
        max_draft_tokens: int = 0,
        step_cost_tokens: int = 1,
    ) -> None:
        """token_budget: most tokens a step computes, >= max_rows. max_rows: most sequences in the batch.

        max_draft_tokens: longest draft of a sequence; 0 for none. step_cost_tokens: as `least_chance`.
        """
        self._pool = pool
        self._token_budget = token_budget
        self._max_rows = max_rows
        self._max_draft_tokens = max_draft_tokens
        self._step_cost_tokens = step_cost_tokens
        self.pace = Pace(step_cost_tokens, token_budget)
        self._waiting: deque[SequenceGroup] = deque()  # those preempted, then by arrival; holds no blocks
        self._running: list[SequenceGroup] = []  # in order of admission; at least one sequence holds blocks
        self._num_added = 0
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    # What may come in, and what leaves

    def can_ever_run(self, group: SequenceGroup) -> bool:
        """Whether the cache and the batch could hold the group at its largest, alone."""
        return self._most_blocks(group) <= self._pool.num_usable and group.num_rows <= self._max_rows

    def add(self, group: SequenceGroup) -> None:
        self._num_added += 1
        group.arrival = self._num_added
        self._waiting.append(group)

    def remove(self, group: SequenceGroup) -> None:
        """Drop a group and free all it holds, wherever it is."""
        for sequence in group.sequences:
            self._release_blocks(sequence)
        group.sequences.clear()
        if group in self._running:
            self._running.remove(group)
        elif group in self._waiting:
            self._waiting.remove(group)

    def forget_prefixes(self, group: SequenceGroup) -> None:
        """Let nobody reuse the blocks of a request that failed."""
        for sequence in group.sequences:
            for block in sequence.blocks:
                self._pool.withdraw(block)

    def end_choice(self, group: SequenceGroup, choice: int) -> None:
        """A choice needs no more tokens; its sequence goes when no other choice shares it."""
        group.ended_choices.add(choice)
        for sequence in group.sequences:
            if choice in sequence.choices:
                self._keep_choices(group, sequence, tuple(c for c in sequence.choices if c != choice))
                break
        if group.is_finished:
            self.remove(group)

    def overdue(self, now_s: float) -> list[SequenceGroup]:
        """Those that wait and may not wait any longer."""
        return [group for group in self._waiting if group.is_overdue(now_s)]

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(len(group.sequences) for group in self._running)

    @property
    def num_promised_tokens(self) -> int:
        """Tokens the running sequences hold at their longest."""
        return sum(group.num_rows * (group.num_prompt_tokens + group.request.max_new_tokens) for group in self._running)

    # The step

    def schedule(self) -> list[ScheduledRow]:
        """Rows of the next step, in no order that matters; empty only when nothing can run."""
        step = _Step(self._token_budget)
        for group in list(self._running):
            self._schedule_decoding(step, group)
        if step.rows:
            # Whoever decodes waits for the whole step, so what came since may at most double it.
            step.paced_budget = min(step.budget, self.pace.num_tokens(step.num_tokens))
            step.oldest_stream = min(self._stream_since(row.group) for row in step.rows.values())
        is_blocked = False
        for group in list(self._running):
            if self._budget_for(step, group) > 0 and group in self._running:
                is_blocked |= not self._schedule_catching_up(step, group)
        # Who was preempted comes back before anyone new takes the blocks it waits for.
        if not is_blocked:
            self._admit_waiting(step)
        if self._max_draft_tokens > 0:
            self._add_drafts(step)
        return list(step.rows.values())

    def mark_computed(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence's next tokens are in the cache now: full blocks become findable."""
        sequence.num_computed_tokens += num_tokens
        num_full = sequence.num_computed_tokens // self._pool.block_size
        if num_full > sequence.num_published:
            keys = sequence.prefix_keys(num_full, self._pool.block_size)
            for index in range(sequence.num_published, num_full):
                self._pool.publish(sequence.blocks[index], keys[index])
            sequence.num_published = num_full

    def continue_with(self, group: SequenceGroup, sequence: Sequence, drawn: list[tuple[int, int]]) -> None:
        """Append each (choice, token id) that goes on after this sequence; the other choices it carried have ended.

        The first keeps the sequence, the others fork it and share its blocks.
        """
        survivors = tuple(choice for choice, _ in drawn)
        if group.search is None:
            group.ended_choices.update(choice for choice in sequence.choices if choice not in survivors)
        forks = []
        for choice, token_id in drawn[1:]:
            twin = sequence.fork(choice)
            for block in twin.blocks:
                self._pool.share(block)
            twin.append(token_id)
            forks.append(twin)
        position = group.sequences.index(sequence)
        group.sequences[position + 1 : position + 1] = forks
        self._keep_choices(group, sequence, survivors[:1])
        if drawn:
            sequence.append(drawn[0][1])
        elif group.is_finished:
            self.remove(group)

    def drop_draft(self, sequence: Sequence) -> None:
        """Free the blocks that hold nothing but rejected drafts; what lies in other blocks is written over."""
        for _ in range(len(sequence.blocks) - self._pool.num_blocks_for(sequence.num_computed_tokens)):
            self._pool.release(sequence.blocks.pop())

    def make_room_ahead(self, rows: list[ScheduledRow], most: int) -> int:
        """For how many further tokens each of the rows of a step has blocks now; above 0 only if all can run ahead.

        Those are rows that decode and ask for nothing but the likeliest token: what comes next is known without us.
        """
        if self._max_draft_tokens > 0 or not all(row.group.is_plain and row.is_decoding for row in rows):
            return 0
        # The last token allowed is drawn, never run.
        num_left = (row.group.request.max_new_tokens - row.group.num_generated(row.sequence) - 1 for row in rows)
        num_ahead = min(most, *num_left)
        if num_ahead <= 0:
            return 0
        missing = [
            self._pool.num_blocks_for(row.sequence.num_tokens + num_ahead) - len(row.sequence.blocks) for row in rows
        ]
        if sum(missing) > self._pool.num_free:
            return 0
        for row, count in zip(rows, missing, strict=True):
            row.sequence.blocks += [self._pool.allocate() for _ in range(count)]
        return num_ahead

    # Blocks

    def _schedule_decoding(self, step: _Step, group: SequenceGroup) -> None:
        """The group's sequences that only lack the token drawn last; of a group in step, all or none."""
        if group not in self._running:
            return
        if not group.moves_in_step:
            for sequence in list(group.sequences):
                if sequence.num_pending_tokens == 1 and sequence.blocks:
                    self._schedule_row(step, group, sequence, 1)
        elif (
            all(sequence.num_pending_tokens == 1 and sequence.blocks for sequence in group.sequences)
            and len(group.sequences) <= step.budget
            and self._free_for_all(step, group)
        ):
            for sequence in group.sequences:
                self._schedule_row(step, group, sequence, 1)

    def _schedule_catching_up(self, step: _Step, group: SequenceGroup) -> bool:
        """The group's first sequence that lacks more; False if it has to wait for blocks.

        One after another: the later ones then find the prefix they share published.
        """
        behind = next((s for s in group.sequences if s.num_pending_tokens > 1 or not s.blocks), None)
        if behind is None:
            return True
        if not behind.blocks and not self._admit(group, behind):
            return False
        self._schedule_row(step, group, behind, _most_catching_up(group, behind))
        return True

    def _admit_waiting(self, step: _Step) -> None:
        """Let in who waits, first come, first served. One that does not fit yet is overtaken by a few that do.

        Each overtaking is counted, and after the last one allowed all wait for it: it starves no longer than they run.
        """
        overtaken: list[SequenceGroup] = []
        for group in list(self._waiting):
            if self._budget_for(step, group) <= 0:
                return
            first = group.sequences[0]
            if self._reserved_rows() + group.num_rows <= self._max_rows and self._admit(group, first):
                self._waiting.remove(group)
                self._running.append(group)
                self._schedule_row(step, group, first, _most_catching_up(group, first))
                for one in overtaken:
                    one.num_overtakings += 1
            else:
                overtaken.append(group)
            if len(overtaken) == MOST_OVERTAKINGS or not all(_may_be_overtaken(one) for one in overtaken):
                return

    def _schedule_row(self, step: _Step, group: SequenceGroup, sequence: Sequence, most_tokens: int) -> None:
        num_query_tokens = min(sequence.num_pending_tokens, self._budget_for(step, group), most_tokens)
        if num_query_tokens <= 0:
            return
        row = ScheduledRow(group, sequence, num_query_tokens)
        if self._provide_blocks(step, row):
            step.add(row)

    def _add_drafts(self, step: _Step) -> None:
        """Let rows that decode run a draft too, where budget and blocks are left and it is likely to pay."""
        num_drawing = sum(row.reaches_end for row in step.rows.values())
        worth = least_chance(num_drawing, step.num_tokens, self._step_cost_tokens)
        # A step never takes more than about twice as long, for the sake of rows that have no draft.
        budget = min(step.paced_budget, self._step_cost_tokens + step.num_tokens)
        for row in step.rows.values():
            group, sequence = row.group, row.sequence
            if not row.is_decoding or group.search is not None:
                continue
            drafter = group.drafter(sequence)
            if length := drafter.length_worth(sequence.token_ids, worth):
                # The last token allowed is drawn, never run.
                num_left = group.request.max_new_tokens - group.num_generated(sequence) - 1
                length = min(length, self._max_draft_tokens, num_left, budget, self._most_that_fit(row))
                row.draft_ids = drafter.draft(sequence.token_ids, length)
                budget -= length
                num_blocks = self._pool.num_blocks_for(sequence.num_tokens + len(row.draft_ids))
                while len(sequence.blocks) < num_blocks:
                    sequence.blocks.append(self._pool.allocate())

    def _most_that_fit(self, row: ScheduledRow) -> int:
        """Tokens for which the row has room after its own, in its last block and in free ones."""
        num_blocks = len(row.sequence.blocks) + self._pool.num_free
        return num_blocks * self._pool.block_size - row.sequence.num_tokens

    def _provide_blocks(self, step: _Step, row: ScheduledRow) -> bool:
        """Give the row every block it writes to, exclusively; False when those ahead of it hold them all."""
        sequence, pool = row.sequence, self._pool
        first_written, offset = divmod(sequence.num_computed_tokens, pool.block_size)
        copies_shared_block = offset > 0 and pool.references(sequence.blocks[first_written]) > 1
        num_missing = pool.num_blocks_for(sequence.num_computed_tokens + row.num_query_tokens) - len(sequence.blocks)
        while pool.num_free < num_missing + copies_shared_block:
            # The row holds blocks or was admitted a moment ago because it fits, so the last holder is not before it.
            group, victim = self._last_holder()
            if victim is sequence or (group is row.group and group.moves_in_step):
                return False
            self._preempt(step, group, victim)
            copies_shared_block = offset > 0 and pool.references(sequence.blocks[first_written]) > 1
        if copies_shared_block:
            source, target = sequence.blocks[first_written], pool.allocate()
            row.block_copies.append((source, target))
            pool.release(source)
            sequence.blocks[first_written] = target
        for _ in range(num_missing):
            sequence.blocks.append(pool.allocate())
        return True

    def _free_for_all(self, step: _Step, group: SequenceGroup) -> bool:
        """Free what all of the group's sequences need for one more token each; False if those ahead hold it."""
        while self._pool.num_free < self._num_blocks_for_next(group):
            last, victim = self._last_holder()
            if last is group:
                return False
            self._preempt(step, last, victim)
        return True

    def _num_blocks_for_next(self, group: SequenceGroup) -> int:
        """Free blocks that one more token for every sequence takes: new ones, and copies of shared ones."""
        num_new = 0
        writers: Counter[int] = Counter()
        for sequence in group.sequences:
            index, offset = divmod(sequence.num_computed_tokens, self._pool.block_size)
            if offset == 0:
                num_new += 1
            else:
                writers[sequence.blocks[index]] += 1
        # The last writer keeps a block that only the group's writers hold.
        return num_new + sum(count - (self._pool.references(block) == count) for block, count in writers.items())

    def _admit(self, group: SequenceGroup, sequence: Sequence) -> bool:
        """Give a sequence without blocks its reusable prefix, if all its tokens would fit beside what runs."""
        if group.num_preemptions >= MOST_PREEMPTIONS and not self._is_safe(group):
            return False
        pool = self._pool
        # A hit stops short of the last token: that one must run, or there are no logits to draw from.
        num_reusable = 0 if group.scores_prompt else (sequence.num_tokens - 1) // pool.block_size
        hits = pool.find_prefix(sequence.prefix_keys(num_reusable, pool.block_size))
        num_needed = pool.num_blocks_for(sequence.num_tokens) - len(hits)
        num_revived = sum(pool.references(block) == 0 for block in hits)
        # One block stays free for each sequence that runs, so that what is admitted is not preempted at once.
        if num_needed + num_revived + self._num_holders() > pool.num_free:
            return False
        for block in hits:
            pool.share(block)
        sequence.blocks = hits
        sequence.num_published = len(hits)
        sequence.num_computed_tokens = len(hits) * pool.block_size
        self.prefix_query_tokens += sequence.num_tokens
        self.prefix_hit_tokens += sequence.num_computed_tokens
        if group.started_s is None:
            group.num_cached_tokens = sequence.num_computed_tokens
        return True

    def _is_safe(self, group: SequenceGroup) -> bool:
        """Whether the group and all that run before it could grow to their longest side by side.

        It is then never preempted again: those before it always find blocks, and nobody else may take its own.
        """
        position = self._running.index(group) if group in self._running else len(self._running)
        before = sum(self._most_blocks(other) for other in self._running[:position])
        return before + self._most_blocks(group) <= self._pool.num_usable

    def _preempt(self, step: _Step, group: SequenceGroup, sequence: Sequence) -> None:
        """Take a sequence's blocks; it will be computed again, and noise by position makes it draw the same.

        Of a group in step all sequences go: none could advance without the one.
        """
        for victim in list(group.sequences) if group.moves_in_step else [sequence]:
            step.drop(victim)
            self._release_blocks(victim)
            victim.num_computed_tokens = 0
            victim.num_published = 0
        if group.scores_prompt:
            group.prompt_logprobs = [None]
        group.num_preemptions += 1
        self.num_preemptions += 1
        if not any(s.blocks for s in group.sequences):
            self._running.remove(group)
            self._waiting.appendleft(group)  # it is the newest of those that ran, and older than all that wait

    def _release_blocks(self, sequence: Sequence) -> None:
        # Last block first: of a freed prefix the tail is then reused before the head, which more requests share.
        for block in reversed(sequence.blocks):
            self._pool.release(block)
        sequence.blocks = []

    def _keep_choices(self, group: SequenceGroup, sequence: Sequence, choices: tuple[int, ...]) -> None:
        sequence.choices = choices
        if not choices:
            self._release_blocks(sequence)
            group.sequences.remove(sequence)

    # Order

    def _budget_for(self, step: _Step, group: SequenceGroup) -> int:
        """How many tokens of a group may still come into the step.

        Of requests that come together the first to decode would otherwise slow the prompts of the others down, until
        all of them are late. So what fits into a step has precedence over streams that began after it came.
        """
        if group.arrival > step.oldest_stream or any(s.num_tokens > self._token_budget for s in group.sequences):
            return step.paced_budget
        return step.budget

    def _stream_since(self, group: SequenceGroup) -> int:
        """Noted when it decodes first, not when it draws: who comes during its last step as a prompt came with it."""
        if group.stream_since is None:
            group.stream_since = self._num_added
        return group.stream_since

    def _last_holder(self) -> tuple[SequenceGroup, Sequence]:
        return next(
            (group, sequence)
            for group in reversed(self._running)
            for sequence in reversed(group.sequences)
            if sequence.blocks
        )

    def _num_holders(self) -> int:
        return sum(bool(sequence.blocks) for group in self._running for sequence in group.sequences)

    def _reserved_rows(self) -> int:
        return sum(group.num_rows for group in self._running)

    def _most_blocks(self, group: SequenceGroup) -> int:
        """Blocks the group holds at its longest: whole prompt blocks are shared, all others are a choice's own."""
        request = group.request
        num_shared = len(request.prompt_ids) // self._pool.block_size
        longest = self._pool.num_blocks_for(len(request.prompt_ids) + request.max_new_tokens)
        return num_shared + group.num_rows * (longest - num_shared)


def _may_be_overtaken(group: SequenceGroup) -> bool:
    """Not once it has begun, nor for ever."""
    return group.started_s is None and group.num_overtakings < MOST_OVERTAKINGS


def _most_catching_up(group: SequenceGroup, sequence: Sequence) -> int:
    """How much of a sequence may be caught up: where the group moves in step, its last token waits for the others."""
    return sequence.num_pending_tokens - (1 if group.moves_in_step else 0)


class _Step:
    """The rows gathered so far, and the tokens that may still be added.

    paced_budget: of them by prompts that streams need not wait for. oldest_stream: how many requests had come when the
    first of the streams in the step began.
    """

    def __init__(self, token_budget: int) -> None:
        self.budget = token_budget
        self.paced_budget = token_budget
        self.oldest_stream = 0
        self.num_tokens = 0
        self.rows: dict[Sequence, ScheduledRow] = {}

    def add(self, row: ScheduledRow) -> None:
        self.rows[row.sequence] = row
        self._count(row.num_query_tokens)

    def drop(self, sequence: Sequence) -> None:
        row = self.rows.pop(sequence, None)
        if row is not None:
            self._count(-row.num_query_tokens)

    def _count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self.budget -= num_tokens
        self.paced_budget -= num_tokens
