"""The application over a fake engine, as the clients of each dialect see it."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from gyrfalcon.http.app import create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service, write_tokenizer

API_KEY = "KEY"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def session_engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="session")
def session_client(session_engine: FakeEngine, tokenizer_folder: Path) -> TestClient:
    service, metrics = text_service(session_engine, tokenizer_folder, name="eyas")
    return TestClient(create_app(service, HttpSettings(api_keys=(API_KEY,)), metrics))


@pytest.fixture
def engine(session_engine: FakeEngine) -> FakeEngine:
    """The engine behind `client`, with no memory of earlier tests."""
    session_engine.requests.clear()
    return session_engine


@pytest.fixture
def client(session_client: TestClient, engine: FakeEngine) -> TestClient:
    assert engine.requests == []
    return session_client
