"""7.9 and 7.10: what the sources must not contain, and that each part of the checklist has its tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FORBIDDEN = {
    "pickles": r"^\s*(?:import|from) (?:pickle|cPickle|dill|shelve|marshal)\b",
    "code from text": r"(?<![\w.])(?:eval|exec)\(",
    "tensors with code": r"\btorch\.load\(",
    "a template outside the sandbox": r"\bjinja2\.(?:Environment|Template)\(|^from jinja2 import .*\bEnvironment\b",
    "code of checkpoints": r"trust_remote_code\s*=\s*True",
    "commands through a shell": r"shell\s*=\s*True|\bos\.system\(",
    "TLS without checks": r"CERT_NONE|verify\s*=\s*False|_create_unverified_context",
    "YAML with code": r"\byaml\.(?:load|unsafe_load)\(",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_7_9_the_sources_are_free_of(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    assert [str(path.relative_to(ROOT)) for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))] == []


def test_7_9_no_cache_of_identities_uses_pythons_hash() -> None:
    text = (ROOT / "src" / "gyrfalcon" / "engine" / "block_pool.py").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])hash\(", text)
    assert "sha256" in text


def test_7_10_each_number_of_the_front_has_a_test_named_after_it() -> None:
    names = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    numbers = ["1_3", "2", "2_1", "2_2", "2_3", "2_4", "2_5", "2_6"]
    numbers += [f"3_{number}" for number in range(1, 8)] + ["4_1", "4_2", "4_3", "4_5"]
    numbers += [f"5_{number}" for number in range(1, 5)] + ["7_3", "7_4", "7_9", "7_10"]
    assert [number for number in numbers if not re.search(rf"def test_{number}_[a-z]", names)] == []
