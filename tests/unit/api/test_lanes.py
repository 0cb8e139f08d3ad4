from afd_server.api.page.lanes import MAX_LANES, MAX_SPANS, NAMES, lanes
from afd_server.types import HopSpan, WorkerTrace


def attention(name="attention-0", steps=range(6), hops=2, offset_s=0.0):
    """Steps of 10 ms, hops of 1 ms one after the other."""
    spans = [
        HopSpan(
            "attention",
            offset_s + 0.01 * step + 0.001 * hop,
            offset_s + 0.01 * step + 0.001 * (hop + 1),
            step,
            hop,
            0,
        )
        for step in steps
        for hop in range(hops)
    ]
    return WorkerTrace(name, "attention", tuple(spans))


def ffn(name="ffn-0", began_s=0.0, ended_s=0.1):
    return WorkerTrace(name, "ffn", (HopSpan("ffn", began_s, ended_s, 0, 3, 1),))


def test_nobody_ran_a_step():
    assert lanes([]) is None
    assert lanes([WorkerTrace("attention-0", "attention", ()), ffn()]) is None


def test_the_last_whole_steps_are_shown_from_their_own_beginning():
    shown = lanes([attention()])
    assert shown["steps"] == [[2, 0, 2000], [3, 10_000, 12_000], [4, 20_000, 22_000]]
    assert shown["duration_us"] == 22_000
    (lane,) = shown["workers"]
    assert lane["spans"][0] == [NAMES.index("attention"), 0, 1000, 0, 0, 2]
    assert len(lane["spans"]) == 6


def test_a_window_with_one_step_shows_it():
    assert [step for step, _, _ in lanes([attention(steps=[7])])["steps"]] == [7]


def test_what_reaches_beyond_the_window_is_cut_at_it():
    _, lane = lanes([attention(), ffn(began_s=0.0, ended_s=1.0)])["workers"]
    assert lane["spans"] == [[NAMES.index("ffn"), 0, 22_000, 3, 1, 0]]


def test_fewer_steps_are_shown_when_they_have_many_hops():
    shown = lanes([attention(hops=MAX_SPANS // 2)])
    assert [step for step, _, _ in shown["steps"]] == [4]


def test_a_step_with_too_many_hops_is_shown_in_part():
    shown = lanes([attention(steps=[1], hops=2 * MAX_SPANS)])
    (lane,) = shown["workers"]
    assert len(lane["spans"]) <= MAX_SPANS
    assert shown["duration_us"] == 1000 * MAX_SPANS


def test_calls_are_seen_by_their_parts():
    trace = attention()
    call = HopSpan("call", 0.02, 0.03, 2, 0, 0)
    shown = lanes([WorkerTrace("attention-0", "attention", (*trace.spans, call))])
    assert len(shown["workers"][0]["spans"]) == 6


def test_of_many_workers_the_first_ones_are_drawn_and_the_others_counted():
    traces = [attention(f"attention-{index}") for index in range(MAX_LANES + 3)] + [
        ffn(f"ffn-{index}") for index in range(2)
    ]
    shown = lanes(traces)
    names = [lane["name"] for lane in shown["workers"]]
    assert names == [*(f"attention-{index}" for index in range(MAX_LANES)), "ffn-0", "ffn-1"]
    assert shown["num_not_drawn"] == 3
