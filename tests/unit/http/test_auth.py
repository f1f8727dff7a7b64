from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from gyrfalcon.http.app import OPEN_PATHS

from .conftest import MakeClient

KEYS = ("first-key", "zweiter-schlüssel")


@pytest.fixture
def guarded(make_client: MakeClient) -> TestClient:
    return make_client(api_keys=KEYS)


def routes(client: TestClient) -> set[tuple[str, str]]:
    return {(method, route.path) for route in client.app.routes for method in route.methods}  # type: ignore[attr-defined]


def test_every_route_is_closed_but_the_open_ones(guarded: TestClient) -> None:
    for method, path in routes(guarded):
        status = guarded.request(method, path, json={}).status_code
        is_open = method in {"GET", "HEAD"} and path in OPEN_PATHS
        assert (status != 401) == is_open, (method, path, status)


def test_open_paths_lead_somewhere(guarded: TestClient) -> None:
    assert {path for method, path in routes(guarded) if method == "GET"} == {*OPEN_PATHS, "/metrics"}


def test_metrics_are_open_where_the_operator_says_so(guarded: TestClient, make_client: MakeClient) -> None:
    assert guarded.get("/metrics").status_code == 401
    assert make_client(api_keys=KEYS, open_metrics=True).get("/metrics").status_code == 200


@pytest.mark.parametrize(
    "path",
    ["//generate", "/generate/", "/GENERATE", "/health/", "/health/../generate", "/%67enerate", "/nothing", "/docs/x"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS", "TRACE"])
def test_no_spelling_of_a_path_gets_around_the_key(guarded: TestClient, method: str, path: str) -> None:
    assert guarded.request(method, f"http://testserver{path}", json={"inputs": "x"}).status_code == 401


def test_generating_at_the_root_needs_a_key_although_its_health_does_not(guarded: TestClient) -> None:
    assert guarded.get("/").status_code == 200
    assert guarded.post("/", json={"inputs": "x"}).status_code == 401


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_each_key_opens(guarded: TestClient, key: str, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {key}".encode()}
    assert guarded.post("/generate", json={"inputs": "x"}, headers=headers).status_code == 200  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer FIRST-KEY",
        "Bearer first-key-and-more",
        "Bearer first-ke",
        "first-key",
        "Basic first-key",
        "Bearer first-key first-key",
    ],
)
def test_anything_else_does_not(guarded: TestClient, header: str) -> None:
    answer = guarded.post("/generate", json={"inputs": "x"}, headers={"Authorization": header})
    assert answer.status_code == 401
    assert answer.json().keys() == {"error"}
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "first-key" not in answer.text


def test_the_answer_has_the_shape_of_its_dialect(guarded: TestClient) -> None:
    assert list(guarded.post("/chat", json={"prompt": "x"}).json()) == ["detail"]


def test_a_refused_request_is_answered_before_its_body_is_read(guarded: TestClient) -> None:
    assert guarded.post("/generate", content=b"{" * 3_000_000).status_code == 401


def test_refusals_are_counted(guarded: TestClient) -> None:
    for _ in range(3):
        guarded.post("/generate", json={"inputs": "x"})
    lines = guarded.get("/metrics", headers={"Authorization": "Bearer first-key"}).text.splitlines()
    assert 'gyrfalcon_rejected_total{cause="unauthorized"} 3.0' in lines


@pytest.mark.parametrize("path", ["/tokenize", "/chat_tokenize", "/invocations", "/vertex"])
def test_what_tokenises_renders_or_generates_needs_a_key(guarded: TestClient, path: str) -> None:
    assert guarded.post(path, json={"inputs": "x", "messages": []}).status_code == 401


def test_a_browsers_preflight_needs_no_key(guarded: TestClient) -> None:
    headers = {
        "Origin": "http://example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = guarded.options("/generate", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"


def test_without_keys_everything_is_open(client: TestClient) -> None:
    assert client.post("/generate", json={"inputs": "x"}).status_code == 200


def test_a_mounted_application_guards_the_paths_its_router_sees(make_client: MakeClient) -> None:
    guarded = TestClient(make_client(api_keys=KEYS).app, root_path="/models/a")
    assert guarded.get("/models/a/health").status_code == 200
    assert guarded.post("/models/a/generate", json={"inputs": "x"}).status_code == 401
