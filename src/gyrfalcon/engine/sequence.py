"""What the engine knows of a request: its group, and the rows it has in the batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gyrfalcon.engine.beams import Search, make_search
from gyrfalcon.engine.block_pool import block_key, first_parent
from gyrfalcon.engine.interface import EngineRequest
from gyrfalcon.engine.sampling_record import is_plain, make_record
from gyrfalcon.engine.speculation import Drafter, NgramIndex


class Sequence:
    """One row: token ids, how many of them are in the cache, and the blocks that hold them.

    It carries every choice whose tokens so far are exactly its own: all of them until the first draw, one after it.
    Only the scheduler changes a sequence.
    """

    __slots__ = (
        "_keys",
        "_salt",
        "_tokens",
        "blocks",
        "choices",
        "drafter",
        "num_computed_tokens",
        "num_published",
        "num_tokens",
    )

    def __init__(self, prompt_ids: tuple[int, ...], max_new_tokens: int, choices: tuple[int, ...], salt: str) -> None:
        self._tokens = np.empty(len(prompt_ids) + max_new_tokens, dtype=np.int32)
        self._tokens[: len(prompt_ids)] = prompt_ids
        self.num_tokens = len(prompt_ids)
        self.num_computed_tokens = 0  # tokens whose keys and values are in the cache
        self.num_published = 0  # leading blocks offered to the prefix index
        self.blocks: list[int] = []
        self.choices = choices
        self.drafter: Drafter | None = None  # of a sequence that has been speculated on
        self._salt = salt
        self._keys: list[bytes] = []

    @property
    def token_ids(self) -> np.ndarray:
        """Prompt and generated ids so far; a view, not to be written."""
        return self._tokens[: self.num_tokens]

    @property
    def num_pending_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    def append(self, token_id: int) -> None:
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1

    def fork(self, choice: int) -> Sequence:
        """A copy that carries one choice and names the same blocks; the caller adds the block references."""
        twin = object.__new__(Sequence)
        twin._tokens = self._tokens.copy()
        twin.num_tokens = self.num_tokens
        twin.num_computed_tokens = self.num_computed_tokens
        twin.num_published = self.num_published
        twin.blocks = list(self.blocks)
        twin.choices = (choice,)
        twin.drafter = None
        twin._salt = self._salt
        twin._keys = list(self._keys)
        return twin

    def prefix_keys(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Keys of the first `num_blocks` blocks, all of which must be full of known tokens."""
        while len(self._keys) < num_blocks:
            start = len(self._keys) * block_size
            parent = self._keys[-1] if self._keys else first_parent(self._salt)
            self._keys.append(block_key(parent, self._tokens[start : start + block_size]))
        return self._keys[:num_blocks]


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """A request in the engine and its live sequences. Only the scheduler and the core change it."""

    request: EngineRequest
    arrival_s: float  # monotonic clock
    salt: str
    record: bytes = field(init=False)  # of its parameters, see `sampling_record`
    is_plain: bool = field(init=False)  # the model's likeliest tokens are all it asks for
    sequences: list[Sequence] = field(default_factory=list)
    ended_choices: set[int] = field(default_factory=set)
    arrival: int = 0  # its place among all that came
    started_s: float | None = None  # when its first token was first scheduled
    stream_since: int | None = None  # how many had come when it decoded first
    num_cached_tokens: int = 0  # prompt tokens the prefix cache gave at the first admission
    prompt_logprobs: list[float | None] | None = None  # collected so far, when asked for
    prompt_reported: bool = False
    num_preemptions: int = 0
    num_overtakings: int = 0  # times a later request was admitted before it, as it did not fit
    search: Search | None = None  # of a request with beams; its choices are then the beams
    prompt_index: NgramIndex | None = None  # of a request that has been speculated on

    def __post_init__(self) -> None:
        request = self.request
        self.record = make_record(request)
        self.is_plain = is_plain(request)
        self.search = make_search(request)
        choices = tuple(range(self.num_rows))
        self.sequences = [Sequence(request.prompt_ids, request.max_new_tokens, choices, self.salt)]
        if request.prompt_logprobs:
            self.prompt_logprobs = [None]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    def is_overdue(self, now_s: float) -> bool:
        """Whether its time to begin is over. What has begun has all the time it needs, also where it is preempted."""
        most_s = self.request.begin_within_s
        return self.started_s is None and most_s is not None and now_s - self.arrival_s >= most_s

    @property
    def num_live_choices(self) -> int:
        """Choices still generating."""
        return self.request.num_choices - len(self.ended_choices)

    @property
    def num_rows(self) -> int:
        """Rows this group may come to need."""
        return self.num_live_choices if self.request.beams is None else self.request.beams.num_beams

    @property
    def moves_in_step(self) -> bool:
        """Whether its sequences can only advance together, as beams do, which are compared with each other."""
        return self.search is not None and len(self.sequences) > 1

    @property
    def is_finished(self) -> bool:
        return not self.sequences

    def num_generated(self, sequence: Sequence) -> int:
        return sequence.num_tokens - self.num_prompt_tokens

    def drafter(self, sequence: Sequence) -> Drafter:
        """The sequence's own; made when first asked for."""
        if sequence.drafter is None:
            if self.prompt_index is None:
                self.prompt_index = NgramIndex(sequence.token_ids[: self.num_prompt_tokens])
            sequence.drafter = Drafter(self.prompt_index)
        return sequence.drafter

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt log-probabilities are still to be collected."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens
