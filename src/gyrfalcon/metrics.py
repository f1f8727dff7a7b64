"""The server's metrics. On the ground: what it is told about engines and steps has any type of the right shape."""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gyrfalcon.telemetry import RequestRecord

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DURATION_BUCKETS = tuple(0.0001 * 1.5**k for k in range(1, 36))
BATCH_SIZE_BUCKETS = tuple(float(size) for size in range(1, 1025))
SKIPPED_TOKENS_BUCKETS = tuple(float(count) for count in range(11))
GAP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
LAG_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
NUM_LENGTH_BUCKETS = 100
# Histogram value of a request that may fill the context: TGI's scheduling slice.
LARGEST_SLICE_TOKENS = 1024
LAG_INTERVAL_S = 0.25

FAILURES = ("validation", "overloaded", "generation", "incomplete", "dropped", "template", "queue_timeout")
ABORTS = ("disconnect", "stall", "shutdown")
REJECTIONS = (
    *("validation", "template", "overloaded", "queue_timeout", "malformed", "unauthorized"),
    *("key_concurrency", "key_rate", "draining"),
)
# Why the server itself ended a connection, or did not begin with it.
CUTS = ("too_many", "too_many_of_address", "headers_too_large", "header_timeout", "body_timeout", "stall")
METHODS = ("prefill", "decode")
# Requests join at any step; the other reasons of TGI's are those of batches that wait for each other.
CONCAT_REASON = "chunking"


class EngineReading(Protocol):
    """The gauges and running totals of an engine that metrics show."""

    @property
    def num_waiting(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_promised_tokens(self) -> int: ...
    @property
    def cache_usage(self) -> float: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def prefix_hit_tokens(self) -> int: ...
    @property
    def prefix_query_tokens(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def decode_tokens(self) -> int: ...
    @property
    def draft_tokens(self) -> int: ...
    @property
    def accepted_tokens(self) -> int: ...
    @property
    def last_step_s(self) -> float: ...
    @property
    def peak_memory_bytes(self) -> int: ...


class StepMeasures(Protocol):
    """What an engine says of one step and of the `num_ahead` that it ran with it; durations in seconds, of them all."""

    @property
    def num_prefill_tokens(self) -> int: ...
    @property
    def num_decode_rows(self) -> int: ...
    @property
    def num_admitted(self) -> int: ...
    @property
    def has_succeeded(self) -> bool: ...
    @property
    def num_ahead(self) -> int: ...
    @property
    def num_accepted_tokens(self) -> Sequence[int]: ...
    @property
    def schedule_s(self) -> float: ...
    @property
    def forward_s(self) -> float: ...
    @property
    def sample_s(self) -> float: ...
    @property
    def commit_s(self) -> float: ...


class Metrics:
    """The server's metrics in a registry of their own.

    The `tgi_*` names, labels and buckets are those that dashboards for TGI query; the rest is `gyrfalcon_*`. Made
    before the engine, whose steps it is told of; requests come after `limits_known`. Not for use from threads, save
    for `render`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._count = self._counter("tgi_request_count", "Generation requests begun")
        self._success = self._counter("tgi_request_success", "Requests answered")
        self._failures = self._counters("tgi_request_failure", "Requests that failed, by kind", "err", FAILURES)
        self._duration = self._durations("tgi_request_duration", "Seconds from arrival to end")
        self._validation = self._durations("tgi_request_validation_duration", "Seconds from arrival to the engine")
        self._queue = self._durations("tgi_request_queue_duration", "Seconds from the engine to the first step")
        self._inference = self._durations("tgi_request_inference_duration", "Seconds from the first step to the end")
        self._per_token = self._durations(
            "tgi_request_mean_time_per_token_duration", "Seconds of inference per generated token"
        )
        self._lengths: _Lengths | None = None
        self._aborts = self._counters(
            "gyrfalcon_aborts", "Requests ended before their answer was whole, by cause", "cause", ABORTS
        )
        self._rejections = self._counters(
            "gyrfalcon_rejected", "Requests refused before any work, by cause", "cause", REJECTIONS
        )
        self._cuts = self._counters(
            "gyrfalcon_connections_cut", "Connections that the server ended or refused, by cause", "cause", CUTS
        )
        self._connections = Gauge("gyrfalcon_connections", "Open connections", registry=self.registry)
        self._queued_requests = Gauge(
            "gyrfalcon_queued_requests", "Requests that wait for the engine", ["model"], registry=self.registry
        )
        self._queued_tokens = Gauge(
            "gyrfalcon_queued_tokens", "Prompt tokens of the requests that wait", ["model"], registry=self.registry
        )
        self._key_reloads = self._counters(
            "gyrfalcon_key_reloads", "Times that the file of API keys was read again", "result", ("success", "failure")
        )
        self._first_token = self._durations(
            "gyrfalcon_time_to_first_token_seconds", "Seconds from arrival to the first token"
        )
        gaps = _FrequentHistogram("gyrfalcon_inter_token_seconds", "Seconds between tokens of a request", GAP_BUCKETS)
        self.registry.register(gaps)
        self._gaps = gaps.only
        self._lag = self._histogram(
            "gyrfalcon_event_loop_lag_seconds", "Seconds by which the event loop woke late", LAG_BUCKETS
        )
        self._steps = _StepMetrics(self)

    def limits_known(self, *, max_input_tokens: int, max_total_tokens: int, cache_tokens: int) -> None:
        """Register what depends on the engine's facts: the length histograms span these limits. Call it once."""
        self._lengths = _Lengths(
            input=self._length("tgi_request_input_length", "Prompt tokens", max_input_tokens),
            generated=self._length("tgi_request_generated_tokens", "Generated tokens", max_total_tokens),
            max_new=self._length("tgi_request_max_new_tokens", "New tokens asked for", max_total_tokens),
        )
        most = Gauge("tgi_batch_max_total_tokens", "Tokens the KV cache holds", registry=self.registry)
        most.set(cache_tokens)

    def watch_engines(self, read: Callable[[], Mapping[str, EngineReading]]) -> None:
        """Show what the engines' readings say, each time the metrics are asked for."""
        self.registry.register(_EngineCollector(read))

    async def watch_event_loop(self) -> None:
        """Measure for ever how late the event loop wakes; run it in a task of its own."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self._lag.observe(max(loop.time() - due, 0.0))

    def queue_watcher(self, model: str) -> Callable[[int, int], None]:
        """What to tell how many requests and prompt tokens wait for this model's engine."""
        requests, tokens = self._queued_requests.labels(model), self._queued_tokens.labels(model)

        def watch(num_requests: int, num_tokens: int) -> None:
            requests.set(num_requests)
            tokens.set(num_tokens)

        return watch

    def connections_open(self, count: int) -> None:
        self._connections.set(count)

    def connection_cut(self, cause: str) -> None:
        """The server ended a connection, or refused it: one of CUTS."""
        self._cuts[cause].inc()

    def keys_reloaded(self, *, succeeded: bool) -> None:
        self._key_reloads["success" if succeeded else "failure"].inc()

    def request_begins(self) -> None:
        self._count.inc()

    def prompt_admitted(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """A request has passed every check."""
        assert self._lengths is not None
        self._lengths.input.observe(num_prompt_tokens)
        self._lengths.max_new.observe(min(max_new_tokens, LARGEST_SLICE_TOKENS))

    def first_token(self, seconds: float) -> None:
        """A request's first token came this long after its arrival."""
        self._first_token.observe(seconds)

    def token_gap(self, seconds: float) -> None:
        """Tokens of a request came this long after those before them."""
        self._gaps.observe(seconds)

    def request_ends(self, record: RequestRecord) -> None:
        """Count a request that is over."""
        if record.outcome != "success":
            self.request_failed(record.outcome)
            return
        assert self._lengths is not None
        self._success.inc()
        self._duration.observe(record.total_s)
        self._lengths.generated.observe(record.num_generated_tokens)
        if record.validation_s is not None:
            self._validation.observe(record.validation_s)
        if record.queue_s is not None:
            self._queue.observe(record.queue_s)
        if record.inference_s is not None:
            self._inference.observe(record.inference_s)
            self._per_token.observe(record.inference_s / max(record.num_generated_tokens, 1))

    def request_failed(self, failure: str) -> None:
        """Count a request that failed: one of FAILURES."""
        self._failures[failure].inc()
        if failure in self._rejections:
            self._rejections[failure].inc()

    def request_aborted(self, cause: str) -> None:
        """An admitted request was given up: one of ABORTS."""
        self._aborts[cause].inc()

    def request_rejected(self, cause: str) -> None:
        """A request was turned away before the service saw it: one of REJECTIONS."""
        self._rejections[cause].inc()

    def step_ended(self, step: StepMeasures) -> None:
        """An engine has run a step."""
        self._steps.observe(step)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format. Takes milliseconds; may be called in a thread."""
        text = generate_latest(self.registry).decode("utf-8")
        # The client library names counters `*_total` and dates every series; TGI's dashboards know neither.
        text = re.sub(r"(?m)^(# (?:HELP|TYPE) )?(tgi_\w+?)_total\b", r"\1\2", text)
        text = re.sub(r"(?m)^(# (?:HELP|TYPE) )?\w+_created\b.*\n", "", text)
        return text.encode("utf-8")

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)

    def _counters(self, name: str, text: str, label: str, values: Sequence[str]) -> dict[str, Counter]:
        """A counter for each of the label's values, so that every series is there from the start."""
        counter = Counter(name, text, [label], registry=self.registry)
        return {value: counter.labels(value) for value in values}

    def _durations(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, DURATION_BUCKETS)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _length(self, name: str, text: str, most: int) -> Histogram:
        steps = [most * (step + 1) / NUM_LENGTH_BUCKETS for step in range(NUM_LENGTH_BUCKETS)]
        return self._histogram(name, text, steps)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Histograms of token counts."""

    input: Histogram
    generated: Histogram
    max_new: Histogram


class _StepMetrics:
    """What TGI measures of a batch, taken from our steps. A step that computes prompt tokens counts as a prefill.

    Steps that ran at once count one by one, each with its share of the time: dashboards show the same whatever the
    engine puts together.
    """

    def __init__(self, metrics: Metrics) -> None:
        registry = metrics.registry

        def counters(name: str, text: str) -> dict[str, Counter]:
            counter = Counter(name, text, ["method"], registry=registry)
            return {method: counter.labels(method) for method in METHODS}

        def registered(histogram: _FrequentHistogram) -> _FrequentHistogram:
            registry.register(histogram)
            return histogram

        def durations(name: str, text: str) -> dict[str, _Observations]:
            return registered(_FrequentHistogram(name, text, DURATION_BUCKETS, "method", METHODS)).series

        self._count = counters("tgi_batch_inference_count", "Steps begun")
        self._success = counters("tgi_batch_inference_success", "Steps that succeeded")
        self._failure = counters("tgi_batch_inference_failure", "Steps that failed")
        self._whole = durations("tgi_batch_inference_duration", "Seconds of a whole step")
        self._forward = durations("tgi_batch_forward_duration", "Seconds of a step's forward pass")
        self._decode = durations("tgi_batch_decode_duration", "Seconds of a step's choice of tokens")
        self._filter = durations("tgi_batch_filter_duration", "Seconds of a step's bookkeeping and reporting")
        self._concat_s = Histogram(
            "tgi_batch_concat_duration",
            "Seconds of planning a step that requests joined",
            ["method"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        ).labels("decode")
        self._concat = Counter(
            "tgi_batch_concat", "Times that requests joined others that ran", ["reason"], registry=registry
        ).labels(CONCAT_REASON)
        self._next_size = Histogram(
            "tgi_batch_next_size", "Requests that began in a step", buckets=BATCH_SIZE_BUCKETS, registry=registry
        )
        self._skipped = registered(
            _FrequentHistogram(
                "tgi_request_skipped_tokens",
                "Tokens beyond the first that speculation gave a sequence in a step",
                SKIPPED_TOKENS_BUCKETS,
            )
        ).only
        self._step_s = registered(
            _FrequentHistogram("gyrfalcon_step_seconds", "Seconds of a step", DURATION_BUCKETS)
        ).only

    def observe(self, step: StepMeasures) -> None:
        method = "prefill" if step.num_prefill_tokens else "decode"
        num_steps = 1 + step.num_ahead
        self._count[method].inc(num_steps)
        if step.num_admitted:
            self._next_size.observe(step.num_admitted)
            if step.num_decode_rows:
                self._concat.inc()
                self._concat_s.observe(step.schedule_s)
        if not step.has_succeeded:
            self._failure[method].inc(num_steps)
            return
        whole_s = step.schedule_s + step.forward_s + step.sample_s + step.commit_s
        self._success[method].inc(num_steps)
        for observations, all_s in (
            (self._whole[method], whole_s),
            (self._forward[method], step.forward_s),
            (self._decode[method], step.sample_s),
            (self._filter[method], step.commit_s),
            (self._step_s, whole_s),
        ):
            observations.observe(all_s / num_steps, num_steps)
        self._skipped.observe(0, num_steps * step.num_decode_rows - len(step.num_accepted_tokens))
        for count in step.num_accepted_tokens:
            self._skipped.observe(count)


class _Observations:
    """One series of a histogram. One thread observes."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        buckets, total = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), tuple(self._counts), strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric(labels, buckets, self._sum)


class _FrequentHistogram:
    """A histogram that costs a fraction of a microsecond an observation, so that every token can be observed.

    It has one series, or one for each of the label's values.
    """

    def __init__(
        self, name: str, text: str, bounds: Sequence[float], label: str | None = None, values: Sequence[str] = ("",)
    ) -> None:
        self._name = name
        self._text = text
        self._label = label
        self.series = {value: _Observations(bounds) for value in values}

    @property
    def only(self) -> _Observations:
        """The one series of a histogram without label."""
        (series,) = self.series.values()
        return series

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        for value, series in self.series.items():
            series.add_to(family, [value] if self._label else [])
        yield family


class _EngineCollector:
    """Turns the engines' readings into samples when the registry is collected."""

    SUMS = (
        ("tgi_queue_size", "Requests waiting", "num_waiting"),
        ("tgi_batch_current_size", "Sequences running", "num_running"),
        ("tgi_batch_current_max_tokens", "Tokens that the running sequences may come to hold", "num_promised_tokens"),
    )
    GAUGES = (
        ("gyrfalcon_requests_waiting", "Requests that hold no cache yet", "num_waiting"),
        ("gyrfalcon_sequences_running", "Sequences in the batch", "num_running"),
        ("gyrfalcon_cache_usage_ratio", "Share of the KV cache's blocks in use", "cache_usage"),
        ("gyrfalcon_last_step_seconds", "Duration of the newest step", "last_step_s"),
        ("gyrfalcon_peak_memory_bytes", "Largest resident size of the engine's process", "peak_memory_bytes"),
    )
    COUNTERS = (
        ("gyrfalcon_steps", "Steps run", "num_steps"),
        ("gyrfalcon_preemptions", "Sequences that gave their cache up for others", "num_preemptions"),
        ("gyrfalcon_prefix_hit_tokens", "Prompt tokens found in the prefix cache", "prefix_hit_tokens"),
        ("gyrfalcon_prefix_query_tokens", "Prompt tokens looked up in the prefix cache", "prefix_query_tokens"),
        ("gyrfalcon_prefill_tokens", "Prompt tokens computed", "prefill_tokens"),
        ("gyrfalcon_decode_tokens", "Tokens generated", "decode_tokens"),
        ("gyrfalcon_draft_tokens", "Tokens run by speculation, ahead of being drawn", "draft_tokens"),
        ("gyrfalcon_accepted_tokens", "Tokens run by speculation that were then drawn", "accepted_tokens"),
    )

    def __init__(self, read: Callable[[], Mapping[str, EngineReading]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        readings = self._read()
        for name, text, field in self.SUMS:
            yield GaugeMetricFamily(name, text, value=sum(getattr(each, field) for each in readings.values()))
        for name, text, field in self.GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model, reading in readings.items():
                gauge.add_metric([model], getattr(reading, field))
            yield gauge
        for name, text, field in self.COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model"])
            for model, reading in readings.items():
                counter.add_metric([model], getattr(reading, field))
            yield counter
