"""Step-3 gives what its equations say, by itself and as the text part of the vision model's checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd_server.errors import ModelError
from tests.checkpoints import write_step3
from tests.unit.models.served import KERNELS, PLANS, load_whole, random_texts, run
from tests.unit.models.step3_oracle import step3_logits

TEXTS = random_texts((24, 1, 11))


def expected_logits(directory):
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    text = config.get("text_config", config)
    return [step3_logits(text, tensors, ids).float() for ids in TEXTS]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("plan", PLANS)
def test_the_equations(tmp_path, plan, kernels):
    directory = write_step3(tmp_path)
    logits = run(load_whole(directory, kernels=kernels), TEXTS, PLANS[plan](TEXTS))
    expected = expected_logits(directory)
    for (text, position), row in logits.items():
        torch.testing.assert_close(row, expected[text][position], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("gate_on", ["attention", "ffn"])
@pytest.mark.parametrize(("ep", "tp"), [(1, 3), (4, 1), (2, 2)])
def test_shards_and_renormalised_weights(tmp_path, ep, tp, gate_on):
    directory = write_step3(tmp_path, norm_expert_weight=True)
    model = load_whole(directory, ep=ep, tp=tp, gate_on=gate_on)
    torch.testing.assert_close(model.logits(TEXTS[0]), expected_logits(directory)[0], atol=5e-5, rtol=5e-5)


def test_the_vision_model_is_served_as_its_text_part(tmp_path):
    directory = write_step3(tmp_path)
    as_part_of_a_vision_model(directory)
    logits = load_whole(directory).logits(TEXTS[0])
    torch.testing.assert_close(logits, expected_logits(directory)[0], atol=5e-5, rtol=5e-5)


def test_what_is_unknown_in_the_text_part_is_refused(tmp_path):
    directory = write_step3(tmp_path, attention_sinks=4)
    as_part_of_a_vision_model(directory)
    with pytest.raises(ModelError, match=r"text_config: attention_sinks is 4"):
        load_whole(directory)


def as_part_of_a_vision_model(directory):
    text = json.loads((directory / "config.json").read_text())
    outer = {
        "architectures": ["Step3VLForConditionalGeneration"],
        "model_type": "step3_vl",
        "torch_dtype": text.pop("torch_dtype"),
        "vision_config": {"hidden_size": 8},
        "understand_projector_stride": 2,
        "text_config": text,
    }
    (directory / "config.json").write_text(json.dumps(outer))
    tensors = load_file(directory / "model.safetensors")
    tensors["vision_model.conv1.weight"] = torch.zeros(2, 2)
    tensors["vit_large_projector.weight"] = torch.zeros(2, 2)
    save_file(tensors, directory / "model.safetensors")
