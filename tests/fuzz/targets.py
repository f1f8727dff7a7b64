"""What is fuzzed: functions of bytes that come back where all is well and raise where a promise is broken."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors
from fastapi import FastAPI
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models

from gyrfalcon.engine.core import CoreLimits, EngineCore, StepOutcome
from gyrfalcon.engine.interface import EngineRequest
from gyrfalcon.errors import InvalidRequest, ModelLoadError
from gyrfalcon.http.app import create_app
from gyrfalcon.http.kaito_render import render_deltas
from gyrfalcon.http.kaito_render import render_error as render_kaito_error
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.tgi_render import render_error, render_events
from gyrfalcon.http.wire import MalformedBody, quote, sse
from gyrfalcon.models.weights import read_header
from gyrfalcon.service.detokenizer import ByteDecoder, Detokenizer, StopFinder, WindowDecoder
from gyrfalcon.service.interface import Delta, GeneratedToken
from gyrfalcon.service.tokenizer import REPLACEMENT, TextTokenizer, load_tokenizer
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.executor import FakeExecutor
from gyrfalcon.testing.text import text_service, write_tokenizer
from tests.reliability import bad_inputs

WIDTH = 512  # of the logits
CONTEXT = 256
MOST_IDS = 90  # of a text to detokenize: beyond them a window may be moved amid an invalid character


@dataclass(frozen=True, slots=True)
class Target:
    """run: takes any bytes. seeds: inputs to begin with. tokens: what is worth putting in."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]
    tokens: tuple[bytes, ...] = ()


# A body, up to the engine's door


def body(data: bytes) -> None:
    """The first byte chooses a route, the others are its body; every schema of every dialect is among them.

    The answer is no failure of the server, is JSON or events of JSON, and whatever came to the engine is a request that
    it can take in.
    """
    if not data:
        return
    path, payload = _paths()[data[0] % len(_paths())], data[1:]
    app, engine = _application()
    engine.requests.clear()
    status, headers, answer = _loop().run_until_complete(_post(app, path, payload))
    assert 200 <= status < 500, (path, status, answer[:300])
    if headers.get(b"content-type") == b"text/event-stream":
        for event in answer.removesuffix(b"\n\n").split(b"\n\n"):
            assert event.startswith(b"data: "), event
            json.loads(event[6:])
    else:
        json.loads(answer)
    # Of several prompts some may have begun before another is refused.
    assert status == 200 or not engine.requests or path == "/vertex", "the engine was asked for what was refused"
    for request in engine.requests:
        _check_request(request)


def _check_request(request: EngineRequest) -> None:
    """Hold a request to what the engine's interface says of it."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=EngineRequest) == request
    ids = [*request.prompt_ids, *request.stop_token_ids, *request.sampling.suppress_tokens]
    ids += [id_ for word in request.sampling.bad_words_ids for id_ in word]
    ids += [id_ for phrase, _ in request.sampling.sequence_bias for id_ in phrase]
    assert all(0 <= id_ < WIDTH for id_ in ids)
    numbers = [value for value in msgspec.structs.astuple(request.sampling) if isinstance(value, float)]
    assert all(math.isfinite(np.float32(number)) for number in numbers)
    core, outcome = _make_core(), StepOutcome()
    core.submit(request, outcome)
    core.step(outcome)
    assert not outcome.failures, outcome.failures


async def _post(app: FastAPI, path: str, payload: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """The answer's status, headers and body."""
    is_read, sent = asyncio.Event(), list[Any]()

    async def receive() -> dict[str, Any]:
        if is_read.is_set():
            await asyncio.sleep(60)  # the client stays
        is_read.set()
        return {"type": "http.request", "body": payload, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    async with asyncio.timeout(30):
        await app(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent[1:])


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


@cache
def _application() -> tuple[FastAPI, FakeEngine]:
    engine = FakeEngine(vocab_size=WIDTH, max_context=CONTEXT, script=(70,), tokens_per_batch=CONTEXT)
    service, metrics = text_service(engine, _folder())
    return create_app(service, HttpSettings(), metrics), engine


def _make_core() -> EngineCore:
    executor = FakeExecutor(num_blocks=8 * CONTEXT + 1, block_size=1, vocab_size=WIDTH, max_context=CONTEXT)
    return EngineCore(executor, CoreLimits(token_budget=CONTEXT))


@cache
def _paths() -> tuple[str, ...]:
    return tuple(sorted(bad_inputs.GOOD))


def _body_seeds() -> Iterator[bytes]:
    numbers = {path: bytes([number]) for number, path in enumerate(_paths())}
    for path, good in bad_inputs.GOOD.items():
        yield numbers[path] + json.dumps(good).encode()
    for row in bad_inputs.rows():
        if row.path in numbers and len(row.body) < 2000:
            yield numbers[row.path] + row.body


# A safetensors file's header


def header(data: bytes) -> None:
    """A file is refused by name, or its tensors fill it; what the format's own library reads, so do we."""
    path = _folder() / "fuzzed.safetensors"
    path.write_bytes(data)
    reference = None
    with contextlib.suppress(Exception):  # whatever that library does not like
        reference = dict(safetensors.deserialize(data))
    try:
        tensors = read_header(path)
    except ModelLoadError:
        if reference is not None:
            raise
        return
    position = 8 + int.from_bytes(data[:8], "little")
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        assert tensor.offset == position
        position += tensor.num_bytes
    assert position == len(data)
    if reference is not None:
        assert {name: (each.dtype, list(each.shape), each.num_bytes) for name, each in tensors.items()} == {
            name: (each["dtype"], each["shape"], len(each["data"])) for name, each in reference.items()
        }


def _header_seeds() -> Iterator[bytes]:
    small = np.arange(6, dtype=np.float32).reshape(2, 3)
    yield save({"a": small})
    yield save({"a": small, "b": small[:0], "c": np.zeros((), dtype=np.int64)}, metadata={"format": "pt"})
    yield save({})
    for text in (b"{}", b'{"a":[]}', b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + b" " * 3):
        yield struct.pack("<Q", len(text)) + text + b"\0" * 4
    yield b"version https://git-lfs.github.com/spec/v1\n"


# Stop strings


def stop(data: bytes) -> None:
    """Fields end at 0xFF: the stop strings, then the pieces. Where a search in the whole text finds the first end, so
    does the finder.
    """
    strings, _, rest = data.partition(b"\xff\xff")
    stops = [part.decode("utf-8", "replace") for part in strings.split(b"\xff")][:8]
    finder, text = StopFinder(stops), ""
    for piece in (part.decode("utf-8", "replace") for part in rest.split(b"\xff")):
        kept = finder.push(piece)
        # An empty stop string is complete as soon as it is looked for, and cuts nothing.
        now = text + piece
        ends = [now.find(each) + len(each) if each else len(now) for each in stops if each in now]
        assert kept == (min(ends) - len(text) if ends else None), (stops, text, piece)
        if kept is not None:
            return
        text += piece


def _stop_seeds() -> Iterator[bytes]:
    yield b"\n\n\xffUser:\xff\xffHello\xff\n\xff\nUser"
    yield b"abab\xffb\xff\xffa\xffba\xffbab"
    yield b"\xff\xffx"
    yield "é🦅".encode() + b"\xff\xff" + "xé".encode() + b"\xff" + "🦅y".encode()


# The incremental detokenizer


def detokenizer(data: bytes) -> None:
    """Every two bytes are an id. Token by token there comes what decoding all at once gives, and a stop string cuts it.

    The first byte says which tokenizer, and whether special tokens are among the ids.
    """
    if not data:
        return
    ids = [int.from_bytes(data[at : at + 2]) for at in range(1, len(data) - 1, 2)][:MOST_IDS]
    with_specials = data[0] & 1
    if data[0] & 2:
        _check_byte_fallback([id_ % _fallback_tokenizer().vocab_size for id_ in ids])
        return
    tokenizer = _byte_tokenizer()
    ids = [id_ % (tokenizer.vocab_size + 1) for id_ in ids]  # one of them it does not know
    if not with_specials:
        ids = [id_ for id_ in ids if not tokenizer.is_special(id_)]
    prompt = tokenizer.encode("x")
    pieces = [list(map(make(tokenizer, prompt).push, ids)) for make in (ByteDecoder, WindowDecoder)]
    assert pieces[0] == pieces[1]
    if not with_specials:
        assert "".join(pieces[0]) == tokenizer.decode(ids).rstrip(REPLACEMENT)
    for string in ("", "é", "".join(pieces[0])[3:6]):
        _check_stopped(tokenizer, prompt, ids, string)


def _check_stopped(tokenizer: TextTokenizer, prompt: list[int], ids: list[int], string: str) -> None:
    """Hold a choice that a stop string ends to its two rules."""
    text, plain = Detokenizer(tokenizer, prompt, (string,)), ByteDecoder(tokenizer, prompt)
    shown = own = whole = ""
    for id_ in ids:
        piece, full = text.push(id_), plain.push(id_)
        shown += piece.text
        own += "" if piece.is_special else piece.text
        whole += full
        assert text.text == own
        assert piece.is_stop == (string in whole)
        if piece.is_stop:
            assert shown.endswith(string) or piece.is_special
            return
        assert piece.text == full


def _check_byte_fallback(ids: list[int]) -> None:
    tokenizer = _fallback_tokenizer()
    ids = [id_ for id_ in ids if not tokenizer.is_special(id_)]
    prompt = [1, 260]  # "<s> hello"
    decoder = WindowDecoder(tokenizer, prompt)
    together, whole = "".join(map(decoder.push, ids)), tokenizer.decode(prompt + ids)
    if REPLACEMENT not in whole:  # bytes that never become a character are replaced run by run, and runs differ
        assert tokenizer.decode(prompt) + together == whole


@cache
def _byte_tokenizer() -> TextTokenizer:
    return load_tokenizer(_folder())


@cache
def _fallback_tokenizer() -> TextTokenizer:
    """Words with a leading space mark, bytes as a fallback."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "lo", "!"]
    backend = Tokenizer(models.BPE({word: id_ for id_, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(backend, bos_token="<s>", eos_token="</s>")


def _detokenizer_seeds() -> Iterator[bytes]:
    tokenizer, fallback = _byte_tokenizer(), _fallback_tokenizer()
    for text in ("Hello, world", "déjà vu 北京", "🦅🙂", " \n"):
        for first in (0, 1):
            ids = tokenizer.encode(text)
            yield bytes([first]) + b"".join(id_.to_bytes(2) for id_ in [*ids, first, *ids])
    for word in ("▁hello", "▁", "lo", "<0xC3>", "<0xA9>"):
        id_ = fallback._backend.token_to_id(word)
        yield bytes([2]) + id_.to_bytes(2) * 3


# Events


def event(data: bytes) -> None:
    """A stream's events about any text, number and JSON value: each on one line, each JSON that says what went in."""
    text = data.decode("utf-8", "replace")
    broken = data.decode("utf-8", "surrogateescape")  # what no JSON can say, but an error may have to quote
    number = float(np.frombuffer(data[:8].ljust(8, b"\0"), dtype=np.float64)[0])
    single = np.frombuffer(data[:4].ljust(4, b"\0"), dtype=np.float32)[0]
    (said,) = _said(sse({"text": text, "number": number, "single": single}))
    assert said["text"] == text
    assert said["number"] == (number if math.isfinite(number) else None)
    assert said["single"] is None or np.float32(said["single"]) == single
    deltas = [
        Delta(0, index + 1, GeneratedToken(id_, text, float(single), bool(id_ & 1)))
        for index, id_ in enumerate(data[:5])
    ]
    for said, delta in zip(_said(render_events(deltas, text, True)), deltas, strict=True):
        assert (said["token"]["text"], said["token"]["id"]) == (text, delta.token.id)
    for said, delta in zip(_said(render_deltas(deltas)), deltas, strict=True):
        assert said["Delta"] == ("" if delta.token.special else text)
    mistakes = (InvalidRequest("inputs", f"Given: {quote(broken)}"), MalformedBody(422, quote(broken), (text, 1)))
    for error in mistakes:
        (said,) = _said(sse(render_error(error)[1]))
        assert len(said["error"]) < 1000
        _said(sse({"detail": render_kaito_error(error)[1]}))
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text, parse_constant=lambda name: None)
        if _is_sendable(value):
            assert _said(sse(value)) == [value]


def _said(stream: bytes) -> list[Any]:
    """The values of a stream, which is also whole for clients that take other characters for line ends."""
    assert not stream or stream.endswith(b"\n\n")
    lines = stream.decode().splitlines()
    assert lines[1::2] == [""] * (len(lines) // 2)
    assert all(line.startswith("data: ") for line in lines[::2])
    return [json.loads(line[6:]) for line in lines[::2]]


def _is_sendable(value: Any) -> bool:
    """Whether JSON of ours can say it: no lone surrogates, no integer beyond 64 bits, no overflowing number."""
    match value:
        case dict():
            return all(map(_is_sendable, value)) and all(map(_is_sendable, value.values()))
        case list():
            return all(map(_is_sendable, value))
        case str():
            return not any("\ud800" <= char <= "\udfff" for char in value)
        case bool() | None:
            return True
        case int():
            return -(2**63) <= value < 2**64
        case _:
            return math.isfinite(value)


def _event_seeds() -> Iterator[bytes]:
    yield "line\u2028ends\u0085and\r\nothers\u2029\x0b\x0c\x1c".encode()
    yield b"\xff\xfe\x00\xed\xa0\x80"
    yield b'{"a": [1, -0.0, 1e308, null, "\\u2028 \\ud83e\\udd85"]}'
    yield struct.pack("<d", math.inf) + b"x"
    yield struct.pack("<d", 1e300)


@cache
def _folder() -> Path:
    """A tokenizer, and room for files, where memory can hold them."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    atexit.register(partial(shutil.rmtree, folder, ignore_errors=True))
    return write_tokenizer(folder)


_JSON_TOKENS = (
    b"null",
    b"true",
    b"false",
    b"NaN",
    b"1e999",
    b"-0",
    b"[[",
    b"{}",
    b"\\ud800",
    b'"inputs":',
    b'"parameters":',
)
TARGETS = {
    "body": Target(body, _body_seeds, _JSON_TOKENS),
    "header": Target(header, _header_seeds, (b'"dtype":', b'"shape":', b'"data_offsets":', b'"BF16"', b"__metadata__")),
    "stop": Target(stop, _stop_seeds, (b"\xff\xff", b"\xff")),
    "detokenizer": Target(detokenizer, _detokenizer_seeds),
    "event": Target(event, _event_seeds, (b"\xe2\x80\xa8", b"\xc2\x85", b"\xed\xa0\x80", *_JSON_TOKENS)),
}
