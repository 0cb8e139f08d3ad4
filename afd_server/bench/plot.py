"""The picture of a sweep: tokens a second against the time per token, a line for each server, PNG and SVG.

What lives here: drawing, by matplotlib, which is imported only for it. The points are pareto.py's. Called by command.py.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afd_server.bench.pareto import Point, by_server, front
from afd_server.errors import ConfigError

INCHES, DOTS_PER_INCH = (8.0, 5.2), 150
# Told apart by people who see few colours, and in grey (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Where a point's number may stand, in printer's points from it, the first where nothing else is in the way.
PLACES = ((0, 11), (0, -11), (-11, 6), (11, -6), (11, 6), (-11, -6), (-16, 0), (16, 0), (0, 20), (0, -20))
CLEAR_POINTS = 8.0  # from a number's middle to the nearest line or other number
WIDTH = ((-6, 0), (0, 0), (6, 0))  # of a number
HEADROOM = 1.08


def check(file: Path) -> None:
    """Before minutes of measuring: whether it can be drawn. Raises ConfigError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot", "matplotlib is not installed", "pip install 'afd-server[bench]'")
    if not file.parent.is_dir():
        raise ConfigError("--plot", f"{file.parent} is no directory")


def draw(points: Sequence[Point], file: Path, tpot_sla_ms: float | None = None) -> list[Path]:
    """Writes FILE.png and FILE.svg, whatever FILE ends in; gives both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
    servers = by_server(points)
    for number, (server, own) in enumerate(servers.items()):
        _draw_server(axes, server, own, number)
    if tpot_sla_ms is not None:
        axes.axvline(
            tpot_sla_ms, color="0.35", linestyle=":", linewidth=1.3, label=f"promise of {tpot_sla_ms:g} ms"
        )
    axes.set_xlabel("time per output token, median of the requests (ms)")
    axes.set_ylabel("output tokens per second, all clients together")
    axes.set_xlim(0, HEADROOM * max([tpot_sla_ms or 0.0, *(point.median_tpot_ms for point in points)]))
    axes.set_ylim(0, HEADROOM * max(point.output_throughput for point in points))
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="best", frameon=True, framealpha=0.9)
    axes.set_title("Up and to the left is better. Numbers are concurrent clients; hollow: another load of that server\n"
                   "gives more tokens at a shorter time.", fontsize=9, loc="left")  # fmt: skip
    figure.canvas.draw()  # settles where on the paper a point is
    _write_numbers(axes, servers, tpot_sla_ms)
    files = [file.with_suffix(suffix) for suffix in (".png", ".svg")]
    for written in files:
        figure.savefig(written, dpi=DOTS_PER_INCH)
    pyplot.close(figure)
    return files


def _draw_server(axes: Any, server: str, own: Sequence[Point], number: int) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    best = front(own)
    axes.plot(
        [point.median_tpot_ms for point in own], [point.output_throughput for point in own],
        color=colour, linewidth=1.5, marker=marker, markersize=6, label=server,
    )  # fmt: skip
    beaten = [point for point in own if point not in best]
    axes.plot(
        [point.median_tpot_ms for point in beaten], [point.output_throughput for point in beaten],
        color=colour, linestyle="none", marker=marker, markersize=6, markerfacecolor="white",
    )  # fmt: skip


def _write_numbers(axes: Any, servers: dict[str, list[Point]], tpot_sla_ms: float | None) -> None:
    """The clients of each point beside it, clear of all lines and of each other as far as there is a place."""
    pixels = axes.figure.dpi / 72
    on_paper = {
        server: axes.transData.transform([(p.median_tpot_ms, p.output_throughput) for p in own]) / pixels
        for server, own in servers.items()
    }
    lines = list(on_paper.values())
    if tpot_sla_ms is not None:
        lines.append(axes.transData.transform([(tpot_sla_ms, edge) for edge in axes.get_ylim()]) / pixels)
    taken = np.concatenate([_along(line) for line in lines])
    for number, (server, own) in enumerate(servers.items()):
        for point, middle in zip(own, on_paper[server], strict=True):
            spots = middle + np.array(PLACES)
            distances = np.linalg.norm(spots[:, None] - taken[None], axis=2).min(axis=1)
            clear = np.flatnonzero(distances >= CLEAR_POINTS)
            best = int(clear[0] if len(clear) else distances.argmax())
            axes.annotate(
                str(point.max_concurrency), (point.median_tpot_ms, point.output_throughput), xytext=PLACES[best],
                textcoords="offset points", ha="center", va="center", fontsize=8, color=COLOURS[number % len(COLOURS)],
            )  # fmt: skip
            taken = np.concatenate([taken, spots[best] + np.array(WIDTH)])


def _along(line: Any) -> Any:
    """Points on a line through the given ones, near enough to each other that nothing fits between."""
    pieces = [
        np.linspace(start, end, 2 + int(np.linalg.norm(end - start) / CLEAR_POINTS * 2))
        for start, end in itertools.pairwise(line)
    ]
    return np.concatenate([line, *pieces])
