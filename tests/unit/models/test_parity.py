"""Every family gives transformers' logits, however its texts are cut and batched."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import FAMILIES, write_checkpoint
from tests.unit.models.served import CPU, KERNELS, PLANS, load_whole, random_texts, run

TEXTS = random_texts()

# No choice of experts: where a rounding sends a token to another one, the rest of its text is another.
EVERY_EXPERT = {
    "mixtral": {"num_experts_per_tok": 8},
    "qwen3_moe": {"num_experts_per_tok": 6},
    "deepseek_v3": {"num_experts_per_tok": 8, "topk_group": 4},
}
# Where and with what it is computed.
COMPUTING = [*[pytest.param("cpu", kernels, id=kernels) for kernels in KERNELS],
             pytest.param("cuda", "torch", marks=pytest.mark.gpu, id="cuda")]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Family -> (directory, transformers' float32 logits of every text), made once."""
    made = {}

    def get(family):
        if family not in made:
            directory = write_checkpoint(family, tmp_path_factory.mktemp(family))
            made[family] = (directory, transformers_logits(directory, TEXTS))
        return made[family]

    return get


@torch.inference_mode()
def transformers_logits(directory, texts, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    return [model(torch.tensor([ids])).logits[0].float() for ids in texts]


def assert_close(logits, expected, **tolerance):
    for (text, position), row in logits.items():
        torch.testing.assert_close(row, expected[text][position], **tolerance)


@pytest.mark.parametrize(("device", "kernels"), COMPUTING)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(reference, family, plan, device, kernels):
    directory, expected = reference(family)
    device = torch.device(device)
    model = load_whole(directory, device=device, kernels=kernels)
    logits = run(model, TEXTS, PLANS[plan](TEXTS), device=device)
    tolerance = 5e-5 if device == CPU else 2e-4
    assert_close(logits, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_one_text(reference, family):
    directory, expected = reference(family)
    torch.testing.assert_close(load_whole(directory).logits(TEXTS[0]), expected[0], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(("device", "kernels"), COMPUTING)
@pytest.mark.parametrize("plan", ["one_by_one", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path, family, plan, device, kernels):
    device = torch.device(device)
    directory = write_checkpoint(family, tmp_path, dtype="bfloat16", **EVERY_EXPERT.get(family, {}))
    exact = transformers_logits(directory, TEXTS)
    theirs = transformers_logits(directory, TEXTS, torch.bfloat16)
    model = load_whole(directory, dtype=torch.bfloat16, device=device, kernels=kernels)
    ours = run(model, TEXTS, PLANS[plan](TEXTS), dtype=torch.bfloat16, device=device)

    def mean_error(rows):
        return torch.stack([(row - exact[text][at]).abs() for (text, at), row in rows.items()]).mean()

    assert mean_error(ours) < 1.5 * mean_error({(text, at): theirs[text][at] for text, at in ours})


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 10}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 2}),
        ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 0}),
    ],
)
@pytest.mark.parametrize("kernels", KERNELS)
def test_variants_of_a_family(tmp_path, family, overrides, kernels):
    directory = write_checkpoint(family, tmp_path, **overrides)
    logits = run(load_whole(directory, tp=2, kernels=kernels), TEXTS, PLANS["mixed"](TEXTS))
    assert_close(logits, transformers_logits(directory, TEXTS), atol=5e-5, rtol=5e-5)
