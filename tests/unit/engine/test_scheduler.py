"""The scheduler's promises: same tokens whatever the company, nothing lost, nobody starved; and its rules one by one."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.engine.scheduler import Scheduler
from afd_server.errors import PromptTooLongError, RequestError
from afd_server.types import GenerationRequest, SamplingParams
from tests.unit.engine.toy_worker import EOS, ToyWorker, continuation, next_token, report_on, small_config


def make_request(request_id, prompt, **sampling):
    return GenerationRequest(request_id, tuple(prompt), SamplingParams(**{"max_tokens": 4, **sampling}))


class Run:
    """A scheduler and a toy worker, stepped by hand. outputs: all tokens so far, reports: all that was reported of prompts,
    ends: finish reasons, by request."""

    def __init__(self, *, num_blocks=64, failing_steps=(), **config):
        self.config = small_config(**config)
        self.scheduler = Scheduler(self.config, num_blocks=num_blocks, eos_token_ids=(EOS,))
        self.worker = ToyWorker(self.config, failing_steps)
        self.num_blocks = num_blocks
        self.outputs, self.reports, self.ends, self.first = {}, {}, {}, {}

    def add(self, *args, **sampling):
        self.scheduler.add(make_request(*args, **sampling))

    def take(self, outputs):
        for output in outputs:
            assert output.request_id not in self.ends, "output after the end"
            self.first.setdefault(output.request_id, output)
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            self.reports.setdefault(output.request_id, []).extend(output.prompt_logprobs)
            if output.finish_reason:
                self.ends[output.request_id] = output.finish_reason.value

    def step(self, num_micro_batches=1):
        plan = self.scheduler.schedule(lambda num_tokens: min(num_micro_batches, len(num_tokens)))
        try:
            self.take(self.scheduler.complete(self.worker.execute(plan)))
        except type(self.worker.error) as error:
            self.take(self.scheduler.fail_step(str(error)))
        self.scheduler.check()
        return plan

    def finish(self, num_micro_batches=1):
        while self.scheduler.has_work:
            self.step(num_micro_batches)
        return self.outputs


# --- the whole, under anything ---------------------------------------------------------------------------------------

arrivals = st.lists(
    st.fixed_dictionaries(
        {
            # Few distinct tokens, so that prompts share prefixes.
            "prompt": st.lists(st.integers(1, 2), min_size=1, max_size=20),
            "arrives": st.integers(0, 12),
            "aborts": st.none() | st.integers(0, 25),
            "sampling": st.builds(
                SamplingParams,
                max_tokens=st.integers(0, 14),
                prompt_logprobs=st.none() | st.just(2),
                min_tokens=st.integers(0, 3),
                ignore_eos=st.booleans(),
                stop_token_ids=st.just(()) | st.just((7, 8, 9)),
            ).filter(lambda sampling: sampling.max_tokens or sampling.prompt_logprobs is not None),
        }
    ),
    min_size=1,
    max_size=9,
)
layouts = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 5),
        "max_num_batched_tokens": st.integers(1, 24),
        "block_size": st.sampled_from([1, 3, 4]),
        "enable_prefix_caching": st.booleans(),
    }
).filter(lambda layout: layout["max_num_batched_tokens"] >= layout["max_num_seqs"])


@settings(max_examples=200, deadline=None)
@given(
    arrivals=arrivals,
    layout=layouts,
    chunked=st.booleans(),
    spare_blocks=st.integers(0, 8),
    failing_steps=st.sets(st.integers(1, 40), max_size=2),
    num_micro_batches=st.integers(1, 4),
)
def test_every_request_gets_what_it_would_get_alone(
    arrivals, layout, chunked, spare_blocks, failing_steps, num_micro_batches
):
    if not chunked:
        layout = {**layout, "enable_chunked_prefill": False, "max_num_batched_tokens": 32}
    fewest_blocks = -(-32 // layout["block_size"])
    run = Run(num_blocks=fewest_blocks + spare_blocks, failing_steps=failing_steps, **layout)
    aborted = set()
    now = 0
    while run.scheduler.has_work or now <= 12:
        for index, arrival in enumerate(arrivals):
            if arrival["arrives"] == now:
                run.scheduler.add(GenerationRequest(str(index), tuple(arrival["prompt"]), arrival["sampling"]))
            if arrival["aborts"] == now and (outputs := run.scheduler.abort(str(index))):
                run.take(outputs)
                aborted.add(str(index))
        if run.scheduler.has_work:
            run.step(num_micro_batches)
        now += 1
        assert now < 2000, "somebody starves"
    for index, arrival in enumerate(arrivals):
        tokens, reason = continuation(arrival["prompt"], arrival["sampling"], 32)
        report = report_on(arrival["prompt"]) if arrival["sampling"].prompt_logprobs is not None else []
        given_tokens, end = run.outputs[str(index)], run.ends[str(index)]
        given_report = run.reports[str(index)]
        if end == "error":
            assert str(index) in {
                part.request_id
                for plan in run.worker.plans
                if plan.step in failing_steps
                for batch in plan.micro_batches
                for part in batch
            }
        elif str(index) in aborted:
            assert end == "abort"
        else:
            assert (given_tokens, end, given_report) == (tokens, reason, report)
        assert given_tokens == tokens[: len(given_tokens)]
        assert given_report == report[: len(given_report)]
        assert given_report == report or not given_tokens, "tokens before all of the prompt is reported"
    stats = run.scheduler.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert (stats.num_running, stats.num_waiting) == (0, 0)


# --- rules, one by one -----------------------------------------------------------------------------------------------


def test_decodes_come_first_and_prompts_share_what_is_left():
    run = Run(max_num_batched_tokens=8)
    run.add("a", range(1, 4))
    run.step()
    run.add("b", range(1, 13))
    plan = run.step()
    assert {part.request_id: len(part.token_ids) for part in plan.micro_batches[0]} == {"a": 1, "b": 7}
    assert [part.samples for part in plan.micro_batches[0]] == [True, False]


def test_without_chunks_a_prompt_waits_until_it_fits_and_nobody_overtakes():
    run = Run(enable_chunked_prefill=False, max_num_batched_tokens=32)
    for name, length in (("a", 20), ("b", 20), ("c", 2)):
        run.add(name, [ord(name)] * length)
    assert [part.request_id for part in run.step().micro_batches[0]] == ["a"]
    assert [part.request_id for part in run.step().micro_batches[0]] == ["a", "b", "c"]


def test_no_more_than_max_num_seqs_run():
    run = Run(max_num_seqs=2)
    for name in "abc":
        run.add(name, [1])
    run.step()
    assert (run.scheduler.stats().num_running, run.scheduler.stats().num_waiting) == (2, 1)


def test_the_latest_is_preempted_and_comes_back_with_its_output():
    run = Run(num_blocks=8, max_num_seqs=3, enable_prefix_caching=False)
    prompts = {"a": [1] * 10, "b": [2] * 10, "c": [3] * 7}
    for name, prompt in prompts.items():
        run.add(name, prompt, max_tokens=12, ignore_eos=True)
    run.finish()
    assert run.scheduler.stats().num_preemptions > 0
    started = [start for plan in run.worker.plans for start in plan.started]
    assert [start.request_id for start in started].count("a") == 1
    again = [start for start in started if start.request_id == "c"]
    assert again[0].output_token_ids == ()
    assert again[-1].output_token_ids == tuple(run.outputs["c"][: len(again[-1].output_token_ids)]) != ()
    for name, prompt in prompts.items():
        assert run.outputs[name] == continuation(prompt, SamplingParams(12, ignore_eos=True), 32)[0]


def test_the_cheapest_to_compute_again_is_preempted_and_never_the_oldest_that_runs():
    run = Run(num_blocks=11, max_num_seqs=3, max_num_batched_tokens=32, enable_prefix_caching=False)
    for name, length in (("a", 8), ("short", 8), ("long", 16)):
        run.add(name, [ord(name[0])] * length, max_tokens=14, ignore_eos=True)
    run.finish()
    again = [start.request_id for plan in run.worker.plans for start in plan.started][3:]
    assert again[0] == "short"
    assert "a" not in again


def test_blocks_that_others_hold_cost_nothing_to_preempt():
    """The latest holds more tokens than the one before it, but most of them in blocks of the oldest."""
    run = Run(num_blocks=11, max_num_seqs=3, max_num_batched_tokens=32)
    beginning = list(range(1, 17))
    run.add("a", beginning, max_tokens=10, ignore_eos=True)
    run.step()
    run.add("apart", [30] * 10, max_tokens=9, ignore_eos=True)
    run.add("shares", [*beginning, 5], max_tokens=9, ignore_eos=True)
    run.finish()
    assert next(plan.finished for plan in run.worker.plans if plan.finished) == ("shares",)


def test_a_preempted_request_comes_back_before_those_that_came_later():
    run = Run(num_blocks=8, max_num_seqs=2)
    for name, max_tokens in (("a", 12), ("b", 12), ("c", 2)):
        run.add(name, [ord(name)] * 10, max_tokens=max_tokens, ignore_eos=True)
    run.finish()
    assert [start.request_id for plan in run.worker.plans for start in plan.started] == ["a", "b", "b", "c"]
    # What b found again was its own: the prefix cache did not save anybody else's work.
    stats = run.scheduler.stats()
    assert (stats.num_preemptions, stats.prefix_cache_queried_tokens, stats.prefix_cache_hit_tokens) == (
        1,
        30,
        0,
    )


def test_a_cached_prefix_is_no_room_for_the_rest():
    """Free blocks that hold the prefix cannot also be those for the tokens after it."""
    run = Run(num_blocks=8)
    run.add("a", range(1, 21), max_tokens=1)
    run.finish()
    run.add("other", [30] * 15, max_tokens=2, ignore_eos=True)
    run.step()
    assert run.scheduler.stats().num_free_blocks == 4
    run.add("again", [*range(1, 21), 5, 5, 5])
    run.step()
    assert run.scheduler.stats().num_waiting == 1
    run.finish()
    assert run.first["again"].cached_tokens == 16


def test_a_prompt_seen_before_is_read_from_the_cache():
    run = Run()
    run.add("a", range(1, 14))
    run.finish()
    run.add("b", [*range(1, 13), 30, 31])
    plan = run.step()
    assert plan.micro_batches[0][0].start_position == 12
    assert (run.first["a"].cached_tokens, run.first["b"].cached_tokens) == (0, 12)
    stats = run.scheduler.stats()
    assert (stats.prefix_cache_queried_tokens, stats.prefix_cache_hit_tokens) == (13 + 14, 12)


def test_output_is_cached_too_and_cached_tokens_are_said_once():
    run = Run()
    run.add("a", range(1, 10), ignore_eos=True, max_tokens=8)
    answer = run.finish()["a"]
    run.add("b", [*range(1, 10), *answer, 5], ignore_eos=True)
    outputs = []
    while run.scheduler.has_work:
        plan = run.scheduler.schedule(lambda num_tokens: 1)
        outputs += run.scheduler.complete(run.worker.execute(plan))
    assert [output.cached_tokens for output in outputs] == [16, 0, 0, 0]


def test_a_failed_step_ends_its_requests_alone_and_leaves_no_prefix():
    run = Run(max_num_seqs=1, failing_steps=[1])
    run.add("a", range(1, 9))
    run.add("b", range(1, 9))
    run.finish()
    assert run.ends == {"a": "error", "b": "length"}
    assert run.first["a"].error == "worker ffn-0, layer 1: broken"
    assert run.first["b"].cached_tokens == 0
    assert run.outputs["b"] == continuation(range(1, 9), SamplingParams(4), 32)[0]


def test_the_worker_is_told_to_forget_even_if_the_step_that_would_have_told_it_failed():
    run = Run(failing_steps=[2])
    run.add("a", [1], max_tokens=1)
    run.step()
    run.add("b", [2])
    run.step()
    run.add("c", [3])
    assert set(run.step().finished) == {"a", "b"}


def test_an_abort_frees_the_blocks_at_once():
    run = Run(num_blocks=8)
    run.add("a", range(1, 20))
    run.add("b", range(1, 20))
    run.step()
    assert run.scheduler.stats().num_free_blocks < 8
    (output,) = run.scheduler.abort("a")
    assert output.finish_reason == "abort"
    assert run.scheduler.abort("b")
    assert run.scheduler.stats().num_free_blocks == 8
    assert not run.scheduler.has_work
    assert run.scheduler.abort("a") == run.scheduler.abort("never seen") == []


def test_a_resumed_request_goes_on_where_it_was():
    sampling = SamplingParams(max_tokens=9, ignore_eos=True)
    whole = continuation([5, 6], sampling, 32)[0]
    run = Run()
    run.scheduler.add(GenerationRequest("a", (5, 6), sampling, resumed_output_token_ids=tuple(whole[:4])))
    plan = run.step()
    assert plan.started[0].prompt_token_ids == (5, 6)
    assert plan.started[0].output_token_ids == tuple(whole[:4])
    assert run.finish()["a"] == whole[4:]
    assert run.ends["a"] == "length"


def test_what_is_reported_of_a_prompt_is_not_read_from_the_cache():
    run = Run(max_num_batched_tokens=8)
    run.add("a", range(1, 14))
    run.finish()
    run.add("b", range(1, 14), prompt_logprobs=0)
    run.finish()
    assert (run.first["b"].cached_tokens, run.reports["b"]) == (0, report_on(list(range(1, 14))))
    run.add("c", range(1, 14))
    run.finish()
    assert (run.first["c"].cached_tokens, run.reports["c"]) == (12, [])


def test_a_prompt_alone_is_reported_and_nothing_is_sampled():
    run = Run(max_num_batched_tokens=8)
    run.add("whole", range(32), max_tokens=0, prompt_logprobs=3)  # no room for output
    run.add("one", [7], max_tokens=0, prompt_logprobs=3)
    run.finish()
    assert run.reports == {"whole": report_on(list(range(32))), "one": []}
    assert (run.outputs, run.ends) == ({"whole": [], "one": []}, {"whole": "length", "one": "length"})


def test_a_report_is_not_given_twice_after_preemption_or_failover():
    run = Run()
    prompt = list(range(1, 14))
    sampling = SamplingParams(4, prompt_logprobs=1)
    run.add("seen", prompt, max_tokens=1)
    run.finish()
    run.scheduler.add(GenerationRequest("a", tuple(prompt), sampling, resumed_prompt_logprobs=6))
    plan = run.step()
    assert plan.micro_batches[0][0].start_position == 4  # of the cache only what has been reported
    run.finish()
    assert run.reports["a"] == report_on(prompt)[6:]


def test_a_step_reports_no_more_than_goes_into_one_message(monkeypatch):
    monkeypatch.setattr("afd_server.engine.pace.MAX_ENTRIES", 20)
    for chunked in (True, False):
        run = Run(enable_chunked_prefill=chunked, max_num_batched_tokens=32)
        for name in "ab":
            run.add(name, range(1, 14), max_tokens=1, prompt_logprobs=3)
        run.add("plain", range(1, 9))
        parts = [
            {part.request_id: len(part.token_ids) for part in run.step().micro_batches[0]} for _ in range(3)
        ]
        assert parts == [{"a": 5}, {"a": 5}, {"a": 3, "b": 2}]
        run.finish()
        assert run.reports["b"] == report_on(list(range(1, 14)))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt_token_ids": ()}, RequestError),
        ({"prompt_token_ids": (1,) * 32}, PromptTooLongError),
        ({"prompt_token_ids": (1, -2)}, RequestError),
        ({"prompt_token_ids": (1, 2**64)}, RequestError),
        ({"sampling": SamplingParams(max_tokens=0)}, RequestError),
        ({"request_id": "taken"}, RequestError),
    ],
)
def test_what_cannot_be_served_is_refused(change, error):
    run = Run()
    run.add("taken", [1])
    with pytest.raises(error):
        run.scheduler.add(replace(make_request("new", [1]), **change))
    assert run.finish().keys() == {"taken"}


# --- the end of a request --------------------------------------------------------------------------------------------


def prompt_whose_next_token(wanted):
    return next([a, b] for a in range(40) for b in range(40) if wanted(next_token([a, b])))


@pytest.mark.parametrize(
    ("sampling", "reason", "num_tokens"),
    [
        ({}, "stop", 1),
        ({"ignore_eos": True}, "length", 4),
        ({"min_tokens": 1}, None, None),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, "stop", 1),
    ],
)
def test_eos_ends_a_request_unless_it_says_otherwise(sampling, reason, num_tokens):
    run = Run()
    prompt = prompt_whose_next_token(lambda token: token == EOS)
    run.scheduler.add(make_request("a", prompt, **sampling))
    run.step()
    if reason is None:
        assert "a" not in run.ends
        return
    run.finish()
    assert (run.ends["a"], len(run.outputs["a"])) == (reason, num_tokens)


def test_the_model_length_ends_a_request():
    run = Run(max_model_len=6)
    run.add("a", [1, 2], max_tokens=100, ignore_eos=True)
    assert len(run.finish()["a"]) == 4
    assert run.ends["a"] == "length"


def test_a_request_without_a_next_token_ends_alone():
    run = Run()
    run.add("a", (1, 2))
    run.add("b", (3,))
    plan = run.scheduler.schedule(lambda num_tokens: 1)
    output = run.worker.execute(plan)
    tokens = [replace(each, error="no way") if each.request_id == "a" else each for each in output.tokens]
    first, second = run.scheduler.complete(replace(output, tokens=tuple(tokens)))
    assert (first.finish_reason, first.error, first.token_ids) == ("error", "no way", ())
    assert second.finish_reason is None and second.token_ids
    run.take([first, second])
    run.finish()
    assert run.ends["b"] in ("length", "stop")


def test_under_a_constraint_an_end_counts_whenever_it_comes():
    run = Run()
    for name, constraint in (("free", None), ("bound", "a grammar")):
        run.add(name, (1,), min_tokens=3, max_tokens=9, constraint=constraint)
    plan = run.scheduler.schedule(lambda num_tokens: 1)
    output = run.worker.execute(plan)
    ended = tuple(replace(each, token_id=EOS) for each in output.tokens)
    ends = {
        each.request_id: each.finish_reason for each in run.scheduler.complete(replace(output, tokens=ended))
    }
    assert ends == {"free": None, "bound": "stop"}
