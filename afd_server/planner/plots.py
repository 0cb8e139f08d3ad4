"""The pictures of `afd plan --plot`: cost by model and context, the ratio of workers, and two steps of a timeline.

What lives here: drawing. What does not: any number that is drawn. matplotlib is an extra of the package, and imported only here,
when a picture is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from afd_server.errors import ConfigError
from afd_server.planner import paper
from afd_server.planner.cost import cheapest, role_cost
from afd_server.planner.counts import count
from afd_server.planner.hardware import Hardware
from afd_server.planner.layout import Prediction, Workload
from afd_server.planner.model_config import CountedModel
from afd_server.planner.report import layout_words
from afd_server.planner.search import Limits, search
from afd_server.planner.timeline import LANES, play_step

CONTEXTS = tuple(1024 * 2**power for power in range(7))
DRAWN_LAYERS = 4
MOST_LEVEL_LABELS = 6  # cards under which names do not run into each other
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # told apart by every eye (Okabe and Ito)
BUBBLE: dict[str, Any] = {"facecolor": "#dddddd", "edgecolor": "#999999", "hatch": "///", "linewidth": 0}
LIMIT_COLOURS = {"attention": COLOURS[0], "wire": COLOURS[1], "FFN": COLOURS[2], "own way": COLOURS[3]}


def require_matplotlib() -> None:
    """Raises ConfigError, with the remedy, when it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot", "needs matplotlib", "pip install 'afd-server[plots]'")


def draw_all(directory: Path, workload: Workload, limits: Limits, best: Prediction) -> list[Path]:
    """Writes every picture as PNG and SVG and gives the files. best: the layout of the ratio and the timeline."""
    pictures: dict[str, Callable[[Any], None]] = {
        "cost": lambda figure: draw_cost(figure, workload.model, workload.context, workload.cards),
        "ratio": lambda figure: draw_ratio(figure, workload, limits, best),
        "timeline": lambda figure: draw_timeline(figure, workload, best),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [file for name, draw in pictures.items() for file in _write(directory / name, draw)]
    except OSError as error:
        raise ConfigError("--plot", f"cannot write to {directory}: {error.strerror}") from error


def _write(path: Path, draw: Callable[[Any], None]) -> list[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    draw(figure)
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=130)
    return files


# --- cost ----------------------------------------------------------------------------------------------------------


def draw_cost(figure: Any, model: CountedModel, context: int, cards: dict[str, Hardware]) -> None:
    """Left: models over context, each on its cheapest cards. Right: this model on each card."""
    over_context, on_cards = figure.subplots(1, 2)
    figure.get_layout_engine().set(wspace=0.08)
    models = {name: paper.bundled_model(name) for name in paper.BUNDLED}
    models.setdefault(model.name, model)
    for colour, (name, other) in zip((*COLOURS, "black"), models.items(), strict=False):
        usd = [_cheapest_usd(other, tokens, cards) for tokens in CONTEXTS]
        width = 3 if name == model.name else 1.5
        over_context.plot(CONTEXTS, usd, color=colour, linewidth=width, marker="o", markersize=4, label=name)
    over_context.set_xscale("log", base=2)
    over_context.set_xticks(CONTEXTS, [f"{tokens // 1024}K" for tokens in CONTEXTS])
    over_context.set_ylim(bottom=0)
    over_context.set(
        xlabel="context, tokens", ylabel="USD per million tokens", title="cheapest card for each role"
    )
    over_context.legend()
    over_context.grid(alpha=0.3)

    counts = count(model, context)
    costs = {name: role_cost(counts, card) for name, card in cards.items()}
    dearest = 10 * cheapest(costs).usd_per_mtok
    shown = {name: cost for name, cost in costs.items() if cost.attention + cost.ffn <= dearest}
    attention = [cost.attention for cost in shown.values()]
    on_cards.bar(list(shown), attention, color=COLOURS[0], label="attention")
    on_cards.bar(
        list(shown), [cost.ffn for cost in shown.values()], bottom=attention, color=COLOURS[2], label="FFN"
    )
    if len(shown) > MOST_LEVEL_LABELS:
        on_cards.set_xticks(range(len(shown)), list(shown), rotation=45, ha="right", rotation_mode="anchor")
    left_out = sorted(set(costs) - set(shown))
    beyond = f"\nbeyond the scale: {', '.join(left_out)}" if left_out else ""
    on_cards.set_ylim(
        top=1.25 * max(cost.attention + cost.ffn for cost in shown.values())
    )  # room for the legend
    on_cards.set_axisbelow(True)
    on_cards.set(
        xlabel="card",
        ylabel="USD per million tokens",
        title=f"{model.name} at {context} tokens, by card{beyond}",
    )
    on_cards.legend()
    on_cards.grid(axis="y", alpha=0.3)


def _cheapest_usd(model: CountedModel, context: int, cards: dict[str, Hardware]) -> float:
    counts = count(model, context)
    return cheapest({name: role_cost(counts, card) for name, card in cards.items()}).usd_per_mtok


# --- ratio ---------------------------------------------------------------------------------------------------------


def draw_ratio(figure: Any, workload: Workload, limits: Limits, best: Prediction) -> None:
    """Tokens a second and card over the number of attention workers, the FFN side as in `best`, the batch as the promise allows."""
    axes = figure.subplots()
    layout = best.layout
    points = sweep(workload, limits, best)
    workers = [prediction.layout.attention_workers for prediction in points]
    rates = [prediction.tokens_per_s_per_card for prediction in points]
    axes.plot(workers, rates, color="#888888", linewidth=1, zorder=1)
    for limit, colour in LIMIT_COLOURS.items():
        mine = [index for index, prediction in enumerate(points) if limit in prediction.limit]
        if mine:
            words = "a micro-batch's own way" if limit == "own way" else f"{limit} time"
            axes.scatter([workers[i] for i in mine], [rates[i] for i in mine], color=colour, zorder=2, label=f"limited by {words}")  # fmt: skip
    ffn_words = layout_words(layout)[1]
    axes.set_ylim(bottom=0)
    axes.set(xlabel=f"attention workers on {layout.attention_card}, beside {ffn_words}", ylabel="tokens/s per card",
             title=f"{workload.model.name}, context {workload.context}, TPOT up to {limits.tpot_s * 1e3:g} ms")  # fmt: skip
    ratio = axes.secondary_xaxis(
        "top", functions=(lambda x: x / layout.ffn_workers, lambda x: x * layout.ffn_workers)
    )
    ratio.set_xlabel("attention : FFN workers")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(LIMIT_COLOURS))


def sweep(workload: Workload, limits: Limits, best: Prediction) -> list[Prediction]:
    """The best of each number of attention workers beside the FFN side of `best`."""
    layout = best.layout
    most = max(limits.max_cards - layout.ffn_workers, layout.attention_workers)
    points = []
    for workers in range(1, most + 1):
        only = dataclasses.replace(limits, pairs=[(layout.attention_card, layout.ffn_card)], attention_workers=[workers],
                                   ffn_shapes=[(layout.expert_shards, layout.tensor_shards)])  # fmt: skip
        points += search(workload, only, "throughput", best=1)
    return points


# --- timeline ------------------------------------------------------------------------------------------------------


def draw_timeline(figure: Any, workload: Workload, best: Prediction) -> None:
    """Two steps of `best` as if the model had DRAWN_LAYERS layers, with what a step costs once in proportion."""
    axes = figure.subplots()
    layers = min(DRAWN_LAYERS, workload.model.num_layers)
    pieces = play_step(best.hop, best.layout.micro_batches, layers)
    step_s = max(piece.end_s for piece in pieces) + best.hop.latency_s
    once_s = best.overhead_s * layers / workload.model.num_layers
    rows = {lane: index for index, lane in enumerate(reversed(LANES))}
    for start_s in (0.0, step_s + once_s):
        for row in rows.values():
            axes.broken_barh([(start_s * 1e6, step_s * 1e6)], (row - 0.4, 0.8), **BUBBLE)
        for piece in pieces:
            left, width = (start_s + piece.start_s) * 1e6, (piece.end_s - piece.start_s) * 1e6
            axes.broken_barh([(left, width)], (rows[piece.lane] - 0.4, 0.8), facecolor=COLOURS[piece.micro_batch],
                             edgecolor="white", linewidth=0.7)  # fmt: skip
        end = (start_s + step_s) * 1e6
        axes.broken_barh([(end, once_s * 1e6)], (rows["attention"] - 0.4, 0.8), facecolor="#555555")
    axes.set_yticks(list(rows.values()), list(rows))
    attention, ffn = layout_words(best.layout)
    axes.set(xlabel="time, us", xlim=(0, None),
             title=f"{workload.model.name}, {attention} and {ffn}, {best.layout.requests} requests a worker\n"
             f"two steps, {layers} of {workload.model.num_layers} layers drawn; TPOT {best.tpot_s * 1e3:.1f} ms in all")  # fmt: skip
    figure.legend(handles=_timeline_legend(best.layout.micro_batches), loc="outside lower center", ncols=6)


def _timeline_legend(micro_batches: int) -> Sequence[Any]:
    from matplotlib.patches import Patch

    batches = [Patch(facecolor=COLOURS[index], label=f"micro-batch {index}") for index in range(micro_batches)]
    once = Patch(facecolor="#555555", label="once a step: LM head, sampling")
    return [*batches, Patch(**BUBBLE, label="bubble"), once]
