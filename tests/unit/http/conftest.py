"""The application over a fake engine and a small tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from gyrfalcon.http.app import create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service, write_tokenizer

MakeClient = Callable[..., TestClient]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_client(tokenizer_folder: Path) -> MakeClient:
    def make(engine: FakeEngine | None = None, *, max_concurrent_requests: int = 128, **settings: Any) -> TestClient:
        service, metrics = text_service(
            engine or FakeEngine(), tokenizer_folder, max_concurrent_requests=max_concurrent_requests
        )
        return TestClient(create_app(service, HttpSettings(**settings), metrics))

    return make


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client()
