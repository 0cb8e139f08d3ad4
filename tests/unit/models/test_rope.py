"""Every stretching of RoPE gives transformers' logits, in both spellings of config.json."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from afd_server.models.families import read_model_spec
from afd_server.models.rope import Rope
from afd_server.models.spec import RopeSpec
from tests.checkpoints import write_checkpoint
from tests.unit.models.served import CPU, PLANS, load_whole, random_texts, run

TEXTS = random_texts((60, 33))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn, all keys": {**YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3, "truncate": False},
    "yarn, mscale": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.5},
}
LATENT_SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0, "mscale_all_dim": 0.8},
    "yarn": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, no mscale": YARN,
}


def transformers_logits(directory, ids):
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    return model(torch.tensor([ids])).logits[0]


@torch.inference_mode()
def check(directory, expected):
    logits = run(load_whole(directory), TEXTS, PLANS["mixed"](TEXTS))
    for (text, position), row in logits.items():
        torch.testing.assert_close(row, expected[text][position], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scalings(tmp_path, scaling):
    rope = {"rope_theta": 5000.0, **SCALINGS[scaling]}
    directory = write_checkpoint("llama", tmp_path, rope_parameters=rope)
    with torch.inference_mode():
        expected = [transformers_logits(directory, ids) for ids in TEXTS]
    check(directory, expected)
    in_the_older_spelling(directory)
    check(directory, expected)


@pytest.mark.parametrize("scaling", LATENT_SCALINGS)
def test_scalings_of_latent_attention(tmp_path, scaling):
    rope = {"rope_theta": 5000.0, **LATENT_SCALINGS[scaling]}
    directory = write_checkpoint("deepseek_v3", tmp_path, rope_parameters=rope)
    with torch.inference_mode():
        expected = [transformers_logits(directory, ids) for ids in TEXTS]
    check(directory, expected)
    in_the_older_spelling(directory)
    check(directory, expected)


def in_the_older_spelling(directory):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = None if scaling == {"type": "default"} else scaling
    path.write_text(json.dumps(config))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames past_key_values
@torch.inference_mode()
def test_dynamic_scaling_is_transformers_decoding_token_by_token(tmp_path):
    """Beyond the trained length; there transformers' result depends on the cut, ours is that of single tokens."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
    directory = write_checkpoint("llama", tmp_path, rope_parameters=rope, max_position_embeddings=32)
    assert read_model_spec(directory).max_position_embeddings == 64
    expected = []
    for ids in TEXTS:
        # A new model for each text: the frequencies that it grew to are kept in it.
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        state, rows = None, []
        for token_id in ids:
            output = model(torch.tensor([[token_id]]), past_key_values=state, use_cache=True)
            state = output.past_key_values
            rows.append(output.logits[0, 0])
        expected.append(rows)
    check(directory, expected)


def test_interleaved_pairs_turn_as_half_split_ones():
    heads = torch.randn(5, 3, 8)
    positions = torch.tensor([0, 1, 7, 100, 3])
    half_split = Rope(RopeSpec("default", 100.0), 8, CPU).table(positions, torch.float32)
    interleaved = Rope(RopeSpec("default", 100.0, interleaved=True), 8, CPU).table(positions, torch.float32)
    pairs_together = heads.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
    assert torch.equal(interleaved.rotate(pairs_together), half_split.rotate(heads))
    assert torch.equal(half_split.rotate(heads)[0], heads[0])  # position 0 does not turn
