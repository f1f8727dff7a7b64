"""Beam search and diverse (group) beam search: which candidates go on, which are finished, when to stop.

Pure bookkeeping over numbers: the rows are the scheduler's, the candidates the sampler's. Beam search ranks, ties and
stops as transformers 5's `generate` does; diverse beam search as its releases before 5 did (Vijayakumar et al. 2016,
arXiv 1610.02424). Scores are float32 and added in float32, as there.

Letters: B beams of a search, K candidates looked at in a step, C candidates a beam proposes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gyrfalcon.engine.interface import BeamParams, EarlyStopping, EngineRequest

Scores = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

NO_BEAM = np.float32(-1e9)
"""Score of a beam or a finished slot that does not exist yet."""


@dataclass(frozen=True, slots=True)
class Proposals:
    """One beam's best next tokens, best first. `keys` is what ranks them: the scores, or a draw's perturbed scores."""

    ids_C: Ids
    scores_C: Scores  # natural log, after the request's processors; without the beam's own score
    keys_C: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Trail:
    """A token of a beam and, through its parent, all before it; beams share their common past."""

    parent: Trail | None
    token_id: int
    score: float  # this token's own, after processors
    beam: int  # the beam it was appended to

    def walk(self) -> Iterator[Trail]:
        """From the first token to this one."""
        backwards: list[Trail] = []
        node: Trail | None = self
        while node is not None:
            backwards.append(node)
            node = node.parent
        return reversed(backwards)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished sequence and the score it is ranked by."""

    score: float
    trail: Trail


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam of the next step: which beam it goes on from, and with which token."""

    parent: int
    token_id: int


class _RunningBeams:
    """What a search and a group of a diverse search have in common: beams that run, and how their scores are judged."""

    def __init__(
        self,
        params: BeamParams,
        *,
        num_beams: int,
        first_beam: int,
        max_new_tokens: int,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        """first_beam: the place of these beams among all of the request's."""
        self._params = params
        self._num_beams = num_beams
        self._first_beam = first_beam
        self._max_new_tokens = max_new_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._length = 0  # generated tokens of the running beams
        self._trails: list[Trail | None] = [None] * num_beams
        self._scores_B = np.full(num_beams, NO_BEAM, dtype=np.float32)
        self._scores_B[0] = 0.0

    @property
    def num_candidates(self) -> int:
        """How many candidates each beam proposes: enough that B go on although all stop ids lead every beam."""
        return max(2, 1 + len(self._stop_token_ids)) * self._num_beams

    def _best_candidates(self, proposals: list[Proposals], *, by_key: bool) -> list[tuple[np.float32, Trail]]:
        """The best of all beams' proposals with their totals, ties by beam and id; by_key: in order of draw."""
        beams = np.repeat(np.arange(len(proposals)), [len(own.ids_C) for own in proposals])
        ids = np.concatenate([own.ids_C for own in proposals])
        scores = np.concatenate([own.scores_C for own in proposals])
        totals = scores + self._scores_B[beams]
        keys = np.concatenate([own.keys_C for own in proposals]) + self._scores_B[beams] if by_key else totals
        order = np.lexsort((ids, beams, -keys))[: self.num_candidates]
        return [
            (totals[i], Trail(self._trails[beams[i]], int(ids[i]), float(scores[i]), self._first_beam + int(beams[i])))
            for i in order
        ]

    def _length_to_judge_by(self) -> int:
        """The length at which running beams are compared with finished ones."""
        never_stops = self._params.early_stopping is EarlyStopping.NEVER and self._params.length_penalty > 0
        return self._max_new_tokens if never_stops else self._length


class BeamSearch(_RunningBeams):
    """One search of B beams over one prompt."""

    def __init__(
        self, params: BeamParams, *, do_sample: bool, max_new_tokens: int, stop_token_ids: tuple[int, ...]
    ) -> None:
        """do_sample: candidates are drawn, by their keys, instead of being the best."""
        super().__init__(
            params,
            num_beams=params.num_beams,
            first_beam=0,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
        )
        self._do_sample = do_sample
        self._finished: list[Hypothesis] = []  # best first, at most B
        self._is_improvable = True

    def advance(self, proposals: list[Proposals]) -> list[Continuation]:
        """Take the beams' proposals, one entry a beam; the beams of the next step, none when the search has ended."""
        candidates = self._best_candidates(proposals, by_key=self._do_sample)
        self._length += 1
        at_limit = self._length >= self._max_new_tokens
        ends = [at_limit or trail.token_id in self._stop_token_ids for _, trail in candidates]
        self._finish([pair for pair, ended in zip(candidates[: self._num_beams], ends, strict=False) if ended])
        self._run_on(candidates, ends)
        self._is_improvable = self._is_improvable and self._can_improve()
        is_full = len(self._finished) == self._num_beams
        if not self._is_improvable or all(ends) or (is_full and self._params.early_stopping is EarlyStopping.TRUE):
            return []
        return [Continuation(trail.beam, trail.token_id) for trail in self._trails if trail is not None]

    def best(self) -> list[Hypothesis]:
        """What the search has finished, best first."""
        return self._finished

    def _finish(self, ended: list[tuple[np.float32, Trail]]) -> None:
        """Offer the candidates that end and are among the B best to the finished slots."""
        is_full = len(self._finished) == self._num_beams
        if not self._is_improvable or (is_full and self._params.early_stopping is EarlyStopping.TRUE):
            return
        divisor = _length_divisor(self._length, self._params.length_penalty)
        offered = [Hypothesis(float(total / divisor), trail) for total, trail in ended]
        # A stable sort: what was finished before wins a tie.
        self._finished = sorted([*self._finished, *offered], key=lambda one: -one.score)[: self._num_beams]

    def _run_on(self, candidates: list[tuple[np.float32, Trail]], ends: list[bool]) -> None:
        """The B best candidates that do not end; one that ends only where there are too few."""
        totals = np.array([total for total, _ in candidates], dtype=np.float32)
        totals = np.where(ends, totals + NO_BEAM, totals)
        order = np.argsort(-totals, kind="stable")[: self._num_beams]
        self._trails = [candidates[i][1] for i in order]
        self._scores_B = totals[order]

    def _can_improve(self) -> bool:
        """Whether a running beam could still be better than the worst finished one."""
        if len(self._finished) < self._num_beams:
            return True
        best = self._scores_B[0] / _length_divisor(self._length_to_judge_by(), self._params.length_penalty)
        return bool(best > np.float32(self._finished[-1].score))


class GroupSearch(_RunningBeams):
    """One group of a diverse search: w beams and a pool of finished hypotheses of its own."""

    def __init__(
        self,
        params: BeamParams,
        *,
        max_new_tokens: int,
        stop_token_ids: tuple[int, ...],
        padding_id: int,
        first_beam: int,
    ) -> None:
        """padding_id: what the beams of a finished group go on with."""
        super().__init__(
            params,
            num_beams=params.num_beams // params.num_beam_groups,
            first_beam=first_beam,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
        )
        self._padding_id = padding_id
        self._pool: list[Hypothesis] = []  # in the order in which they were added
        self.is_done = False

    def advance(self, proposals: list[Proposals]) -> list[Continuation]:
        """Take the proposals of the group's beams; all its beams of the next step, numbered in the whole search."""
        self._length += 1
        if self.is_done:
            return [Continuation(self._first_beam + beam, self._padding_id) for beam in range(self._num_beams)]
        candidates = self._best_candidates(proposals, by_key=False)
        running: list[tuple[np.float32, Trail]] = []
        for rank, (total, trail) in enumerate(candidates):
            if trail.token_id not in self._stop_token_ids:
                running.append((total, trail))
            elif rank < self._num_beams:
                self._add(total, self._length, trail)
            if len(running) == self._num_beams:
                break
        self._trails = [trail for _, trail in running]
        self._scores_B = np.array([total for total, _ in running], dtype=np.float32)
        self.is_done = self._judge_done(candidates[0][0])
        return [Continuation(trail.beam, trail.token_id) for _, trail in running]

    def close(self) -> list[Hypothesis]:
        """At the end of the search: what the group has finished, running beams included if it was not done."""
        if not self.is_done:
            for total, trail in zip(self._scores_B, self._trails, strict=True):
                if trail is not None:
                    self._add(total, self._length, trail)
        return self._pool

    def _add(self, total: np.float32, length: int, trail: Trail) -> None:
        score = float(total) / length**self._params.length_penalty
        if len(self._pool) < self._num_beams or score > min(one.score for one in self._pool):
            self._pool.append(Hypothesis(score, trail))
            if len(self._pool) > self._num_beams:
                worst = min(range(len(self._pool)), key=lambda index: self._pool[index].score)
                del self._pool[worst]

    def _judge_done(self, best_total: np.float32) -> bool:
        if len(self._pool) < self._num_beams:
            return False
        if self._params.early_stopping is EarlyStopping.TRUE:
            return True
        attainable: float = float(best_total) / self._length_to_judge_by() ** self._params.length_penalty
        return min(one.score for one in self._pool) >= attainable


class Search:
    """What a request with beams has going on: one search, or the groups of a diverse one.

    A step is taken in waves, one a group: what a group chooses changes what the next one is offered.
    """

    def __init__(self, request: EngineRequest, params: BeamParams) -> None:
        self._max_new_tokens = request.max_new_tokens
        self._groups: list[GroupSearch] = []
        self._search: BeamSearch | None = None
        stop_ids = request.stop_token_ids
        if params.num_beam_groups == 1:
            self._search = BeamSearch(
                params,
                do_sample=request.sampling.do_sample,
                max_new_tokens=request.max_new_tokens,
                stop_token_ids=stop_ids,
            )
        else:
            padding_id = params.padding_id if params.padding_id is not None else (*stop_ids, 0)[0]
            width = params.num_beams // params.num_beam_groups
            self._groups = [
                GroupSearch(
                    params,
                    max_new_tokens=request.max_new_tokens,
                    stop_token_ids=stop_ids,
                    padding_id=padding_id,
                    first_beam=first,
                )
                for first in range(0, params.num_beams, width)
            ]
        self._wave_width = params.num_beams // params.num_beam_groups
        self._chosen: list[Continuation] = []  # by the waves of this step so far
        self._num_steps = 0

    @property
    def num_waves(self) -> int:
        return max(1, len(self._groups))

    def beams_of(self, wave: int) -> range:
        return range(wave * self._wave_width, (wave + 1) * self._wave_width)

    def num_candidates(self, wave: int) -> int:
        return self._of(wave).num_candidates

    def chosen_before(self) -> Counter[int]:
        """How often each token was chosen in this step by the waves so far."""
        return Counter(one.token_id for one in self._chosen)

    def advance(self, wave: int, proposals: list[Proposals]) -> None:
        """Take the proposals of one wave's beams, in order."""
        self._chosen += self._of(wave).advance(proposals)

    def _of(self, wave: int) -> BeamSearch | GroupSearch:
        return self._groups[wave] if self._search is None else self._search

    def end_step(self) -> list[Continuation]:
        """After the last wave: the beams of the next step in order, none when the search has ended."""
        chosen, self._chosen = self._chosen, []
        self._num_steps += 1
        if self._groups and (self._num_steps == self._max_new_tokens or all(group.is_done for group in self._groups)):
            return []
        return chosen

    def best(self, count: int) -> list[Hypothesis]:
        """The best finished sequences once the search has ended, best first; of equals the one finished last."""
        if self._search is not None:
            return self._search.best()[:count]
        pooled = [hypothesis for group in self._groups for hypothesis in group.close()]
        return sorted(pooled, key=lambda one: one.score)[::-1][:count]  # a stable sort, reversed


def make_search(request: EngineRequest) -> Search | None:
    """The search a request asks for, if it asks for one."""
    return None if request.beams is None else Search(request, request.beams)


def _length_divisor(length: int, penalty: float) -> np.float32:
    return np.float32(length**penalty)
