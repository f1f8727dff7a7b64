"""Section 5 of the checklist: clients that leave, dawdle, read nothing, or come in crowds."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from typing import Any

import pytest

from gyrfalcon.http.connections import ConnectionLimits
from gyrfalcon.testing.engine import FakeEngine
from tests.reliability.house import (
    WAYS_TO_LEAVE,
    House,
    ask,
    body_of,
    connect,
    leave,
    request_bytes,
    send,
    status_of,
    until,
)

from .conftest import OpenHouse

LONG = {"max_new_tokens": 200}
PLAIN = ("/generate", {"inputs": "hello", "parameters": LONG})
STREAM = ("/generate_stream", {"inputs": "hello", "parameters": LONG})
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": PLAIN,
    "stream": STREAM,
    "list": ("/", {"inputs": "hello", "parameters": LONG}),
    "several": ("/generate", {"inputs": "hello", "parameters": LONG | {"best_of": 3, "do_sample": True}}),
    "chat": ("/chat", {"prompt": "hello", "generate_kwargs": LONG}),
    "chat stream": ("/chat", {"prompt": "hello", "stream": True, "generate_kwargs": LONG}),
    "chat several": (
        "/chat",
        {"prompt": "hello", "generate_kwargs": LONG | {"num_return_sequences": 3, "do_sample": True}},
    ),
    "vertex": ("/vertex", {"instances": [{"inputs": "a", "parameters": LONG}, {"inputs": "b", "parameters": LONG}]}),
}
# One step of the engine plus a quarter of a second, on a machine that does other things too.
PROMPTLY_S = 1.0
QUICK = ConnectionLimits(header_timeout_s=0.5, body_timeout_s=0.5, idle_timeout_s=0.5, stall_timeout_s=0.75)


# 5.1


@pytest.mark.parametrize("way", WAYS_TO_LEAVE)
@pytest.mark.parametrize("name", CALLS)
async def test_5_1_leaving_while_tokens_are_made_frees_everything(house: OpenHouse, name: str, way: str) -> None:
    engine = FakeEngine(step_s=0.01)
    async with house(engine) as server:
        _, writer = await connect(server.port)
        writer.write(request_bytes(*CALLS[name]))
        await until(lambda: engine.stats().decode_tokens > 2)
        leave(writer, way)
        await until(lambda: server.is_idle, PROMPTLY_S)
        assert engine.stats().decode_tokens < 400
        assert engine.aborted


@pytest.mark.parametrize("way", WAYS_TO_LEAVE)
@pytest.mark.parametrize("name", CALLS)
async def test_5_1_leaving_before_the_first_token_frees_everything(house: OpenHouse, name: str, way: str) -> None:
    engine = FakeEngine(start_s=30)
    async with house(engine) as server:
        _, writer = await connect(server.port)
        writer.write(request_bytes(*CALLS[name]))
        await until(lambda: engine.stats().num_waiting)
        leave(writer, way)
        await until(lambda: server.is_idle, PROMPTLY_S)


@pytest.mark.parametrize("name", ["plain", "stream", "several", "chat"])
async def test_5_1_leaving_the_queue_frees_everything_and_hurts_nobody(house: OpenHouse, name: str) -> None:
    engine = FakeEngine(step_s=0.01, max_context=128)
    filling = {"inputs": "x", "parameters": {"max_new_tokens": 100}}
    async with house(engine) as server:
        neighbours = [asyncio.create_task(ask(server.port, "/generate", filling)) for _ in range(20)]
        await until(lambda: engine.stats().num_running == 20)
        path, body = CALLS[name]
        _, writer = await connect(server.port)
        key = "generate_kwargs" if path == "/chat" else "parameters"
        writer.write(request_bytes(path, {**body, key: body[key] | {"max_new_tokens": 120}}))
        await until(lambda: server.metric("gyrfalcon_queued_requests", model="tiny") == 1)
        assert server.metric("gyrfalcon_queued_tokens", model="tiny") > 0
        leave(writer, "RST")
        await until(lambda: server.metric("gyrfalcon_queued_requests", model="tiny") == 0, PROMPTLY_S)
        assert server.metric("gyrfalcon_queued_tokens", model="tiny") == 0
        assert {status_of(answer) for answer in await asyncio.gather(*neighbours)} == {200}
        assert len(engine.requests) == 20
        assert engine.aborted == []


@pytest.mark.parametrize("way", WAYS_TO_LEAVE)
@pytest.mark.parametrize(
    "sent", [b"", b"POST", b"POST /generate HTTP/1.1\r\nHo", request_bytes(*PLAIN)[:-20], request_bytes(*STREAM)[:-1]]
)
async def test_5_1_leaving_amid_headers_or_body_leaves_nothing(house: OpenHouse, sent: bytes, way: str) -> None:
    async with house() as server:
        _, writer = await connect(server.port)
        writer.write(sent)
        await until(lambda: server.server.num_connections == 1)
        leave(writer, way)
        await until(lambda: server.server.num_connections == 0, PROMPTLY_S)
        assert server.engine.requests == []


# 5.2


async def come_and_go(server: House, chance: random.Random) -> None:
    """Send some of a request and leave at some moment, in some way."""
    data = request_bytes(*chance.choice(list(CALLS.values())))
    _, writer = await connect(server.port)
    try:
        writer.write(data[: chance.choice([len(data)] * 4 + [chance.randrange(len(data))])])
        await asyncio.sleep(chance.random() * 0.05)
    finally:
        leave(writer, chance.choice(WAYS_TO_LEAVE))


async def test_5_2_after_300_random_disconnects_nothing_is_left(house: OpenHouse) -> None:
    chance = random.Random(1)
    async with house(FakeEngine(step_s=0.002)) as server:
        await ask(server.port, *PLAIN)
        tasks = len(asyncio.all_tasks())
        for _ in range(10):
            await asyncio.gather(*(come_and_go(server, chance) for _ in range(30)))
        await until(lambda: server.is_idle and server.server.num_connections == 0)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        assert server.metric("gyrfalcon_connections") == 0
        assert status_of(await ask(server.port, "/generate", {"inputs": "x"})) == 200


# 5.3


async def closed_after(server: House, data: bytes) -> tuple[float, bytes]:
    """How long the server kept a connection on which it was sent this and no more, and what it said."""
    started = time.monotonic()
    answer = await asyncio.wait_for(send(server.port, data), 10)
    return time.monotonic() - started, answer


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", b"G", b"GET /health HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nX: y"])
async def test_5_3_slow_headers_are_ended(house: OpenHouse, sent: bytes) -> None:
    async with house(connections=QUICK) as server:
        took_s, answer = await closed_after(server, sent)
        assert 0.4 <= took_s < 3
        if sent.strip():
            assert status_of(answer) == 408
            assert body_of(answer)["error_type"] == "request_timeout"
            assert server.metric("gyrfalcon_connections_cut_total", cause="header_timeout") == 1
        else:
            assert answer == b""


async def test_5_3_headers_that_dribble_in_are_ended_too(house: OpenHouse) -> None:
    async with house(connections=QUICK) as server:
        reader, writer = await connect(server.port)
        writer.write(b"GET /health HTTP/1.1\r\n")
        started = time.monotonic()
        reading = asyncio.create_task(reader.read())
        while not reading.done():
            writer.write(b"X: y\r\n")
            await asyncio.sleep(0.05)
        assert time.monotonic() - started < 3
        assert status_of(reading.result()) == 408
        writer.close()


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/chat", "/tokenize"])
async def test_5_3_a_slow_body_is_answered_and_ended(house: OpenHouse, path: str) -> None:
    async with house(connections=QUICK, body_timeout_s=0.5) as server:
        took_s, answer = await closed_after(server, request_bytes(path, {"inputs": "hello"})[:-5])
        assert took_s < 5
        assert status_of(answer) == 408
        assert server.engine.requests == []


async def test_5_3_a_body_that_nobody_reads_does_not_keep_a_connection(house: OpenHouse) -> None:
    async with house(connections=QUICK) as server:
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        took_s, answer = await closed_after(server, head + b"x" * 10)
        assert took_s < 5
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert server.metric("gyrfalcon_connections_cut_total", cause="body_timeout") == 1


async def test_5_3_an_idle_connection_is_closed(house: OpenHouse) -> None:
    async with house(connections=QUICK) as server:
        took_s, answer = await closed_after(server, request_bytes("/health", method="GET", close=False) + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert 0.4 <= took_s < 3


async def test_5_3_a_kept_connection_serves_one_request_after_the_other(house: OpenHouse) -> None:
    async with house(connections=QUICK) as server:
        reader, writer = await connect(server.port)
        for _ in range(4):
            writer.write(request_bytes("/health", method="GET", close=False))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.3)  # together longer than one silence may be
        writer.close()


async def test_5_3_pipelined_requests_are_answered_in_order(house: OpenHouse) -> None:
    async with house(FakeEngine(step_s=0.1), connections=QUICK) as server:
        slow = request_bytes("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 12}}, close=False)
        answer = await send(server.port, slow + request_bytes("/health", method="GET"))
        assert answer.count(b"HTTP/1.1 200 ") == 2
        assert answer.index(b"generated_text") < answer.rindex(b"HTTP/1.1 200 ")


async def _read_nothing(server: House, path: str, body: dict[str, Any]) -> socket.socket:
    """A client with a small window that has asked and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", server.port))
    await loop.sock_sendall(client, request_bytes(path, body))
    return client


@pytest.mark.parametrize("path", ["/generate_stream", "/generate"])
async def test_5_3_a_client_that_reads_nothing_is_cut_and_hurts_nobody(house: OpenHouse, path: str) -> None:
    engine = FakeEngine(max_context=12_000, tokens_per_batch=50)
    parameters = {"max_new_tokens": 10_000, "details": True, "top_n_tokens": 20}
    async with house(engine, connections=QUICK, stall_s=0.75) as server:
        client = await _read_nothing(server, path, {"inputs": "x", "parameters": parameters})
        await until(lambda: engine.stats().num_running == 1)
        neighbour = await ask(server.port, "/generate", {"inputs": "x", "parameters": {"max_new_tokens": 5}})
        assert status_of(neighbour) == 200
        await until(lambda: server.is_idle and server.server.num_connections == 0, 60)
        client.close()


async def test_5_3_at_most_a_mebibyte_waits_for_a_slow_reader(house: OpenHouse) -> None:
    engine = FakeEngine(max_context=20_000, tokens_per_batch=200)
    parameters = {"max_new_tokens": 15_000, "top_n_tokens": 20}
    async with house(engine, stall_s=60) as server:
        client = await _read_nothing(server, "/generate_stream", {"inputs": "x", "parameters": parameters})
        connections = server.server.server_state.connections

        def num_waiting_bytes() -> int:
            return sum(connection.transport.get_write_buffer_size() for connection in connections)

        await until(num_waiting_bytes)  # which is when the client's own buffers are full
        await asyncio.sleep(0.3)
        assert 0 < num_waiting_bytes() <= 2**20
        client.close()
        await until(lambda: server.is_idle)


async def test_5_3_connections_are_limited_in_all_and_by_address(house: OpenHouse) -> None:
    async with house(connections=ConnectionLimits(max_connections=3)) as server:
        held = [await connect(server.port) for _ in range(3)]
        await until(lambda: server.server.num_connections == 3)
        answer = await send(server.port, b"")
        assert status_of(answer) == 503
        assert b"retry-after: 1\r\n" in answer
        assert body_of(answer) == {"error": "too many connections", "error_type": "overloaded"}
        held.pop()[1].close()
        await until(lambda: server.server.num_connections == 2)
        assert status_of(await ask(server.port, "/health", method="GET")) == 200
        assert server.metric("gyrfalcon_connections_cut_total", cause="too_many") == 1
        for _, writer in held:
            writer.close()
    async with house(connections=ConnectionLimits(max_per_address=1)) as server:
        _, writer = await connect(server.port)
        await until(lambda: server.server.num_connections == 1)
        assert status_of(await send(server.port, b"")) == 503
        assert server.metric("gyrfalcon_connections_cut_total", cause="too_many_of_address") == 1
        writer.close()


async def test_5_3_slow_and_idle_connections_do_not_slow_others(house: OpenHouse) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 10}}

    async def p95(server: House) -> float:
        times = []
        for _ in range(60):
            started = time.monotonic()
            await ask(server.port, "/generate", body)
            times.append(time.monotonic() - started)
        return sorted(times)[56]

    async with house(FakeEngine(step_s=0.002)) as server:
        await p95(server)
        alone_s = await p95(server)
        idle = [await connect(server.port) for _ in range(200)]
        for number, (_, writer) in enumerate(idle):
            writer.write((b"", b"POST /generate HTTP/1.1\r\n", request_bytes(*PLAIN)[:-9])[number % 3])
        with_others_s = await p95(server)
        assert server.server.num_connections >= 200
        for _, writer in idle:
            writer.close()
    # A half more, and what this shared machine does to any two measurements.
    assert with_others_s <= 1.5 * alone_s + 0.02


# 5.4


async def test_5_4_streams_are_not_held_back_by_proxies_and_silence_is_filled(house: OpenHouse) -> None:
    async with house(FakeEngine(start_s=0.35), ping_s=0.1) as server:
        for path, body in (STREAM, CALLS["chat stream"]):
            answer = await ask(server.port, path, body)
            head, _, rest = answer.partition(b"\r\n\r\n")
            assert b"\r\nx-accel-buffering: no" in head.lower()
            assert b"\r\ncache-control: no-cache" in head.lower()
            assert b": ping\n\n" in rest[: rest.index(b"data:")]


async def test_5_4_silence_in_the_queue_is_filled_too(house: OpenHouse) -> None:
    engine = FakeEngine(step_s=0.005, max_context=128)
    async with house(engine, ping_s=0.05) as server:
        filling = [
            asyncio.create_task(ask(server.port, "/generate", {"inputs": "x", "parameters": {"max_new_tokens": 120}}))
            for _ in range(16)
        ]
        await until(lambda: engine.stats().num_running == 16)
        answer = await ask(server.port, "/generate_stream", {"inputs": "x", "parameters": {"max_new_tokens": 120}})
        assert answer.index(b": ping\n\n") < answer.index(b"data:")
        await asyncio.gather(*filling)


async def test_5_4_the_texts_of_a_stream_join_to_its_final_text(house: OpenHouse) -> None:
    import json

    async with house(FakeEngine(vocab_size=400)) as server:
        for seed in range(5):
            parameters = {"max_new_tokens": 60, "do_sample": True, "seed": seed}
            answer = await ask(server.port, "/generate_stream", {"inputs": "北京 x", "parameters": parameters})
            events = [json.loads(line[5:]) for line in answer.splitlines() if line.startswith(b"data:")]
            texts = [event["token"]["text"] for event in events if not event["token"]["special"]]
            assert "".join(texts) == events[-1]["generated_text"]
