"""The pictures of studies. What lives here: drawing. What does not: any number that is drawn (studies.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from afd_server.simulator.plots import COLOURS, write
from afd_server.simulator.studies import LOST_AT_S, MICRO_BATCHES, RESTART_S, Study


def draw_study(directory: Path, study: Study) -> list[Path]:
    """As PNG and SVG, named after study and model. Raises ConfigError when they cannot be written."""
    draw: Callable[[Any, Study], None] = {
        "ratio": _ratio, "undivided": _undivided, "ffn-loss": _ffn_loss, "lockstep": _lockstep,
    }[study.name]  # fmt: skip
    return write(directory, f"{study.name}-{study.model}", lambda figure: draw(figure, study))


def _ratio(figure: Any, study: Study) -> None:
    axes = figure.subplots()
    for colour, count in zip(COLOURS, MICRO_BATCHES, strict=False):
        values = [row[f"tokens_per_s_per_gpu_m{count}"] for row in study.rows]
        label = f"{count} micro-batch{'es' if count > 1 else ''}"
        axes.plot([row["ratio"] for row in study.rows], values, color=colour, marker="o", label=label)
    axes.set(
        xlabel="attention workers per FFN worker",
        ylabel="tokens/s per GPU",
        title=f"{study.model}: {study.about}",
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _undivided(figure: Any, study: Study) -> None:
    from matplotlib.colors import TwoSlopeNorm

    axes = figure.subplots()
    networks = sorted({row["network_gbps"] for row in study.rows})
    requests = sorted({row["requests_per_gpu"] for row in study.rows})
    speed = {(row["network_gbps"], row["requests_per_gpu"]): row["divided_speed"] for row in study.rows}
    grid = [[speed[gbps, count] for count in requests] for gbps in networks]
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="RdBu", norm=TwoSlopeNorm(1.0, 0.4, 1.6))
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            strong = abs(value - 1) > 0.4
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if strong else "black")
    axes.set_xticks(range(len(requests)), [str(count) for count in requests])
    axes.set_yticks(range(len(networks)), [f"{gbps:g}" for gbps in networks])
    axes.set(
        xlabel="requests per GPU", ylabel="network, Gb/s of each GPU", title=f"{study.model}: {study.about}"
    )
    figure.colorbar(image, ax=axes, label="speed divided / undivided (blue: dividing pays)")


def _ffn_loss(figure: Any, study: Study) -> None:
    axes = figure.subplots()
    axes.axvspan(LOST_AT_S, LOST_AT_S + RESTART_S, color="#dddddd", label="ffn-0 is away")
    for colour, row in zip(COLOURS, study.rows, strict=False):
        width = max(1, round(1.0 / row["bin_s"]))  # bins of a second
        bins = row["tokens_per_s"]
        means = [sum(bins[at : at + width]) / width for at in range(0, len(bins) - width + 1, width)]
        seconds = [(index + 0.5) * width * row["bin_s"] for index in range(len(means))]
        label = f"{row['extra_replicas']} replicas beside ({row['gpus']} GPUs): {row['seconds_lost']:.1f} s of output lost"
        axes.plot(seconds, means, color=colour, label=label)
    axes.set(xlabel="seconds", ylabel="tokens/s", title=f"{study.model}: {study.about}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _lockstep(figure: Any, study: Study) -> None:
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("tokens_per_s", "tpot_p99_ms"),
        ("tokens/s", "99th percentile of TPOT, ms"),
        strict=True,
    ):
        slowness = [row["slowest_worker"] for row in study.rows]
        axes.plot(slowness, [row[key] for row in study.rows], color=COLOURS[0], marker="o", label="no lockstep")
        axes.plot(
            slowness,
            [row[f"{key}_lockstep"] for row in study.rows],
            color=COLOURS[1],
            marker="s",
            label="lockstep",
        )
        axes.set(xlabel="times of the slowest attention worker, as a multiple", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")
    figure.suptitle(f"{study.model}: {study.about}", fontsize="medium")
