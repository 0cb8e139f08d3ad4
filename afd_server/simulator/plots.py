"""The pictures of one run: throughput and load over time, how long requests took, and the lanes of some layers.

What lives here: drawing. What does not: any number that is drawn. matplotlib is an extra of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from afd_server.errors import ConfigError
from afd_server.simulator.results import Result
from afd_server.simulator.spans import Span, Spans

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # told apart by every eye (Okabe and Ito)
BUBBLE = {"facecolor": "#dddddd", "edgecolor": "#999999", "hatch": "///", "linewidth": 0}
MAX_LANES = 12
CURVE_POINTS = 50


def write(directory: Path, name: str, draw: Callable[[Any], None]) -> list[Path]:
    """As PNG and SVG. Raises ConfigError when they cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    draw(figure)
    files = [directory / f"{name}{suffix}" for suffix in (".png", ".svg")]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file in files:
            figure.savefig(file, dpi=130)
    except OSError as error:
        raise ConfigError("--plot", f"cannot write to {directory}: {error.strerror}") from error
    return files


def draw_run(directory: Path, result: Result, spans: Spans | None) -> list[Path]:
    """The lanes are drawn where hops were simulated one by one."""
    files = write(directory, "run", lambda figure: _run(figure, result))
    if spans is not None and spans.spans:
        files += write(directory, "lanes", lambda figure: _lanes(figure, spans))
    return files


def _run(figure: Any, result: Result) -> None:
    over_time, times = figure.subplots(1, 2)
    width = max(1, round(result.scenario.duration_s / CURVE_POINTS / result.bin_s))
    count = round(result.scenario.duration_s / result.bin_s / width)
    rates = [
        sum(result.tokens_per_bin.get(index, 0) for index in range(at * width, (at + 1) * width))
        / width
        / result.bin_s
        for at in range(count)
    ]
    seconds = [(at + 0.5) * width * result.bin_s for at in range(count)]
    over_time.plot(seconds, rates, color=COLOURS[0])
    if result.scenario.warm_up_s:
        over_time.axvspan(0, result.scenario.warm_up_s, color="#eeeeee", label="warm-up")
        over_time.legend(loc="lower right")
    over_time.set(xlabel="seconds", ylabel="output tokens/s", title="throughput")
    over_time.set_ylim(bottom=0)
    over_time.grid(alpha=0.3)
    for colour, label, values in (
        (COLOURS[0], "time to first token", [each.ttft_s for each in result.outcomes]),
        (COLOURS[1], "time per output token", [each.tpot_s for each in result.outcomes]),
    ):
        known = sorted(value * 1e3 for value in values if value is not None)
        shares = [(index + 1) / len(known) for index in range(len(known))]
        times.plot(known, shares, color=colour, label=label)
    times.set_xscale("log")
    times.xaxis.set_major_formatter("{x:g}")
    times.xaxis.set_minor_formatter("")
    times.set(xlabel="ms", ylabel="share of requests", title="as fast or faster")
    times.grid(alpha=0.3)
    times.legend(loc="lower right")


def _lanes(figure: Any, spans: Spans) -> None:
    """Who was busy when; colours are micro-batches."""
    axes = figure.subplots()
    by_lane: dict[str, list[Span]] = {}
    for span in spans.spans:
        by_lane.setdefault(span.lane, []).append(span)
    lanes = sorted(by_lane, key=_order)[:MAX_LANES]
    for row, lane in enumerate(lanes):
        if not lane.startswith("wire"):
            axes.broken_barh([(0, (spans.to_s - spans.from_s) * 1e3)], (row - 0.35, 0.7), **BUBBLE)
        for micro_batch, colour in enumerate(COLOURS):
            pieces = [
                ((span.began_s - spans.from_s) * 1e3, (span.ended_s - span.began_s) * 1e3)
                for span in by_lane[lane]
                if span.micro_batch == micro_batch
            ]
            axes.broken_barh(pieces, (row - 0.35, 0.7), facecolor=colour, edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlim(0, (spans.to_s - spans.from_s) * 1e3)
    axes.set(xlabel="ms", title="some layers; a colour is a micro-batch, hatched: nothing to compute")


def _order(lane: str) -> tuple[int, int, str]:
    """An attention worker, its wire, the next; then the FFN workers."""
    role, _, index = lane.rpartition("-")
    return (1 if role == "ffn" else 0, int(index), role)
