"""What a server that is full says, and to whom."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from gyrfalcon.http.app import create_app
from gyrfalcon.http.drain import Drain
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.interface import GenerateCall
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service

FULL = "model is overloaded: at most 1 sequences run at the same time"
TGI_BODY = {"error": FULL, "error_type": "overloaded"}
PROMPT = {"inputs": "x", "prompt": "x"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What an application sent."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)

    @property
    def event(self) -> Any:
        """The only event of a stream."""
        line, end, rest = self.content.partition(b"\n\n")
        assert (end, rest) == (b"\n\n", b"")
        return json.loads(line.removeprefix(b"data: "))


@dataclass(frozen=True, slots=True)
class FullHouse:
    """An application whose service runs all that it may."""

    app: FastAPI
    metrics: Metrics
    drain: Drain

    async def ask(self, path: str, *body: bytes, method: str = "POST", headers: dict[str, str] | None = None) -> Answer:
        """Send a request whose body comes in these pieces, and never ends if the last one is empty."""
        pieces = list(body or (json.dumps(PROMPT).encode(),))
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not pieces or not pieces[0]:
                await asyncio.Event().wait()
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        given = {"content-type": "application/json"} | (headers or {})
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "state": {},
        }
        await self.app(scope, receive, send)  # type: ignore[arg-type]
        shown = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], shown, b"".join(message.get("body", b"") for message in sent[1:]))

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


OpenFullHouse = Callable[..., Any]


@pytest.fixture
def full_house(tokenizer_folder: Path) -> OpenFullHouse:
    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[FullHouse]:
        service, metrics = text_service(FakeEngine(step_s=0.05), tokenizer_folder, max_concurrent_requests=1)
        drain = Drain()
        app = create_app(service, HttpSettings(**settings), metrics, drain=drain)
        running = asyncio.create_task(service.complete(GenerateCall(prompt="x", max_new_tokens=200)))
        await asyncio.sleep(0)
        try:
            yield FullHouse(app, metrics, drain)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    return make


@pytest.mark.parametrize("path", ["/generate", "/", "/invocations", "/vertex", "/predict"])
async def test_a_full_server_says_so_as_tgi_does(full_house: OpenFullHouse, path: str) -> None:
    async with full_house(predict_path="/predict") as house:
        answer = await house.ask(path)
        assert (answer.status, answer.body) == (429, TGI_BODY)
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["content-length"] == str(len(answer.content))


async def test_a_full_server_says_so_as_kaitos_does(full_house: OpenFullHouse) -> None:
    async with full_house() as house:
        answer = await house.ask("/chat")
        assert (answer.status, answer.body) == (429, {"detail": FULL})
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/generate_stream", b"{}", TGI_BODY),
        ("/", b'{"inputs": "x", "stream": true}', TGI_BODY),
        ("/invocations", b'{"stream" :true, "inputs": "x"}', TGI_BODY),
        ("/chat", b'{"prompt": "x", "stream": true}', {"detail": FULL}),
    ],
)
async def test_on_a_stream_it_is_an_event(full_house: OpenFullHouse, path: str, body: bytes, said: Any) -> None:
    async with full_house() as house:
        answer = await house.ask(path, body)
        assert (answer.status, answer.event) == (200, said)
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": "x", "stream": false}',
        b'{"inputs": "say \\"stream\\": true"}',
        b'{"inputs": "x", "stream": "true"}',
        b"not JSON",
    ],
)
async def test_what_does_not_ask_for_a_stream_gets_a_status(full_house: OpenFullHouse, body: bytes) -> None:
    async with full_house() as house:
        assert (await house.ask("/", body)).status == 429


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/tokenize", 200),
        ("GET", "/", 200),
        ("GET", "/health", 200),
        ("GET", "/info", 200),
        ("GET", "/generate", 405),
        ("POST", "/nowhere", 404),
    ],
)
async def test_what_does_not_generate_is_answered_as_ever(
    full_house: OpenFullHouse, method: str, path: str, status: int
) -> None:
    async with full_house() as house:
        assert (await house.ask(path, method=method)).status == status


async def test_under_a_proxys_prefix_it_is_the_same(full_house: OpenFullHouse) -> None:
    async with full_house() as house:
        house.app.root_path = "/prefix"
        assert (await house.ask("/prefix/generate")).status == 429


async def test_who_may_not_come_in_does_not_learn_how_full_it_is(full_house: OpenFullHouse) -> None:
    async with full_house(api_keys=("k",)) as house:
        assert (await house.ask("/generate")).status == 401
        assert (await house.ask("/generate", headers={"authorization": "Bearer k"})).status == 429
        assert house.metric("gyrfalcon_rejected_total", cause="overloaded") == 1


async def test_a_server_on_its_way_down_says_that(full_house: OpenFullHouse) -> None:
    async with full_house() as house:
        house.drain.begin()
        answer = await house.ask("/generate")
        assert (answer.status, answer.body["error_type"]) == (503, "draining")


async def test_each_refusal_is_counted_as_a_request_that_failed(full_house: OpenFullHouse) -> None:
    async with full_house() as house:
        for path in ("/generate", "/generate_stream", "/chat"):
            await house.ask(path)
        assert house.metric("tgi_request_count_total") == 4  # and the one that runs
        assert house.metric("tgi_request_failure_total", err="overloaded") == 3
        assert house.metric("gyrfalcon_rejected_total", cause="overloaded") == 3


async def test_a_body_in_pieces_is_read_to_its_end(full_house: OpenFullHouse) -> None:
    async with full_house() as house:
        answer = await house.ask("/", b'{"inputs": "x", "str', b'eam": true}')
        assert (answer.status, answer.event) == (200, TGI_BODY)
        assert "connection" not in answer.headers


@pytest.mark.parametrize(
    "body", [(b"x" * 60, b"x" * 60), (b"x", b""), (b"",)], ids=["too large", "never ends", "never begins"]
)
async def test_a_body_that_is_not_read_to_its_end_ends_the_connection(
    full_house: OpenFullHouse, body: tuple[bytes, ...]
) -> None:
    async with full_house(payload_limit=100, body_timeout_s=0.05) as house:
        answer = await house.ask("/generate", *body)
        assert (answer.status, answer.body) == (429, TGI_BODY)
        assert answer.headers["connection"] == "close"


async def test_a_server_that_ends_before_a_body_has_come_says_no_more_than_that(full_house: OpenFullHouse) -> None:
    async with full_house() as house:
        asking = asyncio.create_task(house.ask("/generate", b""))
        await asyncio.sleep(0.01)
        asking.cancel()
        answer = await asking
        assert (answer.status, answer.headers["connection"]) == (429, "close")


async def test_a_browsers_script_may_read_the_refusal(full_house: OpenFullHouse) -> None:
    async with full_house() as house:
        for _ in range(2):
            answer = await house.ask("/generate", headers={"origin": "http://page"})
            assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-origin" not in (await house.ask("/generate")).headers
