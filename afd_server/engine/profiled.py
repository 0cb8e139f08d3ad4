"""What `afd profile` measured, as the first belief of the models of step time.

What lives here: the steps and slopes that stand for a profile. What does not: the profile (planner/), and learning (step_time.py
and micro_batches.py), which goes on from here: what really runs soon outweighs it.
"""

from __future__ import annotations

from collections.abc import Iterator

from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.step_time import StepTimeModel, StepWork
from afd_server.planner.times import LayerTimes
from afd_server.types import StepTiming

CONTEXT = 512  # of each request in the steps that stand for a size; the slopes know the rest


def profiled_model(times: LayerTimes, max_requests: int, max_tokens: int) -> StepTimeModel:
    """A model that believes the profile, up to steps of max_tokens tokens."""
    layers = times.num_layers
    slopes = (
        layers * times.attention.context_token_s,
        layers * times.attention.chunk_pair_s,
        times.overhead.row_s,
    )
    return StepTimeModel(slopes, ((work, _seconds(times, work)) for work in _steps(max_requests, max_tokens)))


def tell_chooser(times: LayerTimes, chooser: MicroBatchChooser, max_requests: int) -> None:
    """Tells what hops take, by the number of requests."""
    for power in range(max_requests.bit_length()):
        size = 2**power
        attention_s = times.num_layers * times.attention_s(size, size * CONTEXT)
        ffn_s, wire_s = times.num_layers * times.ffn_s(size), times.num_layers * 2 * times.wire_s(size)
        chooser.observe(
            StepTiming(
                total_s=times.step_s(size, size * CONTEXT), attention_s=attention_s, ffn_s=ffn_s, wire_s=wire_s,
                bubble_s=ffn_s + wire_s, num_hops=times.num_layers, num_tokens=size,
            )
        )  # fmt: skip


def _steps(max_requests: int, max_tokens: int) -> Iterator[StepWork]:
    """One for each power of two of tokens: of requests that decode, and beyond as many as may run of one prompt."""
    for power in range(max_tokens.bit_length()):
        tokens = 2**power
        decoding = StepWork(tokens, tokens * CONTEXT, 0, tokens)
        yield decoding if tokens <= max_requests else StepWork.part(0, tokens, True)


def _seconds(times: LayerTimes, work: StepWork) -> float:
    layers_s = times.layers_s(work.tokens, work.context_tokens, work.chunk_pairs)
    return layers_s + times.step_overhead_s(work.samples)
