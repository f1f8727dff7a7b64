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
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.server import ServerProcess, running_server
from gyrfalcon.testing.text import write_tokenizer
from tests.fuzz.mutation import mutated
from tests.reliability import bad_inputs
from tests.reliability.house import (
    WAYS_TO_LEAVE,
    ask,
    connect,
    leave,
    open_house,
    request_bytes,
    send,
    status_of,
    until,
)
from tests.reliability.load import make_load

PROMPTS = ("Return the number of", "x", "def add(a, b):\n    " * 12, "The falcon " * 60, "北京 déjà vu")
# What a mutation puts in.
TOKENS = (b"\\ud800", b"NaN", b"1e999", b"[[", b'"', b"{}", b"null", b"\xff", b"-0")
# Of a server that is warm, all its processes together.
MOST_GROWTH_BYTES = 32 * 2**20
MOST_GROWTH_PER_REQUEST = 1024
LONGEST_WARM_UP_S = 180.0
MOST_READINGS, LEAST_BETWEEN_READINGS_S = 10, 5.0
IDLE_WITHIN_S = 60.0
# What runs beside a trial may halt the clients for a while, which must not look like clients that dawdle or like a
# queue that does not move. The cache is small, so that it has all its pages soon, and runs out.
PATIENT = [
    *("--header-timeout", "600", "--body-timeout", "600", "--stall-timeout", "600", "--queue-timeout", "600"),
    *("--max-batch-total-tokens", "2048"),
]
# Inputs that leave the server waiting for more are over sooner.
HASTY = ["--header-timeout", "2", "--body-timeout", "2", "--idle-timeout", "2", "--max-batch-total-tokens", "2048"]
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
            Call(
                "/generate",
                {"inputs": prompt, "parameters": long | {"best_of": 2, "do_sample": True, "details": True}},
                is_repeatable=False,
            ),
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
            Call("/tokenize", {"inputs": prompt}),
        ]
    return made


def is_whole(said: bytes) -> bool:
    """Whether an answer that is drawn anew each time has as many tokens as it says."""
    best = json.loads(said)["details"]
    return all(
        len(one["tokens"]) == one["generated_tokens"] and one["finish_reason"] in {"length", "eos_token"}
        for one in (best, *best["best_of_sequences"])
    )


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

    async def until_idle(self, timeout_s: float = 2 * IDLE_WITHIN_S) -> float:
        """Seconds until nothing waits, runs or holds cache."""
        started = time.monotonic()
        while not await self.is_idle():
            if time.monotonic() - started > timeout_s:
                return float("inf")
            await asyncio.sleep(0.05)
        return time.monotonic() - started

    def memory_bytes(self) -> dict[str, int]:
        """Memory of its own that each process holds at the moment; pages of files are the system's to take back."""
        server, engine = psutil.Process(self.process.process.pid), self.process.engine
        others = [each for each in server.children(recursive=True) if each != engine]
        return {"front": _own_bytes(server), "engine": _own_bytes(engine), "others": sum(map(_own_bytes, others))}

    def num_files(self) -> int:
        return psutil.Process(self.process.process.pid).num_fds() + self.process.engine.num_fds()


def _own_bytes(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def growth(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - size for name, size in before.items()}


def is_steady(grown: dict[str, int], num_requests: int) -> bool:
    total = sum(grown.values())
    return total <= MOST_GROWTH_BYTES and total <= MOST_GROWTH_PER_REQUEST * num_requests


async def timed(server: Watched, call: Call) -> tuple[int, float]:
    started = time.monotonic()
    answer = await ask(server.port, call.path, call.body)
    return (status_of(answer) if answer else 0), time.monotonic() - started


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else float("nan")


# Soak


async def soak(server: Watched, arguments: argparse.Namespace) -> tuple[Figures, bool]:
    chance, table, counts = random.Random(arguments.seed), calls(), Counter[str]()
    alone = {id(call): payload(await ask(server.port, call.path, call.body)) for call in table}
    engine_pid, files = server.process.engine.pid, server.num_files()

    async def one() -> None:
        call = chance.choice(table)
        if chance.random() < 0.1:
            await leave_early(server.port, call, chance)
            counts["cancelled"] += 1
            return
        counts["requests"] += 1
        try:
            answer = await ask(server.port, call.path, call.body)
            said = payload(answer)
        except (OSError, ValueError):
            answer = said = b""
        if not answer or status_of(answer) != 200:
            counts["lost"] += 1
        elif said != alone[id(call)] if call.is_repeatable else not is_whole(said):
            counts["altered"] += 1

    async def traffic(seconds: float) -> tuple[float, dict[str, int]]:
        """Seconds until it is calm after so much of it, and the memory then."""
        deadline = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < deadline:
                await one()

        await asyncio.gather(*(client() for _ in range(arguments.clients)))
        return await server.until_idle(), server.memory_bytes()

    warm_up_s = min(arguments.seconds * 0.25, LONGEST_WARM_UP_S)
    _, warm = await traffic(warm_up_s)
    num_warm, idle_s, now = counts["requests"] + counts["cancelled"], 0.0, warm
    rest_s = arguments.seconds - warm_up_s
    num_readings = min(int(rest_s / LEAST_BETWEEN_READINGS_S) + 1, MOST_READINGS)
    for number in range(num_readings):
        idle_s, now = await traffic(rest_s / num_readings)
        sys.stderr.write(f"{number + 1}/{num_readings}: {dict(counts)}, memory {now}\n")
    grown, num_sent = growth(warm, now), counts["requests"] + counts["cancelled"] - num_warm
    found = await server.metrics()
    figures = {
        "seconds": arguments.seconds,
        **{name: counts[name] for name in ("requests", "cancelled", "lost", "altered")},
        "preemptions": sum(value for name, value in found.items() if name.startswith("gyrfalcon_preemptions_total")),
        "memory_warm_bytes": warm,
        "memory_growth_bytes": grown,
        "memory_growth_per_request": round(sum(grown.values()) / max(num_sent, 1), 1),
        "files_left": server.num_files() - files,
        "idle_after_s": round(idle_s, 2),
    }
    is_right = (
        counts["lost"] == counts["altered"] == 0
        and is_steady(grown, num_sent)
        and figures["files_left"] <= 1
        and idle_s < IDLE_WITHIN_S
        and server.process.engine.pid == engine_pid
    )
    return figures, is_right


async def leave_early(port: int, call: Call, chance: random.Random) -> None:
    """Send some or all of a request, wait for a moment, and go."""
    data = request_bytes(call.path, call.body)
    _, writer = await connect(port)
    try:
        writer.write(data if chance.random() < 0.8 else data[: chance.randrange(len(data))])
        await asyncio.sleep(chance.random() * 0.1)
    finally:
        leave(writer, chance.choice(WAYS_TO_LEAVE))


# Overload


async def overload(server: Watched, arguments: argparse.Namespace) -> tuple[Figures, bool]:
    """Full load is as many clients as a step computes sequences of; overload, ten times the requests they get done."""
    figures: Figures = {"seconds": arguments.seconds}
    is_right = True
    for name, options in (("new_connections", []), ("kept_connections", ["--keep-alive"])):
        figures[name], is_good = await _overloaded_with(server, arguments, options)
        is_right = is_right and is_good
    return figures, is_right


async def _overloaded_with(
    server: Watched, arguments: argparse.Namespace, options: Sequence[str]
) -> tuple[Figures, bool]:
    call = Call("/generate", {"inputs": PROMPTS[0], "parameters": {"max_new_tokens": 40}})
    calm = [(await timed(server, call))[1] for _ in range(5)]
    seconds = ("--seconds", str(arguments.seconds), *options)
    full = await make_load(server.port, call.path, call.body, "--clients", str(arguments.capacity), *seconds)
    full_s = full.of(200)
    health: list[tuple[int, float]] = []

    async def probe() -> None:
        while True:
            started = time.monotonic()
            status = status_of(await ask(server.port, "/health", method="GET"))
            health.append((status, time.monotonic() - started))
            await asyncio.sleep(0.5)

    probing = asyncio.create_task(probe())
    rate = 10 * len(full_s) / full.took_s
    over = await make_load(server.port, call.path, call.body, "--rate", str(rate), *seconds)
    probing.cancel()
    ended = time.monotonic()
    while (await timed(server, call))[1] > 2 * max(calm):
        if time.monotonic() - ended > 10:
            break
    accepted_s, shed_s = over.of(200), over.of(429)
    figures = {
        "full_load_p95_s": round(quantile(full_s, 0.95), 3),
        "full_load_per_s": round(len(full_s) / full.took_s, 1),
        "offered_per_s": round(len(over.statuses) / over.took_s, 1),
        "accepted_p95_s": round(quantile(accepted_s, 0.95), 3),
        "accepted_per_s": round(len(accepted_s) / over.took_s, 1),
        "shed": len(shed_s),
        "shed_p99_s": round(quantile(shed_s, 0.99), 4),
        "other_statuses": dict(Counter(status for status in over.statuses if status not in {200, 429})),
        "health": dict(Counter(status for status, _ in health)),
        "health_slowest_s": round(max(took_s for _, took_s in health), 3),
        "normal_after_s": round(time.monotonic() - ended, 2),
        # The client's own share in all that.
        "client_late_p99_s": round(quantile(over.late_s, 0.99), 4),
        "client_cores": round(over.client_cpu_s / over.took_s, 2),
    }
    is_right = (
        not figures["other_statuses"]
        and figures["shed_p99_s"] <= 0.25
        and figures["accepted_p95_s"] <= 1.25 * figures["full_load_p95_s"]
        and figures["accepted_per_s"] >= 0.9 * figures["full_load_per_s"]
        and figures["normal_after_s"] <= 2
        and {status for status, _ in health} == {200}
    )
    return figures, is_right


# Disconnects


async def disconnects(server: Watched, arguments: argparse.Namespace) -> tuple[Figures, bool]:
    chance, table = random.Random(arguments.seed), calls()
    room = asyncio.Semaphore(arguments.clients)

    async def one() -> None:
        async with room:
            await leave_early(server.port, chance.choice(table), chance)

    async def many(count: int) -> float:
        """Seconds until it is calm after so many."""
        for first in range(0, count, 500):
            await asyncio.gather(*(one() for _ in range(min(500, count - first))))
        return await server.until_idle()

    await asyncio.gather(*(timed(server, call) for call in table))
    await many(arguments.count // 10)
    files, memory, started = server.num_files(), server.memory_bytes(), time.monotonic()
    idle_s = await many(arguments.count)
    took_s = time.monotonic() - started
    await asyncio.sleep(1)
    grown = growth(memory, server.memory_bytes())
    figures = {
        "disconnects": arguments.count,
        "per_s": round(arguments.count / took_s, 1),
        "idle_after_s": round(idle_s, 2),
        "files_left": server.num_files() - files,
        "tasks_left": await _tasks_left(arguments.count),
        "memory_growth_bytes": grown,
    }
    status, _ = await timed(server, table[0])
    is_right = (
        status == 200
        and idle_s < IDLE_WITHIN_S
        and figures["files_left"] <= 1
        and figures["tasks_left"] <= 0
        and sum(grown.values()) <= MOST_GROWTH_BYTES
    )
    return figures, is_right


async def _tasks_left(count: int) -> int:
    """How many more tasks the event loop of a server in this process has after as many disconnects."""
    chance, table = random.Random(count), calls()
    with tempfile.TemporaryDirectory() as folder:
        async with open_house(FakeEngine(step_s=0.002), write_tokenizer(Path(folder))) as house:
            await ask(house.port, table[0].path, table[0].body)
            tasks = len(asyncio.all_tasks())
            for first in range(0, count, 50):
                await asyncio.gather(
                    *(leave_early(house.port, chance.choice(table), chance) for _ in range(min(50, count - first)))
                )
            await until(lambda: house.is_idle and house.server.num_connections == 0, IDLE_WITHIN_S)
            await asyncio.sleep(1)
            return len(asyncio.all_tasks()) - tasks


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
    counts, failures = Counter[int](), list[str]()
    slowest_s = 0.0

    async def client(deadline: float) -> None:
        nonlocal slowest_s
        while time.monotonic() < deadline:
            if chance.random() < 0.1:
                data = mutated(chance.choice(raw), chance.randrange(1, 4), TOKENS, chance)
            else:
                row = chance.choice(rows)
                headers = "".join(f"{name}: {value}\r\n" for name, value in row.headers[1:] if len(value) < 1000)
                path = row.path if row.path.isascii() else "/generate"
                body = mutated(row.body[:100_000], chance.randrange(1, 4), TOKENS, chance)
                data = request_bytes(path, body, method=row.method, headers=headers)
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

    async def traffic(seconds: float) -> dict[str, int]:
        """The memory after so much of it."""
        deadline = time.monotonic() + seconds
        await asyncio.gather(*(client(deadline) for _ in range(8)))
        await server.until_idle()
        return server.memory_bytes()

    warm = await traffic(arguments.seconds * 0.2)
    grown = growth(warm, await traffic(arguments.seconds * 0.8))
    status = status_of(await ask(server.port, "/health", method="GET"))
    figures = {
        "inputs": counts.total(),
        "statuses": dict(sorted(counts.items())),
        "slowest_s": round(slowest_s, 2),
        "memory_growth_bytes": grown,
        "failures": failures[:5],
    }
    return figures, not failures and status == 200 and sum(grown.values()) <= MOST_GROWTH_BYTES


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
    parser.add_argument("--seconds", type=float, default=60.0, help="of soak, overload (each quarter) and fuzz")
    parser.add_argument("--count", type=int, default=200, help="of disconnects, and of slow connections")
    parser.add_argument("--clients", type=int, default=32, help="at the same time")
    parser.add_argument("--capacity", type=int, default=64, help="clients at full load, for overload")
    parser.add_argument("--probes", type=int, default=100, help="requests that each p95 is of")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    options = ["--log-level", "warning"]
    if arguments.trial in {"soak", "disconnects"}:
        options += PATIENT
    if arguments.trial == "fuzz":
        options += HASTY
    if arguments.trial == "overload":
        options = []  # as it is served by default, with a log
    with running_server(*options) as process:
        figures, is_right = asyncio.run(TRIALS[arguments.trial](Watched(process), arguments))
    sys.stdout.write(json.dumps({"trial": arguments.trial, **figures, "ok": is_right}) + "\n")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
