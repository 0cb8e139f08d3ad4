"""One run: router, admission and replicas of a scenario in simulated time, from the first request to the result.

What lives here: the wiring and the course of a run. What does not: any of the parts, and what becomes of the result
(command.py, plots.py).
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from afd_server.router.admission import Admission
from afd_server.router.router import Router
from afd_server.simulator.clients import Clients
from afd_server.simulator.fleet import Fleet
from afd_server.simulator.hop_by_hop import HopByHop
from afd_server.simulator.lockstep import Lockstep
from afd_server.simulator.results import Result, totals_of
from afd_server.simulator.scenario import Detail, Scenario
from afd_server.simulator.spans import Spans
from afd_server.simulator.virtual_time import VirtualLoop, run_virtual
from afd_server.simulator.whole_steps import WholeSteps
from afd_server.simulator.work import Execution
from afd_server.telemetry.metrics import Metrics

# Up to so many hops are executed one by one where the scenario leaves it open: about half a minute.
FEW_HOPS = 3e6
# A bin of the throughput over time, and between two notes of progress: shares of the duration.
BIN, PROGRESS = 1 / 200, 1 / 100

Progress = Callable[[float], None]


def simulate(scenario: Scenario, progress: Progress | None = None, spans: Spans | None = None) -> Result:
    """Runs a scenario. progress: called with the share of its time that has passed. spans: hops are noted there."""
    collects = gc.isenabled()
    gc.disable()  # millions of objects live long, none of the many that die at once is in a cycle
    began_s = time.perf_counter()
    try:
        result = run_virtual(_run(scenario, progress, spans))
    finally:
        if collects:
            gc.enable()
    result.wall_s = time.perf_counter() - began_s
    return result


def detail_of(scenario: Scenario) -> Detail:
    """What `auto` means for this scenario: hop by hop where that takes no more than half a minute or so."""
    if scenario.detail is not Detail.AUTO:
        return scenario.detail
    config, times = scenario.config, scenario.times
    micro_batches = 1 if config.micro_batches == "auto" else int(config.micro_batches)
    step_s = max(times.step_s(config.max_num_seqs // 2, 0.0), 1e-6)
    num_hops = config.attention_workers * scenario.duration_s / step_s * times.num_layers * micro_batches
    return Detail.HOPS if num_hops * scenario.num_shards <= FEW_HOPS else Detail.STEPS


async def _run(scenario: Scenario, progress: Progress | None, spans: Spans | None) -> Result:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    config = scenario.config
    detail = detail_of(scenario)
    execution = _execution(scenario, detail, loop, spans)
    fleet = Fleet(scenario, execution)
    bin_s = scenario.duration_s * BIN
    async with Router(fleet.clients(), admission=_admission(scenario, loop), clock=loop.time) as router:
        assert config.max_model_len is not None
        clients = Clients(router, config.max_model_len, bin_s, scenario.front_end_s)
        fleet.router, fleet.on_update = router, clients.note_update
        background = [asyncio.create_task(each) for each in _disturbances(scenario, fleet)]
        if progress is not None:
            background.append(asyncio.create_task(_report(scenario.duration_s, progress)))
        coming = asyncio.create_task(clients.come(scenario.demand, scenario.duration_s))
        await asyncio.sleep(scenario.warm_up_s)
        before = totals_of(fleet, execution)
        if scenario.drain:
            await coming
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(coming, scenario.duration_s - loop.time())
        after = totals_of(fleet, execution)
        for task in background:
            task.cancel()
        outcomes = [each for each in clients.outcomes if each.came_s >= scenario.warm_up_s]
        return Result(scenario, detail, loop.time() - scenario.warm_up_s, before, after, outcomes,
                      clients.tokens_per_bin, bin_s, loop.events.num_run)  # fmt: skip


def _execution(scenario: Scenario, detail: Detail, loop: VirtualLoop, spans: Spans | None) -> Execution:
    events, times, shards = loop.events, scenario.times, scenario.num_shards
    replicas, timeout_s = scenario.config.ffn_replicas, scenario.config.ffn_timeout
    slowness = {
        int(name.rpartition("-")[2]): factor
        for name, factor in scenario.slowness.items()
        if name.startswith("ffn")
    }
    if detail is Detail.HOPS:
        return HopByHop(events, times, shards, replicas, slowness, timeout_s, spans)
    if detail is Detail.STEPS:
        return WholeSteps(events, times, shards, replicas, slowness, timeout_s)
    return Lockstep(events, times, shards, replicas, detail is Detail.UNDIVIDED, slowness)


def _admission(scenario: Scenario, loop: VirtualLoop) -> Admission | None:
    config = scenario.config
    if config.tpot_sla_ms is None:
        return None
    ttft_s = config.ttft_sla_ms and config.ttft_sla_ms / 1e3
    return Admission(
        config.tpot_sla_ms / 1e3, ttft_s, config.max_queue_len, Metrics("simulated"), clock=loop.time
    )


def _disturbances(scenario: Scenario, fleet: Fleet) -> list[Coroutine[Any, Any, None]]:
    failures = scenario.failures
    happening = [fleet.kill_at(kill) for kill in failures.kills]
    happening += [fleet.resize_at(resize) for resize in scenario.resizes]
    if failures.mtbf_s is not None:
        happening += [fleet.fail_at_random(role) for role in ("attention", "ffn")]
    return happening


async def _report(duration_s: float, progress: Progress) -> None:
    time_s = asyncio.get_running_loop().time
    while True:
        progress(min(1.0, time_s() / duration_s))
        await asyncio.sleep(PROGRESS * duration_s)
