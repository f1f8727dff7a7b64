"""Bytes at the door: JSON bodies read within limits, event streams written whole, clients that leave noticed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gyrfalcon.metrics import Metrics

T = TypeVar("T")
ModelT = TypeVar("ModelT", bound=BaseModel)

# Bodies below this are parsed in less time than a thread's round trip takes from the event loop.
SHORT_BODY_BYTES = 32_768
# The same of answers.
SHORT_ANSWER_VALUES = 2000
LONGEST_QUOTE = 200  # characters of a caller's own text that an answer repeats
PING = b": ping\n\n"
# Of every stream: caches and proxies pass each event on at once.
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
STREAM_TYPE = "text/event-stream"
LAST_WORDS_S = 1.0  # for a client to take them when the server ends

NOT_JSON = "Failed to parse the request body as JSON"
WRONG_SHAPE = "Failed to deserialize the JSON body into the target type"

_JSON_TYPE = re.compile(r"application/(?:[\w.!#$&^-]+\+)?json", re.IGNORECASE)
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789.", b"0000000000")


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """What a request's body may be."""

    max_bytes: int = 2_000_000
    max_depth: int = 64  # arrays and objects within each other
    max_digits: int = 100  # of one number
    timeout_s: float = 30.0  # for the whole body to arrive


class MalformedBody(Exception):
    """The body is refused before its meaning is looked at.

    status: the HTTP status that says why. loc: where in the body, when it was JSON.
    """

    def __init__(self, status: int, message: str, loc: tuple[str | int, ...] = (), kind: str = "value_error") -> None:
        super().__init__(message)
        self.status = status
        self.loc = loc
        self.kind = kind


class ClientGone(Exception):
    """The client closed the connection before its answer was ready; nobody will see what is answered."""


class ServerStopping(Exception):
    """The server's time to finish what runs is over, and this request still ran."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


async def read_json(request: Request, limits: BodyLimits, *, any_content_type: bool = False) -> Any:
    """The request's body as plain Python values. Raises MalformedBody: 400, 408, 413, 415, or 422 for twice a key."""
    if not any_content_type:
        _check_content_type(request)
    body = await read_within(request, limits)
    if len(body) < SHORT_BODY_BYTES:
        return parse_json(body, limits)
    return await asyncio.to_thread(parse_json, body, limits)


def parse_json(body: bytes, limits: BodyLimits) -> Any:
    """Strict JSON: nothing that the standard does not have, no key twice, nothing deeper or longer than allowed."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedBody(400, f"{NOT_JSON}: {error.msg} at line {error.lineno} column {error.colno}") from None
    if body.count(b"[") + body.count(b"{") > limits.max_depth and _exceeds_depth(value, limits.max_depth):
        raise MalformedBody(400, f"{NOT_JSON}: arrays and objects are nested more than {limits.max_depth} deep")
    # What the fast parser passes over: of a key that comes twice it keeps the last, long integers it rounds.
    long_digits = b"0" * (limits.max_digits + 1) in body.translate(_DIGITS_TO_ZERO)
    check = _number_within(limits.max_digits) if long_digits else None
    return json.loads(body, object_pairs_hook=_object_without_duplicates, parse_int=check, parse_float=check)


def parse_body(value: Any, model: type[ModelT]) -> ModelT:
    """The value as the model's type. Raises MalformedBody 422 naming the first field that does not fit."""
    try:
        return model.model_validate(value)
    except ValidationError as errors:
        first = errors.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(part) for part in first["loc"]) or "the body"
        found = "" if first["type"] == "missing" else f". Given: {quote(first['input'])}"
        message = f"{WRONG_SHAPE}: {path}: {first['msg']}{found}"
        raise MalformedBody(422, message, first["loc"], first["type"]) from None


def quote(value: object) -> str:
    """A caller's value, short and printable, for an error message."""
    text = json.dumps(value) if isinstance(value, str | int | float | bool | None) else _kind(value)
    return text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "..."


def to_json(value: object) -> bytes:
    """Compact JSON; numpy floats in their own shortest form, NaN and infinities as null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, dict(headers or {}), media_type="application/json")


async def large_json_response(
    render: Callable[[], object], size: int, *, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer of about `size` values; one of many is made in a thread, so that streams go on meanwhile."""
    if size < SHORT_ANSWER_VALUES:
        return json_response(render(), headers=headers)
    return await asyncio.to_thread(lambda: json_response(render(), headers=headers))


def sse(value: object) -> bytes:
    """One server-sent event, on one line also for clients that take U+0085, U+2028 and U+2029 for line ends."""
    text = to_json(value)
    if not text.isascii():
        for char, escaped in _LINE_ENDS:
            text = text.replace(char, escaped)
    return b"data: " + text + b"\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; its work is cancelled and ClientGone raised when the client leaves first, ServerStopping when
    the server ends.

    Call it after the body has been read: the server then tells of nothing but the end of the connection.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    except asyncio.CancelledError:  # only the server's end cancels a request
        raise ServerStopping from None
    finally:
        await cancel_all(task, gone)


class EventStream(Response):
    """Writes chunks as they come, each whole, and a comment in silence; ends the work when nobody reads."""

    media_type = STREAM_TYPE

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        headers: Mapping[str, str] | None = None,
        ping_s: float = 10.0,
        stall_s: float = 60.0,
        last_words: bytes = b"",
        on_abort: Callable[[str], None] = lambda cause: None,
    ) -> None:
        """chunks: made of complete events; closed whatever happens. ping_s: silence after which a comment is sent, so
        that proxies keep the connection. stall_s: time after which a client that takes nothing is given up.
        last_words: what is sent when the server ends first. on_abort: told why the chunks were not written to their
        end: `disconnect`, `stall` or `shutdown`.
        """
        super().__init__(
            headers={**STREAM_HEADERS, **(headers or {})},
            media_type=self.media_type,
        )
        # The type as the protocol states it, without a charset; the length is not known.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] not in {b"content-length", b"content-type"}]
        self.raw_headers.append((b"content-type", STREAM_TYPE.encode()))
        self._chunks = chunks
        self._ping_s = ping_s
        self._stall_s = stall_s
        self._last_words = last_words
        self._on_abort = on_abort
        self._last_write = 0.0
        self._is_writing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._last_write = asyncio.get_running_loop().time()
            writer = asyncio.ensure_future(self._write_all(send))
            gone = asyncio.ensure_future(_disconnected(receive))
            idle = asyncio.ensure_future(self._keep_alive(send))
            try:
                await asyncio.wait({writer, gone, idle}, return_when=asyncio.FIRST_COMPLETED)
                if writer.done():
                    writer.result()
                else:
                    self._on_abort("disconnect" if gone.done() else "stall")
            except asyncio.CancelledError:  # only the server's end cancels a response
                self._on_abort("shutdown")
                await cancel_all(writer)
                await self._close(send)
            finally:
                await cancel_all(writer, gone, idle)

    async def _write_all(self, send: Send) -> None:
        async for chunk in self._chunks:
            await self._write(send, chunk)
        await self._write(send, b"", more=False)

    async def _write(self, send: Send, chunk: bytes, *, more: bool = True) -> None:
        # Each message is written whole; one that waits for the client lets others wait with it.
        now = asyncio.get_running_loop().time
        self._last_write = now()
        self._is_writing = True
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self._is_writing = False
        self._last_write = now()

    async def _close(self, send: Send) -> None:
        """End the stream from the server's side, unless the client takes nothing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._write(send, self._last_words)
                await self._write(send, b"", more=False)

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment after each silence; return when a write has been stuck for too long."""
        loop = asyncio.get_running_loop()
        while True:
            silence = loop.time() - self._last_write
            if self._is_writing:
                if silence >= self._stall_s:
                    return
                await asyncio.sleep(min(self._stall_s - silence, self._ping_s))
            elif silence >= self._ping_s:
                try:
                    async with asyncio.timeout(self._stall_s):
                        await self._write(send, PING)
                except TimeoutError:
                    return
            else:
                await asyncio.sleep(min(self._ping_s - silence, self._stall_s))


def count_failure(metrics: Metrics, error: Exception) -> None:
    """Count what the service could not: bodies that never reached it, answers that were cut."""
    match error:
        case MalformedBody():
            metrics.request_rejected("malformed")
        case ClientGone():
            metrics.request_aborted("disconnect")
        case ServerStopping():
            metrics.request_aborted("shutdown")


async def _disconnected(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_all(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs and wait for its end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _check_content_type(request: Request) -> None:
    content_type = request.headers.get("content-type")
    if content_type is None or not _JSON_TYPE.fullmatch(content_type.partition(";")[0].strip()):
        raise MalformedBody(
            415, f"Expected the header `Content-Type: application/json`. Given: {quote(content_type or 'none')}"
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise MalformedBody(415, f"Expected a body without `Content-Encoding`. Given: {quote(encoding)}")


async def read_within(request: Request, limits: BodyLimits) -> bytes:
    """The request's body. Raises MalformedBody, 413 or 408, ClientGone, ServerStopping."""
    too_large = MalformedBody(413, f"The request body is larger than the limit of {limits.max_bytes} bytes")
    announced = request.headers.get("content-length", "0").lstrip("0")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limits.max_bytes):
        raise too_large
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(limits.timeout_s):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > limits.max_bytes:
                    raise too_large
                chunks.append(chunk)
    except ClientDisconnect:
        raise ClientGone from None
    except asyncio.CancelledError:
        raise ServerStopping from None
    except TimeoutError:
        raise MalformedBody(408, f"The request body did not arrive within {limits.timeout_s:g} seconds") from None
    return b"".join(chunks)


def _exceeds_depth(value: Any, max_depth: int) -> bool:
    """Whether arrays and objects lie within each other deeper than allowed."""
    level = [[value]]
    for _ in range(max_depth + 1):  # the first level is our own
        level = [
            list(member.values()) if isinstance(member, dict) else member
            for members in level
            for member in members
            if isinstance(member, list | dict)
        ]
    return bool(level)


def _number_within(max_digits: int) -> Callable[[str], float | int]:
    """A parser of numbers that refuses long ones."""

    def parse(digits: str) -> float | int:
        if len(digits) > max_digits:
            raise MalformedBody(400, f"{NOT_JSON}: a number has more than {max_digits} digits")
        return float(digits) if {".", "e", "E"} & set(digits) else int(digits)

    return parse


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise MalformedBody(422, f"{WRONG_SHAPE}: duplicate field {quote(key)}", (key,), "duplicate_field")
            seen.add(key)
    return result


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "an array"
    return "an object" if isinstance(value, dict) else type(value).__name__
