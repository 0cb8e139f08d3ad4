"""Whole runs: what they add up to, that whole steps come to what hops do, and what failures and changes cost."""

from dataclasses import replace

import pytest

from afd_server.simulator.demand import Demand, Lengths
from afd_server.simulator.scenario import Detail, Failures, Kill, Resize
from afd_server.simulator.simulation import detail_of, simulate
from tests.unit.simulator.scenarios import STEP_S, TIMES, demand, scenario, times_with


def tokens_per_s(result, from_s, to_s):
    """Between two moments."""
    bins = range(round(from_s / result.bin_s), round(to_s / result.bin_s))
    return sum(result.tokens_per_bin.get(index, 0) for index in bins) / (to_s - from_s)


def test_one_request_alone_takes_a_step_for_its_prompt_and_one_for_each_further_token():
    result = simulate(scenario(demand=demand(clients=1, prompt="1", output="100"), detail=Detail.HOPS))
    outcome = result.outcomes[0]
    assert outcome.num_tokens == 100
    assert outcome.ttft_s == pytest.approx(STEP_S, rel=0.02)
    assert outcome.tpot_s == pytest.approx(STEP_S, rel=0.02)
    assert result.attention_utilisation == pytest.approx(4e-3 / STEP_S, rel=0.05)
    assert result.ffn_utilisation == pytest.approx(8e-3 / STEP_S, rel=0.05)
    assert result.bubble_share == pytest.approx(12e-3 / STEP_S, rel=0.05)


def test_the_way_through_the_front_end_is_in_the_time_to_the_first_token_alone():
    ask = demand(clients=1, prompt="1", output="100")
    near, far = (simulate(scenario(demand=ask, front_end_s=way_s)).outcomes[0] for way_s in (0.0, 0.05))
    assert far.ttft_s == pytest.approx(near.ttft_s + 0.05)
    assert far.tpot_s == pytest.approx(near.tpot_s)


def test_cost_is_of_all_workers_for_all_of_the_time():
    priced = scenario(2, 3, attention_usd_per_hour=2.0, ffn_usd_per_hour=1.0, attention_gpus=2, ffn_gpus=4)
    result = simulate(priced)
    assert result.usd == pytest.approx(10 / 3600 * (2 * 2.0 + 3 * 1.0))
    assert result.gpu_s == pytest.approx(10 * (2 * 2 + 3 * 4))
    assert result.as_json()["usd_per_mtok"] == pytest.approx(result.usd / result.output_tokens * 1e6)


def test_the_warm_up_is_left_out_of_everything():
    whole, late = simulate(scenario()), simulate(scenario(warm_up_s=5.0))
    assert late.seconds == 5.0
    assert min(outcome.came_s for outcome in late.outcomes) >= 5.0
    assert late.tokens_per_s == pytest.approx(whole.tokens_per_s, rel=0.05)
    assert late.ffn_utilisation == pytest.approx(whole.ffn_utilisation, rel=0.05)


def test_the_same_seed_gives_the_same_run():
    open_loop = Demand(
        prompt=Lengths.parse("", "lognormal:100:1"), output=Lengths.parse("", "uniform:5:50"), rate=20.0, seed=3
    )
    results = [simulate(scenario(2, demand=open_loop)).as_json() for _ in range(2)]
    for result in results:
        del result["wall_s"], result["wall_us_per_step"]
    assert results[0] == results[1]
    assert results[0] != simulate(scenario(2, demand=replace(open_loop, seed=4))).as_json()


# (attention workers, FFN shards, FFN replicas, clients, micro-batches, layers)
GROUPS = [
    (1, 2, 1, 16, "1", 20),
    (4, 1, 1, 64, "1", 60),
    (6, 2, 1, 150, "2", 60),
    (8, 2, 2, 150, "1", 20),
    (8, 1, 1, 240, "3", 20),
]


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_whole_steps_come_to_what_hops_come_to(group):
    """The estimate for large clusters, against the count, where both can be had."""
    attention, shards, replicas, clients, micro_batches, layers = group
    asked = demand(clients, prompt="lognormal:200:1", output="lognormal:100:0.7")
    base = scenario(
        attention,
        shards,
        replicas,
        config={"micro_batches": micro_batches},
        demand=asked,
        times=times_with(num_layers=layers),
        duration_s=layers / 2,
        warm_up_s=layers / 10,
    )
    hops, steps = (simulate(replace(base, detail=detail)) for detail in (Detail.HOPS, Detail.STEPS))
    assert steps.tokens_per_s == pytest.approx(hops.tokens_per_s, rel=0.15)
    ours, exact = steps.as_json(), hops.as_json()
    assert ours["tpot_s"]["mean"] == pytest.approx(exact["tpot_s"]["mean"], rel=0.15)
    assert ours["ttft_s"]["mean"] == pytest.approx(exact["ttft_s"]["mean"], rel=0.25)
    assert ours["utilisation"]["ffn"] == pytest.approx(exact["utilisation"]["ffn"], abs=0.12)


@pytest.mark.parametrize("detail", [Detail.HOPS, Detail.STEPS])
def test_a_lost_ffn_worker_stops_everyone_without_a_replica_and_hardly_anyone_with_one(detail):
    kill = Failures(kills=(Kill(4.0, "ffn-0"),), ffn_restart_s=2.0)
    alone = simulate(scenario(2, failures=kill, detail=detail))
    assert tokens_per_s(alone, 4.1, 6.0) == 0
    assert tokens_per_s(alone, 7.0, 10.0) == pytest.approx(tokens_per_s(alone, 1.0, 4.0), rel=0.1)
    pair = simulate(scenario(2, ffn_replicas=2, failures=kill, detail=detail))
    assert tokens_per_s(pair, 4.1, 6.0) > 0.5 * tokens_per_s(pair, 1.0, 4.0)
    for result in (alone, pair):
        assert result.as_json()["requests"]["failed"] == 0
        assert result.as_json()["failures"] == 1


def test_requests_of_a_lost_attention_worker_go_on_elsewhere():
    kill = Failures(kills=(Kill(4.0, "attention-0"),), attention_restart_s=3.0)
    result = simulate(scenario(2, demand=demand(clients=16, output="200"), failures=kill))
    assert result.as_json()["requests"]["failed"] == 0
    whole = [outcome for outcome in result.outcomes if outcome.ended_s is not None]
    assert {outcome.num_tokens for outcome in whole} == {200}
    assert any(outcome.came_s < 4.0 < outcome.ended_s for outcome in whole)


def test_failures_at_random_are_as_many_as_their_mean_time_says():
    often = Failures(mtbf_s=50.0, attention_restart_s=0.1, ffn_restart_s=0.1)
    result = simulate(scenario(3, 2, duration_s=100.0, failures=often, demand=demand(clients=2)))
    assert 3 <= result.as_json()["failures"] <= 25  # 5 GPUs for 100 s: 10 are expected


def test_a_slow_attention_worker_slows_its_own_requests_only():
    slow = simulate(scenario(2, demand=demand(clients=2), slowness={"attention-0": 5.0}))
    times_s = sorted(outcome.tpot_s for outcome in slow.outcomes if outcome.tpot_s is not None)
    assert times_s[0] == pytest.approx(STEP_S, rel=0.2)
    assert times_s[-1] > 1.5 * STEP_S


def test_more_workers_serve_more_and_fewer_are_paid_less():
    ask = demand(clients=64)
    grown = simulate(scenario(demand=ask, resizes=(Resize(2.0, attention_workers=3, ffn_replicas=2),),
                              failures=Failures(attention_restart_s=1.0, ffn_restart_s=1.0)))  # fmt: skip
    assert tokens_per_s(grown, 6.0, 10.0) > 1.3 * tokens_per_s(grown, 0.5, 2.0)
    shrunk = simulate(scenario(3, demand=ask, resizes=(Resize(5.0, attention_workers=1),)))
    assert shrunk.gpu_s < 3.6 * 10
    assert shrunk.as_json()["requests"]["failed"] == 0


def test_a_promise_is_kept_by_refusing():
    promise = {"tpot_sla_ms": 50.0, "ttft_sla_ms": 1000.0, "max_num_batched_tokens": 256}
    crowd = Demand(prompt=Lengths.fixed(100), output=Lengths.fixed(50), rate=200.0)
    result = simulate(scenario(config=promise, demand=crowd)).as_json()
    assert result["requests"]["refused"] > 100
    assert result["goodput_share"] < 1
    assert result["tpot_s"]["p90"] <= 0.05


def test_lockstep_waits_for_the_slowest():
    ask, slow = demand(clients=32), {"attention-0": 3.0}
    base = scenario(4, demand=ask, slowness=slow)
    free, locked = (simulate(replace(base, detail=detail)) for detail in (Detail.HOPS, Detail.LOCKSTEP))
    assert locked.tokens_per_s < free.tokens_per_s


def test_hops_are_counted_where_they_are_few():
    assert detail_of(scenario()) is Detail.HOPS
    assert detail_of(scenario(100, 4, duration_s=600.0)) is Detail.STEPS
    assert TIMES.num_layers == 20
