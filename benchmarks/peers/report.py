"""The results as Markdown: one table a shape, ratios to the best peer and to the limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from benchmarks.checkpoints import SHAPES, cache_values_per_token, num_weights_read
from benchmarks.peers.engines import VARIANTS, WEIGHT_BYTES, Variant, Weights
from benchmarks.peers.results import BANDWIDTH, Results
from benchmarks.peers.workloads import WORKLOADS, Workload

# For each kind of workload: the figure that is shown, and whether more of it is better.
SHOWN: dict[str, tuple[str, bool]] = {
    "decode": ("tokens_per_s", True),
    "prefill": ("tokens_per_s", True),
    "throughput": ("tokens_per_s", True),
    "overhead": ("us_per_token", False),
    "start": ("seconds", False),
    "http": ("tokens_per_s", True),
}
PEAK = "peak memory, GB"


def render(results: Results) -> str:
    figures = results.figures()
    shapes = [shape for shape in SHAPES if any(key[0] == shape for key in figures)]
    parts = [_head(results)]
    for shape in shapes:
        parts.append(f"### {shape}\n\n{_engine_table(results, shape)}")
        parts.append(_ratios(results, shape))
        parts.append(_http_table(results, shape))
    parts.append(_failures(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: Results) -> str:
    lines = [f"- {name}: {value}" for name, value in results.machine.items() if name != "quick"]
    if results.machine["quick"]:
        lines.insert(0, "**A quick run: an eighth of the tokens. It shows that everything runs, not how fast.**\n")
    lines += ["", "What took part, as each says of itself:", ""]
    for variant in VARIANTS:
        facts = results.facts().get(variant.name)
        if facts:
            lines.append(f"- {variant.name}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    return "\n".join(lines)


def _engine_table(results: Results, shape: str) -> str:
    """One row a variant; medians, and under them the least and the most of the rounds."""
    figures = results.figures()
    workloads = [
        workload
        for workload in WORKLOADS
        if workload.kind != "http" and any(key[:2] == (shape, workload.name) for key in figures)
    ]
    columns: list[tuple[str, Callable[[Variant], str]]] = [
        (workload.title, _shower(results, shape, workload.name, SHOWN[workload.kind][0], 1.0)) for workload in workloads
    ]
    if any(workload.kind == "start" for workload in workloads):
        columns.append((PEAK, _shower(results, shape, "start", "peak_bytes", 1e-9)))
    variants = [v for v in VARIANTS if any(key[0] == shape and key[2] == v.name for key in figures)]
    rows = [[variant.name, *(show(variant) for _, show in columns)] for variant in variants]
    return _table(["engine", *(title for title, _ in columns)], rows)


def _shower(results: Results, shape: str, workload: str, figure: str, scale: float) -> Callable[[Variant], str]:
    figures, errors = results.figures(), results.errors()

    def show(variant: Variant) -> str:
        key = (shape, workload, variant.name)
        values = [scale * value for value in figures.get(key, {}).get(figure, [])]
        if values:
            return spread(values)
        return "fails" if key in errors else ""

    return show


def spread(values: list[float]) -> str:
    """The median, with the least and the most where there are several."""
    middle = short(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({short(min(values))}–{short(max(values))})"


def short(value: float) -> str:
    """Three digits, and no more of a large number than its whole part."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def limit_tokens_per_s(shape: str, weights: Weights, context: int, bytes_per_s: float) -> float:
    """What decoding one row could reach at most: weights and cache read once a token at the memory's speed."""
    config = SHAPES[shape]
    cache_bytes = 2 * cache_values_per_token(config) * context
    return bytes_per_s / (WEIGHT_BYTES[weights] * num_weights_read(config) + cache_bytes)


def _ratios(results: Results, shape: str) -> str:
    """Ours beside the best of the others: in each kind of weights, and whatever the precision."""
    figures = results.figures()
    rows: list[list[str]] = []
    for workload in WORKLOADS:
        figure, more_is_better = SHOWN[workload.kind]
        measured = {
            variant: statistics.median(figures[shape, workload.name, variant.name][figure])
            for variant in VARIANTS
            if (shape, workload.name, variant.name) in figures
        }
        rows += _ratio_rows(results, shape, workload, measured, more_is_better)
        if workload.kind == "http":
            clients = workload.title.removesuffix(", tokens/s")
            for name, title in (("first_p50_s", "first token p50, s"), ("start_s", "server's start to first token, s")):
                times = {v: statistics.median(figures[shape, workload.name, v.name][name]) for v in measured}
                rows += _compared(f"{clients}, {title}", times, more_is_better=False, limit=lambda ours: "")
        if workload.kind == "start":
            peaks = {v: statistics.median(figures[shape, "start", v.name]["peak_bytes"]) / 1e9 for v in measured}
            rows += _compared(PEAK, peaks, more_is_better=False, limit=lambda ours: "")
    titles = ["workload", "weights", "gyrfalcon", "best peer", "", "ratio", "of the limit"]
    return "" if not rows else "Ratios above 1 say how many times better gyrfalcon is.\n\n" + _table(titles, rows)


def _ratio_rows(
    results: Results, shape: str, workload: Workload, measured: dict[Variant, float], more_is_better: bool
) -> list[list[str]]:
    probes = results.figures().get((shape, workload.name, BANDWIDTH), {}).get("bytes_per_s")

    def limit(ours: Variant) -> str:
        if workload.kind != "decode" or not probes:
            return ""
        context = workload.prompt_tokens + workload.new_tokens // 2
        bound = limit_tokens_per_s(shape, ours.weights, context, statistics.median(probes))
        return f"{100 * measured[ours] / bound:.0f} % of {short(bound)}"

    return _compared(workload.title, measured, more_is_better=more_is_better, limit=limit)


def _compared(
    title: str, measured: dict[Variant, float], *, more_is_better: bool, limit: Callable[[Variant], str]
) -> list[list[str]]:
    rows = []
    kinds: list[Weights | None] = ["bf16", "int8", "int4", None]
    best = max if more_is_better else min
    for kind in kinds:
        taking_part = [variant for variant in measured if kind in (None, variant.weights)]
        ours = [variant for variant in taking_part if variant.is_ours]
        peers = [variant for variant in taking_part if not variant.is_ours]
        if not ours or not peers:
            continue
        mine, other = best(ours, key=measured.__getitem__), best(peers, key=measured.__getitem__)
        ratio = measured[mine] / measured[other] if more_is_better else measured[other] / measured[mine]
        name = f"best: {mine.precision}" if kind is None else kind
        rows.append(
            [title, name, short(measured[mine]), short(measured[other]), other.name, f"{ratio:.2f}", limit(mine)]
        )
    return rows


def _http_table(results: Results, shape: str) -> str:
    figures = results.figures()
    rows = []
    for workload in WORKLOADS:
        if workload.kind != "http":
            continue
        for variant in VARIANTS:
            found = figures.get((shape, workload.name, variant.name))
            if found:
                times = [spread([1000 * v for v in found[name]]) for name in _HTTP_TIMES]
                rows.append([
                    str(workload.rows), variant.name, spread(found["tokens_per_s"]), *times,
                    spread(found["start_s"]), spread([value / 1e9 for value in found["peak_bytes"]]),
                ])  # fmt: skip
    if not rows:
        return ""
    titles = ["clients", "engine", "tokens/s", "first p50, ms", "p99", "next p50, ms", "p99", "start, s", PEAK]
    return (
        "Over HTTP: prompts of about 128 tokens, 64 new ones, streamed. Start: from the process's to the first "
        "token.\n\n" + _table(titles, rows)
    )


_HTTP_TIMES = ("first_p50_s", "first_p99_s", "gap_p50_s", "gap_p99_s")


def _failures(results: Results) -> str:
    """What did not run and why, shapes and workloads with the same reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for (shape, workload, variant), error in results.errors().items():
        reasons.setdefault((variant, error), []).append(f"{shape} {workload}")
    lines = [f"- {variant}: {', '.join(where)}: {error}" for (variant, error), where in sorted(reasons.items())]
    return "" if not lines else "### What did not run\n\n" + "\n".join(lines)


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(titles)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
