"""What a worker runs before its first request: steps whose times resemble those of real ones. And with how many threads."""

from types import SimpleNamespace

import pytest
import torch

from afd_server.attention.worker import AttentionWorker
from afd_server.errors import WorkerTimeoutError
from afd_server.types import StepOutput, StepPlan, StepTiming

HALF = SimpleNamespace(sides=[object()], spec=SimpleNamespace(vocab_size=1000, eos_token_ids=(0,)))


class Recording(AttentionWorker):
    def __init__(self):
        super().__init__(HALF, [], None, block_size=16, device=torch.device("cpu"))
        self.plans = []

    def execute(self, plan):
        self.plans.append(plan)
        return StepOutput(step=plan.step, tokens=(), timing=StepTiming(0.0, num_tokens=plan.num_tokens))


def test_the_tokens_of_a_warm_up_differ_so_that_they_choose_different_experts():
    worker = Recording()
    measured = worker.warm_up([1, 32])
    assert [timing.num_tokens for _, timing in measured] == [1, 32]
    (parts,) = worker.plans[1].micro_batches
    tokens = [token for part in parts for token in part.token_ids]
    assert len(set(tokens)) > 25
    assert all(0 <= token < 1000 for token in tokens)
    assert len({block for part in parts for block in part.block_table}) == 32


@pytest.mark.usefixtures("other_numbers_of_threads")
def test_the_number_of_threads_may_change_from_step_to_step():
    class OutOfReach:
        def begin_step(self, step):
            seen.append(torch.get_num_threads())
            raise WorkerTimeoutError("ffn-0", "out of reach")

    seen = []
    worker = AttentionWorker(HALF, [], OutOfReach(), block_size=16, device=torch.device("cpu"))
    for worker.threads in (3, 2, None):
        with pytest.raises(WorkerTimeoutError):
            worker.execute(StepPlan(0, (), ()))
    assert seen == [3, 2, 2]
