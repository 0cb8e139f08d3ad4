"""The halves as graphs give what they give without, whatever the sizes: on a CPU, with recorded operations for graphs.

With the GPU's kernels and real CUDA graphs: tests/unit/kernels/gpu/test_graphs.py, which runs the same decoding.
"""

import pytest
import torch

from afd_server.models.attention_graphs import AttentionGraphs
from afd_server.models.checkpoint import load_attention_half, load_ffn_half
from afd_server.models.families import read_model_spec
from afd_server.models.ffn_call import FFNCall
from afd_server.models.ffn_graphs import FFNGraphs
from afd_server.models.graphs import Captured, CUDACapture, filled_up
from afd_server.models.halves import FFNShard
from afd_server.models.operations import TorchOperations
from afd_server.models.spec import MoESpec
from tests.checkpoints import write_checkpoint
from tests.unit.models.capturable import CapturableOperations
from tests.unit.models.decoding import BLOCK_SIZE, MAX_MODEL_LEN, PLAN, Decoding
from tests.unit.models.tape import Tape

CPU = torch.device("cpu")
FAMILIES = ["qwen3", "qwen3_moe", "deepseek_v3", "step3"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {family: write_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def directory(request, directories):
    return directories[request.param]


def where(gate_on="attention", dtype=torch.float32):
    return {"device": CPU, "dtype": dtype, "gate_on": gate_on, "operations": CapturableOperations(dtype)}


def halves(directory, shard=None, **settings):
    spec = read_model_spec(directory)
    return (
        load_attention_half(directory, spec, **where(**settings)),
        load_ffn_half(directory, spec, shard or FFNShard(), **where(**settings)),
    )


def graphed(attention, ffn, tape):
    decoding = Decoding(attention, FFNGraphs(ffn, tape, max_rows=8))
    decoding.graphs = AttentionGraphs(
        attention, decoding.cache, block_size=BLOCK_SIZE, max_rows=8, max_model_len=MAX_MODEL_LEN, capture=tape
    )
    return decoding


@pytest.mark.parametrize("gate_on", ["attention", "ffn"])
def test_decoding(directory, gate_on):
    """Prompts, then steps of many sizes as one, two and three micro-batches."""
    tape = Tape()
    attention, ffn = halves(directory, gate_on=gate_on)
    expected = Decoding(attention, ffn).run(PLAN)
    for got, wanted in zip(graphed(attention, ffn, tape).run(PLAN), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert tape.num_recorded and tape.num_replayed


def test_full_graphs_give_the_same_bits(directory):
    """A matrix product may round a row otherwise among more rows, so only these can."""
    attention, ffn = halves(directory)
    plan = [PLAN[0], *[[range(4), range(4, 6)], [range(8)]] * 3]
    expected = Decoding(attention, ffn).run(plan)
    for got, wanted in zip(graphed(attention, ffn, Tape()).run(plan), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_size_is_recorded_once_for_every_micro_batch_and_layer(directories):
    attention, ffn = halves(directories["qwen3_moe"])
    tape, layers = Tape(), 3
    decoding = graphed(attention, ffn, tape)

    def recorded(step):
        before = tape.num_recorded
        decoding.run([step])
        return (tape.num_recorded - before) // layers

    assert recorded([range(9)]) == 0  # prompts, as whoever comes first has one
    assert recorded([range(3)]) == 2  # 4 rows, on both sides
    assert recorded([range(4)]) == 0
    assert recorded([range(3), range(4, 8)]) == 1  # the second micro-batch's
    assert recorded([range(5), range(5, 9)]) == 2  # 8 rows
    assert recorded([range(9)]) == 0  # too many
    assert recorded([range(1)]) == 2


def test_padding_writes_where_no_request_reads(directory):
    attention, ffn = halves(directory)
    decoding = graphed(attention, ffn, Tape())
    decoding.run(PLAN[:1])
    before = [cache.clone() for cache in decoding.cache]
    decoding.run([[range(5)]] * 2)
    for cache, old in zip(decoding.cache, before, strict=True):
        changed = (cache != old).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert set(changed) <= {*decoding.blocks_of(range(5)), len(cache) - 1}


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_calls_of_every_shard(directory, rows, wire):
    """Answers in the type of the wire. The second call finds less of its place taken than the first one did."""
    spec, generator = read_model_spec(directory), torch.Generator().manual_seed(rows)
    for shard in (FFNShard(0, 2), FFNShard(1, 2), FFNShard(0, 1, 1, 2)):
        _, ffn = halves(directory, shard)
        graphs = FFNGraphs(ffn, Tape(), max_rows=8)
        for layer, side in enumerate(spec.ffn):
            for count in (8, rows, rows, max(1, rows - 1)):
                x_TH = torch.randn(count, spec.hidden_size, generator=generator).to(wire)
                call = FFNCall(layer, x_TH)
                if isinstance(side, MoESpec):
                    ids = torch.rand(count, side.num_experts, generator=generator).argsort(1)[:, : side.top_k]
                    call.topk_ids = ids.to(torch.int32)
                    call.topk_weights = torch.rand(count, side.top_k, generator=generator)
                expected, out = ffn.forward(call, torch.empty_like(x_TH)), torch.empty_like(x_TH)
                assert graphs.forward(call, out) is out
                torch.testing.assert_close(
                    out, expected, rtol=1e-2 if wire is torch.bfloat16 else 1e-5, atol=1e-5
                )


def test_the_shared_expert_needs_no_count_of_its_rows(directories):
    """With and without one the same: see MoEFFN."""
    directory = directories["deepseek_v3"]
    spec, shard = read_model_spec(directory), FFNShard(1, 2)
    ffn = load_ffn_half(directory, spec, shard, **where())
    counting = load_ffn_half(directory, spec, shard, **where() | {"operations": TorchOperations(torch.float32)})
    call = FFNCall(2, torch.randn(6, spec.hidden_size), torch.tensor([[0, 5], [6, 1], [2, 3], [7, 4], [1, 0], [4, 2]]).int(),
                   torch.rand(6, 2))  # fmt: skip
    torch.testing.assert_close(ffn.forward(call), counting.forward(call))


def test_a_tape_takes_nothing_that_asks_the_device():
    x = torch.ones(2)
    with pytest.raises(AssertionError, match="asks the device"):
        Captured(lambda: x.nonzero(), Tape())()


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (129, 256)])
def test_sizes(rows, size):
    assert filled_up(rows) == size


def test_where_no_graph_can_be_had_the_function_runs_as_it_is(monkeypatch, caplog):
    class NoGraph:
        def capture_begin(self, **_):
            raise torch.OutOfMemoryError("no memory for a graph")

        def capture_end(self):
            raise AssertionError("has not begun")

    for name, stand_in in {"graph_pool_handle": tuple, "Stream": lambda _: None, "mem_get_info": lambda _: (1, 1),
                           "CUDAGraph": NoGraph}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    capture, calls = CUDACapture(torch.device("cuda"), "attention-7"), []
    captured = Captured(lambda: calls.append(1), capture)
    for count in (1, 2, 3):
        captured()
        assert len(calls) == count
    assert len(caplog.records) == 1
    assert "attention-7: no more CUDA graphs after 0 of them" in caplog.text and "no memory" in caplog.text
    assert capture.num_graphs == 0
