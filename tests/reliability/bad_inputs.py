"""The table of bad inputs: a row is one request that a client must not send, and what it may be answered.

Rows are combined from what can be wrong with bytes, with JSON, with each member of each dialect, and with HTTP itself.
Every mistake that was ever found becomes a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gyrfalcon.http.kaito_schema import ChatRequest, GenerateKwargs
from gyrfalcon.http.tgi_schema import ChatTokenizeRequest, CompatGenerateRequest, GenerateParameters, GenerateRequest
from gyrfalcon.http.watermark import DetectRequest

JSON_TYPE = (("Content-Type", "application/json"),)
REFUSED = frozenset({400, 404, 405, 408, 411, 413, 414, 415, 422, 431})
# A value may be right for a member, or the route lenient; what must never come is a failure of the server.
ANSWERED = REFUSED | {200}


@dataclass(frozen=True, slots=True)
class Row:
    """One request. allowed: the statuses that are right."""

    name: str
    path: str
    body: bytes
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = JSON_TYPE
    allowed: frozenset[int] = REFUSED


# A body of each route that is fine, so that a row differs from it in one thing.
GOOD: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "x", "parameters": {"max_new_tokens": 1}},
    "/generate_stream": {"inputs": "x", "parameters": {"max_new_tokens": 1}},
    "/": {"inputs": "x", "parameters": {"max_new_tokens": 1}},
    "/invocations": {"inputs": "x", "parameters": {"max_new_tokens": 1}},
    "/vertex": {"instances": [{"inputs": "x", "parameters": {"max_new_tokens": 1}}]},
    "/tokenize": {"inputs": "x"},
    "/chat_tokenize": {"messages": [{"role": "user", "content": "x"}]},
    "/chat": {"prompt": "x", "generate_kwargs": {"max_new_tokens": 1}},
    "/watermark/detect": {"text": "x"},
}
LENIENT = {"/chat"}  # reads whatever content type

NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n ",
    "bare word": b"hello",
    "open object": b"{",
    "key alone": b'{"inputs"',
    "no value": b'{"inputs":',
    "no end": b'{"inputs":"x"',
    "one end too many": b'{"inputs":"x"}}',
    "two values": b'{"inputs":"x"}{"inputs":"y"}',
    "single quotes": b"{'inputs':'x'}",
    "key without quotes": b'{inputs:"x"}',
    "comma at the end": b'{"inputs":"x",}',
    "comment": b'{"inputs":"x"/* y */}',
    "raw NUL": b'{"inputs":"\x00"}',
    "raw line end": b'{"inputs":"a\nb"}',
    "raw escape": b'{"inputs":"\x1b[31m"}',
    "unknown escape": b'{"inputs":"\\q"}',
    "half an escape": b'{"inputs":"\\u12"}',
    "byte 0xff": b'{"inputs":"\xff"}',
    "overlong UTF-8": b'{"inputs":"\xc0\xaf"}',
    "surrogate in UTF-8": b'{"inputs":"\xed\xa0\x80"}',
    "beyond Unicode": b'{"inputs":"\xf4\x90\x80\x80"}',
    "cut UTF-8": b'{"inputs":"\xe5\x8c"}',
    "UTF-16": '{"inputs":"x"}'.encode("utf-16"),
    "UTF-32": '{"inputs":"x"}'.encode("utf-32"),
    "byte order mark": b'\xef\xbb\xbf{"inputs":"x"}',
    "lone high surrogate": b'{"inputs":"\\ud800"}',
    "lone low surrogate": b'{"inputs":"\\udc00x"}',
    "surrogates swapped": b'{"inputs":"\\udc00\\ud800"}',
    "surrogate in a key": b'{"inputs":"x","\\udc00":1}',
    "NaN": b'{"inputs":"x","parameters":{"temperature":NaN}}',
    "Infinity": b'{"inputs":"x","parameters":{"temperature":Infinity}}',
    "-Infinity": b'{"inputs":"x","parameters":{"temperature":-Infinity}}',
    "1e999": b'{"inputs":"x","parameters":{"temperature":1e999}}',
    "-1e999": b'{"inputs":"x","parameters":{"temperature":-1e999}}',
    "leading zero": b'{"inputs":"x","parameters":{"top_k":01}}',
    "plus sign": b'{"inputs":"x","parameters":{"top_k":+1}}',
    "hexadecimal": b'{"inputs":"x","parameters":{"top_k":0x10}}',
    "dot alone": b'{"inputs":"x","parameters":{"top_p":.5}}',
    "dot at the end": b'{"inputs":"x","parameters":{"top_p":5.}}',
    "101 digits": b'{"inputs":"x","parameters":{"seed":' + b"9" * 101 + b"}}",
    "101 digits after the dot": b'{"inputs":"x","parameters":{"top_p":0.' + b"1" * 101 + b"}}",
    "a million digits": b'{"inputs":"x","parameters":{"seed":' + b"9" * 1_000_000 + b"}}",
    "65 arrays": b'{"inputs":"x","more":' + b"[" * 64 + b"]" * 64 + b"}",
    "65 objects": b'{"a":' * 65 + b"1" + b"}" * 65,
    "200,000 arrays": b"[" * 200_000,
    "200,000 arrays, closed": b"[" * 200_000 + b"]" * 200_000,
    "900 objects": b'{"a":' * 900 + b"1" + b"}" * 900,
    "a key twice": b'{"inputs":"x","inputs":"y"}',
    "a key twice inside": b'{"inputs":"x","more":{"a":1,"a":2}}',
    "a form": b"inputs=x&parameters=y",
    "multipart": b'--x\r\nContent-Disposition: form-data; name="inputs"\r\n\r\nx\r\n--x--\r\n',
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07inputs\x94.",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xabV\xca\xcc+()-V\xb2R\xaaP\xaa\x05\x00",
}
NOT_AN_OBJECT = (b"[]", b"3", b"null", b'"x"', b"true", b"[[]]", b'[{"inputs":"x"}]', b"-0", b"1e2")
CONTENT_TYPES = (
    *("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml"),
    *("application/jsonx", "json", "application/octet-stream", "application/x-python-pickle", "application/msgpack"),
)
ENCODINGS = ("gzip", "deflate", "br", "zstd", "identity, gzip", "x" * 500)
# For any member: values of which hardly any is right for it.
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "text": "x",
    "empty text": "",
    "number as text": "1",
    "long text": "y" * 5000,
    "direction marks": "\u202e\u2066\ufeff",
    "template": "{{7*7}}{% for a in range(9999999) %}{% endfor %}",
    "path": "../../../../etc/passwd",
    "URL": "http://169.254.169.254/latest/meta-data/",
    "zero": 0,
    "minus one": -1,
    "a half": 0.5,
    "tiny": 1e-300,
    "huge": 1e300,
    "2^31": 2**31,
    "2^63": 2**63,
    "2^64": 2**64,
    "10^90": 10**90,
    "negative huge": -(10**30),
    "empty array": [],
    "array of null": [None],
    "array of text": ["x", ""],
    "array of numbers": [1, 2],
    "array of huge": [2**70],
    "negative ids": [[-1]],
    "ids beyond the model": [[10**9]],
    "pairs": [[[1], 1e300]],
    "many": list(range(2000)),
    "arrays within": [[[[[]]]]],
    "empty object": {},
    "object": {"a": 1, "type": "json", "value": {}},
    "prototype": {"__proto__": {"x": 1}, "__class__": "y"},
}
NUMBERS_NEAR_LIMITS: dict[str, tuple[Any, ...]] = {
    "best_of": (5, 9, 2**32, 2**64 - 1),
    "num_return_sequences": (9, 17, 2**31),
    "num_beams": (17, 100, 2**31),
    "max_new_tokens": (0, 256, 257, 2**32 - 1),
    "temperature": (0, 0.0, -0.0, -1, 1e-50, 1e39),
    "top_p": (0, 1.0001, -0.5, 1e-50),
    "typical_p": (0.0, 2),
    "top_k": (0, -1, 2**31 - 1),
    "top_n_tokens": (21, 2**32 - 1),
    "truncate": (0, 256, 2**40),
    "repetition_penalty": (0, -1.5, 1e39, 1e-40),
    "frequency_penalty": (2.1, -2.1),
    "stop": (["x" * 257], list("abcdefghi"), [""] * 9),
    "bad_words_ids": ([[1]] * 1001, [[1] * 65], [[400]]),
    "suppress_tokens": ([1] * 1001, [400], [-1]),
    "eos_token_id": (400, -1, 10**9),
    "pad_token_id": (400, -1),
    "forced_bos_token_id": (400, -1),
    "min_p": (-0.1, 1.1),
    "epsilon_cutoff": (-0.1, 1.0),
    "length_penalty": (11, -11, 1e300),
    "no_repeat_ngram_size": (-1, 2**40),
    "exponential_decay_length_penalty": ([1, -1], [-1, 1], [1, 1e300], [1]),
}
# Members and their combinations that contradict each other.
CONFLICTS: tuple[dict[str, Any], ...] = (
    {"best_of": 2},
    {"best_of": 2, "do_sample": True, "seed": 1},
    {"best_of": 2, "do_sample": True, "num_return_sequences": 2},
    {"best_of": 2, "num_beams": 2},
    {"num_beams": 4, "num_beam_groups": 3},
    {"num_beams": 4, "num_beam_groups": 2},
    {"num_beams": 2, "num_return_sequences": 3},
    {"num_beams": 2, "stop": ["x"]},
    {"num_beams": 2, "top_n_tokens": 2},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "do_sample": True},
    {"min_new_tokens": 30, "max_new_tokens": 5},
    {"min_new_tokens": 30},
    {"max_new_tokens": 300, "truncate": 1},
    {"forced_eos_token_id": 3, "suppress_tokens": [3]},
    {"grammar": {"type": "regex", "value": "(a+)+$"}},
    {"grammar": {"type": "json", "value": {"$ref": "http://169.254.169.254/"}}},
    {"adapter_id": "../../etc/passwd"},
)
WRONG_METHODS = ("GET", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS", "BREW")
PATHS = (
    *("//generate", "/generate/", "/Generate", "/generate%00", "/generate%0d%0aX: y", "/..%2f..%2fetc/passwd", "/%ff"),
    *("/generate;a", "/v1/", "/v1/models/../../generate", "/docs/../../etc/passwd", "/docs/%2e%2e/x", "/" + "a" * 5000),
    *("/health/", "/health/live/", "/metrics/x", "/\u202e", "/generate?" + "a=b&" * 1000, "/admin", "/openapi.jsonx"),
)


def rows() -> list[Row]:
    """The whole table."""
    return [*_bytes_rows(), *_header_rows(), *_member_rows(), *_limit_rows(), *_path_rows()]


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _bytes_rows() -> Iterator[Row]:
    """Bodies that are not JSON, or not an object."""
    for path in GOOD:
        for name, body in NOT_JSON.items():
            yield Row(f"{path}: {name}", path, body)
        for body in NOT_AN_OBJECT:
            yield Row(f"{path}: {body.decode()}", path, body)


def _header_rows() -> Iterator[Row]:
    for path, good in GOOD.items():
        body = _dump(good)
        allowed = frozenset({200, 415} if path in LENIENT else {415})
        for kind in CONTENT_TYPES:
            headers = (("Content-Type", kind),) if kind else ()
            yield Row(f"{path}: content type {kind}", path, body, headers=headers, allowed=allowed)
        for encoding in ENCODINGS:
            headers = (*JSON_TYPE, ("Content-Encoding", encoding))
            yield Row(f"{path}: encoding {encoding[:20]}", path, body, headers=headers, allowed=allowed)
        many = tuple((f"X-{number}", "y") for number in range(120))
        yield Row(f"{path}: 120 headers", path, body, headers=JSON_TYPE + many, allowed=frozenset({431}))
        large = (("X-Large", "y" * 33_000),)
        yield Row(f"{path}: 33 kB of headers", path, body, headers=JSON_TYPE + large, allowed=frozenset({431}))
        yield Row(f"{path}: too large", path, b'{"x":"' + b"y" * 2_000_000 + b'"}', allowed=frozenset({413}))


def _member_rows() -> Iterator[Row]:
    """Each member of each dialect with each value."""
    for name in sorted({*GenerateParameters.model_fields, "unknown"}):
        for label, value in VALUES.items():
            body = {"inputs": "x", "parameters": {"max_new_tokens": 1, name: value}}
            yield Row(f"/generate parameters.{name}: {label}", "/generate", _dump(body), allowed=ANSWERED)
    for name in sorted({*GenerateKwargs.model_fields, "unknown"}):
        for label, value in VALUES.items():
            body = {"prompt": "x", "generate_kwargs": {"max_new_tokens": 1, name: value}}
            yield Row(f"/chat generate_kwargs.{name}: {label}", "/chat", _dump(body), allowed=ANSWERED)
    models = {
        "/generate_stream": GenerateRequest,
        "/": CompatGenerateRequest,
        "/invocations": CompatGenerateRequest,
        "/tokenize": GenerateRequest,
        "/chat": ChatRequest,
        "/chat_tokenize": ChatTokenizeRequest,
        "/watermark/detect": DetectRequest,
    }
    for path, model in models.items():
        for name in sorted({*model.model_fields, "unknown"}):
            for label, value in VALUES.items():
                body = GOOD[path] | {name: value}
                yield Row(f"{path} {name}: {label}", path, _dump(body), allowed=ANSWERED)
    for label, value in VALUES.items():
        yield Row(f"/vertex instances: {label}", "/vertex", _dump({"instances": value}))
        yield Row(f"/vertex an instance: {label}", "/vertex", _dump({"instances": [value]}))
        message = {"messages": [{"role": value, "content": value}]}
        yield Row(f"/chat_tokenize a message: {label}", "/chat_tokenize", _dump(message), allowed=ANSWERED)


def _limit_rows() -> Iterator[Row]:
    """Values of the right kind beyond what they may be, and members that contradict each other."""
    for name, values in NUMBERS_NEAR_LIMITS.items():
        for value in values:
            for path, outer, prompt in (
                ("/generate", "parameters", "inputs"),
                ("/generate_stream", "parameters", "inputs"),
                ("/chat", "generate_kwargs", "prompt"),
            ):
                text = str(value)[:30]
                yield Row(f"{path} {name}={text}", path, _dump({prompt: "x", outer: {name: value}}), allowed=ANSWERED)
    for number, conflict in enumerate(CONFLICTS):
        for path, outer, prompt in (("/generate", "parameters", "inputs"), ("/chat", "generate_kwargs", "prompt")):
            yield Row(f"{path} conflict {number}", path, _dump({prompt: "x", outer: conflict}), allowed=ANSWERED)
    for path in ("/generate", "/generate_stream", "/", "/invocations"):
        for name, text in (("empty", ""), ("too long in characters", "x" * 100_000), ("too long", "word " * 600)):
            yield Row(f"{path} inputs: {name}", path, _dump({"inputs": text}), allowed=ANSWERED)
    prompts = {"instances": [{"inputs": "x"}] * 33}
    yield Row("/vertex: 33 prompts", "/vertex", _dump(prompts), allowed=frozenset({422}))
    messages = {"messages": [{"role": "user", "content": "x"}] * 1025}
    for path in ("/chat", "/chat_tokenize"):
        yield Row(f"{path}: 1025 messages", path, _dump(messages), allowed=frozenset({422}))
    beams = [{"ids": [1], "bias": 1.0}] * 301
    yield Row("/chat: 301 biases", "/chat", _dump({"prompt": "x", "generate_kwargs": {"sequence_bias": beams}}))


def _path_rows() -> Iterator[Row]:
    for path in (*GOOD, "/health", "/metrics", "/info", "/docs", "/openapi.json"):
        for method in WRONG_METHODS:
            allowed = frozenset({200, 404, 405, 415, 400})
            yield Row(f"{method} {path}", path, b"{}", method=method, headers=(), allowed=allowed)
    for path in PATHS:
        for method in ("GET", "POST"):
            yield Row(f"{method} {path[:40]}", path, b"{}", method=method, allowed=ANSWERED)


# Bytes on the wire that are no HTTP/1.1, or hardly; each is followed by the client's silence.
RAW: dict[str, bytes] = {
    "nothing like HTTP": b"hello\r\n\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/9.9": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    "no version": b"GET /health HTTP/\r\n\r\n",
    "lower-case method": b"get /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "two spaces": b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "tab": b"GET\t/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "no path": b"GET HTTP/1.1\r\nHost: x\r\n\r\n",
    "path without slash": b"GET health HTTP/1.1\r\nHost: x\r\n\r\n",
    "NUL in the path": b"GET /he\x00alth HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "absolute": b"GET http://elsewhere/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "line ends of Unix": b"GET /health HTTP/1.1\nHost: x\nConnection: close\n\n",
    "header without colon": b"GET /health HTTP/1.1\r\nHost\r\n\r\n",
    "space before the colon": b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n",
    "folded header": b"GET /health HTTP/1.1\r\nX: a\r\n b\r\nHost: x\r\n\r\n",
    "header without name": b"GET /health HTTP/1.1\r\n: x\r\n\r\n",
    "NUL in a header": b"GET /health HTTP/1.1\r\nX: \x00\r\n\r\n",
    "carriage return in a header": b"GET /health HTTP/1.1\r\nX: a\rb\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
    "two equal lengths": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    "negative length": b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "length in words": b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
    "length with a plus": b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\nx",
    "hexadecimal length": b"POST / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\nx",
    "endless length": b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n",
    "large length": (
        b"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 999999999999\r\n\r\n"
    ),
    "length and chunks": b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks twice": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "unknown transfer": b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\nx",
    "chunked not last": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked, gzip\r\n\r\nx",
    "chunk size in words": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "negative chunk": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    "endless chunk size": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
    "chunk longer than said": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxyz\r\n0\r\n\r\n",
    "chunk extension": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 5000 + b"\r\nx\r\n0\r\n\r\n",
    "websocket": (
        b"GET /generate HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ),
    "HTTP/2 upgrade": (
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n"
    ),
    "expectation unknown": b"POST / HTTP/1.1\r\nHost: x\r\nExpect: magic\r\nContent-Length: 2\r\n\r\n{}",
    "100 kB of one header": b"GET /health HTTP/1.1\r\nX: " + b"y" * 100_000,
    "100 kB of path": b"GET /" + b"y" * 100_000,
    "5,000 headers": b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
    "answers to a request": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "garbage after a request": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n\x00\x01\x02garbage\r\n\r\n",
    "garbage as a body": b"POST /generate HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(range(256)),
}
