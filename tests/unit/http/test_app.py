from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

from gyrfalcon.metrics import METRICS_CONTENT_TYPE

from .conftest import MakeClient


@pytest.mark.parametrize(
    "path", ["/nothing", "/generate/", "/health/", "/v1", "/v1/models", "/v1/chat/completions", "/docs/", "/generate/x"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_not_found_and_never_redirected(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path, json={}, follow_redirects=False)
    assert (answer.status_code, answer.content) == (404, b"")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/generate", {"POST"}),
        ("DELETE", "/", {"GET", "HEAD", "POST"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("PUT", "/info", {"GET", "HEAD"}),
        ("PATCH", "/chat", {"POST"}),
    ],
)
def test_a_wrong_method_is_answered_with_those_allowed(
    client: TestClient, method: str, path: str, allowed: set[str]
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert answer.content == b"" or path == "/chat"


@pytest.mark.parametrize("path", ["/", "/health", "/healthz", "/ping", "/info", "/metrics", "/docs", "/openapi.json"])
def test_head_answers_as_get_without_a_body(client: TestClient, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers.get("content-type") == got.headers.get("content-type")


class TestDocumentation:
    @pytest.mark.parametrize("path", ["/openapi.json", "/api-doc/openapi.json"])
    def test_the_document_shows_the_real_types(self, client: TestClient, path: str) -> None:
        document = client.get(path).json()
        schemas = document["components"]["schemas"]
        assert set(schemas["GenerateParameters"]["properties"]) >= {"best_of", "stop", "typical_p", "watermark"}
        assert schemas["GenerateParameters"]["properties"]["temperature"]["description"]
        assert set(schemas["GenerateKwargs"]["properties"]) >= {"max_length", "num_beams", "bad_words_ids"}
        for path_, body in (
            ("/generate", "GenerateRequest"),
            ("/", "CompatGenerateRequest"),
            ("/chat", "ChatRequest"),
            ("/tokenize", "GenerateRequest"),
            ("/chat_tokenize", "ChatTokenizeRequest"),
            ("/invocations", "CompatGenerateRequest"),
            ("/vertex", "VertexRequest"),
            ("/watermark/detect", "DetectRequest"),
        ):
            content = document["paths"][path_]["post"]["requestBody"]["content"]
            assert content["application/json"]["schema"] == {"$ref": f"#/components/schemas/{body}"}
            assert client.post(path_, json=content["application/json"]["example"]).status_code == 200

    def test_every_reference_leads_somewhere(self, client: TestClient) -> None:
        answer = client.get("/openapi.json")
        names = set(re.findall(r'"#/components/schemas/([^"]+)"', answer.text))
        assert names
        assert names <= set(answer.json()["components"]["schemas"])

    def test_every_route_is_in_it(self, client: TestClient) -> None:
        assert set(client.get("/openapi.json").json()["paths"]) == {
            *("/", "/generate", "/generate_stream", "/health", "/ping", "/info"),
            *("/tokenize", "/chat_tokenize", "/invocations", "/vertex"),
            *("/chat", "/healthz", "/metrics", "/watermark/detect"),
            *("/health/live", "/health/ready", "/ready"),
        }

    def test_operations_that_need_a_key_say_so(self, make_client: MakeClient) -> None:
        paths = make_client(api_keys=("k",)).get("/openapi.json").json()["paths"]
        assert paths["/generate"]["post"]["security"] == [{"ApiKey": []}]
        assert paths["/"]["post"]["security"] == [{"ApiKey": []}]
        assert "security" not in paths["/"]["get"]

    def test_the_page_loads_nothing_from_elsewhere(self, client: TestClient) -> None:
        page = client.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(loaded) == 3
        assert "//" not in "".join(loaded)
        for path in loaded:
            assert client.get(path).status_code == 200
            assert len(client.get(path).content) > 1000

    def test_the_page_works_under_a_prefix(self, make_client: MakeClient) -> None:
        page = TestClient(make_client().app, root_path="/models/a").get("/models/a/docs").text
        assert 'src="/models/a/docs/swagger-ui-bundle.js"' in page
        assert "'/models/a/openapi.json'" in page


class TestMetrics:
    def test_names_are_those_of_tgi(self, client: TestClient) -> None:
        client.post("/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 3}})
        client.post("/generate", json={"inputs": ""})
        answer = client.get("/metrics")
        assert answer.headers["content-type"] == METRICS_CONTENT_TYPE
        lines = set(answer.text.splitlines())
        assert "tgi_request_count 2.0" in lines
        assert "tgi_request_success 1.0" in lines
        assert 'tgi_request_failure{err="validation"} 1.0' in lines
        assert "tgi_request_generated_tokens_sum 3.0" in lines
        assert "tgi_queue_size 0.0" in lines
        assert "tgi_batch_current_size 0.0" in lines
        assert 'gyrfalcon_decode_tokens_total{model="tiny"} 3.0' in lines
        assert "# TYPE tgi_request_count counter" in lines
        assert "_created" not in answer.text

    def test_bodies_that_are_refused_unread_are_counted(self, client: TestClient) -> None:
        client.post("/generate", content=b"{", headers={"Content-Type": "application/json"})
        client.post("/chat", content=b"{")
        client.post("/generate_stream", content=b"{}")
        assert 'gyrfalcon_rejected_total{cause="malformed"} 3.0' in client.get("/metrics").text.splitlines()

    def test_two_applications_count_apart(self, make_client: MakeClient) -> None:
        first, second = make_client(), make_client()
        first.post("/generate", json={"inputs": "x"})
        assert "tgi_request_count 1.0" in first.get("/metrics").text
        assert "tgi_request_count 0.0" in second.get("/metrics").text


class TestHeaders:
    @pytest.mark.parametrize(
        "headers", [{f"x-{n}": "y" for n in range(101)}, {"x": "y" * 32_769}, {f"x-{n}": "y" * 8000 for n in range(5)}]
    )
    @pytest.mark.parametrize("path", ["/generate", "/chat", "/health", "/nothing"])
    def test_too_many_or_too_large_headers_are_refused(
        self, client: TestClient, path: str, headers: dict[str, str]
    ) -> None:
        answer = client.post(path, json={"inputs": "x"}, headers=headers)
        assert (answer.status_code, answer.json()["error_type"]) == (431, "headers_too_large")
        assert client.get("/health").status_code == 200

    def test_what_clients_and_proxies_send_is_fine(self, client: TestClient) -> None:
        headers = {f"x-{n}": "y" * 300 for n in range(80)}
        assert client.post("/generate", json={"inputs": "x"}, headers=headers).status_code == 200


class TestCrossOrigin:
    def test_a_preflight_is_answered_for_reading_and_posting(self, client: TestClient) -> None:
        headers = {
            "Origin": "http://a.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type, authorization",
        }
        answer = client.options("/generate_stream", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "*"
        assert set(answer.headers["access-control-allow-methods"].split(", ")) == {"GET", "POST"}
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert "content-type" in allowed
        assert "authorization" in allowed
        refused = client.options("/generate", headers=headers | {"Access-Control-Request-Method": "DELETE"})
        assert refused.status_code == 400

    @pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", "/tokenize"])
    def test_answers_and_streams_may_be_read_elsewhere(self, client: TestClient, path: str) -> None:
        for body in ({"inputs": "x"}, {"inputs": ""}, {}):
            answer = client.post(path, json=body, headers={"Origin": "http://a.example"})
            assert answer.headers["access-control-allow-origin"] == "*"

    def test_any_origin_may_read_by_default(self, client: TestClient) -> None:
        headers = client.get("/info", headers={"Origin": "http://a.example"}).headers
        assert headers["access-control-allow-origin"] == "*"
        assert "x-generated-tokens" in headers["access-control-expose-headers"]

    def test_only_those_named_may_when_some_are(self, make_client: MakeClient) -> None:
        client = make_client(cors_allow_origins=("http://a.example",))
        allowed = client.get("/info", headers={"Origin": "http://a.example"}).headers
        assert allowed["access-control-allow-origin"] == "http://a.example"
        assert "access-control-allow-origin" not in client.get("/info", headers={"Origin": "http://b.example"}).headers
