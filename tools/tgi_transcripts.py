"""Record the transcripts in tests/dialects/tgi anew: python tools/tgi_transcripts.py [NAME ...]

To be run after a change that is meant to show on the wire, such as other weights of the bundled model; the diff says
what changed. A transcript is a JSON file:

request    method and path; `body`, sent as JSON, or `text`, sent as it is; `headers` beside the usual ones;
           `key: false` leaves out the API key
response   status; headers, null for those whose value differs from run to run; `body` (JSON, or text, or null where
           there is none) or the `events` of a stream
volatile   paths into the response whose values differ from run to run: only their type is compared

For a new transcript, write a file that holds the request (and `volatile`), and record it. The test is
tests/dialects/test_tgi_transcripts.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gyrfalcon.testing.server import Answer, ServerProcess, running_server

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "dialects" / "tgi"
KEY = "a-key"
SERVER_ARGUMENTS = ("eyas", "--api-key", KEY, "--max-total-tokens", "512", "--device", "cpu", "--dtype", "float32")
# Log-probabilities differ in their last digits from one processor to another.
TOLERANCE = 1e-4

IGNORED_HEADERS = {"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"}
VOLATILE_HEADERS = {
    "x-compute-time",
    "x-inference-time",
    "x-queue-time",
    "x-request-id",
    "x-time-per-token",
    "x-total-time",
    "x-validation-time",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record the transcripts in tests/dialects/tgi anew.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; all by default")
    names = parser.parse_args(arguments).names
    unknown = sorted(set(names) - {path.stem for path in transcripts()})
    if unknown:
        parser.error(f"no transcript is called {', '.join(unknown)}")
    with running_server(*SERVER_ARGUMENTS) as server:
        for path in transcripts():
            if names and path.stem not in names:
                continue
            transcript = load(path)
            said = exchange(server, transcript["request"])
            if "response" not in transcript or any(differences(transcript, said)):
                print(f"{path.stem}: {'changed' if 'response' in transcript else 'new'}")
                save(path, transcript | {"response": said})
    return 0


def transcripts() -> list[Path]:
    return sorted(FOLDER.glob("*.json"))


def load(path: Path) -> dict[str, Any]:
    transcript: dict[str, Any] = json.loads(path.read_text())
    return transcript


def save(path: Path, transcript: Mapping[str, Any]) -> None:
    members = {name: transcript[name] for name in ("request", "response", "volatile") if name in transcript}
    path.write_text(json.dumps(members, indent=1, ensure_ascii=False) + "\n")


def exchange(server: ServerProcess, request: Mapping[str, Any]) -> dict[str, Any]:
    """Send a transcript's request; what came back, as a transcript's response."""
    headers = {} if request.get("key") is False else {"Authorization": f"Bearer {KEY}"}
    body = request["text"].encode() if "text" in request else request.get("body")
    answer = server.request(request["method"], request["path"], body, headers=headers | request.get("headers", {}))
    return {
        "status": answer.status,
        "headers": {
            name: None if name in VOLATILE_HEADERS else value
            for name, value in sorted(answer.headers.items())
            if name not in IGNORED_HEADERS
        },
        **_content(answer),
    }


def differences(transcript: Mapping[str, Any], said: Mapping[str, Any]) -> Iterator[str]:
    """Where what was said now is not what the transcript holds: one line each."""
    yield from _differences(transcript["response"], said, "", frozenset(transcript.get("volatile", ())))


def _content(answer: Answer) -> dict[str, Any]:
    content_type = answer.headers.get("content-type", "")
    if content_type.startswith("text/event-stream"):
        return {"events": answer.events()}
    if content_type.startswith("application/json"):
        return {"body": answer.json()}
    return {"body": answer.body.decode() or None}


def _differences(expected: Any, found: Any, path: str, volatile: Collection[str]) -> Iterator[str]:
    if path in volatile:
        if type(expected) is not type(found):
            yield f"{path}: {found!r} is not of the type of {expected!r}"
    elif isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            inner = f"{path}.{key}".lstrip(".")
            if key not in found or key not in expected:
                yield f"{inner}: {'new' if key in found else 'missing'}"
            else:
                yield from _differences(expected[key], found[key], inner, volatile)
    elif isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            yield f"{path}: {len(found)} items, not {len(expected)}"
        for index, (one, other) in enumerate(zip(expected, found, strict=False)):
            yield from _differences(one, other, f"{path}.{index}", volatile)
    elif isinstance(expected, float) and isinstance(found, float):
        if not math.isclose(expected, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{path}: {found!r}, not {expected!r}"
    elif type(expected) is not type(found) or expected != found:
        yield f"{path}: {found!r}, not {expected!r}"


if __name__ == "__main__":
    sys.exit(main())
