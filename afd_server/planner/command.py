"""`afd plan`: flags, and the order of what is worked out and printed.

What lives here: that. What does not: numbers (counts.py, cost.py, search.py), words (report.py) and pictures (plots.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afd_server.command_line import USAGE_ERROR, Parser, positive, whole
from afd_server.config import MAX_MICRO_BATCHES
from afd_server.errors import ConfigError
from afd_server.planner import infeasible, paper, paper_report, report
from afd_server.planner.cost import role_cost
from afd_server.planner.counts import count
from afd_server.planner.hardware import Hardware
from afd_server.planner.inputs import MODELS, add_workload_flags, read_cards, read_model, read_workload
from afd_server.planner.layout import Prediction
from afd_server.planner.model_config import CountedModel
from afd_server.planner.search import MICRO_BATCHES, OBJECTIVES, Limits, best_pairs, search
from afd_server.planner.serve_command import remarks_on_layout, remarks_on_model, serve_command

PROFILED_CARD = "cpu-epyc"
# Pairs of cards, for attention and FFN, that are searched to the end.
MAX_PAIRS = 9


def parser() -> Parser:
    parser = Parser(
        prog="afd plan",
        description="What a model costs split between attention and FFN cards, and the layout that suits best.\n"
        f"MODEL_OR_CONFIG is {MODELS}.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL_OR_CONFIG", help="also one that the server does not run"
    )
    _add_inputs(parser.add_argument_group("what is planned for"))
    _add_outputs(parser.add_argument_group("what is shown"))
    return parser


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--hardware",
        metavar="CARD,CARD",
        default="",
        help="cards that may be used; default: all that are known",
    )
    add("--context", type=whole, default=8192, metavar="N", help="tokens that a decoded one attends to. Default: %(default)s")  # fmt: skip
    add(
        "--tpot-sla-ms",
        type=positive,
        default=50.0,
        metavar="MS",
        help="per output token. Default: %(default)g",
    )
    add(
        "--max-gpus",
        type=whole,
        default=64,
        metavar="N",
        help="cards of both roles together. Default: %(default)s",
    )
    add(
        "--objective",
        choices=OBJECTIVES,
        default="cost",
        help="USD a token, or tokens/s a card. Default: %(default)s",
    )
    micro_batches = ("auto", *map(str, MICRO_BATCHES))
    add("--micro-batches", choices=micro_batches, default="auto", help="in flight. Default: %(default)s")
    add_workload_flags(group)


def _add_outputs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--explain",
        action="store_true",
        help="show every count's formula and the source of every card's numbers",
    )
    add("--json", action="store_true", help="print JSON only")
    add("--paper", action="store_true", help="the tables of arXiv 2507.19427, ours beside them; takes no model")
    add(
        "--plot",
        type=Path,
        metavar="DIR",
        help="write cost, ratio and timeline there as PNG and SVG; needs matplotlib",
    )


def plan(argv: Sequence[str]) -> int:
    flags = parser()
    given = flags.parse_args(list(argv))
    if given.paper:
        print(
            json.dumps(paper_report.json_report(), indent=2) if given.json else "\n".join(paper_report.lines())
        )
        return 0
    if given.model is None:
        flags.error("give MODEL_OR_CONFIG, or --paper")
    if given.plot:
        from afd_server.planner.plots import require_matplotlib

        require_matplotlib()
    path, model = read_model(given.model)
    names = [name for name in given.hardware.split(",") if name]
    cards = read_cards(given, names or _default_cards(given))
    return Plan(given, path, model, cards).run()


def _default_cards(given: Any) -> list[str]:
    """A profile stands for one machine: that of the table which is nearest to where the server's tests run."""
    return [PROFILED_CARD] if given.profile else []


class Plan:
    """One run of the command, after its flags are read."""

    def __init__(self, given: Any, path: Path, model: CountedModel, cards: dict[str, Hardware]) -> None:
        self._given, self._path, self._model, self._cards = given, path, model, cards
        self._counts = count(model, given.context)
        self._costs = {name: role_cost(self._counts, card) for name, card in cards.items()}
        self._workload = read_workload(given, model, given.context, cards)
        micro_batches = MICRO_BATCHES if given.micro_batches == "auto" else (int(given.micro_batches),)
        assert max(micro_batches) <= MAX_MICRO_BATCHES
        wire = ("fp8", "bfloat16") if given.dtype != "float32" else ("fp8", "bfloat16", "float32")
        self._limits = Limits(
            given.tpot_sla_ms / 1e3,
            given.max_gpus,
            list(itertools.product(cards, cards)),
            micro_batches=micro_batches,
            wire_dtypes=wire,
        )

    def run(self) -> int:
        self._choose_pairs()
        found = search(self._workload, self._limits, self._given.objective)
        problem = None if found else infeasible.reason(self._workload, self._limits)
        if self._given.json:
            self._print_json(found, problem)
        else:
            self._print_text(found)
        if found and self._given.plot:
            from afd_server.planner.plots import draw_all

            files = draw_all(self._given.plot, self._workload, self._limits, found[0])
            print("\n".join(f"wrote {file}" for file in files), file=sys.stderr)
        if problem is not None:
            print(f"afd plan: {problem}", file=sys.stderr)
        return 0 if found else USAGE_ERROR

    def _choose_pairs(self) -> None:
        """Of many pairs of cards the most promising ones are searched; where none promises anything, what cannot be said of all."""
        if len(self._limits.pairs) > MAX_PAIRS:
            pairs = best_pairs(self._workload, self._limits, self._given.objective, MAX_PAIRS)
            pairs = pairs or [(name, name) for name in self._cards]
            self._limits = dataclasses.replace(self._limits, pairs=pairs)

    def _command(self, best: Prediction) -> str:
        given = self._given
        model = given.model if not self._path.is_file() else str(self._path.parent)
        if given.model in paper.BUNDLED:
            model = "MODEL"
        return serve_command(
            model, best.layout, context=given.context, dtype=given.dtype, tpot_sla_ms=given.tpot_sla_ms
        )

    def _remarks(self, best: Prediction) -> list[str]:
        given, longest = self._given, self._model.max_context
        found = [] if given.model in paper.BUNDLED else remarks_on_model(self._path)
        if longest and given.context > longest:
            found.append(f"the model has {longest} positions, fewer than --context {given.context}")
        return found + remarks_on_layout(best.layout, given.dtype)

    def _print_text(self, found: Sequence[Prediction]) -> None:
        given = self._given
        print("\n".join(report.count_lines(self._model, self._counts)))
        if given.explain:
            print("\n".join(report.explain_lines(self._model, given.context, self._cards)))
        print()
        print("\n".join(report.cost_lines(self._model, self._costs, self._cards, self._limits.tpot_s)))
        if not found:
            return
        attention, ffn = (list(dict.fromkeys(names)) for names in zip(*self._limits.pairs, strict=True))
        source = (
            f"times measured on {self._workload.profile.machine}" if self._workload.profile else "rooflines"
        )
        print(f"\nlayouts of up to {given.max_gpus} cards within {given.tpot_sla_ms:g} ms a token, by {given.objective}; {given.dtype} "
              f"weights and caches, {source};\nattention on {', '.join(attention)}, FFN on {', '.join(ffn)}; requests are "
              "those of each attention worker:")  # fmt: skip
        print("\n".join(report.layout_lines(found)))
        print(f"\nthe first is started by\n  {self._command(found[0])}")
        for remark in self._remarks(found[0]):
            print(f"  # {remark}")

    def _print_json(self, found: Sequence[Prediction], problem: ConfigError | None) -> None:
        content = report.json_report(self._model, self._counts, self._costs, self._cards, self._limits.tpot_s)
        content["layouts"] = [report.json_layout(prediction) for prediction in found]
        if found:
            content["command"] = self._command(found[0])
        if problem is not None:
            content["infeasible"] = str(problem)
        print(json.dumps(content, indent=2))
