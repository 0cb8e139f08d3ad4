"""The model of step time, against machines whose times are made by formula and then disturbed."""

import itertools
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd_server.engine.step_time import OUTLIER, StepTimeModel, StepWork, rising_mean
from afd_server.types import ScheduledRequest, StepPlan


def dense(work):
    """Weights are read once; then arithmetic, context and logits."""
    return (
        max(0.02, 0.0009 * work.tokens)
        + 4e-6 * work.context_tokens
        + 1e-6 * work.chunk_pairs
        + 3e-4 * work.samples
    )


def experts(work):
    """Each further row finds new experts to read, until all 16 are."""
    distinct = 16 * (1 - (1 - 4 / 16) ** work.tokens)
    return 0.004 + 0.002 * distinct + 2e-4 * work.tokens + 2e-6 * work.context_tokens + 1e-4 * work.samples


def decodes(count, context):
    return StepWork(count, count * context, 0, count)


def some_step(generator):
    """Decoding requests of any context, with a part of a prompt or without."""
    work = decodes(generator.randint(1, 40), generator.uniform(20, 600))
    if generator.random() < 0.4:
        work += StepWork.part(generator.randint(0, 500), generator.randint(2, 120), generator.random() < 0.3)
    return work


class Disturbed:
    """A machine on which others run too: every step takes up to 20 % more, and one of 30 five times as long."""

    def __init__(self, formula):
        self.formula, self.random = formula, random.Random(1)

    def __call__(self, work):
        seconds = self.formula(work) * (1 + 0.2 * self.random.random())
        return 5 * seconds if self.random.random() < 1 / 30 else seconds


def fitted(machine, steps=600, seed=0):
    model, generator = StepTimeModel(), random.Random(seed)
    for _ in range(steps):
        work = some_step(generator)
        model.observe(work, machine(work))
    return model


def errors(model, formula, count=300):
    generator = random.Random("others")
    works = [some_step(generator) for _ in range(count)]
    return [abs(model.predict_s(work) - formula(work)) / formula(work) for work in works]


@pytest.mark.parametrize("formula", [dense, experts])
def test_what_was_learnt_of_some_steps_tells_of_others(formula):
    assert statistics.median(errors(fitted(formula), formula)) < 0.04


@pytest.mark.parametrize("formula", [dense, experts])
def test_disturbances_do_not_mislead_it(formula):
    expected = 1.1  # the mean of the ordinary noise
    found = statistics.median(errors(fitted(Disturbed(formula)), lambda work: expected * formula(work)))
    assert found < 0.12


def test_the_price_of_context_is_told_from_the_price_of_a_row():
    model = fitted(dense)
    added_s = model.predict_s(decodes(16, 500)) - model.predict_s(decodes(16, 100))
    assert added_s == pytest.approx(16 * 400 * 4e-6, rel=0.15)


def test_a_machine_that_becomes_slower_is_followed_and_so_is_one_that_recovers():
    model, generator = fitted(dense), random.Random(2)
    for slower in (2.5, 1.0):
        for _ in range(200):
            work = some_step(generator)
            model.observe(work, slower * dense(work))
        assert statistics.median(errors(model, lambda work: slower * dense(work))) < 0.15  # noqa: B023


def test_one_long_step_is_not_believed():
    model = fitted(dense)
    work = decodes(8, 100)
    before_s = model.predict_s(work)
    model.observe(work, 1000 * before_s)
    assert model.predict_s(work) < (1 + OUTLIER * 0.15) * before_s


def test_a_size_that_was_slow_at_first_is_found_out_when_it_comes_again():
    model = StepTimeModel()
    for count in (1, 2, 4, 8, 16, 32):
        model.observe(
            decodes(count, 1), 1.0 if count == 1 else dense(decodes(count, 1))
        )  # the first touches memory
    for _ in range(60):
        for count in (1, 2, 4):
            model.observe(decodes(count, 1), dense(decodes(count, 1)))
    assert model.predict_s(decodes(1, 1)) == pytest.approx(dense(decodes(1, 1)), rel=0.1)


def test_before_the_first_step_nothing_is_predicted():
    assert not StepTimeModel().is_fitted
    assert StepTimeModel().predict_s(decodes(1, 1)) == 0.0


works = st.builds(
    StepWork, st.integers(1, 3000), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 64)
)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(works, st.floats(1e-5, 10)), min_size=1, max_size=40), works, works)
def test_more_work_never_takes_less_time(steps, work, more):
    model = StepTimeModel()
    for done, seconds in steps:
        model.observe(done, seconds)
    assert 0 <= model.predict_s(work) <= model.predict_s(work + more) * (1 + 1e-9)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 10)), min_size=1))
def test_the_rising_mean_rises_and_keeps_the_sum(pairs):
    values, weights = zip(*pairs, strict=True)
    rising = rising_mean(values, weights)
    assert all(first <= second for first, second in itertools.pairwise(rising))

    def total(numbers):
        return sum(number * weight for number, weight in zip(numbers, weights, strict=True))

    assert total(rising) == pytest.approx(total(values))
    assert rising_mean(sorted(values), weights) == sorted(values)


def test_the_work_of_a_plan():
    decode = ScheduledRequest("a", 9, (1,), (0,), samples=True)
    chunk = ScheduledRequest("b", 4, (1, 2, 3), (0,), samples=False)
    plan = StepPlan(1, ((decode,), (chunk,)))
    assert StepWork.of(plan) == StepWork(tokens=4, context_tokens=10, chunk_pairs=5 + 6 + 7, samples=1)
