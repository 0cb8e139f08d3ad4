"""Plots of measured points beside a model's lines, as PNG files in this folder.

What lives here: the data of a plot, its table for the terminal, the drawing. What does not: any measurement. Called by growth.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Curve:
    """Measured points, and the model's lines at the same places: seconds. xs ascend. model_s: by the line's name."""

    name: str
    xs: list[int] = field(default_factory=list)
    measured_s: list[float] = field(default_factory=list)
    model_s: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Plot:
    """One way of growing. about: what stays the same. The limits are those that the model's lines were made with."""

    name: str
    x_label: str
    about: str
    bytes_per_s: float
    flop_per_s: float
    curves: list[Curve]

    @property
    def limits(self) -> str:
        return f"{self.bytes_per_s / 1e9:.1f} GB/s, {self.flop_per_s / 1e9:.0f} GFLOP/s"


def table(plot: Plot) -> str:
    """A row for each point: milliseconds, and the model's with their shares of the measured."""
    lines = [f"{plot.name}: {plot.about}; {plot.limits}"]
    lines += [f"{'curve':<18} {plot.name:>8} {'step ms':>9}   the model's ms, and its share"]
    for curve in plot.curves:
        for index, (x, measured_s) in enumerate(zip(curve.xs, curve.measured_s, strict=True)):
            model = "   ".join(
                f"{name} {line[index] * 1e3:>8.2f} {line[index] / measured_s:>4.0%}"
                for name, line in curve.model_s.items()
            )
            lines.append(f"{curve.name:<18} {x:>8} {measured_s * 1e3:>9.2f}   {model}")
    return "\n".join(lines)


def draw(plot: Plot, caption: str, directory: Path) -> Path:
    """The file that it wrote: points as measured, the model's lines, both axes logarithmic. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8.5, 4.4), layout="constrained")
    for number, curve in enumerate(plot.curves):
        color, measured_ms = f"C{number}", [1e3 * seconds for seconds in curve.measured_s]
        axes.plot(curve.xs, measured_ms, "o", color=color, label=f"{curve.name}, measured")
        for (name, line), style in zip(curve.model_s.items(), ("-", "--"), strict=False):
            model_ms = [1e3 * seconds for seconds in line]
            axes.plot(curve.xs, model_ms, style, color=color, label=f"{curve.name}, {name}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks(ticks := sorted({x for curve in plot.curves for x in curve.xs}), map(str, ticks))
    axes.minorticks_off()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel("decode step, ms")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    axes.set_title(plot.about, fontsize=10)
    figure.supxlabel(caption, fontsize=7, color="gray")
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{plot.name}.png"
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return file
