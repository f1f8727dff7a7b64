"""7.3: the OpenAPI document against the server: whatever it allows or forbids, no answer is a failure of the server."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from starlette.testclient import TestClient

from gyrfalcon.http.app import create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service, write_tokenizer

EXAMPLES = 12  # of each operation, of values that fit the document as well as of others


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Any:
    service, metrics = text_service(FakeEngine(), write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    app = create_app(service, HttpSettings(), metrics)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_7_3_every_operation_keeps_to_the_document(api: Any, mode: schemathesis.GenerationMode) -> None:
    operations = [each.ok() for each in api.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:
        try:
            cases = operation.as_strategy(generation_mode=mode)
            _try(cases)
        except Exception as error:
            if type(error).__name__ != "Unsatisfiable" or mode is schemathesis.GenerationMode.POSITIVE:
                raise  # an operation without a body has no wrong one


def _try(cases: Any) -> None:
    @given(cases)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def call(case: Any) -> None:
        response = case.call()
        case.validate_response(response, checks=[checks.not_a_server_error])
        if response.status_code == 200 and response.headers.get("content-type") == ["application/json"]:
            case.validate_response(response, checks=[content_type_conformance, response_schema_conformance])

    call()


def test_7_3_the_document_names_every_route(api: Any) -> None:
    client = TestClient(api.app)
    documented = set(client.get("/openapi.json").json()["paths"])
    hidden = {"/docs", "/openapi.json", "/api-doc/openapi.json"}
    routes = {route.path for route in api.app.routes if not route.path.startswith("/docs/")}
    assert routes == documented | hidden
