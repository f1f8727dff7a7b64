"""The banner: what is served, where, within which limits, and a line to paste."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex

import pytest

from gyrfalcon.cli.banner import render_banner
from gyrfalcon.config import Settings
from gyrfalcon.service.interface import ModelInfo

MODEL = ModelInfo(
    name="eyas",
    revision=None,
    dtype="float32",
    device="cpu",
    num_parameters=7_654_321,
    num_text_tokens=4096,
    max_context=1024,
    max_input_tokens=1023,
    max_total_tokens=1024,
    cache_tokens=65536,
    max_concurrent_requests=128,
    max_best_of=4,
    max_stop_sequences=8,
    max_top_n_tokens=20,
    default_max_new_tokens=20,
    has_chat_template=True,
)


def curl_words(banner: str) -> list[str]:
    """The words a shell makes of the line to paste."""
    return shlex.split(banner[banner.index("curl ") :].strip())


def test_it_says_what_is_served_where_and_within_which_limits() -> None:
    banner = render_banner(Settings(), MODEL)
    for part in (
        "eyas (7.7 M parameters, float32 on cpu)",
        "http://127.0.0.1:8080",
        "http://127.0.0.1:8080/docs",
        "1,024 a sequence",
        "1,023 of them prompt",
        "20 new ones",
        "128 sequences",
        "65,536 tokens",
    ):
        assert part in banner


def test_the_line_to_paste_is_a_valid_request() -> None:
    words = curl_words(render_banner(Settings(port=9000), MODEL))
    assert words[:2] == ["curl", "http://127.0.0.1:9000/generate"]
    assert words[words.index("-H") + 1] == "Content-Type: application/json"
    body = json.loads(words[words.index("-d") + 1])
    assert isinstance(body["inputs"], str)
    assert body["parameters"] == {"max_new_tokens": 20}


def test_with_keys_the_line_carries_the_header_and_no_key_is_shown() -> None:
    banner = render_banner(Settings(api_key=("hunter2", "hunter3")), MODEL)
    assert "Authorization: Bearer YOUR_KEY" in curl_words(banner)
    assert "hunter" not in banner
    assert "2 known" in banner


def test_without_keys_the_line_has_no_authorization() -> None:
    assert "Authorization" not in render_banner(Settings(), MODEL)


@pytest.mark.parametrize(
    ("host", "url", "note"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080", "this machine only; --host 0.0.0.0"),
        ("localhost", "http://localhost:8080", "this machine only"),
        ("0.0.0.0", "http://127.0.0.1:8080", "OPEN to everyone"),
        ("::", "http://127.0.0.1:8080", "OPEN to everyone"),
        ("::1", "http://[::1]:8080", "this machine only"),
        ("10.1.2.3", "http://10.1.2.3:8080", "OPEN to everyone"),
    ],
)
def test_it_says_who_can_reach_the_server(host: str, url: str, note: str) -> None:
    banner = render_banner(Settings(host=host), MODEL)
    assert curl_words(banner)[1] == f"{url}/generate"
    assert note in banner


def test_a_server_that_fills_the_context_says_so() -> None:
    banner = render_banner(Settings(), dataclasses.replace(MODEL, default_max_new_tokens=None))
    assert "new ones fill what is left" in banner


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1_310_000_000, "1.3 B"), (41_303_293_952, "41.3 B")])
def test_parameters_are_counted_in_short(number: int, text: str) -> None:
    banner = render_banner(Settings(), dataclasses.replace(MODEL, num_parameters=number))
    assert re.search(rf"\({re.escape(text)} parameters", banner)
