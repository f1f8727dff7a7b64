"""The long trials of `make reliability`, against a server in processes of its own.

    python -m tests.reliability.campaign soak --seconds 1800
    python -m tests.reliability.campaign overload --seconds 30
    python -m tests.reliability.campaign disconnects --count 10000
    python -m tests.reliability.campaign crowd --count 200
    python -m tests.reliability.campaign fuzz --seconds 600

Each prints its figures as one JSON object and ends with status 1 where they are not what docs/reliability.md promises.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import psutil

from gyrfalcon.testing.server import ServerProcess, running_server
from tests.reliability import bad_inputs
from tests.reliability.house import ask, connect, request_bytes, send, status_of

PROMPTS = ("Return the number of", "x", "def add(a, b):\n    " * 12, "The falcon " * 60, "北京 déjà vu")
# What a mutation puts in.
TOKENS = (b"\\ud800", b"NaN", b"1e999", b"[[", b'"', b"{}", b"null", b"\xff", b"-0")
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A request whose answer is the same whenever it is sent, unless it is drawn without a seed."""

    path: str
    body: dict[str, Any]
    is_repeatable: bool = True


def calls() -> list[Call]:
    """Mixed traffic: all dialects, greedy, sampled, searched, long and short, streamed and whole."""
    made, greedy = [], {"do_sample": False}
    for number, prompt in enumerate(PROMPTS):
        short, long = {"max_new_tokens": 5}, {"max_new_tokens": 60 + 20 * number}
        sampled = {"do_sample": True, "seed": number, "temperature": 0.8, "top_p": 0.9, "details": True}
        made += [
            Call("/generate", {"inputs": prompt, "parameters": short | {"details": True}}),
            Call("/generate", {"inputs": prompt, "parameters": long | sampled}),
            Call("/generate_stream", {"inputs": prompt, "parameters": long}),
            Call("/generate_stream", {"inputs": prompt, "parameters": long | sampled | {"top_n_tokens": 3}}),
            Call("/", {"inputs": prompt, "stream": True, "parameters": short}),
            Call("/generate", {"inputs": prompt, "parameters": long | {"best_of": 2, "do_sample": True}}, False),
            # This dialect samples unless told otherwise.
            Call("/chat", {"prompt": prompt, "generate_kwargs": short | {"seed": 3}}),
            Call("/chat", {"prompt": prompt, "stream": True, "generate_kwargs": long | greedy}),
            Call("/chat", {"prompt": prompt, "generate_kwargs": {"max_new_tokens": 20, "num_beams": 3} | greedy}),
            Call(
                "/chat",
                {
                    "prompt": prompt,
                    "generate_kwargs": short
                    | {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "num_return_sequences": 2}
                    | greedy,
                },
            ),
            Call("/vertex", {"instances": [{"inputs": prompt, "parameters": short}] * 2}),
        ]
    return made


def payload(answer: bytes) -> bytes:
    """What an answer says, without headers, comments and the borders of chunks."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return body
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return b"".join(parts).replace(b": ping\n\n", b"")
        parts.append(body[:length])
        body = body[length + 2 :]
    raise ValueError("the last chunk is missing")


class Watched:
    """A running server, its metrics and its memory."""

    def __init__(self, process: ServerProcess) -> None:
        self.process = process
        self.port = process.port

    async def metrics(self) -> dict[str, float]:
        lines = payload(await ask(self.port, "/metrics", method="GET")).decode().splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}

    async def is_idle(self) -> bool:
        found = await self.metrics()
        gauges = ("gyrfalcon_requests_waiting", "gyrfalcon_sequences_running", "gyrfalcon_cache_usage_ratio")
        return all(value == 0 for name, value in found.items() if name.startswith(gauges))

    async def until_idle(self, timeout_s: float = 30.0) -> float:
        """Seconds until nothing waits, runs or holds cache."""
        started = time.monotonic()
        while not await self.is_idle():
            if time.monotonic() - started > timeout_s:
                return float("inf")
            await asyncio.sleep(0.05)
        return time.monotonic() - started

    def memory_bytes(self) -> int:
        server = psutil.Process(self.process.process.pid)
        return sum(each.memory_info().rss for each in (server, *server.children(recursive=True)))

    def num_files(self) -> int:
        return psutil.Process(self.process.process.pid).num_fds()


async def timed(server: Watched, call: Call) -> tuple[int, float]:
    started = time.monotonic()
    answer = await ask(server.port, call.path, call.body)
    return (status_of(answer) if answer else 0), time.monotonic() - started


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else float("nan")


# Soak


async def soak(server: Watched, arguments: argparse.Namespace) -> tuple[Figures, bool]:
    chance, table, counts = random.Random(0), calls(), Counter[str]()
    alone = {id(call): payload(await ask(server.port, call.path, call.body)) for call in table}
    deadline = time.monotonic() + arguments.seconds
    warm_until = time.monotonic() + min(arguments.seconds * 0.2, 120)
    warm: list[tuple[int, int]] = []  # memory and requests when it is warm

    async def client() -> None:
        while time.monotonic() < deadline:
            call = chance.choice(table)
            if chance.random() < 0.1:
                await leave_early(server, call, chance)
                counts["cancelled"] += 1
                continue
            answer = await ask(server.port, call.path, call.body)
            try:
                said = payload(answer)
            except (ValueError, IndexError):
                counts["lost"] += 1
                continue
            counts["requests"] += 1
            counts["lost"] += not answer or status_of(answer) != 200
            counts["altered"] += call.is_repeatable and said != alone[id(call)]
            if not warm and time.monotonic() > warm_until:
                warm.append((server.memory_bytes(), counts["requests"]))

    await asyncio.gather(*(client() for _ in range(arguments.clients)))
    idle_s = await server.until_idle()
    grown, requests = 0, counts["requests"]
    if warm:
        grown, requests = server.memory_bytes() - warm[0][0], max(counts["requests"] - warm[0][1], 1)
    figures = {
        "seconds": arguments.seconds,
        **{name: counts[name] for name in ("requests", "cancelled", "lost", "altered")},
        "memory_growth_bytes": grown,
        "memory_growth_per_request": round(grown / requests, 1),
        "idle_after_s": round(idle_s, 2),
    }
    is_steady = grown <= 32 * 2**20
    return figures, counts["lost"] == counts["altered"] == 0 and is_steady and idle_s < 5


async def leave_early(server: Watched, call: Call, chance: random.Random) -> None:
    """Send some or all of a request, wait for a moment, and go."""
    data = request_bytes(call.path, call.body)
    _, writer = await connect(server.port)
    writer.write(data if chance.random() < 0.8 else data[: chance.randrange(len(data))])
    await asyncio.sleep(chance.random() * 0.1)
    if chance.random() < 0.5:
        writer.transport.abort()
    writer.close()


# Overload


async def overload(server: Watched, arguments: argparse.Namespace) -> tuple[Figures, bool]:
    call = Call("/generate", {"inputs": PROMPTS[0], "parameters": {"max_new_tokens": 40}})
    calm = [(await timed(server, call))[1] for _ in range(5)]
    full = await _closed_loop(server, call, arguments.capacity, arguments.seconds)
    rate = 10 * len(full) / arguments.seconds
    results: list[tuple[int, float]] = []
    health: list[int] = []

    async def one() -> None:
        results.append(await timed(server, call))

    async def probe() -> None:
        while True:
            health.append(status_of(await ask(server.port, "/health", method="GET")))
            await asyncio.sleep(0.5)

    probing = asyncio.create_task(probe())
    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        while (now := time.monotonic() - started) < arguments.seconds:
            for _ in range(max(int(rate * now) - len(group._tasks) - len(results), 0)):  # type: ignore[attr-defined]
                group.create_task(one())
            await asyncio.sleep(0.01)
    took_s = time.monotonic() - started
    probing.cancel()
    ended = time.monotonic()
    while (await timed(server, call))[1] > 2 * max(calm):
        if time.monotonic() - ended > 10:
            break
    accepted = [each for status, each in results if status == 200]
    shed = [each for status, each in results if status == 429]
    figures = {
        "full_load_p95_s": round(quantile(full, 0.95), 3),
        "full_load_per_s": round(len(full) / arguments.seconds, 1),
        "offered_per_s": round(len(results) / took_s, 1),
        "accepted_p95_s": round(quantile(accepted, 0.95), 3),
        "accepted_per_s": round(len(accepted) / took_s, 1),
        "shed": len(shed),
        "shed_p99_s": round(quantile(shed, 0.99), 3),
        "other_statuses": dict(Counter(status for status, _ in results if status not in {200, 429})),
        "health": dict(Counter(health)),
        "normal_after_s": round(time.monotonic() - ended, 2),
    }
    is_right = (
        not figures["other_statuses"]
        and figures["shed_p99_s"] <= 0.25
        and figures["accepted_p95_s"] <= 1.25 * figures["full_load_p95_s"]
        and figures["accepted_per_s"] >= 0.9 * figures["full_load_per_s"]
        and figures["normal_after_s"] <= 2
        and set(health) <= {200}
    )
    return figures, is_right


async def _closed_loop(server: Watched, call: Call, num_clients: int, seconds: float) -> list[float]:
    deadline = time.monotonic() + seconds
    times: list[float] = []

    async def client() -> None:
        while time.monotonic() < deadline:
            status, took_s = await timed(server, call)
            if status == 200:
                times.append(took_s)

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return times


# Disconnects


async def disconnects(server: Watched, arguments: argparse.Namespace) -> tuple[Figures, bool]:
    chance, table = random.Random(0), calls()
    await asyncio.gather(*(timed(server, call) for call in table))
    await server.until_idle()
    files, memory = server.num_files(), server.memory_bytes()
    started = time.monotonic()
    room = asyncio.Semaphore(arguments.clients)

    async def one() -> None:
        async with room:
            await leave_early(server, chance.choice(table), chance)

    for first in range(0, arguments.count, 500):
        await asyncio.gather(*(one() for _ in range(min(500, arguments.count - first))))
    took_s = time.monotonic() - started
    idle_s = await server.until_idle()
    await asyncio.sleep(1)
    figures = {
        "disconnects": arguments.count,
        "per_s": round(arguments.count / took_s, 1),
        "idle_after_s": round(idle_s, 2),
        "files_left": server.num_files() - files,
        "memory_growth_bytes": server.memory_bytes() - memory,
    }
    status, _ = await timed(server, table[0])
    return figures, status == 200 and idle_s < 5 and figures["files_left"] <= 1


# Slow and idle connections


async def crowd(server: Watched, arguments: argparse.Namespace) -> tuple[Figures, bool]:
    call = Call("/generate", {"inputs": PROMPTS[0], "parameters": {"max_new_tokens": 20}})

    async def p95() -> float:
        return quantile([(await timed(server, call))[1] for _ in range(arguments.probes)], 0.95)

    await p95()
    alone_s = await p95()
    beginnings = (b"", b"POST /generate HTTP/1.1\r\n", request_bytes(call.path, call.body)[:-9])
    running = True

    async def dawdle(number: int) -> None:
        while running:  # and comes back when the server has had enough
            reader, writer = await connect(server.port)
            writer.write(beginnings[number % 3])
            await reader.read()
            writer.close()

    tasks = [asyncio.create_task(dawdle(number)) for number in range(arguments.count)]
    await asyncio.sleep(0.5)
    with_others_s = await p95()
    running = False
    for task in tasks:
        task.cancel()
    figures = {
        "connections": arguments.count,
        "p95_alone_s": round(alone_s, 4),
        "p95_with_others_s": round(with_others_s, 4),
    }
    return figures, with_others_s <= 1.5 * alone_s


# Fuzzing


async def fuzz(server: Watched, arguments: argparse.Namespace) -> tuple[Figures, bool]:
    chance, rows = random.Random(arguments.seed), bad_inputs.rows()
    raw = list(bad_inputs.RAW.values())
    deadline = time.monotonic() + arguments.seconds
    counts, failures = Counter[int](), list[str]()
    slowest_s = 0.0

    async def client() -> None:
        nonlocal slowest_s
        while time.monotonic() < deadline:
            if chance.random() < 0.1:
                data = mutated(chance.choice(raw), chance)
            else:
                row = chance.choice(rows)
                headers = "".join(f"{name}: {value}\r\n" for name, value in row.headers[1:] if len(value) < 1000)
                path = row.path if row.path.isascii() else "/generate"
                data = request_bytes(path, mutated(row.body[:100_000], chance), method=row.method, headers=headers)
            started = time.monotonic()
            try:
                # A mutated head may leave the server waiting for more, which its time-outs end.
                answer = await asyncio.wait_for(send(server.port, data), 60)
            except (OSError, TimeoutError) as error:
                answer = b""
                if isinstance(error, TimeoutError):
                    failures.append(f"no answer in 60 s: {data[:300]!r}")
            slowest_s = max(slowest_s, time.monotonic() - started)
            status = status_of(answer) if answer.startswith(b"HTTP/1.1 ") else 0
            counts[status] += 1
            if status >= 500:
                failures.append(f"{status}: {data[:300]!r} {answer[-300:]!r}")

    await asyncio.gather(*(client() for _ in range(8)))
    status = status_of(await ask(server.port, "/health", method="GET"))
    figures = {
        "inputs": counts.total(),
        "statuses": dict(sorted(counts.items())),
        "slowest_s": round(slowest_s, 2),
        "failures": failures[:5],
    }
    return figures, not failures and status == 200


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few of them changed, cut, repeated or swapped for others."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del changed[at : at + chance.randrange(1, 20)]
            case 2:
                changed[at:at] = changed[at : at + chance.randrange(1, 50)] * chance.randrange(1, 10)
            case 3:
                changed[at:at] = chance.choice(TOKENS)
            case _:
                changed = changed[:at]
    return bytes(changed)


TRIALS: dict[str, Callable[[Watched, argparse.Namespace], Coroutine[Any, Any, tuple[Figures, bool]]]] = {
    "soak": soak,
    "overload": overload,
    "disconnects": disconnects,
    "crowd": crowd,
    "fuzz": fuzz,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--seconds", type=float, default=60.0, help="of soak, overload (each half) and fuzz")
    parser.add_argument("--count", type=int, default=200, help="of disconnects, and of slow connections")
    parser.add_argument("--clients", type=int, default=32, help="at the same time")
    parser.add_argument("--capacity", type=int, default=64, help="sequences in work, for overload")
    parser.add_argument("--probes", type=int, default=100, help="requests that each p95 is of")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    options = ["--log-level", "warning"]
    if arguments.trial == "overload":
        options += ["--max-concurrent-requests", str(arguments.capacity), "--max-connections", "20000"]
    with running_server(*options) as process:
        figures, is_right = asyncio.run(TRIALS[arguments.trial](Watched(process), arguments))
    sys.stdout.write(json.dumps({"trial": arguments.trial, **figures, "ok": is_right}) + "\n")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
