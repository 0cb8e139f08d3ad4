"""A model as a server runs it: texts cut into chunks, several in a batch, blocks scattered over a used cache."""

import random

import torch

from afd_server.models.batch import AttentionBatch
from afd_server.models.checkpoint import load_attention_half, load_ffn_half, operations_for
from afd_server.models.families import read_model_spec
from afd_server.models.halves import FFNShard, WholeModel
from afd_server.types import ScheduledRequest

BLOCK_SIZE = 4
CPU = torch.device("cpu")
KERNELS = ("torch", "native")


def load_whole(directory, *, ep=1, tp=1, gate_on="attention", dtype=torch.float32, device=CPU, kernels="torch"):
    """WholeModel with its FFN side in ep * tp shards."""
    spec = read_model_spec(directory)
    operations = operations_for(device, dtype, kernels)
    where = {"device": device, "dtype": dtype, "gate_on": gate_on, "operations": operations}
    shards = [FFNShard(e, ep, t, tp) for e in range(ep) for t in range(tp)]
    halves = [load_ffn_half(directory, spec, shard, **where) for shard in shards]
    return WholeModel(load_attention_half(directory, spec, **where), halves)


def random_texts(lengths=(40, 1, 23, 9), seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def in_one_go(texts):
    """All texts at once, each whole."""
    return [[(text, len(ids)) for text, ids in enumerate(texts)]]


def in_chunks(texts, size=7):
    return [
        [(text, min(size, len(ids) - start))]
        for text, ids in enumerate(texts)
        for start in range(0, len(ids), size)
    ]


def one_by_one(texts):
    """A batch of single tokens in every step, as in decoding."""
    longest = max(map(len, texts))
    return [[(text, 1) for text, ids in enumerate(texts) if step < len(ids)] for step in range(longest)]


def mixed(texts, seed=1):
    """Chunks and single tokens of a changing set of texts, in changing order."""
    draw = random.Random(seed)
    done, plan = [0] * len(texts), []
    while any(at < len(ids) for at, ids in zip(done, texts, strict=True)):
        step = []
        for text in draw.sample(range(len(texts)), draw.randint(1, len(texts))):
            left = len(texts[text]) - done[text]
            if left:
                count = min(left, draw.choice([1, 1, 2, 5, 11]))
                done[text] += count
                step.append((text, count))
        if step:
            plan.append(step)
    return plan


PLANS = {plan.__name__: plan for plan in (in_one_go, in_chunks, one_by_one, mixed)}


@torch.inference_mode()
def run(model, texts, plan, *, dtype=torch.float32, device=CPU):
    """{(text, position): logits [V]} for the last row of every piece of the plan, a list of steps of (text, count)."""
    blocks_of = [-(-len(ids) // BLOCK_SIZE) for ids in texts]
    order = list(range(sum(blocks_of) + 3))
    random.Random(2).shuffle(order)
    tables = [tuple(order.pop() for _ in range(count)) for count in blocks_of]
    generator = torch.Generator().manual_seed(9)
    shape = (sum(blocks_of) + 3, BLOCK_SIZE, *model.spec.attention.cache_entry_shape)
    # What a freed block held is still in it: masked entries must not show, however large.
    cache = [
        (torch.randn(shape, generator=generator) * 50).to(device=device, dtype=dtype)
        for _ in range(model.spec.num_layers)
    ]
    done, logits = [0] * len(texts), {}
    for step in plan:
        requests, ends = [], []
        for text, count in step:
            ids = tuple(texts[text][done[text] : done[text] + count])
            requests.append(ScheduledRequest(str(text), done[text], ids, tables[text], samples=True))
            done[text] += count
            ends.append((text, done[text] - 1))
        rows = model.run(AttentionBatch.build(requests, BLOCK_SIZE, device), cache)
        assert rows.dtype == torch.float32
        logits |= dict(zip(ends, rows.cpu(), strict=True))
    assert done == list(map(len, texts))
    return logits
