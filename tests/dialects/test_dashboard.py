"""The board that text-generation-inference publishes for Grafana: each of its queries finds samples."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx2
import pytest

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import StepReading
from gyrfalcon.engine.local import LocalEngine
from gyrfalcon.http.app import create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.metrics import METHODS
from gyrfalcon.testing.executor import FakeExecutor
from gyrfalcon.testing.text import text_service

PLAIN = (
    "tgi_request_count",
    "tgi_request_success",
    'tgi_request_failure{err="validation"}',
    "tgi_queue_size",
    "tgi_batch_current_size",
    "tgi_batch_current_max_tokens",
    'tgi_batch_concat{reason="chunking"}',
    "tgi_request_generated_tokens_sum",
    "tgi_request_generated_tokens_count",
)
REQUEST_HISTOGRAMS = (
    "tgi_request_duration",
    "tgi_request_queue_duration",
    "tgi_request_mean_time_per_token_duration",
    "tgi_request_generated_tokens",
    "tgi_request_input_length",
    "tgi_request_skipped_tokens",
)
BATCH_HISTOGRAMS = (
    "tgi_batch_inference_duration",
    "tgi_batch_forward_duration",
    "tgi_batch_decode_duration",
    "tgi_batch_filter_duration",
)
NEVER_ZERO_AFTER_TRAFFIC = (
    "tgi_request_count",
    "tgi_request_success",
    'tgi_request_failure{err="validation"}',
    'tgi_batch_concat{reason="chunking"}',
    "tgi_request_generated_tokens_sum",
    *(f'{name}_bucket{{le="+Inf"}}' for name in REQUEST_HISTOGRAMS),
    *(f'{name}_bucket{{le="+Inf",method="{method}"}}' for name in BATCH_HISTOGRAMS for method in METHODS),
    'tgi_batch_concat_duration_bucket{le="+Inf",method="decode"}',
    *(f'tgi_batch_inference_{name}{{method="{method}"}}' for name in ("count", "success") for method in METHODS),
    'tgi_batch_next_size_bucket{le="1.0"}',
    "tgi_batch_max_total_tokens",
    "gyrfalcon_time_to_first_token_seconds_count",
    "gyrfalcon_inter_token_seconds_count",
    "gyrfalcon_step_seconds_count",
    'gyrfalcon_prefix_query_tokens_total{model="tiny"}',
)


@pytest.fixture
async def samples(tokenizer_folder: Path) -> dict[str, float]:
    """What is exported after two requests that ran at the same time and one that was refused."""
    readings: list[StepReading] = []
    core = EngineCore(
        FakeExecutor(num_blocks=200, vocab_size=400, before_step=lambda plan: time.sleep(0.0005)), CoreLimits()
    )
    engine = LocalEngine(core, on_step=readings.append)
    service, metrics = text_service(engine, tokenizer_folder)
    app = create_app(service, HttpSettings(), metrics)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://server") as client:
        long = {"inputs": "the people of the town", "parameters": {"max_new_tokens": 400, "stop": []}}
        first = asyncio.create_task(client.post("/generate", json=long))
        while not readings:
            await asyncio.sleep(0.001)
        short = {"inputs": "the falcon", "parameters": {"max_new_tokens": 5}}
        async with client.stream("POST", "/generate_stream", json=short) as stream:
            await stream.aread()
        assert (await client.post("/generate", json={"inputs": ""})).status_code == 422
        assert (await first).status_code == 200
        for reading in readings:
            metrics.step_ended(reading)
        text = (await client.get("/metrics")).text
    await service.close()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def test_every_query_finds_its_series(samples: dict[str, float]) -> None:
    buckets = [
        *(f'{name}_bucket{{le="+Inf"}}' for name in REQUEST_HISTOGRAMS),
        *(f'{name}_bucket{{le="+Inf",method="{method}"}}' for name in BATCH_HISTOGRAMS for method in METHODS),
    ]
    assert {*PLAIN, *buckets} <= set(samples)


async def test_traffic_shows(samples: dict[str, float]) -> None:
    assert [name for name in NEVER_ZERO_AFTER_TRAFFIC if not samples.get(name)] == []


async def test_at_rest_nothing_runs(samples: dict[str, float]) -> None:
    for name in ("tgi_queue_size", "tgi_batch_current_size", "tgi_batch_current_max_tokens"):
        assert samples[name] == 0
