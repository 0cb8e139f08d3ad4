"""A simulated run against a live one: the same requests at the same times, with the times of the steps that the live one measured.

The machine's speed is in both; what is compared is what the simulator makes of it: which requests share which steps.
"""

import asyncio
import random
import statistics

import pytest

from afd_server.config import ServeConfig
from afd_server.llm import LLM
from afd_server.planner.times import AttentionTimes, FFNTimes, LayerTimes, LinearTimes
from afd_server.router.router import Router
from afd_server.simulator.demand import Demand
from afd_server.simulator.scenario import Detail, Scenario
from afd_server.simulator.simulation import simulate
from afd_server.traffic import Arrival
from afd_server.types import GenerationRequest, SamplingParams
from tests.checkpoints import write_checkpoint, write_tokenizer

pytestmark = pytest.mark.integration

NUM_REQUESTS, LAYERS = 20, 8
# Steps of one request between two of them: where prompts come faster than they are read, what a request waits is the sum of all
# small differences before it.
PAUSE_STEPS = 24
RUNS = (3, 5, 7)
SETTINGS = {"max_model_len": 256, "max_num_seqs": 16, "max_num_batched_tokens": 32, "micro_batches": "1"}
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 256, "intermediate_size": 1024}


async def serve_live(llm, seed):
    """(what came when, timings of all steps, (time to first token, per token) of each request, seconds altogether).

    seed: of the prompts. Those of another run would be found in the prefix cache.
    """
    loop, generator = asyncio.get_running_loop(), random.Random(seed)
    timings, arrivals, outcomes = [], [], []

    async def one(router, number, prompt_tokens, output_tokens):
        prompt = tuple(generator.randrange(1, 60) for _ in range(prompt_tokens))
        sampling = SamplingParams(output_tokens, temperature=0.0, ignore_eos=True)
        came_s = loop.time()
        arrivals.append(Arrival(came_s, prompt_tokens, output_tokens))
        times_s = []
        async for output in router.generate(GenerationRequest(str(number), prompt, sampling)):
            times_s += [loop.time()] * len(output.token_ids)
        outcomes.append((times_s[0] - came_s, (times_s[-1] - times_s[0]) / (output_tokens - 1)))

    async with Router(llm.workers.clients, on_stats=lambda _, stats: timings.append(stats.timing)) as router:
        await one(router, -1, 60, 60)  # first touch of everything
        pause_s = PAUSE_STEPS * outcomes[0][1]
        for found in (timings, arrivals, outcomes):
            found.clear()
        began_s = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for number in range(NUM_REQUESTS):
                tasks.create_task(one(router, number, generator.randint(60, 190), generator.randint(20, 60)))
                await asyncio.sleep(pause_s)
    seconds = loop.time() - began_s
    return arrivals, [timing for timing in timings if timing is not None], outcomes, seconds


def line(points):
    """(fixed, for each row): the least squares line, neither part below zero."""
    slope, fixed = statistics.linear_regression(*zip(*points, strict=True))
    if slope < 0:
        return statistics.fmean(point[1] for point in points), 0.0
    if fixed < 0:
        return 0.0, sum(x * y for x, y in points) / sum(x * x for x, _ in points)
    return fixed, slope


def times_of(timings):
    """A hop's and a step's times as lines over tokens."""
    attention, ffn, wire, overhead = (
        line([(timing.num_tokens, part(timing)) for timing in timings])
        for part in (
            lambda timing: timing.attention_s / LAYERS,
            lambda timing: timing.ffn_s / LAYERS,
            lambda timing: (timing.bubble_s - timing.ffn_s) / LAYERS,  # all that it waits beside the FFN
            lambda timing: timing.period_s - timing.attention_s - timing.bubble_s,
        )
    )
    return LayerTimes(
        LAYERS,
        AttentionTimes(fixed_s=attention[0], row_s=attention[1]),
        FFNTimes(fixed_s=ffn[0], row_s=ffn[1]),
        LinearTimes(wire[0] / 2, wire[1] / 2),
        LinearTimes(*overhead),
    )


def simulate_again(arrivals, timings):
    first_s = min(arrival.at_s for arrival in arrivals)
    trace = [Arrival(each.at_s - first_s, each.prompt_tokens, each.output_tokens) for each in arrivals]
    scenario = Scenario(
        config=ServeConfig(**SETTINGS),
        times=times_of(timings),
        demand=Demand(trace=trace),
        duration_s=trace[-1].at_s + 1e-6,
        kv_tokens=1 << 14,
        detail=Detail.HOPS,
        drain=True,
    )
    return simulate(scenario)


def compare(arrivals, timings, live, seconds):
    """Simulated over live of everything that a run comes to."""
    result = simulate_again(arrivals, timings)
    simulated = result.as_json()
    assert simulated["requests"]["answered"] == NUM_REQUESTS
    ttft_s, tpot_s = (statistics.median(each) for each in zip(*live, strict=True))
    return {
        "seconds": result.seconds / seconds,
        "steps": result.after.steps / len(timings),
        "TTFT": simulated["ttft_s"]["p50"] / ttft_s,
        "TPOT": simulated["tpot_s"]["p50"] / tpot_s,
    }


def test_a_simulated_server_is_as_fast_as_the_live_one_within_15_percent(tmp_path):
    """The medians over a few runs: whatever else the machine does delays single steps, which no model knows of."""
    write_checkpoint("llama", tmp_path, **SIZES)
    write_tokenizer(tmp_path)
    ratios = []
    with LLM(ServeConfig(model=str(tmp_path), executor="local", **SETTINGS)) as llm:
        for runs in RUNS:
            while len(ratios) < runs:
                ratios.append(compare(*asyncio.run(serve_live(llm, seed=len(ratios)))))
            medians = {name: statistics.median(each[name] for each in ratios) for name in ratios[0]}
            if all(abs(median - 1) <= 0.15 for median in medians.values()):
                return
    pytest.fail(f"simulated over live: {ratios}")
