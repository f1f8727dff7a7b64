"""One server for all clients, each in the environment that `make clients` made for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gyrfalcon.testing.server import ServerProcess, running_server
from tests.clients.observation import CLIENTS_ARE_REQUIRED, SERVER_ARGUMENTS, Observe, Seen, call_with
from tools.client_environments import is_ready, python_of


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    with running_server(*SERVER_ARGUMENTS) as running:
        yield running


@pytest.fixture(scope="session")
def observe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Observe:
    """Run a script in an environment: observe(environment, script, *arguments). Skips where it is not there."""

    def run(environment: str, script: str, *arguments: str) -> Seen:
        if not is_ready(environment):
            message = f".venv-clients/{environment} is missing or not as its list says: run `make clients`"
            pytest.fail(message) if CLIENTS_ARE_REQUIRED else pytest.skip(message)
        home = tmp_path_factory.mktemp("home")
        return call_with(request.getfixturevalue("server"), python_of(environment), home, script, *arguments)

    return run
