"""Searches by themselves, over proposals made by hand."""

from __future__ import annotations

import numpy as np

from gyrfalcon.engine.beams import Proposals, Search
from gyrfalcon.engine.interface import BeamParams, EngineRequest


def proposals(*pairs: tuple[int, float]) -> Proposals:
    ids, scores = zip(*pairs, strict=True)
    return Proposals(np.array(ids, dtype=np.int32), np.array(scores, dtype=np.float32), np.array(scores))


def test_beams_of_a_group_are_numbered_in_the_whole_search() -> None:
    params = BeamParams(num_beams=2, num_beam_groups=2, diversity_penalty=1.0)
    search = Search(EngineRequest(request_id="a", prompt_ids=(1,), max_new_tokens=2, beams=params), params)
    for _ in range(2):
        search.advance(0, [proposals((5, -1.0), (6, -2.0))])
        search.advance(1, [proposals((7, -1.5), (6, -2.5))])
        search.end_step()
    found = [[(step.token_id, step.beam) for step in one.trail.walk()] for one in search.best(2)]
    assert found == [[(5, 0), (5, 0)], [(7, 1), (7, 1)]]
