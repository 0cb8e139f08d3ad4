"""What a worker runs before its first request: steps whose times resemble those of real ones."""

from types import SimpleNamespace

import torch

from afd_server.attention.worker import AttentionWorker
from afd_server.types import StepOutput, StepTiming


class Recording(AttentionWorker):
    def __init__(self):
        half = SimpleNamespace(sides=[object()], spec=SimpleNamespace(vocab_size=1000, eos_token_ids=(0,)))
        super().__init__(half, [], None, block_size=16, device=torch.device("cpu"))
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
