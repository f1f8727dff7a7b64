"""The application over a fake engine behind a real socket: what the checklist of docs/reliability.md is tried on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from gyrfalcon.http.app import create_app
from gyrfalcon.http.keys import KeyStore
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service, write_tokenizer
from tests.reliability.house import House, open_house

OpenHouse = Callable[..., AbstractAsyncContextManager[House]]
MakeClient = Callable[..., TestClient]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def house(tokenizer_folder: Path) -> OpenHouse:
    """Makes servers on free ports."""

    def make(engine: FakeEngine | None = None, **options: Any) -> AbstractAsyncContextManager[House]:
        return open_house(engine or FakeEngine(), tokenizer_folder, **options)

    return make


@pytest.fixture
def make_client(tokenizer_folder: Path) -> MakeClient:
    """Makes clients of applications without a server between."""

    def make(
        engine: FakeEngine | None = None, *, keys: KeyStore | None = None, limits: Any = None, **settings: Any
    ) -> TestClient:
        service, metrics = text_service(engine or FakeEngine(), tokenizer_folder, limits=limits)
        return TestClient(create_app(service, HttpSettings(**settings), metrics, keys=keys))

    return make
