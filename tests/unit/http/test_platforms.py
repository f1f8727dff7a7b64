from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from gyrfalcon.errors import SettingsError
from gyrfalcon.service.tokenizer import load_tokenizer
from gyrfalcon.testing.engine import FakeEngine

from .conftest import MakeClient

PROMPT = "the people"


@pytest.fixture
def playing(make_client: MakeClient, tokenizer_folder: Any) -> TestClient:
    """An engine that writes ` the town` and ends."""
    return make_client(FakeEngine(script=load_tokenizer(tokenizer_folder).encode(" the town")))


def metric(client: TestClient, line: str) -> bool:
    return line in client.get("/metrics").text.splitlines()


class TestInvocations:
    @pytest.mark.parametrize("parameters", [{}, {"details": True}, {"return_full_text": False}])
    def test_a_prompt_is_answered_as_at_the_root(self, playing: TestClient, parameters: dict[str, Any]) -> None:
        body = {"inputs": PROMPT, "parameters": parameters}
        answer, root = playing.post("/invocations", json=body), playing.post("/", json=body)
        assert (answer.status_code, answer.content) == (200, root.content)
        assert isinstance(answer.json(), list)
        assert set(answer.headers) == set(root.headers)

    def test_it_streams_when_asked_to(self, playing: TestClient) -> None:
        body = {"inputs": PROMPT, "stream": True}
        answer = playing.post("/invocations", json=body)
        assert answer.headers["content-type"] == "text/event-stream"
        assert (
            answer.content
            == playing.post("/generate_stream", json=body | {"parameters": {"return_full_text": True}}).content
        )

    @pytest.mark.parametrize(
        ("body", "named"),
        [
            ({"messages": [{"role": "user", "content": "x"}]}, "`messages`"),
            ({"prompt": "x"}, "`prompt`"),
            ({"model": "x", "prompt": ["x"], "max_tokens": 3}, "`prompt`"),
        ],
    )
    def test_openais_shapes_are_refused_by_name(self, client: TestClient, body: dict[str, Any], named: str) -> None:
        answer = client.post("/invocations", json=body)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert f"{named} is not supported at /invocations by this version" in answer.json()["error"]

    @pytest.mark.parametrize(
        ("body", "named"),
        [
            ({}, "inputs: Field required"),
            ([], "the body"),
            ({"inputs": 1}, "inputs"),
            ({"inputs": "", "prompt": "x"}, "`inputs`"),
        ],
    )
    def test_what_fits_no_shape_says_what_is_missing(self, client: TestClient, body: Any, named: str) -> None:
        answer = client.post("/invocations", json=body)
        assert answer.status_code == 422
        assert named in answer.json()["error"]


class TestVertex:
    def test_each_instance_has_its_prediction_in_order(self, make_client: MakeClient) -> None:
        engine = FakeEngine()
        client = make_client(engine)
        instances = [
            {"inputs": f"number {n}", "parameters": {"max_new_tokens": n, "return_full_text": True}} for n in (1, 2, 3)
        ]
        answer = client.post(
            "/vertex", json={"instances": [*instances, {"inputs": "x", "parameters": None}, {"inputs": "y"}]}
        )
        predictions = answer.json()["predictions"]
        assert list(answer.json()) == ["predictions"]
        assert [text.startswith(f"number {n}") for n, text in enumerate(predictions[:3], start=1)] == [True] * 3
        assert [request.max_new_tokens for request in engine.requests] == [1, 2, 3, 20, 20]

    def test_every_parameter_counts_as_at_generate(self, playing: TestClient) -> None:
        parameters = {"stop": ["e t"], "do_sample": True, "seed": 3}
        (text,) = playing.post("/vertex", json={"instances": [{"inputs": PROMPT, "parameters": parameters}]}).json()[
            "predictions"
        ]
        assert text == " the t"

    def test_requests_are_counted_once_and_once_for_each_instance(self, client: TestClient) -> None:
        assert client.post("/vertex", json={"instances": [{"inputs": "x"}] * 3}).status_code == 200
        assert metric(client, "tgi_request_count 4.0")
        assert metric(client, "tgi_request_success 3.0")

    @pytest.mark.parametrize(
        ("instances", "named"),
        [
            ([], "instances"),
            ([{"inputs": "x"}] * 33, "instances"),
            (
                [{"inputs": "x"}, {"inputs": "x", "parameters": {"temperature": 0}}],
                "`temperature` must be strictly positive",
            ),
            ([{"inputs": "x"}, {"inputs": ""}], "`inputs` must not be empty"),
            ([{"inputs": "x"}, {"inputs": 3}], "instances.1.inputs"),
            ([{"messages": []}], "`messages` is not supported at /vertex"),
            (["x"], "instances.0"),
            ({"inputs": "x"}, "instances"),
            (None, "instances"),
        ],
    )
    def test_bad_instances_are_named(self, client: TestClient, instances: Any, named: str) -> None:
        answer = client.post("/vertex", json={"instances": instances})
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert named in answer.json()["error"]

    def test_one_failure_ends_the_others(self, make_client: MakeClient) -> None:
        engine = FakeEngine(step_s=0.02)
        client = make_client(engine)
        long, wrong = {"inputs": "x", "parameters": {"max_new_tokens": 200}}, {"inputs": ""}
        assert client.post("/vertex", json={"instances": [long, long, wrong]}).status_code == 422
        assert engine.stats().num_running == 0
        assert metric(client, 'tgi_request_failure{err="dropped"} 2.0')

    def test_more_instances_than_permits_are_an_overload(self, make_client: MakeClient) -> None:
        client = make_client(max_concurrent_requests=2)
        answer = client.post("/vertex", json={"instances": [{"inputs": "x"}] * 3})
        assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
        assert client.post("/vertex", json={"instances": [{"inputs": "x"}] * 2}).status_code == 200


class TestPathsOfVertex:
    def test_the_platforms_paths_do_what_ours_do(self, make_client: MakeClient) -> None:
        engine = FakeEngine()
        client = make_client(engine, predict_path="/predict", health_path="/live", api_keys=("k",))
        body = {"instances": [{"inputs": "x"}]}
        assert client.get("/live").status_code == client.head("/live").status_code == 200
        assert client.post("/predict", json=body).status_code == 401
        answer = client.post("/predict", json=body, headers={"Authorization": "Bearer k"})
        assert len(answer.json()["predictions"]) == 1
        engine.die()
        assert client.get("/live").status_code == 503
        paths = client.get("/openapi.json").json()["paths"]
        assert set(paths["/predict"]) == {"post"}
        assert "security" not in paths["/live"]["get"]

    @pytest.mark.parametrize("health", ["/health", "/ping", "/vertex", "/v1/live"])
    def test_paths_that_agree_with_ours_are_fine(self, make_client: MakeClient, health: str) -> None:
        client = make_client(predict_path="/vertex", health_path=health)
        assert client.get(health).status_code == 200
        assert client.post("/vertex", json={"instances": [{"inputs": "x"}]}).status_code == 200

    @pytest.mark.parametrize(
        ("settings", "variable"),
        [
            ({"predict_path": "/generate"}, "AIP_PREDICT_ROUTE"),
            ({"predict_path": "/chat"}, "AIP_PREDICT_ROUTE"),
            ({"health_path": "/info"}, "AIP_HEALTH_ROUTE"),
            ({"health_path": "/metrics"}, "AIP_HEALTH_ROUTE"),
        ],
    )
    def test_a_path_that_means_something_else_is_refused(
        self, make_client: MakeClient, settings: dict[str, str], variable: str
    ) -> None:
        with pytest.raises(SettingsError, match=f"^{variable}: .* another meaning") as refused:
            make_client(**settings)
        assert refused.value.setting == variable
