from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from gyrfalcon.http.wire import (
    PING,
    BodyLimits,
    ClientGone,
    EventStream,
    MalformedBody,
    ServerStopping,
    parse_json,
    quote,
    read_json,
    sse,
    to_json,
    unless_gone,
)

LIMITS = BodyLimits(max_bytes=1000, timeout_s=0.2)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=10),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=5), values, max_size=4),
    max_leaves=12,
)


def request(*chunks: bytes, headers: dict[str, str] | None = None, then_hang: bool = False) -> Request:
    """A POST request whose body arrives in these chunks, with nothing after the last where it hangs."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if not then_hang:
        messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)
        raise AssertionError("nobody should wait this long")

    given = {"content-type": "application/json"} if headers is None else headers
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


async def refusal(incoming: Request) -> MalformedBody:
    with pytest.raises(MalformedBody) as refused:
        await read_json(incoming, LIMITS)
    return refused.value


class TestReading:
    @pytest.mark.parametrize(
        "content_type",
        [
            "application/json",
            "Application/JSON",
            "application/json; charset=utf-8",
            "application/json;charset=x",
            "application/vnd.api+json",
            "application/problem+json",
        ],
    )
    async def test_json_content_types_are_read(self, content_type: str) -> None:
        assert await read_json(request(b'{"a":', b"1}", headers={"content-type": content_type}), LIMITS) == {"a": 1}

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"content-type": ""},
            {"content-type": "text/plain"},
            {"content-type": "application/jsonx"},
            {"content-type": "application/json, text/plain"},
            {"content-type": "text/json"},
            {"content-type": "application/x-www-form-urlencoded"},
            {"content-type": "application/json", "content-encoding": "gzip"},
        ],
    )
    async def test_other_content_is_not(self, headers: dict[str, str]) -> None:
        assert (await refusal(request(b"{}", headers=headers))).status == 415

    async def test_the_content_type_may_be_of_no_matter(self) -> None:
        assert await read_json(request(b"{}", headers={}), LIMITS, any_content_type=True) == {}

    async def test_a_body_of_the_limit_is_read_and_one_byte_more_is_not(self) -> None:
        body = b'"' + b"x" * 998 + b'"'
        assert await read_json(request(body), LIMITS) == "x" * 998
        assert (await refusal(request(body[:500], body[500:] + b" "))).status == 413

    @pytest.mark.parametrize("length", ["1001", "0001001", "9" * 5000])
    async def test_an_announced_length_beyond_the_limit_is_refused_before_reading(self, length: str) -> None:
        headers = {"content-type": "application/json", "content-length": length}
        assert (await refusal(request(headers=headers, then_hang=True))).status == 413

    async def test_a_body_that_does_not_arrive_is_not_waited_for(self) -> None:
        assert (await refusal(request(b'{"a":', then_hang=True))).status == 408

    async def test_a_long_body_is_parsed_as_a_short_one(self) -> None:
        value = {"text": "é" * 60_000, "numbers": list(range(5000))}
        incoming = request(json.dumps(value).encode())
        assert await read_json(incoming, BodyLimits(max_bytes=1_000_000)) == value


class TestParsing:
    @given(value=JSON)
    def test_what_json_can_say_is_understood(self, value: object) -> None:
        assert parse_json(json.dumps(value).encode(), LIMITS) == value
        assert parse_json(json.dumps(value, ensure_ascii=False, indent=1).encode(), LIMITS) == value

    @given(body=st.binary(max_size=60) | st.text('{}[]",:0123456789.eE+-truefalsn \\u', max_size=60).map(str.encode))
    def test_whatever_arrives_is_understood_or_refused(self, body: bytes) -> None:
        with contextlib.suppress(MalformedBody):
            json.dumps(parse_json(body, LIMITS), allow_nan=False)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b" ",
            b"{",
            b'{"a"}',
            b'{"a":1,}',
            b"[1,]",
            b"{'a':1}",
            b"nul",
            b"True",
            b"01",
            b"+1",
            b"1.",
            b".5",
            b"0x10",
            b"NaN",
            b"[Infinity]",
            b'{"a": -Infinity}',
            b"1e999",
            b"-1e999",
            b"1" * 101,
            b"1." + b"1" * 100,
            b"{}{}",
            b"{} }",
            b'"a\nb"',
            b'"\\x41"',
            b'"\\ud8"',
            b'"abc',
            b"// comment\n{}",
            b"\xef\xbb\xbf{}",
            b'"\xff"',
            b'"\xed\xa0\x80"',
            b'"\xc3"',
            b"[" * 65 + b"]" * 65,
            b'{"a":' * 65 + b"1" + b"}" * 65,
            b"[" * 100_000,
            b'"\\ud800"',
            b'{"\\udfff":1}',
            b'["\\uD83D\\u0041"]',
        ],
    )
    def test_what_is_not_json_is_refused(self, body: bytes) -> None:
        with pytest.raises(MalformedBody, match="^Failed to parse the request body as JSON: ") as refused:
            parse_json(body, LIMITS)
        assert refused.value.status == 400

    @pytest.mark.parametrize(
        "body",
        [b'{"a":1,"a":1}', b'[{"b":{"a":1,"c":2,"a":3}}]', b'{"a":1,"\\u0061":1}'],
    )
    def test_a_key_that_comes_twice_is_refused(self, body: bytes) -> None:
        prefix = "^Failed to deserialize the JSON body into the target type: "
        with pytest.raises(MalformedBody, match=prefix) as refused:
            parse_json(body, LIMITS)
        assert refused.value.status == 422

    @pytest.mark.parametrize(
        ("body", "value"),
        [
            (b"[" * 64 + b"]" * 64, None),
            (b'"' + b"[{" * 200 + b'"', "[{" * 200),
            (b'"\\"[' + b"[" * 100 + b'"', '"[' + "[" * 100),
            (b"[" + b"[]," * 100 + b"[]]", [[]] * 101),
            (b'"\\ud83e\\udd85"', "🦅"),
            (b"1e308", 1e308),
            (b"9" * 100, 10**100 - 1),
            (b"18446744073709551616", 2**64),
            (b'"' + b"9" * 500 + b'"', "9" * 500),
            (b'["' + b"9" * 500 + b'", 1.5, 7]', ["9" * 500, 1.5, 7]),
            (b" {} ", {}),
        ],
    )
    def test_what_only_looks_wrong_is_understood(self, body: bytes, value: object) -> None:
        parsed = parse_json(body, LIMITS)
        assert value is None or parsed == value

    @pytest.mark.parametrize(
        "body",
        [
            b"[" + b"[]," * 600_000 + b"[]]",
            b"[" + b'{"a":1},' * 200_000 + b"{}]",
            b"[" + b"1," * 900_000 + b"1]",
            b'["' + b'\\"' * 900_000 + b"[]" * 70,
            b'["' + b"\\\\" * 900_000 + b"[]" * 70,
            b"[" * 2_000_000,
            b'{"a":' * 300_000,
            b'"' + b"1" * 1_900_000 + b'"',
        ],
        ids=range(8),
    )
    def test_no_body_takes_long(self, body: bytes) -> None:
        begin = time.perf_counter()
        with contextlib.suppress(MalformedBody):
            parse_json(body, LIMITS)
        assert time.perf_counter() - begin < 20  # quadratic work would take minutes


class TestWriting:
    def test_an_event_is_one_line_between_its_marks(self) -> None:
        assert sse({"text": "a\nb é"}) == b'data: {"text":"a\\nb \xc3\xa9"}\n\n'

    @given(value=st.floats(width=32))
    def test_single_precision_is_written_in_its_shortest_form(self, value: float) -> None:
        written = json.loads(to_json(np.float32(value)))
        if not math.isfinite(value):
            assert written is None
        else:
            assert np.float32(written) == np.float32(value)
            assert len(repr(written)) <= len(repr(value))

    @pytest.mark.parametrize(
        ("value", "quoted"),
        [("a", '"a"'), (None, "null"), (True, "true"), (1.5, "1.5"), ([1], "an array"), ({}, "an object")],
    )
    def test_values_are_quoted_as_json(self, value: object, quoted: str) -> None:
        assert quote(value) == quoted

    def test_quotes_are_short_and_printable(self) -> None:
        assert len(quote("x" * 5000)) < 220
        assert quote("\ud800\x00\n").isprintable()
        assert quote("\ud800").isascii()


class Server:
    """The other side of an ASGI response: what was sent, and when the client leaves."""

    def __init__(self, stuck_after: int | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self._stuck_after = stuck_after

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self._stuck_after is not None and len(self.sent) >= self._stuck_after:
            await asyncio.sleep(60)
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Chunks with a pause before each; remembers that it was closed."""

    def __init__(self, *chunks: bytes, pause_s: float = 0.0) -> None:
        self._chunks = chunks
        self._pause_s = pause_s
        self.is_closed = False

    async def read(self) -> AsyncGenerator[bytes, None]:
        try:
            for chunk in self._chunks:
                await asyncio.sleep(self._pause_s)
                yield chunk
        finally:
            self.is_closed = True


class TestEventStream:
    async def test_each_chunk_is_one_write(self) -> None:
        server, source = Server(), Source(b"data: 1\n\n", b"data: 2\n\ndata: 3\n\n")
        await EventStream(source.read())({"type": "http"}, server.receive, server.send)
        start, *writes = server.sent
        assert dict(start["headers"])[b"content-type"] == b"text/event-stream"
        assert dict(start["headers"])[b"cache-control"] == b"no-cache"
        assert dict(start["headers"])[b"x-accel-buffering"] == b"no"
        assert [write["body"] for write in writes] == [b"data: 1\n\n", b"data: 2\n\ndata: 3\n\n", b""]
        assert [write["more_body"] for write in writes] == [True, True, False]

    async def test_the_answer_begins_before_the_first_chunk(self) -> None:
        server, source = Server(), Source(b"late", pause_s=0.2)
        response = asyncio.ensure_future(EventStream(source.read())({"type": "http"}, server.receive, server.send))
        await asyncio.sleep(0.02)
        assert [message["type"] for message in server.sent] == ["http.response.start"]
        response.cancel()

    async def test_silence_is_filled_with_comments_also_before_the_first_chunk(self) -> None:
        server, source = Server(), Source(b"data: 1\n\n", b"data: 2\n\n", pause_s=0.25)
        await EventStream(source.read(), ping_s=0.1)({"type": "http"}, server.receive, server.send)
        assert server.body == PING * 2 + b"data: 1\n\n" + PING * 2 + b"data: 2\n\n"

    async def test_a_client_that_leaves_ends_the_work(self) -> None:
        server, source = Server(), Source(*[b"x"] * 1000, pause_s=0.01)
        response = asyncio.ensure_future(EventStream(source.read())({"type": "http"}, server.receive, server.send))
        await asyncio.sleep(0.05)
        server.gone.set()
        await asyncio.wait_for(response, 1)
        assert source.is_closed
        assert len(server.sent) < 20

    async def test_a_client_that_reads_nothing_is_given_up(self) -> None:
        server, source = Server(stuck_after=3), Source(*[b"x"] * 1000)
        await asyncio.wait_for(
            EventStream(source.read(), stall_s=0.1)({"type": "http"}, server.receive, server.send), 2
        )
        assert source.is_closed

    async def test_a_silent_stream_whose_comments_get_stuck_is_given_up(self) -> None:
        server, source = Server(stuck_after=1), Source(b"x", pause_s=30)
        stream = EventStream(source.read(), ping_s=0.05, stall_s=0.1)
        await asyncio.wait_for(stream({"type": "http"}, server.receive, server.send), 2)
        assert source.is_closed
        assert asyncio.all_tasks() == {asyncio.current_task()}


class TestEndsOfAStream:
    """Each way in which a stream is cut, and what is said of it."""

    @staticmethod
    def respond(server: Server, source: Source, **options: Any) -> tuple[asyncio.Task[None], list[str]]:
        causes: list[str] = []
        stream = EventStream(source.read(), last_words=b"data: end\n\n", on_abort=causes.append, **options)
        return asyncio.ensure_future(stream({"type": "http"}, server.receive, server.send)), causes

    async def test_a_whole_stream_is_not_an_abort(self) -> None:
        response, causes = self.respond(Server(), Source(b"x"))
        await response
        assert causes == []

    async def test_the_servers_end_is_said_in_an_event_of_its_own(self) -> None:
        server, source = Server(), Source(*[b"data: 1\n\n"] * 1000, pause_s=0.02)
        response, causes = self.respond(server, source)
        await asyncio.sleep(0.05)
        response.cancel()
        await asyncio.wait_for(response, 1)
        assert server.body == b"data: 1\n\ndata: 1\n\ndata: end\n\n"
        assert server.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        assert (causes, source.is_closed) == (["shutdown"], True)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_the_servers_end_does_not_wait_for_a_client_that_reads_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gyrfalcon.http.wire.LAST_WORDS_S", 0.05)
        server, source = Server(stuck_after=2), Source(*[b"x"] * 1000)
        response, causes = self.respond(server, source)
        await asyncio.sleep(0.02)
        response.cancel()
        await asyncio.wait_for(response, 1)
        assert (causes, source.is_closed) == (["shutdown"], True)

    async def test_a_client_that_leaves(self) -> None:
        server, source = Server(), Source(*[b"x"] * 1000, pause_s=0.01)
        response, causes = self.respond(server, source)
        server.gone.set()
        await asyncio.wait_for(response, 1)
        assert causes == ["disconnect"]

    async def test_a_client_that_stalls(self) -> None:
        response, causes = self.respond(Server(stuck_after=3), Source(*[b"x"] * 1000), stall_s=0.05)
        await asyncio.wait_for(response, 1)
        assert causes == ["stall"]


class TestUnlessGone:
    async def test_the_servers_end_ends_the_work(self) -> None:
        server, started = Server(), asyncio.Event()

        async def work() -> None:
            started.set()
            await asyncio.sleep(30)

        incoming = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, server.receive)
        answer = asyncio.ensure_future(unless_gone(incoming, work()))
        await started.wait()
        answer.cancel()
        with pytest.raises(ServerStopping, match="shutting down"):
            await answer
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_the_result_is_given(self) -> None:
        assert await unless_gone(request(b""), asyncio.sleep(0.01, "done")) == "done"

    async def test_failures_pass(self) -> None:
        async def fail() -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            await unless_gone(request(b""), fail())

    async def test_work_is_cancelled_when_the_client_leaves(self) -> None:
        server = Server()
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(30)
            finally:
                ended.set()

        incoming = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, server.receive)
        answer = asyncio.ensure_future(unless_gone(incoming, work()))
        await asyncio.sleep(0.01)
        server.gone.set()
        with pytest.raises(ClientGone):
            await answer
        assert ended.is_set()
