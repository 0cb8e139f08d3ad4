"""`afd bench serve|sla|pareto`: one run, the highest load that holds a promise, a sweep over loads with its plot.

What lives here: the three commands, from flags to what is printed; the last line of standard output is JSON. Exit code 0,
1 where the server cannot be measured or no load holds, 2 for a mistake of the caller. Called by cli.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from afd_server.bench import flags, generator, pareto, plot, report, sla, statistics
from afd_server.bench.dataset import TRACES
from afd_server.bench.probe import Prober
from afd_server.bench.session import Session, failure, opened, run_to_end
from afd_server.command_line import Parser, positive, whole
from afd_server.errors import ConfigError

KINDS = "serve: one run; sla: the highest load that holds a promise; pareto: a sweep over loads, with a plot"


def bench(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="afd bench", description="Put load on an OpenAI-compatible server and measure its answers."
    )
    parser.add_argument("kind", choices=sorted(COMMANDS), help=KINDS)
    chosen = parser.parse_args(list(argv[:1]))
    return COMMANDS[chosen.kind](list(argv[1:]))


def _parser(kind: str, description: str) -> Parser:
    parser = Parser(prog=f"afd bench {kind}", description=description, called_here=flags.CALLED_HERE)
    flags.add_target_flags(parser)
    flags.add_dataset_flags(parser)
    flags.add_run_flags(parser)
    return parser


# --- serve ---------------------------------------------------------------------------------------------------------


def serve(argv: Sequence[str]) -> int:
    parser = _parser("serve", "Send requests to a server and report what its clients see. Options are named as those of\n"
                     "`vllm bench serve`. The last line is JSON.")  # fmt: skip
    load = parser.add_argument_group("the load")
    load.add_argument("--num-prompts", type=whole, default=1000, metavar="N", help="default: %(default)s")
    load.add_argument("--request-rate", type=flags.rate, default=math.inf, metavar="R",
                      help="requests a second; inf sends all at once. Default: %(default)s")  # fmt: skip
    load.add_argument("--burstiness", type=flags.rate, default=1.0, metavar="B",
                      help="of the times: 1 is a Poisson process, less comes in bursts, more evenly. Default: %(default)g")  # fmt: skip
    load.add_argument("--max-concurrency", type=whole, metavar="N", help="requests under way at a time")
    load.add_argument("--self-timed", action=argparse.BooleanOptionalAction, default=None,
                      help="send a trace's requests at its times, stretched to --request-rate if that is given. "
                      f"Default: on for {' and '.join(TRACES)}")  # fmt: skip
    numbers = parser.add_argument_group("what is reported")
    numbers.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS",
                         help=f"promises to a request, as in tpot:50 ttft:2000; of {', '.join(statistics.PROMISED)}")  # fmt: skip
    numbers.add_argument("--percentile-metrics", default=",".join(statistics.METRICS), metavar="METRICS",
                         help="default: %(default)s")  # fmt: skip
    numbers.add_argument(
        "--metric-percentiles", default="50,90,99", metavar="PERCENTILES", help="default: %(default)s"
    )
    numbers.add_argument(
        "--save-detailed", action="store_true", help="put every request's numbers into the file, too"
    )
    given = parser.parse_args(list(argv))
    metrics = flags.metrics_of(given.percentile_metrics)
    percentiles = flags.percentiles_of(given.metric_percentiles)
    promises_ms = flags.promises_of(given.goodput)
    target, settings = flags.target_of(given), flags.dataset_of(given)
    is_self_timed = settings.dataset_name in TRACES if given.self_timed is None else given.self_timed
    if is_self_timed and settings.dataset_name not in TRACES:
        raise ConfigError("--self-timed", f"--dataset-name {settings.dataset_name} has no times")

    async def measured() -> tuple[Session, generator.Run]:
        async with opened(target, settings, given.tokenizer) as session:
            prompts = session.prompts(given.num_prompts, given.seed)
            if is_self_timed:
                timed = generator.replayed([(prompt.at_s, prompt) for prompt in prompts], given.request_rate)
            else:
                timed = generator.schedule(prompts, given.request_rate, given.burstiness, given.seed)
            await session.warm_up(given.num_warmups, given.max_concurrency)
            with report.progress(len(timed), "requests", not given.disable_tqdm) as on_outcome:
                limits = generator.Limits(given.max_concurrency)
                return session, await generator.run(session.client, timed, limits, on_outcome)

    session, run = run_to_end(measured)
    summary = statistics.summary(run, metrics, percentiles, promises_ms)
    print(*report.lines(summary, metrics, percentiles), sep="\n")
    if not summary["completed"]:
        raise failure(session.client.target, run.outcomes[0])
    rate = "inf" if math.isinf(given.request_rate) else given.request_rate
    result = {
        **_head(given, session), "num_prompts": len(run.outcomes), "request_rate": rate,
        "burstiness": given.burstiness, "max_concurrency": given.max_concurrency, "self_timed": is_self_timed, **summary,
    }  # fmt: skip
    kept = {**result, **(statistics.detailed(run) if given.save_detailed else {})}
    concurrency = f"-concurrency{given.max_concurrency}" if given.max_concurrency else ""
    _finish(given, result, kept, f"{result['label']}-{rate}qps{concurrency}-{Path(result['model_id']).name}")
    return 0


def _head(given: argparse.Namespace, session: Session) -> dict[str, Any]:
    target, settings = session.client.target, session.settings
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"), "backend": given.backend, "label": given.label or given.backend,
        "base_url": target.url, "endpoint": target.endpoint, "model_id": target.model, "tokenizer_id": given.tokenizer,
        "dataset_name": settings.dataset_name, "seed": given.seed, **flags.pairs("--metadata", given.metadata),
    }  # fmt: skip


def _finish(given: argparse.Namespace, result: Mapping[str, Any], kept: Mapping[str, Any], name: str) -> None:
    """The result as a file, where asked for, and as the last line in any case: measuring took its time."""
    try:
        if given.save_result or given.result_filename:
            file = Path(given.result_filename or f"{name}-{result['date']}.json")
            if given.result_dir is not None:
                file = given.result_dir / file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(kept) + "\n", encoding="utf-8")
            print(f"saved as {file}")
    except OSError as error:
        raise ConfigError("--result-filename", f"cannot write {file}: {error.strerror}") from error
    finally:
        print(json.dumps(result), flush=True)


# --- sla -----------------------------------------------------------------------------------------------------------


def sla_search(argv: Sequence[str]) -> int:
    parser = _parser("sla", "Search the highest load under which a server keeps its promises: double it until they are broken,\n"
                     "then halve the distance, then try the best one again. The last line is JSON.")  # fmt: skip
    search = parser.add_argument_group("the search")
    search.add_argument(
        "--tpot-sla-ms", type=positive, required=True, metavar="MS", help="promised time per token"
    )
    search.add_argument("--ttft-sla-ms", type=positive, metavar="MS", help="promised time to the first token")
    search.add_argument("--sla-percentile", type=flags.percentile, default=99.0, metavar="P",
                        help="share of the requests that have to be within each promise. Default: %(default)g")  # fmt: skip
    search.add_argument("--workload-var", choices=sla.VARIABLES, default="max_concurrency",
                        help="the load: clients that always ask again, or requests a second, which needs --ttft-sla-ms. "
                        "Default: %(default)s")  # fmt: skip
    search.add_argument("--max-load", type=positive, default=4096, metavar="N", help="default: %(default)g")
    search.add_argument("--tolerance", type=positive, default=0.05, metavar="SHARE",
                        help="of the load, at which the search ends. Default: %(default)g")  # fmt: skip
    _add_probe_flag(search)
    given = parser.parse_args(list(argv))
    promises = sla.Promises(given.tpot_sla_ms, given.ttft_sla_ms, given.sla_percentile)
    if given.workload_var == "request_rate" and given.ttft_sla_ms is None:
        raise ConfigError(
            "--ttft-sla-ms",
            "--workload-var request_rate needs it",
            "a queue may grow without end and no token be late",
        )
    target, settings = flags.target_of(given), flags.dataset_of(given)

    async def searched() -> tuple[Session, sla.Search]:
        async with opened(target, settings, given.tokenizer) as session:
            await session.warm_up(given.num_warmups)
            prober = Prober(
                session, given.probe_seconds, given.seed, _told(given), promises.patience_s(settings)
            )
            search = sla.Search(prober, promises, given.workload_var, given.max_load, given.tolerance)
            await search.run()
            return session, search

    print(sla.HEADS, flush=True)
    session, found = run_to_end(searched)
    print(found.verdict())
    result = {**_head(given, session), **found.result()}
    _finish(given, result, result, f"{result['label']}-sla-{Path(result['model_id']).name}")
    return 0 if found.best is not None else 1


def _add_probe_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--probe-seconds", type=positive, default=20.0, metavar="SECONDS",
                       help="for which requests are sent under each load. Default: %(default)g")  # fmt: skip


def _told(given: argparse.Namespace) -> Callable[[str], Any]:
    """How the progress of one load is shown."""

    def shown(about: str) -> Any:
        return report.progress(None, about, not given.disable_tqdm)

    return shown


# --- pareto --------------------------------------------------------------------------------------------------------


def pareto_sweep(argv: Sequence[str]) -> int:
    parser = _parser("pareto", "Measure servers under growing loads: tokens a second against the time per token, of each and\n"
                     "of earlier results. The last line is JSON.")  # fmt: skip
    sweep = parser.add_argument_group("the sweep")
    sweep.add_argument(
        "--server", nargs="+", default=[], metavar="NAME=URL", help="default: the one of --base-url"
    )
    sweep.add_argument("--max-concurrency", nargs="+", type=whole, default=[1, 2, 4, 8, 16, 32], metavar="N",
                       help="the loads: clients that always ask again. Default: 1 2 4 8 16 32")  # fmt: skip
    sweep.add_argument("--with", dest="earlier", nargs="+", type=Path, default=[], metavar="FILE",
                       help="saved results, for the same plot: of layouts that do not fit the machine together")  # fmt: skip
    sweep.add_argument("--plot", type=Path, metavar="FILE", help="write FILE.png and FILE.svg")
    sweep.add_argument("--tpot-sla-ms", type=positive, metavar="MS", help="a promise, drawn as a line")
    _add_probe_flag(sweep)
    given = parser.parse_args(list(argv))
    settings = flags.dataset_of(given)
    named = flags.pairs("--server", given.server) or {given.label or given.backend: flags.target_of(given).url}
    points = [point for file in given.earlier for point in pareto.read(file)]
    pareto.check_names([*named, *{point.server for point in points}])
    if given.plot is not None:
        plot.check(given.plot)

    async def swept() -> Session:
        targets = {name: flags.target_of(given, url) for name, url in named.items()}
        async with pareto.all_opened(targets, settings, given.tokenizer) as sessions:
            for session in sessions.values():
                await session.warm_up(given.num_warmups)
            for load in given.max_concurrency:
                for name, session in sessions.items():  # in turns: a change of the machine meets all
                    prober = Prober(session, given.probe_seconds, given.seed, _told(given))
                    points.append(pareto.Point.of(name, await prober.closed(load)))
                    print(points[-1].line(), flush=True)
            return next(iter(sessions.values()))

    print(pareto.HEADS, flush=True)
    session = run_to_end(swept)
    if given.plot is not None:
        for file in plot.draw(points, given.plot, given.tpot_sla_ms):
            print(f"plotted as {file}", file=sys.stderr)
    result = {**_head(given, session), "servers": named, "points": pareto.result(points)}
    _finish(given, result, result, f"{result['label']}-pareto-{Path(result['model_id']).name}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "sla": sla_search,
    "pareto": pareto_sweep,
}
