"""The decoder of trainer/model.py in eager PyTorch on a CPU: the peer from the other framework.

The fastest that plain PyTorch offers: fused attention (F.scaled_dot_product_attention), F.rms_norm, F.cross_entropy, fused AdamW.
Same parameters (the trainer's dict, matrices transposed as F.linear wants them), same function, same update rule.

Shapes: B batch, T time, D width, F feed-forward width, H heads, K head width, V vocabulary.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from trainer.model import ModelConfig

MATRICES = ("qkv", "attention_out", "gate_up", "down")
GAINS = ("attention_norm", "mlp_norm")


def parameters(params: dict, num_layers: int) -> dict[str, torch.Tensor]:
    """Torch leaves from the trainer's parameters (a tied head): "embedding", "final_norm", "0.qkv", "0.mlp_norm", ..."""
    arrays = {"embedding": params["embedding"], "final_norm": params["final_norm"]}
    for index in range(num_layers):
        arrays |= {f"{index}.{name}": np.asarray(params["layers"][name])[index].T for name in MATRICES}
        arrays |= {f"{index}.{name}": np.asarray(params["layers"][name])[index] for name in GAINS}
    return {name: torch.tensor(np.ascontiguousarray(array), requires_grad=True) for name, array in arrays.items()}


def gradients(leaves: dict[str, torch.Tensor], num_layers: int) -> dict:
    """The gradients of `parameters`, back in the trainer's layout, as numpy arrays."""
    grads = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    layers = {name: np.stack([grads[f"{index}.{name}"].T for index in range(num_layers)]) for name in MATRICES}
    layers |= {name: np.stack([grads[f"{index}.{name}"] for index in range(num_layers)]) for name in GAINS}
    return {"embedding": grads["embedding"], "final_norm": grads["final_norm"], "layers": layers}


def rotary(time: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [T, K]: both halves of a head turn by the same angles."""
    half = head_dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(time, dtype=torch.float32)[:, None] * frequency
    return torch.cat([angle.cos()] * 2, dim=-1), torch.cat([angle.sin()] * 2, dim=-1)


def rotate(x_BHTK, cos, sin):
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos + torch.cat([-second, first], dim=-1) * sin


def block(h_BTD, leaf, config: ModelConfig, cos, sin):
    batch, time, width = h_BTD.shape
    normed = F.rms_norm(h_BTD, (width,), leaf("attention_norm"), 1e-6)
    qkv = F.linear(normed, leaf("qkv")).view(batch, time, 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin), qkv[2], is_causal=True)
    h_BTD = h_BTD + F.linear(out.transpose(1, 2).reshape(batch, time, width), leaf("attention_out"))
    gate, up = F.linear(F.rms_norm(h_BTD, (width,), leaf("mlp_norm"), 1e-6), leaf("gate_up")).chunk(2, dim=-1)
    return h_BTD + F.linear(F.silu(gate) * up, leaf("down"))


def loss(leaves: dict[str, torch.Tensor], tokens_BT1: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Mean next-token cross-entropy in nats."""
    inputs, targets = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    cos, sin = rotary(inputs.shape[1], config.d_model // config.num_heads)
    h_BTD = F.embedding(inputs, leaves["embedding"]) * config.embedding_width**0.5
    for index in range(config.num_layers):
        h_BTD = block(h_BTD, lambda name, index=index: leaves[f"{index}.{name}"], config, cos, sin)
    h_BTD = F.rms_norm(h_BTD, (config.d_model,), leaves["final_norm"], 1e-6) * config.logit_scale
    return F.cross_entropy(F.linear(h_BTD, leaves["embedding"]).flatten(0, 1), targets.flatten())


def train_step(params: dict, config: ModelConfig, learning_rate: float = 3e-3, weight_decay: float = 0.1, clip_norm: float = 1.0):
    """(leaves, step): step(tokens int64 [B, T+1]) -> loss tensor; it updates the leaves, which are its own."""
    leaves = parameters(params, config.num_layers)
    gains = [leaf for name, leaf in leaves.items() if name.endswith("norm")]
    matrices = [leaf for name, leaf in leaves.items() if not name.endswith("norm")]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(tokens_BT1: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(leaves, tokens_BT1, config)
        value.backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), clip_norm)
        optimizer.step()
        return value

    return leaves, step
