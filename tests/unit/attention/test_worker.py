"""The attention worker as the engine uses it: what it saves time with changes nothing of what comes out."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from afd_server.attention.dispatch import GroupLayout
from afd_server.attention.ffn_group import FFNGroup
from afd_server.attention.hop_notes import HopNotes
from afd_server.attention.worker import AttentionWorker
from afd_server.engine.engine import Engine
from afd_server.engine.micro_batches import MicroBatchChooser
from afd_server.engine.scheduler import Scheduler
from afd_server.engine.step_time import StepTimeModel
from afd_server.models.checkpoint import load_attention_half, load_ffn_half, operations_for
from afd_server.models.families import read_model_spec
from afd_server.models.halves import FFNShard
from afd_server.transport.direct import DirectLink
from afd_server.types import GenerationRequest, SamplingParams
from tests.checkpoints import write_checkpoint
from tests.unit.engine.toy_worker import small_config

CPU, NUM_BLOCKS = torch.device("cpu"), 12
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe") / "model")


class Machine:
    """An engine over a real worker, both halves on one thread."""

    def __init__(self, directory, micro_batches):
        config, spec = small_config(), read_model_spec(directory)
        where = {"device": CPU, "dtype": torch.float32, "gate_on": "attention",
                 "operations": operations_for(CPU, torch.float32, "native")}  # fmt: skip
        half = load_attention_half(directory, spec, **where)
        ffn = load_ffn_half(directory, spec, FFNShard(), **where)
        self.group = FFNGroup(
            {0: lambda timeout_s: DirectLink("ffn-0", ffn.forward)},
            GroupLayout(1, 1, max(getattr(layer, "num_experts", 0) for layer in spec.ffn)),
            replica=0, dtype=torch.float32, timeout_s=DEADLINE_S, hops=HopNotes(spec.num_layers),
        )  # fmt: skip
        self.group.connect()
        shape = (NUM_BLOCKS, config.block_size, *spec.attention.cache_entry_shape)
        self.cache = [torch.zeros(shape) for _ in range(spec.num_layers)]
        self.worker = AttentionWorker(half, self.cache, self.group, block_size=config.block_size, device=CPU)
        scheduler = Scheduler(config, num_blocks=NUM_BLOCKS, eos_token_ids=())
        self.engine = Engine(self.worker, scheduler, MicroBatchChooser(str(micro_batches)), StepTimeModel())

    def outputs(self, each_step=lambda: None):
        """All outputs of some requests that come and go, and are preempted; with log-probabilities, so that bits show."""
        outputs = []
        for step in range(200):
            if step in (0, 3, 4, 9):
                sampling = SamplingParams(
                    max_tokens=20,
                    seed=step,
                    temperature=0.8 * (step % 2),
                    top_p=0.9,
                    logprobs=2,
                    ignore_eos=True,
                )
                self.engine.submit(GenerationRequest(str(step), tuple(range(1, 8 + step)), sampling))
            if step == 8:
                outputs += self.engine.abort("3")
            if self.engine.has_work:
                each_step()
                outputs += self.engine.step().outputs
        assert self.engine.stats().num_preemptions > 0
        self.engine.check()
        self.group.close()
        return outputs


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_prompts_are_reported_as_transformers_sees_them(directory, micro_batches):
    """Prompts in parts and beside others, of one token and of a full context, preempted in the middle."""
    machine = Machine(directory, micro_batches)
    generator = torch.Generator().manual_seed(1)
    prompts = {
        str(length): torch.randint(250, (length,), generator=generator).tolist()
        for length in (1, 2, 17, 30, 32)
    }
    for name, prompt in prompts.items():
        num_tokens = 0 if len(prompt) == 32 else 2
        machine.engine.submit(
            GenerationRequest(name, tuple(prompt), SamplingParams(num_tokens, prompt_logprobs=3))
        )
    machine.engine.submit(GenerationRequest("decodes", (5, 6), SamplingParams(20, ignore_eos=True)))
    reports = {name: [] for name in prompts}
    while machine.engine.has_work:
        for output in machine.engine.step().outputs:
            assert output.error is None
            reports.get(output.request_id, []).extend(output.prompt_logprobs)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for name, prompt in prompts.items():
        with torch.no_grad():
            expected_TV = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        assert len(reports[name]) == len(expected_TV)
        for token_id, given, expected_V in zip(prompt[1:], reports[name], expected_TV, strict=True):
            assert given.logprob == pytest.approx(float(expected_V[token_id]), abs=2e-4)
            assert given.rank == 1 + int((expected_V > expected_V[token_id]).sum())
            assert [other for other, _ in given.top] == expected_V.topk(3).indices.tolist()
            assert [value for _, value in given.top] == pytest.approx(
                expected_V.topk(3).values.tolist(), abs=2e-4
            )


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_batches_that_move_on_give_the_same_bits_as_those_that_are_built(directory, micro_batches):
    moving, building = Machine(directory, micro_batches), Machine(directory, micro_batches)
    outputs = moving.outputs()
    assert outputs == building.outputs(building.worker._batches.clear)
    assert all(torch.equal(mine, other) for mine, other in zip(moving.cache, building.cache, strict=True))


def test_a_micro_batch_is_sampled_while_the_next_one_is_in_its_last_layer(directory):
    machine = Machine(directory, 2)
    events, receive, sample = [], machine.group.receive, machine.worker._sampler.sample
    machine.group.receive = lambda micro_batch: (events.append(micro_batch), receive(micro_batch))[1]
    machine.worker._sampler.sample = lambda ids, logits: (events.append("sample"), sample(ids, logits))[1]
    for name in "ab":
        machine.engine.submit(GenerationRequest(name, (1, 2), SamplingParams(2, ignore_eos=True)))
    machine.engine.step()
    assert events[-4:] == [0, "sample", 1, "sample"]


def test_every_hop_of_a_step_is_recorded_while_somebody_asks_for_it(directory):
    machine = Machine(directory, 2)
    for name in "ab":
        machine.engine.submit(GenerationRequest(name, (1, 2), SamplingParams(3, ignore_eos=True)))
    machine.engine.step()
    hops, num_layers = machine.group.hops, len(machine.cache)
    number = hops.recorder.begin(60.0)
    machine.engine.step()
    spans, _ = hops.recorder.end(number)
    machine.engine.step()
    places = [(layer, micro_batch) for layer in range(num_layers) for micro_batch in range(2)]
    for name in ("attention", "send", "call", "bubble"):
        assert [(each.layer, each.micro_batch) for each in spans if each.name == name] == places
    assert [(each.micro_batch, each.rows) for each in spans if each.name == "sampling"] == [(0, 1), (1, 1)]
    # The thread does one thing at a time.
    mine = sorted((each for each in spans if each.name != "call"), key=lambda each: each.began_s)
    assert all(one.ended_s <= other.began_s for one, other in itertools.pairwise(mine))
    calls = {(each.layer, each.micro_batch): each for each in spans if each.name == "call"}
    for each in spans:
        if each.name == "bubble":
            call = calls[each.layer, each.micro_batch]
            assert call.began_s <= each.began_s
            assert (call.ended_s, call.peer) == (each.ended_s, "ffn-0")
    # The sums are kept, recorded or not.
    assert [total.batches for total in hops.layers.read()] == [6] * num_layers
    (waits,) = hops.waits()
    assert (waits.worker, waits.calls) == ("ffn-0", 6 * num_layers)
