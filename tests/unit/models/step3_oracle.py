"""Step-3 from its equations (arXiv 2507.19427, and its published tensors' names): float64, one text, nothing cached.

Written head by head and token by token where that reads plainest; it shares no code with the server.
"""

import torch


def step3_logits(config, tensors, token_ids):
    """Float64 logits [T, V] of one text. config: the text part of config.json; tensors: name -> tensor."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    x_TH = weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
    moe_layers = [int(layer) for layer in config["moe_layers_enum"].split(",")]
    for layer in range(config["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        eps = config["rms_norm_eps"]
        x_TH = x_TH + attention(config, own, norm(x_TH, own["input_layernorm.weight"], eps))
        n_TH = norm(x_TH, own["post_attention_layernorm.weight"], eps)
        if layer in moe_layers:
            shared = mlp(n_TH, *(own[f"share_expert.{name}_proj.weight"] for name in ("gate", "up", "down")))
            x_TH = x_TH + shared + experts(config, own, n_TH)
        else:
            x_TH = x_TH + mlp(n_TH, *(own[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    x_TH = norm(x_TH, weights["model.norm.weight"], config["rms_norm_eps"])
    return x_TH @ weights["lm_head.weight"].T


def attention(config, own, x_TH):
    head_dim, num_tokens = config["head_dim"], len(x_TH)
    c = norm(
        x_TH @ own["self_attn.q_proj.weight"].T, own["self_attn.inter_norm.weight"], config["rms_norm_eps"]
    )
    queries = (c @ own["self_attn.wq.weight"].T).view(num_tokens, config["num_attention_heads"], head_dim)
    keys = x_TH @ own["self_attn.k_proj.weight"].T
    values = x_TH @ own["self_attn.v_proj.weight"].T
    keys = torch.stack([rotate(config, keys[t], t) for t in range(num_tokens)])
    outputs = []
    for t in range(num_tokens):
        heads = [
            ((keys[: t + 1] @ rotate(config, query, t)) / head_dim**0.5).softmax(0) @ values[: t + 1]
            for query in queries[t]
        ]
        outputs.append(torch.cat(heads))
    return torch.stack(outputs) @ own["self_attn.o_proj.weight"].T


def rotate(config, head, position):
    """The pair (i, i + D/2) is turned by position * theta^(-2i/D)."""
    half = len(head) // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    turned = torch.polar(torch.ones(half, dtype=torch.float64), position * config["rope_theta"] ** -exponents)
    pairs = torch.complex(head[:half], head[half:]) * turned
    return torch.cat([pairs.real, pairs.imag])


def experts(config, own, x_TH):
    rows = []
    for x_H in x_TH:
        scores = (own["moe.gate.weight"] @ x_H).softmax(0)
        chosen = scores.argsort(descending=True)[: config["moe_top_k"]].tolist()
        total = sum(scores[e] for e in chosen) if config["norm_expert_weight"] else 1.0
        rows.append(
            sum(
                scores[e] / total
                * mlp(x_H, *(own[f"moe.{name}_proj.weight"][e] for name in ("gate", "up", "down")))
                for e in chosen
            )
        )  # fmt: skip
    return torch.stack(rows)


def mlp(x, gate, up, down):
    gated = x @ gate.T
    return (gated * gated.sigmoid() * (x @ up.T)) @ down.T


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
