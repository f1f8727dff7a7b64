"""What a server's clients see when its time to finish what runs is over."""

from __future__ import annotations

import http.client
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from gyrfalcon.testing.server import ServerProcess, running_server

BODY = {"inputs": "Return the number of", "parameters": {"max_new_tokens": 900, "do_sample": True, "seed": 5}}


def open_stream(server: ServerProcess) -> http.client.HTTPResponse:
    """A stream of which the first event has arrived."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/generate_stream", json.dumps(BODY), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.readline()
    return response


def test_what_is_cut_by_the_end_is_told_so_and_the_server_ends_well() -> None:
    with running_server("--graceful-termination-timeout", "1") as server, ThreadPoolExecutor(1) as pool:
        stream = open_stream(server)
        plain = pool.submit(server.request, "POST", "/generate", BODY)
        while b"\ntgi_request_count 2.0\n" not in server.request("GET", "/metrics").body:
            time.sleep(0.02)
        server.engine.send_signal(signal.SIGSTOP)  # whatever is left to do will not be done in time
        server.process.send_signal(signal.SIGTERM)
        events = [json.loads(line[5:]) for line in stream.read().splitlines() if line.startswith(b"data:")]
        server.engine.send_signal(signal.SIGCONT)
        assert events[-1] == {
            "error": "the server is shutting down",
            "error_type": "incomplete_generation_stream",
        }
        assert all("token" in event for event in events[:-1])
        answer = plain.result(timeout=10)
        assert (answer.status, answer.json()["error_type"]) == (503, "incomplete_generation")
        assert server.process.wait(timeout=15) == 0
        assert "Traceback" not in server.log
