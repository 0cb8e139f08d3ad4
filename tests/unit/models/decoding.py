"""Steps of a model in its two halves as an attention worker drives them, micro-batches and all, with the texts given."""

import random

import torch

from afd_server.models.batch import AttentionBatch
from afd_server.pipeline import run_pipeline
from afd_server.types import ScheduledRequest

BLOCK_SIZE = 4
MAX_MODEL_LEN = 48
PROMPTS = (5, 1, 3, 17, 2, 9, 30, 4, 1)

# Of every step its micro-batches, each of some of the texts. A text comes with its prompt first, then token by token.
PLAN = [
    [range(9)],
    *[[range(5)], [range(3), range(3, 8)], [range(8)], [range(1), [6, 2], [5, 7, 3]], [range(9)], [[4], [1, 0]]] * 2,
    [range(1)],
]  # fmt: skip


class Decoding:
    """graphs: an AttentionGraphs over `cache`, which may be set before `run`. ffn: an FFNHalf or what is in its place."""

    def __init__(self, attention, ffn):
        self.graphs = None
        self._attention, self._ffn = attention, ffn
        order = list(range(len(PROMPTS) * MAX_MODEL_LEN // BLOCK_SIZE))
        random.Random(2).shuffle(order)
        self._tables = [tuple(order[text :: len(PROMPTS)]) for text in range(len(PROMPTS))]
        generator = torch.Generator().manual_seed(3)
        vocab_size, device = attention.spec.vocab_size, attention.device
        self._tokens = torch.randint(
            vocab_size, (len(PROMPTS), MAX_MODEL_LEN), generator=generator, dtype=torch.int32
        ).tolist()
        self._done = [0] * len(PROMPTS)
        shape = (len(order) + 1, BLOCK_SIZE, *attention.spec.attention.cache_entry_shape)
        # What was there before must not show.
        self.cache = [
            (torch.randn(shape, generator=generator) * 50).to(device, attention.cache_dtype)
            for _ in attention.sides
        ]

    def blocks_of(self, texts):
        return [block for text in texts for block in self._tables[text]]

    @torch.inference_mode()
    def run(self, plan):
        """The logits of every step's rows."""
        return [self._step(micro_batches) for micro_batches in plan]

    def _step(self, micro_batches):
        passes = []
        for number, texts in enumerate(micro_batches):
            requests = [self._next(text) for text in texts]
            if self.graphs is not None and self.graphs.take(requests):
                passes.append(self.graphs.forward(number, requests))
            else:
                batch = AttentionBatch.build(requests, BLOCK_SIZE, self._attention.device)
                passes.append(self._attention.forward(batch, self.cache))
        run = run_pipeline(passes, _LateAnswers(self._ffn), num_hops=len(self._attention.sides))
        return self._attention.logits(torch.cat(run.results)).cpu()

    def _next(self, text):
        done = self._done[text]
        end = self._done[text] = done + 1 if done else PROMPTS[text]
        return ScheduledRequest(
            str(text), done, tuple(self._tokens[text][done:end]), self._tables[text], samples=True
        )


class _LateAnswers:
    """A channel that computes a call when its answer is waited for: until then the call must stay as it is, since it might
    have to be sent again."""

    def __init__(self, ffn):
        self._ffn, self._calls = ffn, {}

    def send(self, micro_batch, call):
        self._calls[micro_batch] = call

    def receive(self, micro_batch):
        return self._ffn.forward(self._calls.pop(micro_batch)).clone()
