"""A step without Python between its hops against the same step the long way: equal to the bit, whatever happens on the way."""

import contextlib
import threading

import pytest
import torch

from afd_server.attention.dispatch import GroupLayout
from afd_server.attention.ffn_group import FFNGroup
from afd_server.attention.hop_notes import HopNotes
from afd_server.attention.shortcut import shortcut_for
from afd_server.errors import WorkerTimeoutError
from afd_server.ffn.worker import FFNWorker
from afd_server.models.batch import AttentionBatch
from afd_server.models.checkpoint import load_attention_half, load_ffn_half, operations_for
from afd_server.models.families import read_model_spec
from afd_server.models.ffn_layer_cpu import call_account, kernel_ffn
from afd_server.models.halves import FFNShard
from afd_server.pipeline import run_pipeline
from afd_server.transport.base import LinkShape
from afd_server.transport.connect import connect
from afd_server.transport.listener import SocketListener
from afd_server.types import ScheduledRequest
from tests.checkpoints import write_checkpoint

CPU, BLOCK_SIZE, NUM_BLOCKS = torch.device("cpu"), 4, 12
SECRET = b"the cluster's secret"
STEPS = [
    [ScheduledRequest("a", 0, tuple(range(7)), (3, 5), True), ScheduledRequest("b", 0, (9,), (1,), True)],
    [ScheduledRequest("a", 7, (11,), (3, 5), True), ScheduledRequest("b", 1, (12,), (1,), True)],
    [ScheduledRequest("b", 2, (4,), (1,), True)],
]


@pytest.fixture(scope="module", params=["qwen3_moe", "llama"])
def directory(request, tmp_path_factory):
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "model")


class Half:
    """An FFN half that notes its calls, and does `before(layer)` first."""

    def __init__(self, half):
        self.half, self.calls, self.before = half, [], lambda layer: None

    def routed(self, call):
        return self.half.routed(call)

    def forward(self, call, out=None):
        self.calls.append(call.layer)
        self.before(call.layer)
        return self.half.forward(call, out)


class Machine:
    """One attention half, and an FFN worker on a thread that may end and be started afresh."""

    def __init__(self, directory, *, dtype=torch.float32, gate_on="attention", ffn_loop=True, timeout_s=20.0):
        self.spec = read_model_spec(directory)
        where = {
            "device": CPU,
            "dtype": dtype,
            "gate_on": gate_on,
            "operations": operations_for(CPU, dtype, "native"),
        }
        self.attention = load_attention_half(directory, self.spec, **where)
        half = load_ffn_half(directory, self.spec, FFNShard(), **where)
        self.kernels = [kernel_ffn(layer) for layer in half.layers] if ffn_loop else ()
        self.half = Half(half)
        experts = max((getattr(ffn, "num_experts", 0) for ffn in self.spec.ffn), default=0)
        top_k = max((getattr(ffn, "top_k", 0) for ffn in self.spec.ffn), default=0)
        self.shape = LinkShape(64, self.spec.hidden_size, top_k if gate_on == "attention" else 0, "float32")
        self.workers = []
        self.start_worker()
        self.group = FFNGroup(
            {0: self.connector()},
            GroupLayout(1, 1, experts),
            replica=0,
            dtype=torch.float32,
            timeout_s=timeout_s,
            hops=HopNotes(self.spec.num_layers),
        )
        self.group.connect()
        shape = (NUM_BLOCKS, BLOCK_SIZE, *self.spec.attention.cache_entry_shape)
        self.cache = [torch.zeros(shape, dtype=dtype) for _ in range(self.spec.num_layers)]
        self.sent = self.resent = 0

    def start_worker(self):
        listener = SocketListener("ffn-0", "here", SECRET)
        worker = FFNWorker(
            "ffn-0",
            self.half,
            listener,
            account=call_account(self.half.half.layers),
            kernels=self.kernels,
            end_at_failure=True,
        )
        thread = threading.Thread(target=self.serve, args=(worker,), daemon=True)
        self.workers.append((worker, thread, listener))
        thread.start()

    @staticmethod
    def serve(worker):
        with contextlib.suppress(SystemExit):
            worker.serve()

    def replace_worker(self):
        """A worker that is new takes the place of the one that is about to end."""
        self.start_worker()
        self.group.replace(0, self.connector())

    def connector(self):
        endpoint = self.workers[-1][2].endpoint
        return lambda timeout_s: connect(endpoint, self.shape, 0, SECRET, "shm", timeout_s)

    @torch.inference_mode()
    def step(self, index, shortcut):
        self.group.begin_step(index)
        batch = AttentionBatch.build(STEPS[index], BLOCK_SIZE, CPU)
        run = run_pipeline([self.attention.forward(batch, self.cache, shortcut)], self, self.spec.num_layers)
        self.resent += self.group.timing.num_resent
        return self.attention.logits(run.results[0])

    def steps(self, shortcut):
        return [self.step(index, shortcut) for index in range(len(STEPS))]

    def send(self, micro_batch, call):
        self.sent += 1
        self.group.send(micro_batch, call)

    def receive(self, micro_batch):
        return self.group.receive(micro_batch)

    def shortcut(self):
        found = shortcut_for(self.attention, self.group)
        assert found is not None
        return found

    def close(self):
        self.group.close()
        for worker, thread, _ in self.workers:
            worker.stop()
            thread.join(10)
            assert not thread.is_alive()


@contextlib.contextmanager
def machine(directory, **options):
    built = Machine(directory, **options)
    try:
        yield built
    finally:
        built.half.before = lambda layer: None
        built.close()


def long_way(directory, **options):
    """(logits of each step, cache) with Python on both sides of every hop."""
    with machine(directory, ffn_loop=False, **options) as built:
        return built.steps(None), built.cache


def assert_equal(built, logits, expected):
    steps, cache = expected
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(logits, steps, strict=True))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(built.cache, cache, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ffn_loop", [True, False])
@pytest.mark.parametrize("attention_loop", [True, False])
def test_every_pair_of_ways_gives_the_same_bits(directory, attention_loop, ffn_loop, dtype):
    expected = long_way(directory, dtype=dtype)
    with machine(directory, ffn_loop=ffn_loop, dtype=dtype) as built:
        assert_equal(built, built.steps(built.shortcut() if attention_loop else None), expected)
        num_calls = len(STEPS) * built.spec.num_layers
        assert built.sent == (0 if attention_loop else num_calls)
        # The call that finds the loop between two looks for new connections is served the long way.
        assert len(built.half.calls) == num_calls if not ffn_loop else len(built.half.calls) < num_calls
        if attention_loop:
            assert built.group.timing.num_hops == built.spec.num_layers
            assert built.group.timing.ffn_rows == built.spec.num_layers  # the last step has one row
            assert built.group.progressed_at > 0


def test_experts_chosen_at_the_ffn_side_are_served_the_long_way_there(directory):
    expected = long_way(directory, gate_on="ffn")
    with machine(directory, gate_on="ffn") as built:
        assert_equal(built, built.steps(built.shortcut()), expected)
        assert built.sent == 0


# Either ends the worker: after it has said why, or with every connection, this call's too.
@pytest.mark.parametrize("fault", [RuntimeError("this one cannot be computed"), SystemExit()])
def test_a_call_that_is_lost_is_made_again_and_the_step_goes_on(directory, fault):
    expected = long_way(directory)
    with machine(directory, ffn_loop=False) as built:

        def end_once(layer):
            if layer == 1 and len(built.workers) == 1:
                built.replace_worker()
                raise fault

        built.half.before = end_once
        assert_equal(built, built.steps(built.shortcut()), expected)
        assert len(built.workers) == 2 and built.sent >= 1
        assert built.resent >= 1


def test_a_worker_that_hangs_is_an_error_within_its_time_and_the_next_step_works(directory):
    expected = long_way(directory)
    with machine(directory, ffn_loop=False, timeout_s=0.5) as built:
        shortcut, go_on = built.shortcut(), threading.Event()
        built.half.before = lambda layer: layer == 1 and go_on.wait(20)
        with pytest.raises(WorkerTimeoutError, match=r"ffn-0.*no answer within 0\.5 s"):
            built.step(0, shortcut)
        built.half.before = lambda layer: None
        go_on.set()
        assert_equal(built, built.steps(shortcut), expected)


def test_it_is_for_layers_that_are_kernels(directory, tmp_path):
    spec = read_model_spec(directory)
    plain = load_attention_half(directory, spec, device=CPU, dtype=torch.float32, gate_on="attention",
                                operations=operations_for(CPU, torch.float32, "torch"))  # fmt: skip
    assert shortcut_for(plain, None) is None
    latent = write_checkpoint("deepseek_v3", tmp_path / "model")
    half = load_attention_half(latent, read_model_spec(latent), device=CPU, dtype=torch.float32, gate_on="attention",
                               operations=operations_for(CPU, torch.float32, "native"))  # fmt: skip
    assert shortcut_for(half, None) is None


def test_its_hops_are_recorded_and_summed_as_those_of_the_long_way(directory):
    recorded = []
    for has_shortcut in (False, True):
        with machine(directory) as built:
            shortcut = built.shortcut() if has_shortcut else None
            built.step(0, shortcut)
            number = built.group.hops.recorder.begin(60.0)
            built.step(1, shortcut)
            spans, _ = built.group.hops.recorder.end(number)
            recorded.append(
                sorted(
                    (s.name, s.step, s.layer, s.micro_batch, s.peer, s.rows) for s in spans if s.name != "send"
                )
            )
            assert all(span.began_s <= span.ended_s for span in spans)
            totals = built.group.hops.layers.read()
            assert [(total.batches, total.rows) for total in totals] == [(2, 10)] * built.spec.num_layers
            assert all(total.seconds > 0 for total in totals)
            assert built.group.hops.waits()[0].calls == 2 * built.spec.num_layers
    assert recorded[0] == recorded[1]
    assert len(recorded[0]) == 3 * built.spec.num_layers
