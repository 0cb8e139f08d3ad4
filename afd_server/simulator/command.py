"""`afd simulate`: from flags to a scenario, and from its result to what is printed and drawn.

What lives here: that order. What does not: flags (flags.py), the run (simulation.py), many runs for one question (studies.py),
pictures (plots.py).
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from afd_server.config import ServeConfig
from afd_server.errors import ConfigError
from afd_server.planner.inputs import read_cards, read_model, read_workload
from afd_server.planner.model_config import CountedModel
from afd_server.simulator.demand import Demand, Lengths
from afd_server.simulator.deployment import DEFAULT_CONTEXT, Deployment
from afd_server.simulator.flags import SERVE_SETTINGS, check_workers, parser
from afd_server.simulator.results import Result
from afd_server.simulator.scenario import Detail, Failures, Scenario
from afd_server.simulator.simulation import simulate as run
from afd_server.simulator.spans import Spans
from afd_server.traffic import read_trace

# Where neither the flags nor the model bound it: prompt and output.
LONGEST_TOKENS = 16384
# The picture of the lanes is taken here, as a share of the run, and for about so many layers: a whole step is a blur.
PICTURE_AT, PICTURE_LAYERS = 0.7, 8


def simulate(argv: Sequence[str]) -> int:
    given = parser().parse_args(list(argv))
    with _simulated_deaths_are_no_errors():
        return _simulate(given)


@contextmanager
def _simulated_deaths_are_no_errors() -> Iterator[None]:
    """Nothing of them is logged."""
    logger = logging.getLogger("afd_server")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _simulate(given: Any) -> int:
    if given.plot:
        from afd_server.planner.plots import require_matplotlib

        require_matplotlib()
    _, model = read_model(given.model)
    deployment = _deployment(given, model)
    if given.study:
        return _study(given, deployment)
    scenario = _scenario(given, deployment, model)
    spans = _spans(scenario) if given.plot else None
    with _progress(quiet=given.json) as progress:
        result = run(scenario, progress, spans)
    if given.plot:
        from afd_server.simulator.plots import draw_run

        _say_files(draw_run(given.plot, result, spans))
    print(json.dumps(result.as_json(), indent=2) if given.json else "\n".join(lines(result)))
    return 0


def _study(given: Any, deployment: Deployment) -> int:
    from afd_server.simulator.studies import STUDIES

    with _progress(quiet=given.json) as progress:
        study = STUDIES[given.study](deployment, given.seed, progress)
    if given.plot:
        from afd_server.simulator.study_plots import draw_study

        _say_files(draw_study(given.plot, study))
    print(json.dumps(study.as_json(), indent=2) if given.json else "\n".join(study.lines()))
    return 0


def _say_files(files: Sequence[Path]) -> None:
    print("\n".join(f"wrote {file}" for file in files), file=sys.stderr)


def _deployment(given: Any, model: CountedModel) -> Deployment:
    attention, ffn = given.attention_card, given.ffn_card
    cards = read_cards(given, [attention, ffn])
    names = list(cards)
    workload = read_workload(given, model, DEFAULT_CONTEXT, cards)
    deployment = Deployment(workload, names[0], names[-1], given.wire_dtype)
    return deployment.undivided() if given.detail == Detail.UNDIVIDED else deployment


def _scenario(given: Any, deployment: Deployment, model: CountedModel) -> Scenario:
    settings = {name: value for name, value in vars(given).items() if name in SERVE_SETTINGS}
    longest = model.max_context or LONGEST_TOKENS
    settings.setdefault("max_model_len", min(longest, LONGEST_TOKENS))
    config = ServeConfig(**settings, micro_batches=given.micro_batches)
    if settings["max_model_len"] > longest:
        raise ConfigError("--max-model-len", f"{settings['max_model_len']} is beyond the model's {longest} positions", "lower it")  # fmt: skip
    experts = max(layer.num_experts for layer in model.ffn)
    ep, _ = config.ffn_shards
    if ep > max(experts, 1):
        raise ConfigError("--ffn-workers", f"{ep} expert shards for {experts} experts", "use --ffn-parallel tp or more --ffn-replicas")  # fmt: skip
    slowness = dict(given.slow)
    check_workers(list(slowness), config, "--slow")
    check_workers([each.name for each in given.kill], config, "--kill")
    if given.detail in (Detail.LOCKSTEP, Detail.UNDIVIDED) and (given.mtbf_hours or given.kill or given.resize):
        raise ConfigError("--detail", f"{given.detail} knows no failures and no resizing", "use hops or steps")
    warm_up_s = given.duration / 5 if given.warm_up is None else given.warm_up
    if warm_up_s >= given.duration:
        raise ConfigError(
            "--warm-up", f"{warm_up_s:g} s leave nothing of --duration {given.duration:g}", "take less"
        )
    times = deployment.times(config)
    least_ms = times.step_s(1, 1) * 1e3
    if config.tpot_sla_ms is not None and config.tpot_sla_ms < least_ms:
        raise ConfigError("--tpot-sla-ms", f"{config.tpot_sla_ms:g} ms cannot be kept: a request alone takes {least_ms:.1f} ms a token",
                          f"{math.ceil(least_ms)} is the least")  # fmt: skip
    attention_usd, ffn_usd = deployment.usd_per_hour()
    return Scenario(
        config=config,
        times=times,
        demand=_demand(given),
        duration_s=given.duration,
        kv_tokens=deployment.kv_tokens(config),
        ffn_gpus=0 if deployment.together else 1,
        attention_usd_per_hour=attention_usd,
        ffn_usd_per_hour=ffn_usd,
        slowness=slowness,
        failures=Failures(
            mtbf_s=given.mtbf_hours and given.mtbf_hours * 3600,
            attention_restart_s=given.attention_restart,
            ffn_restart_s=given.ffn_restart,
            kills=tuple(given.kill),
        ),
        resizes=tuple(given.resize),
        front_end_s=given.front_end_ms / 1e3,
        detail=Detail(given.detail),
        warm_up_s=warm_up_s,
        seed=given.seed,
    )


def _demand(given: Any) -> Demand:
    kinds = {
        "--request-rate": given.request_rate,
        "--max-concurrency": given.max_concurrency,
        "--trace": given.trace,
    }
    chosen = [flag for flag, value in kinds.items() if value is not None]
    if not chosen:
        raise ConfigError("--request-rate", "nothing says when requests come", f"give one of {', '.join(kinds)}")  # fmt: skip
    if len(chosen) > 1:
        raise ConfigError(chosen[1], f"{chosen[0]} says already when requests come", "give one of them")
    return Demand(
        prompt=Lengths.parse("--input-len", given.input_len),
        output=Lengths.parse("--output-len", given.output_len),
        rate=given.request_rate,
        burstiness=given.burstiness,
        num_clients=given.max_concurrency,
        trace=read_trace(given.trace) if given.trace else (),
        speed=given.trace_speed,
        seed=given.seed,
    )


def _spans(scenario: Scenario) -> Spans:
    """Of a few layers, late in the run."""
    rows = max(1, scenario.config.max_num_seqs // 2)
    from_s = PICTURE_AT * scenario.duration_s
    layer_s = scenario.times.step_s(rows, 1024.0 * rows) / scenario.times.num_layers
    return Spans(from_s, from_s + PICTURE_LAYERS * layer_s)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[float], None] | None]:
    """A bar on the terminal's error output."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("simulating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def lines(result: Result) -> list[str]:
    """For people."""
    found = result.as_json()
    scenario, requests = result.scenario, found["requests"]
    config = scenario.config
    workers = f"{config.attention_workers} attention and {config.ffn_workers} FFN workers"
    if config.ffn_replicas > 1:
        workers += f" ({config.ffn_replicas} replicas of {scenario.num_shards})"
    shown = [
        f"{workers}, {found['simulated_s']:g} s of traffic after {scenario.warm_up_s:g} s of warm-up, detail: {found['detail']}",
        "requests        " + ", ".join(f"{count} {what}" for what, count in requests.items() if count),
        f"throughput      {found['output_tokens_per_s']:,.0f} tokens/s, {found['output_tokens_per_s_per_gpu']:,.0f} per GPU",
        f"goodput         {found['goodput_requests_per_s']:,.2f} requests/s, {found['goodput_share']:.1%} of those that ended",
    ]
    for name, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
        times = found[name]
        if times is not None:
            values = ", ".join(f"{what} {seconds * 1e3:,.1f}" for what, seconds in times.items())
            shown.append(f"{label:<16}{values} ms")
    use = found["utilisation"]
    shown += [
        f"utilisation     attention {use['attention']:.1%}, FFN {use['ffn']:.1%}; bubbles {found['bubble_share']:.1%} of a step",
        f"cost            {found['usd']:,.2f} USD for {found['gpu_hours']:,.2f} GPU hours, {found['usd_per_mtok']:,.3f} USD per million tokens",
    ]
    if found["failures"]:
        shown.append(f"failures        {found['failures']}")
    shown.append(f"simulation      {found['steps']:,} steps and {found['events']:,} events in {found['wall_s']:,.1f} s, "
                 f"{found['wall_us_per_step']:,.0f} us a step")  # fmt: skip
    return shown
