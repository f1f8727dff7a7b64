"""Clients over real sockets: what they see on the wire, and what happens when they leave."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gyrfalcon.http.app import create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service


@asynccontextmanager
async def serving(
    engine: FakeEngine,
    folder: Path,
    *,
    max_concurrent_requests: int = 128,
    grace_s: int | None = None,
    **settings: Any,
) -> AsyncIterator[int]:
    """The application behind a real server on a free port."""
    service, metrics = text_service(engine, folder, max_concurrent_requests=max_concurrent_requests)
    app = create_app(service, HttpSettings(**settings), metrics)
    config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=grace_s)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await until(lambda: server.started)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await running


async def post(port: int, path: str, **body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request whole and leave its answer to be read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + payload)
    await writer.drain()
    return reader, writer


async def answer(port: int, path: str, **body: Any) -> bytes:
    """Everything that comes back for a request."""
    reader, writer = await post(port, path, **body)
    try:
        return await reader.read()
    finally:
        writer.close()


async def until(condition: Callable[[], object], timeout_s: float = 2.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


LONG = {"max_new_tokens": 200}
BODIES = {
    "/generate": {"inputs": "hello", "parameters": LONG},
    "/generate_stream": {"inputs": "hello", "parameters": LONG},
    "/": {"inputs": "hello", "parameters": LONG},
    "/chat": {"prompt": "hello", "generate_kwargs": LONG},
}


@pytest.mark.parametrize("path", BODIES)
async def test_a_client_that_leaves_while_tokens_are_made_aborts_its_work(path: str, tokenizer_folder: Path) -> None:
    engine = FakeEngine(step_s=0.005)
    async with serving(engine, tokenizer_folder) as port:
        _reader, writer = await post(port, path, **BODIES[path])
        await until(lambda: engine.stats().decode_tokens > 3)
        writer.close()
        await until(lambda: engine.aborted)
        assert engine.aborted == [engine.requests[0].request_id]
        assert engine.stats().num_running == 0
        assert engine.stats().decode_tokens < 150


@pytest.mark.parametrize("path", BODIES)
async def test_a_client_that_leaves_while_its_request_waits_aborts_it(path: str, tokenizer_folder: Path) -> None:
    engine = FakeEngine(start_s=30)
    async with serving(engine, tokenizer_folder) as port:
        _reader, writer = await post(port, path, **BODIES[path])
        await until(lambda: engine.stats().num_waiting == 1)
        writer.transport.abort()  # as a crashed client: a reset, not an orderly end
        await until(lambda: engine.aborted)
        assert engine.stats().num_waiting == 0


@pytest.mark.parametrize("path", BODIES)
async def test_a_client_that_leaves_is_counted_as_such(path: str, tokenizer_folder: Path) -> None:
    engine = FakeEngine(step_s=0.005)
    async with serving(engine, tokenizer_folder) as port:
        _reader, writer = await post(port, path, **BODIES[path])
        await until(lambda: engine.stats().decode_tokens > 3)
        writer.close()
        await until(lambda: engine.aborted)
        _reader, scraping = await asyncio.open_connection("127.0.0.1", port)
        scraping.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        lines = (await _reader.read()).splitlines()
        scraping.close()
    assert b'gyrfalcon_aborts_total{cause="disconnect"} 1.0' in lines
    assert b'tgi_request_failure{err="dropped"} 1.0' in lines


@pytest.mark.parametrize("path", BODIES)
async def test_what_runs_when_the_servers_patience_ends_is_told_so(path: str, tokenizer_folder: Path) -> None:
    engine = FakeEngine(step_s=0.01)
    async with serving(engine, tokenizer_folder, grace_s=0) as port:
        reader, writer = await post(port, path, **BODIES[path])
        await until(lambda: engine.stats().decode_tokens > 3)
    received = await asyncio.wait_for(reader.read(), 2)
    writer.close()
    assert engine.aborted
    if path == "/generate_stream":
        assert received.startswith(b"HTTP/1.1 200 ")
        last = received.split(b"data: ")[-1].split(b"\n")[0]
        assert json.loads(last) == {
            "error": "the server is shutting down",
            "error_type": "incomplete_generation_stream",
        }
        assert received.endswith(b"0\r\n\r\n")
    else:
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"the server is shutting down" in received


async def test_a_neighbour_goes_on_when_a_client_leaves(tokenizer_folder: Path) -> None:
    engine = FakeEngine(step_s=0.005)
    async with serving(engine, tokenizer_folder) as port:
        stays = asyncio.create_task(answer(port, "/generate", inputs="hello", parameters={"max_new_tokens": 40}))
        _reader, leaves = await post(port, "/generate", **BODIES["/generate"])
        await until(lambda: engine.stats().num_running == 2)
        leaves.close()
        assert (await stays).startswith(b"HTTP/1.1 200 OK")
        assert len(engine.aborted) == 1


async def test_a_client_that_leaves_amid_its_body_leaves_nothing_behind(
    tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    async with serving(engine, tokenizer_folder) as port:
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b'Content-Length: 500\r\n\r\n{"inputs": "he')
        await writer.drain()
        writer.close()
        assert (await answer(port, "/generate", inputs="hello")).startswith(b"HTTP/1.1 200 OK")
        assert len(engine.requests) == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_the_stream_on_the_wire(tokenizer_folder: Path) -> None:
    async with serving(FakeEngine(), tokenizer_folder) as port:
        received = await answer(port, "/generate_stream", inputs="hello", parameters={"max_new_tokens": 2})
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        chunks = body.split(b"\r\n")[1::2]
        assert [chunk[:17] for chunk in chunks] == [b'data: {"index":1,', b'data: {"index":2,', b""]
        assert all(chunk.endswith(b"}\n\n") and chunk.count(b"\n") == 2 for chunk in chunks[:-1])


async def test_tokens_that_are_ready_together_go_out_in_one_write(tokenizer_folder: Path) -> None:
    async with serving(FakeEngine(tokens_per_batch=4), tokenizer_folder) as port:
        received = await answer(port, "/generate_stream", inputs="hello", parameters={"max_new_tokens": 8})
        _, _, body = received.partition(b"\r\n\r\n")
        assert [chunk.count(b"data: ") for chunk in body.split(b"\r\n")[1::2]] == [4, 4, 0]


async def test_silence_before_the_first_token_is_filled(tokenizer_folder: Path) -> None:
    async with serving(FakeEngine(start_s=0.25), tokenizer_folder, ping_s=0.1) as port:
        received = await answer(port, "/generate_stream", inputs="hello", parameters={"max_new_tokens": 1})
        _, _, body = received.partition(b"\r\n\r\n")
        events = b"".join(body.split(b"\r\n")[1::2])
        assert events.startswith(b': ping\n\n: ping\n\ndata: {"index":1')


async def test_overload_is_a_status_and_on_a_stream_an_event(tokenizer_folder: Path) -> None:
    async with serving(FakeEngine(step_s=0.01), tokenizer_folder, max_concurrent_requests=1) as port:
        _, first = await post(port, "/generate", **BODIES["/generate"])
        await asyncio.sleep(0.05)
        plain = await answer(port, "/generate", inputs="x")
        stream = await answer(port, "/generate_stream", inputs="x")
        chat = await answer(port, "/chat", prompt="x")
        first.close()
    assert plain.startswith(b"HTTP/1.1 429 ")
    assert b"\r\nretry-after: 1\r\n" in plain
    assert b'"error_type":"overloaded"' in plain
    assert stream.startswith(b"HTTP/1.1 200 ")
    assert b'data: {"error":"model is overloaded' in stream
    assert chat.startswith(b"HTTP/1.1 429 ")
    assert b'{"detail":"model is overloaded' in chat


async def test_an_engine_that_dies_ends_its_streams_with_an_error(tokenizer_folder: Path) -> None:
    engine = FakeEngine(step_s=0.005)
    async with serving(engine, tokenizer_folder) as port:
        reading = asyncio.create_task(answer(port, "/generate_stream", **BODIES["/generate_stream"]))
        await until(lambda: engine.stats().decode_tokens > 3)
        engine.die()
        body = await asyncio.wait_for(reading, 2)
    assert b'"error_type":"generation"' in body.split(b"data: ")[-1]
    assert body.endswith(b"0\r\n\r\n")


async def test_many_clients_that_leave_at_random_leave_nothing_behind(tokenizer_folder: Path) -> None:
    engine = FakeEngine(step_s=0.002)
    before = len(asyncio.all_tasks())
    async with serving(engine, tokenizer_folder) as port:

        async def come_and_go(number: int) -> None:
            _reader, writer = await post(port, list(BODIES)[number % len(BODIES)], **list(BODIES.values())[number % 4])
            await asyncio.sleep(number * 7 % 13 / 300)
            writer.close()

        for _ in range(3):
            await asyncio.gather(*map(come_and_go, range(40)))
        await until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
        assert (await answer(port, "/generate", inputs="hello")).startswith(b"HTTP/1.1 200 OK")
    await until(lambda: len(asyncio.all_tasks()) <= before)
