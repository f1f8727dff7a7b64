"""Section 6 of the checklist, and 7.6: what breaks, breaks alone, is told, and is mended where that is possible."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from gyrfalcon.engine import process as process_module
from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import BeamParams, EngineRequest, EngineState, SamplingParams
from gyrfalcon.engine.process import ProcessEngine
from gyrfalcon.errors import ModelLoadError, SettingsError
from gyrfalcon.faults import KINDS, Fault, planned_fault
from gyrfalcon.presets import bundled_folder
from gyrfalcon.runner.interface import StepPlan
from gyrfalcon.runner.model_runner import ModelRunner
from gyrfalcon.testing.collector import Collector
from gyrfalcon.testing.executor import FakeExecutor, fake_continuation
from gyrfalcon.testing.server import ServerProcess, free_port, running_server, starting_server

from .conftest import OpenHouse
from .cores import build_core, request
from .test_isolation import load_eyas

PROMPT = "Return the number of"
MARK = 100  # the last byte of `§`, which nothing else here holds
MARKED = "Return the number of \N{SECTION SIGN}"


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def impatient_server(**constants: float) -> Iterator[ServerProcess]:
    """A server whose supervision has other times than production's."""
    code = "".join(f"process.{name} = {value}\n" for name, value in constants.items())
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        script = f"import sys\nfrom gyrfalcon.cli.main import main\nfrom gyrfalcon.engine import process\n{code}"
        script += f"sys.argv = ['gyrfalcon', 'serve', '--port', '{port}']\nmain()"
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=log,
            stderr=log,
        )
        server = ServerProcess(process, port, Path(log.name))
        try:
            server.wait_until_healthy()
            yield server
        finally:
            process.kill()
            process.wait()


def open_stream(server: ServerProcess, max_new_tokens: int = 900) -> http.client.HTTPResponse:
    """A stream of which the first event has arrived."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    parameters = {"max_new_tokens": max_new_tokens, "do_sample": True, "seed": 5}
    connection.request(
        "POST",
        "/generate_stream",
        json.dumps({"inputs": PROMPT, "parameters": parameters}),
        {"Content-Type": "application/json"},
    )
    response = connection.getresponse()
    response.readline()
    return response


def events_of(stream: http.client.HTTPResponse) -> list[Any]:
    return [json.loads(line[5:]) for line in stream.read().splitlines() if line.startswith(b"data:")]


def test_6_1_and_6_3_a_stuck_engine_and_a_killed_one_are_told_mended_and_at_last_given_up() -> None:
    with impatient_server(STUCK_AFTER_S=0.5, DEATHS_TOLERATED=2, LONGEST_BACKOFF_S=0.05) as server:
        stream = open_stream(server)
        server.engine.send_signal(signal.SIGSTOP)
        until(lambda: server.request("GET", "/health").status == 503)
        assert server.request("GET", "/health/live").status == 503
        server.engine.send_signal(signal.SIGCONT)
        until(lambda: server.request("GET", "/health").status == 200)

        killed_at = time.monotonic()
        server.engine.send_signal(signal.SIGKILL)
        assert events_of(stream)[-1]["error_type"] == "generation"
        assert server.request("GET", "/health").status == 503
        assert server.request("GET", "/health/live").status == 200  # it is mended from within
        refused = server.generate(PROMPT, max_new_tokens=3)
        assert (refused.status, b"SIGKILL" in refused.body or b"starting" in refused.body) == (503, True)
        assert time.monotonic() - killed_at < 5
        server.wait_until_healthy(30)
        assert server.generate(PROMPT, max_new_tokens=3).status == 200

        server.engine.send_signal(signal.SIGKILL)
        assert server.process.wait(timeout=20) == 1
        assert "given up after 2 deaths" in server.log


def test_6_1_the_waits_between_starts_double_up_to_a_minute() -> None:
    waits = [process_module._backoff_s(deaths) for deaths in range(1, 9)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert (process_module.DEATHS_TOLERATED, process_module.DEATHS_WINDOW_S) == (5, 600)


def test_6_2_an_engine_in_the_middle_of_a_step_goes_with_its_server() -> None:
    script = textwrap.dedent(
        """
        import asyncio
        from tests.reliability.cores import build_slow_core, request
        from gyrfalcon.engine.process import ProcessEngine

        async def main():
            engine = await ProcessEngine.start(build_slow_core)
            reading = asyncio.create_task(anext(engine.generate(request("a", (1, 2)))))
            await asyncio.sleep(0.3)
            print(engine.pid, flush=True)
            await reading

        asyncio.run(main())
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=5)


async def test_6_3_an_engine_that_is_merely_busy_or_ahead_of_its_readers_is_not_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_module, "STUCK_AFTER_S", 0.15)
    engine = await ProcessEngine.start(build_core)
    try:
        busy = [asyncio.create_task(anext(engine.generate(request(str(n), (n, 1), 40)))) for n in range(8)]
        for _ in range(20):
            await asyncio.sleep(0.02)
            assert (await engine.health()).is_healthy
        await asyncio.gather(*busy)
        async with aclosing(engine.generate(request("slow reader", (1, 2), 3))) as events:
            await anext(events)
            await asyncio.sleep(0.5)  # all of it is there, and only its reader is slow
            assert (await engine.health()).is_healthy
    finally:
        await engine.close()


async def test_6_3_clients_who_come_and_go_do_not_hide_that_the_engine_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_module, "STUCK_AFTER_S", 0.3)
    engine = await ProcessEngine.start(build_core)
    assert engine.pid is not None
    try:
        os.kill(engine.pid, signal.SIGSTOP)
        for number in range(5):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1), aclosing(engine.generate(request(str(number), (1, 2)))) as events:
                    await anext(events)
        assert (await engine.health()).state is EngineState.STUCK
    finally:
        os.kill(engine.pid, signal.SIGCONT)
        await engine.close()


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return load_eyas(bundled_folder(), num_blocks=60)


def neighbours() -> list[EngineRequest]:
    prompt = (49, 275, 323, 264, 637, 311)
    return [
        request("greedy", prompt, 20),
        request("sampled", prompt[1:], 20, sampling=SamplingParams(do_sample=True, seed=4, top_p=0.9)),
        request("choices", prompt[2:], 12, num_choices=3, sampling=SamplingParams(do_sample=True, seed=9)),
        request("beams", prompt[:3], 12, beams=BeamParams(num_beams=3), num_choices=2),
    ]


def answers(runner: ModelRunner, fault: Fault | None, victims: list[EngineRequest]) -> tuple[Collector, list[Any]]:
    runner._fault = fault
    run = Collector(EngineCore(runner, CoreLimits(token_budget=64, max_rows=16)))
    wanted = neighbours()
    for one in wanted:
        run.submit(one)
    run.step()
    for one in victims:
        run.submit(one)
    run.run()
    runner._fault = None
    assert run.core.stats().cache_usage == 0.0
    return run, [(run.tokens[one.request_id], run.logprobs[one.request_id]) for one in wanted]


@pytest.mark.parametrize("kind", ["logits:nan", "step:raise", "step:oom"])
def test_6_4_and_6_6_logits_that_are_not_numbers_and_a_lack_of_memory_end_one_request(
    runner: ModelRunner, kind: str
) -> None:
    victims = [
        request("victim", (5, 6, MARK)),
        request("victim's beams", (5, MARK), beams=BeamParams(num_beams=2)),
        request("victim's draws", (7, MARK), sampling=SamplingParams(do_sample=True)),
    ]
    undisturbed, alone = answers(runner, None, victims)
    assert not undisturbed.failures
    disturbed, beside = answers(runner, Fault(kind, MARK), victims)
    assert sorted(disturbed.failures) == sorted(one.request_id for one in victims)
    assert beside == alone


def test_6_4_a_model_that_computes_no_numbers_does_not_start(tmp_path: Path) -> None:
    for file in bundled_folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.3.mlp.dense_4h_to_h.weight"][7, 9] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    core = EngineCore(load_eyas(tmp_path), CoreLimits())
    with pytest.raises(ModelLoadError, match="not finite"):
        core.warm_up()


def test_6_4_warming_up_leaves_no_trace(runner: ModelRunner) -> None:
    core = EngineCore(runner, CoreLimits())
    core.warm_up()
    assert core.stats() == EngineCore(runner, CoreLimits()).stats()
    assert not core.has_work


def test_6_4_and_7_6_over_http_the_client_is_told_424_and_production_ignores_faults() -> None:
    fault = {"GYRFALCON_FAULT": f"logits:nan:{MARK}", "GYRFALCON_TESTING": "1"}
    with running_server(environ=fault) as server:
        answer = server.generate(MARKED, max_new_tokens=3)
        assert (answer.status, answer.json()["error_type"]) == (424, "generation")
        assert "not finite" in answer.json()["error"]
        body = {"inputs": MARKED, "parameters": {"max_new_tokens": 3}}
        (event,) = server.request("POST", "/generate_stream", body).events()
        assert event["error_type"] == "generation"
        assert server.generate(PROMPT, max_new_tokens=3).status == 200


def test_6_4_a_server_that_cannot_compute_ends_before_it_is_ready() -> None:
    fault = {"GYRFALCON_FAULT": "logits:nan:0", "GYRFALCON_TESTING": "1"}
    with starting_server("serve", environ=fault) as server:
        assert server.process.wait(timeout=30) == 1
        assert "not finite" in server.log.strip().splitlines()[-1]


def test_6_5_without_free_blocks_requests_are_put_off_and_none_is_told() -> None:
    core = EngineCore(FakeExecutor(num_blocks=24, block_size=2), CoreLimits(token_budget=16, max_rows=8))
    run = Collector(core)
    wanted = [request(str(n), (n, n + 1, n + 2), 30) for n in range(12)]
    for one in wanted:
        run.submit(one)
    run.run()
    assert core.stats().num_preemptions > 0
    assert not run.failures
    assert [run.tokens[one.request_id] for one in wanted] == [[fake_continuation(one.prompt_ids, 30)] for one in wanted]


def test_6_6_a_step_too_large_for_the_memory_is_done_in_parts() -> None:
    def lack_memory(plan: StepPlan) -> None:
        if len(plan.token_ids_T) > 10:
            raise MemoryError

    run = Collector(EngineCore(FakeExecutor(num_blocks=100, before_step=lack_memory), CoreLimits(token_budget=64)))
    wanted = [request(str(n), (n, *range(7)), 5) for n in range(6)]
    for one in wanted:
        run.submit(one)
    run.run()
    assert not run.failures
    assert [run.tokens[one.request_id] for one in wanted] == [[fake_continuation(one.prompt_ids, 5)] for one in wanted]


@pytest.mark.parametrize("damage", ["cut", "missing", "header", "empty"])
def test_6_7_damaged_weights_are_refused_at_once_by_name(tmp_path: Path, damage: str) -> None:
    for file in bundled_folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes({"cut": whole[:-1000], "header": b"\xff" * 8 + whole[8:], "empty": b""}[damage])
    started = time.monotonic()
    with pytest.raises(ModelLoadError) as failure:
        load_eyas(tmp_path)
    assert time.monotonic() - started < 5
    assert "model.safetensors" in str(failure.value)
    if damage == "cut":
        assert str(len(whole)) in str(failure.value)
        assert str(len(whole) - 1000) in str(failure.value)


def test_6_8_and_6_9_with_a_full_disk_it_serves_and_ends_well_under_load(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    port = free_port()
    with Path("/dev/full").open("wb") as full:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gyrfalcon", "serve", "--port", str(port)),
                *("--packed-cache", str(blocked / "below"), "--log-level", "info"),
            ],
            stdout=full,
            stderr=full,
        )
        server = ServerProcess(process, port, blocked)
        try:
            server.wait_until_healthy()
            assert server.generate(PROMPT, max_new_tokens=3).status == 200
            stream = open_stream(server, 300)
            process.send_signal(signal.SIGTERM)
            assert events_of(stream)[-1]["generated_text"]
            assert process.wait(timeout=15) == 0
        finally:
            process.kill()
            process.wait()


def test_6_9_a_second_signal_ends_at_once_what_still_runs() -> None:
    with running_server("--drain-delay", "30") as server:
        stream = open_stream(server)
        server.engine.send_signal(signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.request("GET", "/health/ready").status == 503)
        engine, ended_at = server.engine, time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        engine.send_signal(signal.SIGCONT)
        assert "error" in events_of(stream)[-1]
        assert server.process.wait(timeout=10) == 0
        assert time.monotonic() - ended_at < 10
        until(lambda: not engine.is_running())


async def test_6_10_a_clock_that_jumps_is_not_noticed(house: OpenHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.reliability.house import ask, status_of

    clock = [1.0e9, 4.0e9, 0.0, 2.0e9]

    def jumping() -> float:
        clock.append(clock.pop(0))
        return clock[-1]

    async with house(service_options={"queue_timeout_s": 5.0}) as server:
        monkeypatch.setattr(time, "time", jumping)
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 10}}
        plain = await asyncio.gather(*(ask(server.port, "/generate", body) for _ in range(20)))
        assert {status_of(answer) for answer in plain} == {200}
        assert status_of(await ask(server.port, "/health", method="GET")) == 200


def test_7_6_a_fault_needs_a_second_variable_and_a_known_name() -> None:
    assert planned_fault({}) is None
    assert planned_fault({"GYRFALCON_FAULT": "step:hang:3"}) is None
    assert planned_fault({"GYRFALCON_FAULT": "step:hang:3", "GYRFALCON_TESTING": "0"}) is None
    assert planned_fault({"GYRFALCON_TESTING": "1"}) is None
    for kind in KINDS:
        assert planned_fault({"GYRFALCON_FAULT": f"{kind}:3", "GYRFALCON_TESTING": "1"}) == Fault(kind, 3)
    for text in ("step:explode:3", "step:hang", "step:hang:x", "step:hang:-1", "3"):
        with pytest.raises(SettingsError, match="GYRFALCON_FAULT"):
            planned_fault({"GYRFALCON_FAULT": text, "GYRFALCON_TESTING": "1"})


def test_7_6_a_fault_meets_the_tokens_it_names_and_no_others() -> None:
    ids = np.array([1, 2, 3], dtype=np.int32)
    for kind in ("step:raise", "step:oom", "logits:nan"):
        Fault(kind, 4).strike(ids)
        assert not Fault(kind, 4).spoils(ids).any()
    with pytest.raises(RuntimeError):
        Fault("step:raise", 2).strike(ids)
    with pytest.raises(MemoryError):
        Fault("step:oom", 2).strike(ids)
    assert Fault("logits:nan", 2).spoils(ids).tolist() == [False, True, False]
