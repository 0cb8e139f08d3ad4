"""Questions that take many runs: how throughput moves with the ratio, when not to divide a model, what a lost FFN worker and what
lockstep cost.

What lives here: which runs, and the table of what they came to. What does not: the runs, and the pictures (study_plots.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from afd_server.config import ServeConfig
from afd_server.planner.layout import Layout, ffn_fits, most_requests
from afd_server.planner.times import LayerTimes
from afd_server.simulator.demand import Demand, Lengths
from afd_server.simulator.deployment import Deployment
from afd_server.simulator.results import Result
from afd_server.simulator.scenario import Detail, Failures, Kill, Scenario
from afd_server.simulator.simulation import simulate
from afd_server.simulator.steady import Load, divided_step_s, merged_step_s, undivided_step_s

Progress = Callable[[float], None] | None

StepSeconds = Callable[[LayerTimes, int, Load], float]

CONTEXT = 8192
TPOT_S = 0.05
MICRO_BATCHES = (1, 2, 3)
SHARDS = (8, 12, 16, 24, 32, 48)
ATTENTION_WORKERS = (2, 4, 6, 8, 12, 16, 24, 32)

# Undivided: cards in all, FFN workers of them, what each card serves, and its NIC.
CARDS = 32
FFN_WORKERS = (8, 16, 24)
REQUESTS = (2, 8, 32, 64, 128)
NETWORKS_GBPS = (25, 50, 100, 200, 400)

# Lost workers and lockstep: attention workers, clients of each, seconds.
WORKERS, CLIENTS = 8, 24
LOST_AT_S, RESTART_S, LOSS_S = 20.0, 15.0, 50.0
PROMPTS = (32, 128, 512, 2048)
SLOWNESS = (1.5, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Study:
    """name: as in --study. model: whose. about: what is the same in all rows. rows: of equal keys."""

    name: str
    model: str
    about: str
    rows: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        return {"study": self.name, "model": self.model, "about": self.about, "rows": self.rows}

    def lines(self) -> list[str]:
        shown = [key for key, value in self.rows[0].items() if not isinstance(value, list)]
        cells = [[_cell(row[key]) for key in shown] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(shown, *cells, strict=True)]
        table = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in [shown, *cells]
        ]
        return [f"{self.model}: {self.about}", *table]


def _cell(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}" if isinstance(value, float) else str(value)  # fmt: skip


def smallest_shards(deployment: Deployment) -> int:
    """The fewest FFN workers, of 8 or more, that hold the model."""
    for shards in SHARDS:
        if ffn_fits(deployment.workload, _layout(deployment, 1, shards)):
            return shards
    return SHARDS[-1]


def _layout(deployment: Deployment, attention_workers: int, ffn_workers: int) -> Layout:
    experts = max(layer.num_experts for layer in deployment.workload.model.ffn) or 1
    expert_shards = next(count for count in range(min(ffn_workers, experts), 0, -1) if ffn_workers % count == 0)
    tensor_shards = ffn_workers // expert_shards
    return Layout(deployment.attention_card, deployment.ffn_card, attention_workers, expert_shards, tensor_shards, 1, 1,
                  deployment.wire_dtype)  # fmt: skip


# --- how throughput per GPU moves with the ratio --------------------------------------------------------------------


def ratio(deployment: Deployment, seed: int, progress: Progress) -> Study:
    """More and more attention workers on one FFN side; each with as many requests as keep the time per token."""
    shards = smallest_shards(deployment)
    most = most_requests(deployment.workload, deployment.attention_card)
    rows = []
    for number, workers in enumerate(ATTENTION_WORKERS):
        row: dict[str, Any] = {"attention_workers": workers, "ffn_workers": shards, "ratio": workers / shards}
        times = deployment.workload.times(_layout(deployment, workers, shards))
        for name, step_s in (("", divided_step_s), ("_merged", merged_step_s)):
            best = max(_most(times, workers, m, step_s, most) for m in MICRO_BATCHES)
            tokens_per_s, requests, micro_batches = best
            row |= {f"tokens_per_s_per_gpu{name}": tokens_per_s / (workers + shards), f"requests{name}": requests,
                    f"micro_batches{name}": micro_batches}  # fmt: skip
        rows.append(row)
        if progress:
            progress((number + 1) / len(ATTENTION_WORKERS))
    about = f"{shards} FFN workers, context {CONTEXT}, at most {TPOT_S * 1e3:g} ms a token"
    return Study("ratio", deployment.workload.model.name, about, rows)


def _most(
    times: LayerTimes, workers: int, micro_batches: int, step_s: StepSeconds, most: int
) -> tuple[float, int, int]:
    """(tokens/s, requests of a worker, micro-batches) with as many requests, within 5 %, as keep the time per token."""

    def keeps(count: int) -> bool:
        return step_s(times, workers, Load(count * micro_batches, CONTEXT, micro_batches)) <= TPOT_S

    low, high = 0, most // micro_batches + 1
    while high - low > max(1, low // 20):
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    if not low:
        return 0.0, 0, micro_batches
    requests = low * micro_batches
    return (
        workers * requests / step_s(times, workers, Load(requests, CONTEXT, micro_batches)),
        requests,
        micro_batches,
    )


# --- when dividing loses --------------------------------------------------------------------------------------------


def undivided(deployment: Deployment, seed: int, progress: Progress) -> Study:
    """The same cards and requests, divided as well as possible and not divided."""
    rows = []
    for index, gbps in enumerate(NETWORKS_GBPS):
        there = _with_network(deployment, gbps)
        for requests in REQUESTS:
            whole = there.undivided()
            whole_times = whole.workload.times(_layout(whole, CARDS, CARDS))
            whole_s = min(
                undivided_step_s(whole_times, CARDS, Load(requests, CONTEXT, m)) for m in MICRO_BATCHES[:2]
            )
            divided_s, merged_s = (
                _best_split_s(there, requests, step_s) for step_s in (divided_step_s, merged_step_s)
            )
            rows.append({"network_gbps": gbps, "requests_per_gpu": requests, "undivided_ms": whole_s * 1e3, "divided_ms": divided_s * 1e3,
                         "merged_ms": merged_s * 1e3, "divided_speed": whole_s / divided_s, "merged_speed": whole_s / merged_s})  # fmt: skip
        if progress:
            progress((index + 1) / len(NETWORKS_GBPS))
    about = f"a step of {CARDS} GPUs, divided and not, context {CONTEXT}; a speed above 1: dividing pays"
    return Study("undivided", deployment.workload.model.name, about, rows)


def _best_split_s(deployment: Deployment, requests: int, step_s: StepSeconds) -> float:
    """A step with so many requests a GPU, on the best division of the GPUs and with the best number of micro-batches."""
    found = []
    for layout in _splits(deployment):
        times, workers = deployment.workload.times(layout), layout.attention_workers
        found += [step_s(times, workers, Load(requests * CARDS / workers, CONTEXT, m)) for m in MICRO_BATCHES]
    return min(found)


def _splits(deployment: Deployment) -> list[Layout]:
    layouts = [_layout(deployment, CARDS - ffn_workers, ffn_workers) for ffn_workers in FFN_WORKERS]
    return [layout for layout in layouts if ffn_fits(deployment.workload, layout)] or layouts[-1:]


def _with_network(deployment: Deployment, gbps: float) -> Deployment:
    cards = {
        name: dataclasses.replace(card, network_gbps=gbps) for name, card in deployment.workload.cards.items()
    }
    return dataclasses.replace(deployment, workload=dataclasses.replace(deployment.workload, cards=cards))


# --- what a lost FFN worker costs -----------------------------------------------------------------------------------


def ffn_loss(deployment: Deployment, seed: int, progress: Progress) -> Study:
    """One of the FFN workers dies and is restarted, with 0, 1 and 2 replicas of the FFN side beside."""
    rows = []
    for extra in (0, 1, 2):
        kill = Failures(kills=(Kill(LOST_AT_S, "ffn-0"),), ffn_restart_s=RESTART_S)
        scenario = _usual(deployment, seed, ffn_replicas=1 + extra)
        undisturbed = simulate(dataclasses.replace(scenario, duration_s=LOSS_S))
        result = simulate(dataclasses.replace(scenario, duration_s=LOSS_S, failures=kill))
        before, during = (
            _tokens_per_s(result, *span) for span in ((5.0, LOST_AT_S), (LOST_AT_S, LOST_AT_S + RESTART_S))
        )
        lost = undisturbed.output_tokens - result.output_tokens
        bins = [
            result.tokens_per_bin.get(index, 0) / result.bin_s for index in range(round(LOSS_S / result.bin_s))
        ]
        rows.append({"extra_replicas": extra, "gpus": WORKERS + scenario.config.ffn_workers, "tokens_per_s_before": before,
                     "tokens_per_s_while_lost": during, "tokens_lost": float(lost), "seconds_lost": lost / before,
                     "usd_per_mtok": undisturbed.as_json()["usd_per_mtok"], "bin_s": result.bin_s, "tokens_per_s": bins})  # fmt: skip
        if progress:
            progress((extra + 1) / 3)
    about = f"{WORKERS} attention workers; ffn-0 dies at {LOST_AT_S:g} s and is back {RESTART_S:g} s later"
    return Study("ffn-loss", deployment.workload.model.name, about, rows)


def _tokens_per_s(result: Result, from_s: float, to_s: float) -> float:
    bins = range(round(from_s / result.bin_s), round(to_s / result.bin_s))
    return sum(result.tokens_per_bin.get(index, 0) for index in bins) / (to_s - from_s)


# --- lockstep against none ------------------------------------------------------------------------------------------


def lockstep(deployment: Deployment, seed: int, progress: Progress) -> Study:
    """The same requests on the same workers, in lockstep and not: with longer and longer prompts, and with a slower worker."""
    cases = [(prompt, 1.0) for prompt in PROMPTS] + [(PROMPTS[0], slowness) for slowness in SLOWNESS]
    rows = []
    for number, (prompt, slowness) in enumerate(cases):
        usual = _usual(deployment, seed)
        lengths = Lengths.parse("--input-len", f"lognormal:{prompt}:1")
        scenario = dataclasses.replace(
            usual,
            demand=dataclasses.replace(usual.demand, prompt=lengths),
            duration_s=20.0,
            warm_up_s=5.0,
            slowness={"attention-0": slowness},
        )
        free = simulate(scenario)
        locked = simulate(dataclasses.replace(scenario, detail=Detail.LOCKSTEP))
        rows.append(
            {"prompt_tokens": prompt, "slowest_worker": slowness} | _of(free, "") | _of(locked, "_lockstep")
        )
        if progress:
            progress((number + 1) / len(cases))
    about = (
        f"{WORKERS} attention workers of {CLIENTS} clients each, of which one is `slowest_worker` times as slow"
    )
    return Study("lockstep", deployment.workload.model.name, about, rows)


def _of(result: Result, suffix: str) -> dict[str, float | None]:
    """None where no request came so far."""
    found = result.as_json()
    p99_s = {key: (found[key] or {}).get("p99") for key in ("tpot_s", "ttft_s")}
    return {f"tokens_per_s{suffix}": result.tokens_per_s} | {
        f"{key.removesuffix('_s')}_p99_ms{suffix}": None if value is None else value * 1e3
        for key, value in p99_s.items()
    }


def _usual(deployment: Deployment, seed: int, ffn_replicas: int = 1) -> Scenario:
    """Busy, but with room: prompts and outputs of all lengths, clients that ask again and again."""
    layout = _layout(deployment, WORKERS, smallest_shards(deployment))
    config = ServeConfig(
        attention_workers=WORKERS,
        ffn_workers=layout.ffn_workers * ffn_replicas,
        ffn_replicas=ffn_replicas,
        ffn_parallel=f"{layout.expert_shards}x{layout.tensor_shards}",
        max_model_len=CONTEXT,
        micro_batches="2",
    )
    attention_usd, ffn_usd = deployment.usd_per_hour()
    return Scenario(
        config=config,
        times=deployment.times(config),
        demand=Demand(
            prompt=Lengths.parse("--input-len", "lognormal:1024:1"),
            output=Lengths.parse("--output-len", "lognormal:256:1"),
            num_clients=WORKERS * CLIENTS,
            seed=seed,
        ),
        duration_s=30.0,
        kv_tokens=deployment.kv_tokens(config),
        attention_usd_per_hour=attention_usd,
        ffn_usd_per_hour=ffn_usd,
        detail=Detail.STEPS,
        seed=seed,
    )


STUDIES = {"ratio": ratio, "undivided": undivided, "ffn-loss": ffn_loss, "lockstep": lockstep}
