"""nanochat's forward pass in its plainest form, both generations: the oracle where there is no golden file.

Written from the facts of the architecture, on nanochat's own tensors, in double precision: one head at a time, every
mask spelt out, no cache. test_odd_checkpoints.py holds it against the golden logits, and our model against it.
"""

import math

import torch


def norm(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()


def rotated(x: torch.Tensor, base: float) -> torch.Tensor:
    """(B, T, d) by minus the position's angles, first half against second half."""
    time, d = x.shape[1:]
    frequency = base ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    angle = torch.arange(time, dtype=x.dtype)[:, None] * frequency
    first, second = x[..., : d // 2], x[..., d // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def reference_logits(tensors: dict[str, torch.Tensor], settings: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of nanochat's `model_<step>.pt` with the `model_config` of its meta file."""
    w = {name.removeprefix("_orig_mod."): tensor.double() for name, tensor in tensors.items()}
    newest = "smear_lambda" in w
    num_layers, num_heads, num_kv_heads = settings["n_layer"], settings["n_head"], settings["n_kv_head"]
    d, time = settings["n_embd"] // num_heads, ids.shape[1]
    pattern = settings["window_pattern"].upper() if newest else "L"
    short = math.ceil(settings["sequence_len"] / 4 / 128) * 128
    back = torch.arange(time)[:, None] - torch.arange(time)[None, :]  # how many tokens to the left a key lies
    x = norm(w["transformer.wte.weight"][ids])
    if newest:
        gate = (x[:, 1:, :24] @ w["smear_gate.weight"].T).sigmoid()
        x = torch.cat([x[:, :1], x[:, 1:] + w["smear_lambda"] * gate * x[:, :-1]], dim=1)
    first = x
    for i in range(num_layers):
        layer = f"transformer.h.{i}."
        if newest:
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * first
        h = norm(x)
        q, k, v = (h @ w[f"{layer}attn.c_{name}.weight"].T for name in "qkv")
        window = short if i < num_layers - 1 and pattern[i % len(pattern)] == "S" else time
        seen = (back >= 0) & (back <= window)
        heads = []
        for head in range(num_heads):
            shared = head // (num_heads // num_kv_heads)
            mine, theirs = slice(head * d, (head + 1) * d), slice(shared * d, (shared + 1) * d)
            value = v[..., theirs]
            if newest and i % 2 == (num_layers - 1) % 2:
                gate = 3 * (h[..., :12] @ w[f"{layer}attn.ve_gate.weight"][shared]).sigmoid()
                value = value + gate[..., None] * w[f"value_embeds.{i}.weight"][ids][..., theirs]
            query, key = (norm(rotated(part, 1e5 if newest else 1e4)) for part in (q[..., mine], k[..., theirs]))
            if newest:
                query, key = 1.2 * query, 1.2 * key
            scores = (query @ key.transpose(1, 2) / math.sqrt(d)).masked_fill(~seen, -math.inf)
            heads.append(scores.softmax(-1) @ value)
        x = x + torch.cat(heads, dim=-1) @ w[f"{layer}attn.c_proj.weight"].T
        x = x + (norm(x) @ w[f"{layer}mlp.c_fc.weight"].T).relu().square() @ w[f"{layer}mlp.c_proj.weight"].T
        if i == num_layers // 2:
            middle = x
    if newest:
        x = x - w["backout_lambda"] * middle
    logits = norm(x) @ w["lm_head.weight"][: settings["vocab_size"]].T
    return 15 * torch.tanh(logits / 15)
