"""The whole server as its users start it: eyas in a process, its engine in another."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gyrfalcon.presets import bundled_folder
from gyrfalcon.testing.server import ServerProcess, running_server, starting_server

PROMPT = "Return the number of"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server("--max-concurrent-requests", "8", "--max-total-tokens", "800") as running:
        yield running


def open_stream(server: ServerProcess, max_new_tokens: int) -> http.client.HTTPResponse:
    """A stream of which the first event has arrived."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": max_new_tokens, "do_sample": True, "seed": 5}}
    connection.request("POST", "/generate_stream", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.readline()
    return response


def metric(server: ServerProcess, name: str) -> float:
    lines = server.request("GET", "/metrics").body.decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_banner_says_what_is_served_and_shows_a_request(server: ServerProcess) -> None:
    assert "eyas" in server.log
    assert f"curl http://127.0.0.1:{server.port}/generate" in server.log


def test_the_same_request_gives_the_same_bytes_alone_and_in_a_crowd(server: ServerProcess) -> None:
    requests = [
        {"max_new_tokens": 40, "details": True, "seed": seed, "do_sample": bool(seed % 2), "temperature": None}
        for seed in range(1, 8)
    ]
    alone = [server.generate(PROMPT, **parameters).body for parameters in requests]
    with ThreadPoolExecutor(7) as pool:
        together = list(pool.map(lambda parameters: server.generate(PROMPT, **parameters).body, requests))
    assert together == alone


def test_a_stream_says_what_the_plain_answer_says(server: ServerProcess) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 30, "details": True}}
    events = server.request("POST", "/generate_stream", body).events()
    plain = server.request("POST", "/generate", body).json()
    assert [event["token"] for event in events] == plain["details"]["tokens"]
    assert events[-1]["generated_text"] == plain["generated_text"]


def test_a_client_that_leaves_frees_its_place(server: ServerProcess) -> None:
    response = open_stream(server, 700)
    assert metric(server, "gyrfalcon_sequences_running") == 1
    response.close()
    until(lambda: metric(server, "gyrfalcon_sequences_running") == 0, 3)
    assert metric(server, "gyrfalcon_cache_usage_ratio") == 0


def test_a_plain_request_whose_client_leaves_is_aborted(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 700, "do_sample": True, "seed": 5}}
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    until(lambda: metric(server, "gyrfalcon_sequences_running") == 1)
    connection.close()
    until(lambda: metric(server, "gyrfalcon_sequences_running") == 0, 3)


def test_more_than_the_permitted_requests_are_told_so(server: ServerProcess) -> None:
    streams = [open_stream(server, 700) for _ in range(8)]
    answer = server.generate(PROMPT, max_new_tokens=2)
    for stream in streams:
        stream.close()
    assert (answer.status, answer.json()["error_type"]) == (429, "overloaded")
    assert int(answer.headers["retry-after"]) > 0
    until(lambda: server.generate(PROMPT, max_new_tokens=2).status == 200)


def test_a_killed_engine_ends_its_streams_with_an_error_and_comes_back() -> None:
    with running_server() as server:
        stream = open_stream(server, 900)
        server.engine.send_signal(signal.SIGKILL)
        last = [line for line in stream.read().splitlines() if line][-1]
        assert json.loads(last[5:])["error_type"] == "generation"
        assert server.request("GET", "/health").status == 503
        server.wait_until_healthy(30)
        assert server.generate(PROMPT, max_new_tokens=3).status == 200


def test_a_terminated_server_finishes_what_runs_and_ends_well() -> None:
    with running_server() as server:
        stream = open_stream(server, 300)
        server.process.send_signal(signal.SIGTERM)
        events = [json.loads(line[5:]) for line in stream.read().splitlines() if line.startswith(b"data:")]
        assert events[-1]["generated_text"]
        assert server.process.wait(timeout=15) == 0


def test_the_engine_goes_with_a_killed_server() -> None:
    with running_server() as server:
        engine = server.engine
        server.process.kill()
        server.process.wait()
        engine.wait(timeout=5)


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_checkpoint_without_a_file_is_refused_in_one_line_that_names_it(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(bundled_folder(), folder)
    (folder / missing).unlink()
    with starting_server("serve", str(folder)) as server:
        assert server.process.wait(timeout=30) == 1
        last = server.log.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert missing.removesuffix(".safetensors") in last


def test_a_busy_port_is_refused_before_the_model_is_loaded(server: ServerProcess) -> None:
    command = [sys.executable, "-m", "gyrfalcon", "serve", "--port", str(server.port)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: --port: {server.port} on 127.0.0.1 is in use")
