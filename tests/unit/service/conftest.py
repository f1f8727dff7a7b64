"""A small tokenizer, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from gyrfalcon.service.tokenizer import TextTokenizer, load_tokenizer
from gyrfalcon.testing.text import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return load_tokenizer(tokenizer_folder)
