"""Section 4 of the checklist: more requests than there is room for."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from gyrfalcon.http import tgi, wire
from gyrfalcon.service.tokenizer import TextTokenizer
from gyrfalcon.testing.engine import FakeEngine
from tests.reliability.house import ask, body_of, connect, request_bytes, status_of, until

from .conftest import OpenHouse

HELLO = {"inputs": "hello", "parameters": {"max_new_tokens": 10}}
# What is refused is refused in a quarter of a second; `make reliability` holds the server to that on a machine of its
# own, the tests leave room for their neighbours.
SHED_S = 1.5


async def timed(port: int, path: str, body: Any) -> tuple[int, float, bytes]:
    started = time.monotonic()
    answer = await ask(port, path, body)
    return status_of(answer), time.monotonic() - started, answer


async def test_4_1_what_exceeds_the_bound_is_shed_at_once_and_the_rest_is_answered(house: OpenHouse) -> None:
    async with house(FakeEngine(step_s=0.02), service_options={"max_concurrent_requests": 12}) as server:
        results = await asyncio.gather(*(timed(server.port, "/generate", HELLO) for _ in range(120)))
        shed = [(took_s, answer) for status, took_s, answer in results if status == 429]
        assert {status for status, _, _ in results} == {200, 429}
        assert len(shed) >= 60
        assert sorted(took_s for took_s, _ in shed)[int(len(shed) * 0.99) - 1] < SHED_S
        for _, answer in shed:
            assert b"\r\nretry-after: 1\r\n" in answer
            assert body_of(answer)["error_type"] == "overloaded"
        assert server.metric("gyrfalcon_rejected_total", cause="overloaded") == len(shed)
        assert status_of(await ask(server.port, "/generate", HELLO)) == 200
        assert server.is_idle


async def test_4_1_a_connection_goes_on_after_a_request_was_turned_away(house: OpenHouse) -> None:
    async with house(FakeEngine(step_s=0.02), service_options={"max_concurrent_requests": 1}) as server:
        running = asyncio.create_task(ask(server.port, "/generate", HELLO))
        await until(lambda: server.engine.stats().num_running == 1)
        reader, writer = await connect(server.port)
        request = request_bytes("/generate", HELLO, close=False)
        for pieces in ([request], [request[:-60], request[-60:-20], request[-20:]], [request]):
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.01)
            head = await reader.readuntil(b"\r\n\r\n")
            assert status_of(head) == 429
            (length,) = (line[15:] for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            assert json.loads(await reader.readexactly(int(length)))["error_type"] == "overloaded"
        assert status_of(await running) == 200
        writer.write(request)
        assert status_of(await reader.readuntil(b"\r\n\r\n")) == 200
        writer.close()


async def test_4_1_while_a_crowd_comes_nobody_waits_in_a_long_queue(house: OpenHouse) -> None:
    engine = FakeEngine(step_s=0.002, max_context=128)  # twice its cache of 1024 tokens is handed out: to 16 of these
    full = {"inputs": "x", "parameters": {"max_new_tokens": 120}}
    async with house(engine, service_options={"max_concurrent_requests": 48}) as server:

        def num_in_work() -> int:
            (stats,) = server.service.stats().values()
            return stats.num_waiting + stats.num_running

        crowd = [asyncio.create_task(ask(server.port, "/generate", full)) for _ in range(80)]
        await until(lambda: num_in_work() == 48)  # a crowd that comes at once may wait
        late: list[bytes] = []
        while num_in_work() > 16:  # but those who go on coming join no queue that has room again
            late.append(await ask(server.port, "/generate", HELLO))
        refused = [answer for answer in late if status_of(answer) == 429]
        assert any(b"others have just been turned away" in answer for answer in refused)
        statuses = [status_of(each) for each in await asyncio.gather(*crowd)]
        assert (statuses.count(200), statuses.count(429)) == (48, 32)
        assert status_of(await ask(server.port, "/generate", HELLO)) == 200


async def test_4_1_health_stays_truthful_under_overload(house: OpenHouse) -> None:
    async with house(FakeEngine(step_s=0.05), service_options={"max_concurrent_requests": 4}) as server:
        crowd = asyncio.gather(*(ask(server.port, "/generate", HELLO) for _ in range(60)))
        await until(lambda: server.engine.stats().num_running == 4)
        for path in ("/health", "/health/live", "/health/ready", "/ready", "/metrics"):
            assert status_of(await ask(server.port, path, method="GET")) == 200
        await crowd


async def test_4_1_the_queue_is_bounded_in_tokens_too(house: OpenHouse) -> None:
    engine = FakeEngine(step_s=0.01, max_context=128)  # twice its cache of 1024 tokens is handed out
    full = {"inputs": "x", "parameters": {"max_new_tokens": 120}}
    async with house(engine, service_options={"max_queued_tokens": 12}) as server:
        first = [asyncio.create_task(ask(server.port, "/generate", full)) for _ in range(16)]
        await until(lambda: engine.stats().num_running == 16)
        waiting = [asyncio.create_task(ask(server.port, "/generate", {**full, "inputs": "1 2 3 4"})) for _ in range(3)]
        answers = await asyncio.gather(*waiting)
        assert sorted(status_of(answer) for answer in answers) == [200, 429, 429]
        assert {status_of(answer) for answer in await asyncio.gather(*first)} == {200}


async def test_4_2_waiting_has_an_end_that_says_so_in_each_dialect(house: OpenHouse) -> None:
    engine = FakeEngine(step_s=0.02, max_context=128)
    full = {"inputs": "x", "parameters": {"max_new_tokens": 120}}
    async with house(engine, service_options={"queue_timeout_s": 0.3}) as server:
        first = [asyncio.create_task(ask(server.port, "/generate", full)) for _ in range(16)]
        await until(lambda: engine.stats().num_running == 16)
        plain, stream, chat = await asyncio.gather(
            ask(server.port, "/generate", full),
            ask(server.port, "/generate_stream", full),
            ask(server.port, "/chat", {"prompt": "x", "generate_kwargs": {"max_new_tokens": 120}}),
        )
        assert (status_of(plain), status_of(stream), status_of(chat)) == (503, 200, 503)
        assert b"\r\nretry-after: 1\r\n" in plain
        assert b"\r\nretry-after: 1\r\n" in chat
        assert body_of(plain)["error_type"] == "overloaded"
        (event,) = [json.loads(line[5:]) for line in stream.splitlines() if line.startswith(b"data:")]
        assert event["error_type"] == "overloaded"
        assert "waited 0.3 seconds" in event["error"]
        # What had begun took far longer than that, and was not dropped.
        assert {status_of(answer) for answer in await asyncio.gather(*first)} == {200}
        assert server.metric("gyrfalcon_rejected_total", cause="queue_timeout") == 3
        assert len(engine.requests) == 16


async def test_4_2_a_stream_that_waited_in_the_queue_says_what_it_says_alone(house: OpenHouse) -> None:
    engine = FakeEngine(step_s=0.002, max_context=128)
    async with house(engine) as server:
        bodies = [{"inputs": f"x {n}", "parameters": {"max_new_tokens": 110}} for n in range(40)]
        together = await asyncio.gather(*(ask(server.port, "/generate_stream", body) for body in bodies))
        alone = [await ask(server.port, "/generate_stream", body) for body in bodies[:5]]
        for one, other in zip(alone, together, strict=False):
            assert _events(one) == _events(other)


def _events(answer: bytes) -> list[bytes]:
    return [line for line in answer.splitlines() if line.startswith(b"data:")]


def test_4_3_what_can_never_fit_is_refused_by_name(make_client: Any) -> None:
    answer = make_client().post("/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 300}})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")


@pytest.mark.parametrize("is_large", [False, True])
async def test_4_5_large_bodies_are_worked_on_off_the_event_loop(
    house: OpenHouse, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    seen: dict[str, set[bool]] = {}  # what was called, and whether by another thread than the event loop's

    def note(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noting(*arguments: Any, **named: Any) -> Any:
            seen.setdefault(name, set()).add(threading.current_thread() is not threading.main_thread())
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, noting)

    note(wire, "parse_json")
    note(tgi, "render_spans")
    note(TextTokenizer, "encode")
    note(TextTokenizer, "spans")
    text = "word " * (20_000 if is_large else 5)
    async with house() as server:
        await ask(server.port, "/tokenize", {"inputs": text})
        await ask(server.port, "/generate", {"inputs": text[:3000], "parameters": {"truncate": 5, "max_new_tokens": 1}})
    assert seen == {name: {is_large} for name in ("parse_json", "render_spans", "encode", "spans")} | (
        {"parse_json": {True, False}} if is_large else {}
    )


async def test_4_5_the_event_loops_lag_is_a_metric(house: OpenHouse) -> None:
    async with house() as server:
        watching = asyncio.create_task(server.metrics.watch_event_loop())
        await until(lambda: server.metric("gyrfalcon_event_loop_lag_seconds_count") >= 1)
        watching.cancel()
