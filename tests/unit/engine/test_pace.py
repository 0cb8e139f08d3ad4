"""The promise of time per token: a replica in simulated time, whose steps take what a formula says."""

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.engine.pace import MARGIN, Pace, StepBudget, largest
from afd_server.engine.scheduler import Scheduler
from afd_server.engine.step_time import StepTimeModel, StepWork
from afd_server.types import GenerationRequest, SamplingParams
from tests.unit.engine.toy_worker import ToyWorker, continuation, small_config


def seconds_of(work):
    """Reading weights takes 20 ms, a row 1 ms, 1000 keys 1 ms, 1000 pairs of a prompt 0.2 ms."""
    return 0.02 + 1e-3 * work.tokens + 1e-6 * work.context_tokens + 2e-7 * work.chunk_pairs


class Replica:
    """A scheduler in simulated time. token_times: when each request got its tokens."""

    def __init__(self, tpot_sla_s, *, noise=0.0, num_blocks=4096, **config):
        self.config = small_config(**{
            "max_model_len": 1024, "block_size": 16, "max_num_seqs": 64, "max_num_batched_tokens": 2048, **config
        })  # fmt: skip
        self.now = 0.0
        self.model = StepTimeModel()
        for count in (1, 2, 4, 8, 16, 32, 64):
            work = StepWork(count, count, 0, count)
            self.model.observe(work, seconds_of(work))
        self.pace = Pace(tpot_sla_s, self.config.max_num_seqs, self.model, clock=lambda: self.now)
        self.scheduler = Scheduler(self.config, num_blocks=num_blocks, eos_token_ids=(), pace=self.pace)
        self.worker = ToyWorker(self.config)
        self.noise = random.Random(0), noise
        self.token_times, self.ended, self.plans, self.predictions = {}, {}, [], []

    def add(self, name, prompt_tokens, output_tokens):
        # Prompts that share nothing, else the cache would read them.
        tokens = random.Random(name).choices(range(1, 39), k=prompt_tokens)
        sampling = SamplingParams(output_tokens, ignore_eos=True)
        self.scheduler.add(GenerationRequest(name, tuple(tokens), sampling))
        return tokens, sampling

    def step(self):
        plan = self.scheduler.schedule(lambda num_tokens: 1)
        work = StepWork.of(plan)
        generator, noise = self.noise
        seconds = seconds_of(work) * (1 + generator.uniform(-noise, noise))
        self.predictions.append((self.model.predict_s(work), seconds))
        self.now += seconds
        for output in self.scheduler.complete(self.worker.execute(plan)):
            self.token_times.setdefault(output.request_id, []).append(self.now)
            if output.finish_reason:
                self.ended[output.request_id] = output.finish_reason
        self.model.observe(work, seconds)
        self.scheduler.check()
        self.plans.append(plan)
        return plan

    def finish(self, most_steps=20_000):
        while self.scheduler.has_work:
            self.step()
            assert len(self.plans) < most_steps, "somebody starves"

    def tpots(self):
        return {
            name: (times[-1] - times[0]) / (len(times) - 1)
            for name, times in self.token_times.items()
            if len(times) > 1
        }


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_twice_the_possible_load_waits_and_those_that_run_keep_their_pace(noise):
    replica = Replica(0.06, noise=noise)
    for number in range(120):
        replica.add(str(number), 40 + 7 * (number % 13), 20 + number % 50)
    replica.finish()
    tpots = sorted(replica.tpots().values())
    assert len(replica.ended) == 120
    assert sum(tpot <= 0.06 for tpot in tpots) >= 0.99 * len(tpots)
    # The time is used: a pace far below the promise would be fewer requests at once for nothing.
    assert statistics.median(tpots) > 0.8 * (1 - MARGIN) * 0.06


def test_without_a_promise_the_same_load_breaks_it():
    replica = Replica(None)
    for number in range(120):
        replica.add(str(number), 40 + 7 * (number % 13), 20 + number % 50)
    replica.finish()
    assert statistics.median(replica.tpots().values()) > 0.08


def test_a_long_prompt_is_cut_so_that_nobody_stutters():
    replica = Replica(0.06)
    replica.add("talks", 10, 60)
    replica.step()
    replica.step()
    replica.add("reads", 900, 5)
    replica.finish()
    gaps = [later - earlier for earlier, later in zip(*(replica.token_times["talks"][i:] for i in (0, 1)), strict=False)]  # fmt: skip
    assert max(gaps) < 2 * 0.06
    assert replica.tpots()["talks"] <= 0.06
    assert len(replica.token_times["reads"]) == 5


def test_with_nothing_running_a_prompt_is_read_whatever_it_takes():
    replica = Replica(0.001)  # less than any step
    replica.add("a", 700, 3)
    assert replica.step().num_tokens == 700
    replica.add("b", 50, 3)
    replica.finish()
    assert set(replica.ended) == {"a", "b"}


def test_an_impossible_promise_is_kept_as_well_as_one_at_a_time_can():
    replica = Replica(0.001)
    for name in "abc":
        replica.add(name, 20, 4)
    replica.finish()
    assert max(len(batch) for plan in replica.plans for batch in plan.micro_batches) == 1


def test_the_number_of_running_requests_follows_their_context():
    def most_running(prompt_tokens):
        replica = Replica(0.06)
        for number in range(100):
            replica.add(str(number), prompt_tokens, 30)
        running = 0
        while replica.scheduler.has_work:
            replica.step()
            running = max(running, replica.scheduler.stats().num_running)
        return running

    assert most_running(20) > 1.2 * most_running(600)


def test_a_request_that_was_preempted_or_moved_here_asks_for_no_room():
    replica = Replica(0.06)
    for number in range(100):
        replica.add(str(number), 20, 200)
    for _ in range(50):
        replica.step()
    assert replica.scheduler.stats().num_waiting
    state = replica.scheduler._waiting[0]
    assert not replica.pace.has_room(replica.scheduler._running, state)
    state.cached_tokens = 0  # it has run before
    assert replica.pace.has_room(replica.scheduler._running, state)


@settings(deadline=None, max_examples=40)
@given(
    requests=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=20),
    tpot_sla_s=st.sampled_from([0.001, 0.022, 0.03, 0.06, 1.0]),
    spare_blocks=st.integers(0, 20),
    chunked=st.booleans(),
)  # fmt: skip
def test_whatever_is_promised_everyone_gets_what_it_would_get_alone(
    requests, tpot_sla_s, spare_blocks, chunked
):
    replica = Replica(
        tpot_sla_s,
        noise=0.5,
        max_model_len=256,
        num_blocks=16 + spare_blocks,
        enable_chunked_prefill=chunked,
    )
    asked, given_tokens = {}, {}
    complete = replica.scheduler.complete

    def noted(output):
        outputs = complete(output)
        for each in outputs:
            given_tokens.setdefault(each.request_id, []).extend(each.token_ids)
        return outputs

    replica.scheduler.complete = noted
    for step in range(3000):
        for number, (prompt, output, arrives) in enumerate(requests):
            if arrives == step:
                asked[str(number)] = replica.add(str(number), prompt, output)
        if replica.scheduler.has_work:
            replica.step()
        elif step > 30:
            break
    assert not replica.scheduler.has_work, "somebody starves"
    for name, (prompt, sampling) in asked.items():
        assert given_tokens[name] == continuation(prompt, sampling, 256)[0]
    stats = replica.scheduler.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_predictions_are_near_the_truth_while_load_comes_and_goes():
    replica = Replica(0.06, noise=0.1)
    for number in range(80):
        replica.add(str(number), 30 + number, 30)
    replica.finish()
    errors = [abs(predicted - actual) / actual for predicted, actual in replica.predictions[50:]]
    assert statistics.median(errors) < 0.1


def test_the_forecast_tells_what_the_replica_then_does():
    replica = Replica(0.06)
    assert Replica(None).scheduler.stats().forecast is None
    for number in range(100):
        replica.add(str(number), 50, 40)
    replica.finish()
    forecast = replica.pace._new_forecast()
    count = forecast.max_requests
    assert forecast.limit_s == pytest.approx((1 - MARGIN) * 0.06)
    assert forecast.base_s + count * forecast.request_s <= forecast.limit_s
    assert forecast.base_s + (count + 1) * forecast.request_s > 0.95 * forecast.limit_s
    actual = seconds_of(StepWork(count, count * 70, 0, count))
    assert forecast.base_s + count * forecast.request_s == pytest.approx(actual, rel=0.1)
    assert forecast.prompt_token_s == pytest.approx(1e-3, rel=0.5)


def test_a_budget_counts_tokens_and_seconds():
    model = StepTimeModel()
    for tokens in (1, 100):
        model.observe(StepWork(tokens, 0, 0, 0), 0.01 * tokens)
    budget = StepBudget(64, model, limit_s=0.3)
    assert budget.fitting(0, 100) == 64  # nothing is in the step yet
    budget.take(10, 1, True)
    assert budget.fitting(0, 100) == 29
    budget.take(0, 29, False)
    assert (budget.fitting(0, 5), budget.tokens) == (0, 34)
    budget.close()
    assert budget.tokens == 0


@given(st.integers(0, 50), st.integers(0, 50))
def test_the_largest_number_that_holds(bound, most):
    assert largest(lambda number: number <= bound, most) == min(bound, most)
