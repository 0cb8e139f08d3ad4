"""Small scenarios with round numbers, for the tests of the simulator."""

from dataclasses import replace

from afd_server.config import ServeConfig
from afd_server.planner.times import AttentionTimes, FFNTimes, LayerTimes, LinearTimes
from afd_server.simulator.demand import Demand, Lengths
from afd_server.simulator.scenario import Scenario

# 20 layers, each 200 us of attention and, for few rows, 400 us of FFN and 100 us of wire in each direction.
TIMES = LayerTimes(
    num_layers=20,
    attention=AttentionTimes(fixed_s=2e-4, row_s=2e-6, context_token_s=2e-9, chunk_pair_s=2e-10),
    ffn=FFNTimes(dense_s=4e-4, compute_row_s=4e-6),
    wire=LinearTimes(1e-4, 2e-7),
    overhead=LinearTimes(1e-3, 1e-5),
)
STEP_S = 20 * (2e-4 + 4e-4 + 2 * 1e-4) + 1e-3  # of few rows


def demand(clients=8, prompt="100", output="50"):
    """Clients that ask again and again."""
    lengths = Lengths.parse("--input-len", prompt), Lengths.parse("--output-len", output)
    return Demand(prompt=lengths[0], output=lengths[1], num_clients=clients)


def scenario(attention=1, ffn=1, ffn_replicas=1, *, config=(), **fields):
    serve = ServeConfig(
        attention_workers=attention,
        ffn_workers=ffn * ffn_replicas,
        ffn_replicas=ffn_replicas,
        **{"max_model_len": 2048, "max_num_seqs": 32, "micro_batches": "1", **dict(config)},
    )
    usual = {"times": TIMES, "demand": demand(), "duration_s": 10.0, "kv_tokens": 1 << 16}
    return Scenario(config=serve, **{**usual, **fields})


def times_with(**parts):
    return replace(TIMES, **parts)
