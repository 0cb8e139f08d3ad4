"""The pictures of studies. What lives here: drawing. What does not: any number that is drawn (studies.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from afd_server.simulator.plots import COLOURS, write
from afd_server.simulator.studies import LOST_AT_S, RESTART_S, Study


def draw_study(directory: Path, study: Study) -> list[Path]:
    """As PNG and SVG, named after study and model. Raises ConfigError when they cannot be written."""
    draw: Callable[[Any, Study], None] = {
        "ratio": _ratio, "undivided": _undivided, "ffn-loss": _ffn_loss, "lockstep": _lockstep,
    }[study.name]  # fmt: skip
    return write(directory, f"{study.name}-{study.model}", lambda figure: draw(figure, study))


AS_IT_RUNS, AS_PLANNED = "calls merge where they meet", "all calls of a layer merged"


def _ratio(figure: Any, study: Study) -> None:
    axes = figure.subplots()
    for colour, suffix, label in ((COLOURS[0], "", AS_IT_RUNS), (COLOURS[1], "_merged", AS_PLANNED)):
        ratios = [row["ratio"] for row in study.rows]
        values = [row[f"tokens_per_s_per_gpu{suffix}"] for row in study.rows]
        axes.plot(ratios, values, color=colour, marker="o", label=label)
        for x, y, row in zip(ratios, values, study.rows, strict=True):
            note = f"{row[f'requests{suffix}']}"
            axes.annotate(
                note, (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8, color=colour
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.set(xlabel="attention workers per FFN worker", ylabel="tokens/s per GPU", title=f"{study.model}: {study.about}; numbers: requests of each attention worker")  # fmt: skip
    axes.set_ylim(bottom=0, top=1.12 * max(axes.get_ylim()[1], 1.0))
    axes.grid(alpha=0.3)
    axes.legend()


def _undivided(figure: Any, study: Study) -> None:
    from matplotlib.colors import TwoSlopeNorm

    networks = sorted({row["network_gbps"] for row in study.rows})
    requests = sorted({row["requests_per_gpu"] for row in study.rows})
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(
        panels, ("divided_speed", "merged_speed"), (AS_IT_RUNS, AS_PLANNED), strict=True
    ):
        speed = {(row["network_gbps"], row["requests_per_gpu"]): row[key] for row in study.rows}
        grid = [[speed[gbps, count] for count in requests] for gbps in networks]
        image = axes.imshow(grid, origin="lower", aspect="auto", cmap="RdBu", norm=TwoSlopeNorm(1.0, 0.3, 1.7))
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                colour = "white" if abs(value - 1) > 0.4 else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(requests)), [str(count) for count in requests])
        axes.set(xlabel="requests per GPU", title=title)
    panels[0].set_yticks(range(len(networks)), [f"{gbps:g}" for gbps in networks])
    panels[0].set_ylabel("network, Gb/s of each GPU")
    figure.colorbar(image, ax=panels, label="speed, divided over undivided")
    figure.suptitle(f"{study.model}: {study.about}", fontsize="medium")


def _ffn_loss(figure: Any, study: Study) -> None:
    axes = figure.subplots()
    axes.axvspan(LOST_AT_S, LOST_AT_S + RESTART_S, color="#dddddd", label="ffn-0 is away")
    for colour, row in zip(COLOURS, study.rows, strict=False):
        width = max(1, round(1.0 / row["bin_s"]))  # bins of a second
        bins = row["tokens_per_s"]
        means = [sum(bins[at : at + width]) / width for at in range(0, len(bins) - width + 1, width)]
        seconds = [(index + 0.5) * width * row["bin_s"] for index in range(len(means))]
        beside = ("no replica", "1 replica more", "2 replicas more")[row["extra_replicas"]]
        label = f"{beside}, {row['gpus']} GPUs: {row['seconds_lost']:.1f} s of output lost"
        axes.plot(seconds, means, color=colour, label=label)
    axes.set(xlabel="seconds", ylabel="tokens/s", title=f"{study.model}: {study.about}")
    axes.set_ylim(bottom=0, top=1.35 * axes.get_ylim()[1])
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", ncols=2)


def _lockstep(figure: Any, study: Study) -> None:
    by_prompt = [row for row in study.rows if row["slowest_worker"] == 1]
    shortest = min(row["prompt_tokens"] for row in study.rows)
    by_slowness = [row for row in study.rows if row["prompt_tokens"] == shortest]
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, rows, key in ((left, by_prompt, "prompt_tokens"), (right, by_slowness, "slowest_worker")):
        for colour, suffix, label in ((COLOURS[0], "", "no lockstep"), (COLOURS[1], "_lockstep", "lockstep")):
            values = [row[f"tokens_per_s{suffix}"] for row in rows]
            axes.plot([row[key] for row in rows], values, color=colour, marker="o", label=label)
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_xscale("log", base=2)
    left.set_xticks(
        [row["prompt_tokens"] for row in by_prompt], [str(row["prompt_tokens"]) for row in by_prompt]
    )
    left.set(xlabel="mean prompt, tokens", ylabel="tokens/s", title="workers alike")
    left.set_ylim(bottom=0)
    right.set(
        xlabel="times of one attention worker, as a multiple",
        title=f"prompts of {shortest} tokens, one worker slow",
    )
    figure.suptitle(f"{study.model}: 8 attention workers, 24 clients each")
