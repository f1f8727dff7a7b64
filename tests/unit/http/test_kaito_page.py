"""docs/kaito.md and the code agree on what there is, and on the defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gyrfalcon.http.kaito_schema import ChatRequest, GenerateKwargs, SequenceDetails
from gyrfalcon.service import search_rules
from gyrfalcon.service.validation import DEFAULT_MAX_BEAMS

PAGE = Path(__file__).parents[3] / "docs" / "kaito.md"
ROWS = {
    name.strip().strip("`"): [cell.strip() for cell in line.split(" | ")[1:]]
    for line in reversed(PAGE.read_text(encoding="utf-8").splitlines())  # of two rows of a name the first counts
    if line.startswith("| `")
    for name in line.split(" | ")[0].removeprefix("| ").split(",")
}


@pytest.mark.parametrize(
    "name", [*ChatRequest.model_fields, *GenerateKwargs.model_fields, *SequenceDetails.model_fields]
)
def test_every_member_is_explained(name: str) -> None:
    assert name in ROWS


@pytest.mark.parametrize("name", GenerateKwargs.model_fields)
def test_every_default_is_told(name: str) -> None:
    assert json.loads(ROWS[name][0].strip("`")) == GenerateKwargs.model_fields[name].default


def test_limits_are_told() -> None:
    assert f"at most {DEFAULT_MAX_BEAMS}." in ROWS["num_beams"][1]
    assert f"-{search_rules.MAX_LENGTH_PENALTY:g} to {search_rules.MAX_LENGTH_PENALTY:g}:" in ROWS["length_penalty"][1]
    words = f"at most {search_rules.MAX_BAD_WORDS} of {search_rules.MAX_PHRASE_IDS} ids."
    assert words in ROWS["bad_words_ids"][1]
    assert f"at most {search_rules.MAX_BIASED_PHRASES}." in ROWS["sequence_bias"][1]
    assert f"at most {search_rules.MAX_LISTED_IDS}." in ROWS["suppress_tokens"][1]
