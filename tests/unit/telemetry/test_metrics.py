import re
from dataclasses import replace

from afd_server.telemetry.metrics import Metrics
from afd_server.types import ReplicaStats, StepTiming


def value(metrics, name, **labels):
    """Sum of the samples of that name with these labels; None when there is none."""
    samples = re.findall(rf"^afd:{name}\{{([^}}]*)\}} (\S+)$", metrics.exposition().decode(), re.M)
    wanted = [f'{key}="{text}"' for key, text in labels.items()]
    found = [float(number) for given, number in samples if all(pair in given for pair in wanted)]
    return sum(found) if found else None


def test_the_state_of_replicas():
    metrics = Metrics("m")
    metrics.observe_step(
        "attention-0", ReplicaStats(num_running=3, num_waiting=2, num_blocks=10, num_free_blocks=4)
    )
    metrics.observe_step("attention-1", ReplicaStats(num_running=1))
    assert value(metrics, "num_requests_running", engine="attention-0", model_name="m") == 3
    assert value(metrics, "num_requests_running") == 4
    assert value(metrics, "num_requests_waiting", engine="attention-0") == 2
    assert value(metrics, "kv_cache_usage_perc", engine="attention-0") == 0.6
    assert value(metrics, "kv_cache_usage_perc", engine="attention-1") == 0


def test_nothing_runs_at_a_replica_that_is_down():
    metrics = Metrics("m")
    metrics.observe_step("attention-0", ReplicaStats(num_running=3, num_waiting=2, num_blocks=10))
    metrics.workers.up("attention-0", "attention")
    metrics.workers.down("attention-0", "attention")
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert value(metrics, name, engine="attention-0") == 0
    assert value(metrics, "worker_up", worker="attention-0", role="attention") == 0
    metrics.workers.down("ffn-0", "ffn")  # it has no such gauges
    assert value(metrics, "num_requests_running", engine="ffn-0") is None


def test_a_worker_that_has_left_is_not_shown_as_down():
    metrics = Metrics("m")
    metrics.workers.up("ffn-2", "ffn")
    metrics.workers.unplaced("ffn-2", "too little CPU")
    metrics.workers.forget("ffn-2")
    assert value(metrics, "worker_up", worker="ffn-2") is None
    assert value(metrics, "workers_unplaced", worker="ffn-2") is None


def test_calls_and_requests_sent_again():
    metrics = Metrics("m")
    metrics.observe_step("a", ReplicaStats(timing=StepTiming(1.0, num_resent=2)))
    metrics.observe_step("a", ReplicaStats(timing=StepTiming(1.0, num_resent=1)))
    metrics.observe_lost("a", 7)
    assert value(metrics, "ffn_calls_resent_total", engine="a") == 3
    assert value(metrics, "requests_resubmitted_total", engine="a") == 7


def test_totals_become_counters_across_a_restart():
    metrics = Metrics("m")
    first = ReplicaStats(num_preemptions=2, prefix_cache_queried_tokens=100, prefix_cache_hit_tokens=40)
    metrics.observe_step("a", first)
    metrics.observe_step("a", first)
    metrics.observe_step("a", replace(first, prefix_cache_queried_tokens=150, prefix_cache_hit_tokens=60))
    restarted = ReplicaStats(num_preemptions=2, prefix_cache_queried_tokens=30, prefix_cache_hit_tokens=10)
    metrics.observe_step("a", restarted)
    assert value(metrics, "num_preemptions_total") == 4
    assert value(metrics, "prefix_cache_queries_total") == 180
    assert value(metrics, "prefix_cache_hits_total") == 70


def test_where_the_time_of_a_step_went():
    metrics = Metrics("m")
    timing = StepTiming(
        total_s=1.0, attention_s=0.4, ffn_s=0.8, wire_s=0.02, bubble_s=0.25, num_hops=20, num_micro_batches=2,
        num_tokens=8, ffn_rows=160,
    )  # fmt: skip
    metrics.observe_step("a", ReplicaStats(timing=timing))
    metrics.observe_step("a", ReplicaStats())  # nothing was computed
    sums = {"attention_hop_seconds": 0.02, "ffn_hop_seconds": 0.04, "wire_hop_seconds": 0.001, "bubble_share": 0.25,
            "micro_batches": 2, "ffn_batch_rows": 8, "step_seconds": 1}  # fmt: skip
    for name, expected in sums.items():
        assert value(metrics, f"{name}_count", engine="a") == 1
        assert abs(value(metrics, f"{name}_sum") - expected) < 1e-9


def test_the_life_of_a_request():
    metrics = Metrics("m")
    metrics.observe_prompt(5)
    metrics.observe_tokens(1, 0.25, first=True)
    metrics.observe_tokens(2, 0.5, first=False)
    metrics.observe_finish("stop", total_s=0.75, decode_s=0.5, num_tokens=3, ttft_s=0.25, prefill_s=0.125)
    assert value(metrics, "prompt_tokens_total") == 5
    assert value(metrics, "generation_tokens_total") == 3
    assert value(metrics, "time_to_first_token_seconds_sum") == 0.25
    assert value(metrics, "inter_token_latency_seconds_sum") == 0.5
    assert value(metrics, "request_time_per_output_token_seconds_sum") == 0.25
    assert value(metrics, "e2e_request_latency_seconds_sum") == 0.75
    parts_s = [value(metrics, f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode")]
    assert parts_s == [0.125, 0.125, 0.5]
    assert value(metrics, "request_success_total", finished_reason="stop") == 1


def test_requests_that_were_cut_off_say_nothing_about_speed():
    metrics = Metrics("m")
    metrics.observe_finish("abort", total_s=9, decode_s=8, num_tokens=3)
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
    assert value(metrics, "e2e_request_latency_seconds_count") == 0
    assert value(metrics, "request_time_per_output_token_seconds_count") == 0


def test_servers_of_one_process_do_not_share_metrics():
    first, second = Metrics("m"), Metrics("m")
    first.observe_prompt(5)
    assert value(second, "prompt_tokens_total") == 0


def test_promises_kept_and_broken():
    metrics = Metrics("m", tpot_sla_s=0.1, ttft_sla_s=1.0)
    for ttft_s, tpot_s in ((0.5, 0.05), (1.5, 0.05), (0.5, 0.2)):
        metrics.observe_finish("stop", total_s=3, decode_s=10 * tpot_s, num_tokens=11, ttft_s=ttft_s)
    metrics.observe_finish("length", total_s=1, decode_s=0, num_tokens=1, ttft_s=0.5)
    metrics.observe_finish("error", total_s=1, decode_s=0, num_tokens=1, ttft_s=0.5)
    counted = {
        (sla, outcome): value(metrics, "sla_requests_total", sla=sla, outcome=outcome)
        for sla in ("ttft", "tpot")
        for outcome in ("met", "missed")
    }
    assert counted == {
        ("ttft", "met"): 3,
        ("ttft", "missed"): 1,
        ("tpot", "met"): 3,
        ("tpot", "missed"): 1,
    }
    assert (value(metrics, "goodput_requests_total"), value(metrics, "goodput_tokens_total")) == (2, 12)


def test_without_a_promise_none_is_counted():
    metrics = Metrics("m")
    metrics.observe_finish("stop", total_s=3, decode_s=1, num_tokens=11, ttft_s=1)
    assert value(metrics, "sla_requests_total") is None
    assert value(metrics, "goodput_requests_total") == 0


def test_predicted_against_actual_steps():
    metrics = Metrics("m")
    timing = StepTiming(0.9, period_s=1.0, predicted_s=1.25)
    metrics.observe_step("a", ReplicaStats(timing=timing))
    metrics.observe_step("a", ReplicaStats(timing=replace(timing, predicted_s=0.0)))  # nothing was predicted
    sums = {"step_period_seconds": 1.0, "step_predicted_seconds": 1.25, "step_prediction_error": 0.25}
    for name, expected in sums.items():
        assert value(metrics, f"{name}_count", engine="a") == 1
        assert value(metrics, f"{name}_sum", engine="a") == expected


def test_what_admission_did():
    metrics = Metrics("m")
    metrics.observe_queued()
    metrics.set_queue_length(3)
    metrics.observe_queue_time(0.5)
    metrics.observe_refusal("queue_full")
    assert value(metrics, "requests_queued_total") == 1
    assert value(metrics, "num_requests_queued") == 3
    assert value(metrics, "request_admission_time_seconds_sum") == 0.5
    assert value(metrics, "requests_refused_total", reason="queue_full") == 1
    assert value(metrics, "requests_refused_total", reason="ttft_deadline") == 0
