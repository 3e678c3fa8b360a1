"""EXAONE MoE in plain fp32 torch, written from the formulas, and its tests' configurations.

Transformers 5.12.1 has neither a window for each layer, nor the clamp of SwiGLU, nor multi-token
prediction. This reference has them (vLLM's `exaone_moe.py` and `exaone_moe_mtp.py`, PR 50524), and
equals Transformers where the two overlap (`tests/parity/exaone_moe/test_reference.py`).

Axes: N prompts, S tokens, H hidden, D head size, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, linear, pad, scaled_dot_product_attention, silu

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.models.exaone_moe.config import ExaoneMoeModelConfig, read_hf_config

__all__ = ["ReferenceResult", "run_reference"]


@dataclass
class ReferenceResult:
    """The result of the reference.

    Attributes:
        logits: [N, S, V] fp32.
        mtp_logits: [N, S, V] of each depth of multi-token prediction.
        losses: the mean cross entropy of the decoder, then of each depth.
        gradients: tensor name -> gradient of the decoder's loss + the loss weight times the mean of
            the depths' losses.
        experts: layer -> chosen experts [N, S, K], sorted.
        activations: in the order of computation, "3, attention" and "3, mlp" (the output of a
            sublayer of layer 3), and likewise of the first depth "mtp, projection" (its inputs
            joined), "mtp, attention" and "mtp, mlp": [N, S, H].
    """

    logits: torch.Tensor
    mtp_logits: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: dict[int, torch.Tensor] = field(default_factory=dict)
    activations: dict[str, torch.Tensor] = field(default_factory=dict)


class _Model:
    def __init__(self, folder: Path) -> None:
        self.hf_config: Mapping[str, Any] = read_json(folder / "config.json")
        self.config: ExaoneMoeModelConfig = read_hf_config(self.hf_config)
        self.weights = {
            name: value.float().requires_grad_()
            for path in sorted(folder.glob("*.safetensors"))
            for name, value in load_file(path).items()
        }
        self.experts: dict[int, torch.Tensor] = {}
        self.activations: dict[str, torch.Tensor] = {}

    def keep(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.activations.setdefault(name, x.detach())
        return x

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return self.weights[f"{name}.weight"] * (x * scale)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weights[f"{name}.weight"])

    def attention(self, name: str, x: torch.Tensor, window: int | None) -> torch.Tensor:
        """[N, S, H] -> [N, S, H]; RoPE is applied where there is a window."""
        length, size = x.shape[1], self.config.head_dim
        query, key, value = (
            self.linear(f"{name}.{each}_proj", x).unflatten(-1, (-1, size)) for each in "qkv"
        )
        query, key = self.norm(f"{name}.q_norm", query), self.norm(f"{name}.k_norm", key)
        if window is not None:
            exponents = torch.arange(0, size, 2) / size
            angles = torch.outer(torch.arange(length), self.config.rope_theta**-exponents)
            angles = torch.cat([angles, angles], dim=-1)[:, None]

            def rotate(tensor: torch.Tensor) -> torch.Tensor:
                low, high = tensor.chunk(2, dim=-1)
                return tensor * angles.cos() + torch.cat([-high, low], dim=-1) * angles.sin()

            query, key = rotate(query), rotate(key)
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        mask = (distance >= 0) & (distance < (length if window is None else window))
        output = scaled_dot_product_attention(
            *(each.transpose(1, 2) for each in (query, key, value)),
            attn_mask=mask,
            enable_gqa=True,
        )
        return self.linear(f"{name}.o_proj", output.transpose(1, 2).flatten(2))

    def swiglu(self, name: str, x: torch.Tensor, limit: float) -> torch.Tensor:
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        if limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return self.linear(f"{name}.down_proj", silu(gate) * up)

    def mixture(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """[N, S, H] -> [N, S, H]."""
        name, moe = f"model.layers.{layer}.mlp", self.config.moe
        limit = self.config.swiglu_limits[layer]
        scores = torch.sigmoid(self.linear(f"{name}.gate", x))
        biased = scores.detach() + self.weights[f"{name}.e_score_correction_bias"].detach()
        groups = biased.unflatten(-1, (moe.num_groups, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(moe.group_topk, dim=-1).indices
        kept = torch.zeros(groups.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        biased = groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
        chosen = biased.topk(moe.topk, dim=-1).indices
        self.experts[layer] = chosen.sort(dim=-1).values
        weights = scores.gather(-1, chosen)
        if moe.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = torch.zeros_like(scores).scatter(-1, chosen, weights * moe.scaling_factor)
        routed = sum(
            self.swiglu(f"{name}.experts.{expert}", x, limit) * weights[..., expert, None]
            for expert in range(moe.num_experts)
        )
        return routed + self.swiglu(f"{name}.shared_experts", x, limit)

    def layer(self, name: str, x: torch.Tensor, window: int | None, layer: int) -> torch.Tensor:
        """One pre-norm layer; `layer` is -1 for that of multi-token prediction, which is dense."""
        key = str(layer) if layer >= 0 else "mtp"
        normed = self.norm(f"{name}.input_layernorm", x)
        x = x + self.keep(f"{key}, attention", self.attention(f"{name}.self_attn", normed, window))
        normed = self.norm(f"{name}.post_attention_layernorm", x)
        if layer >= 0 and self.config.moe_layer_mask[layer]:
            return x + self.keep(f"{key}, mlp", self.mixture(layer, normed))
        limit = self.config.swiglu_limits[max(layer, 0)]  # as vLLM's exaone_moe_mtp.py
        return x + self.keep(f"{key}, mlp", self.swiglu(f"{name}.mlp", normed, limit))


def run_reference(folder: Path, tokens: torch.Tensor, mtp_depth: int = 0) -> ReferenceResult:
    """Run the reference on a Hugging Face folder.

    Args:
        folder: of an EXAONE MoE model.
        tokens: [N, S + 1]; the labels are the inputs shifted by one.
        mtp_depth: tokens to predict after the next one; every depth uses the one layer on disk, the
            final-norm hidden state of the depth before it, and the model's output layer.
    """
    model = _Model(folder)
    embedding = model.weights["model.embed_tokens.weight"]
    head = embedding if model.config.tied else model.weights["lm_head.weight"]
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    hidden = embedding[inputs]
    for number, window in enumerate(model.config.windows):
        hidden = model.layer(f"model.layers.{number}", hidden, window, number)
    hidden = model.norm("model.norm", hidden)
    logits = linear(hidden, head)
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
    result = ReferenceResult(logits.detach(), losses=[loss.item()])
    for depth in range(mtp_depth):
        assert model.config.mtp is not None
        inputs, labels = pad(inputs[:, 1:], (0, 1)), pad(labels[:, 1:], (0, 1))
        embedded = model.norm("mtp.pre_fc_norm_embedding", embedding[inputs])
        projected = model.linear(
            "mtp.fc", torch.cat([embedded, model.norm("mtp.pre_fc_norm_hidden", hidden)], dim=-1)
        )
        model.keep("mtp, projection", projected)
        hidden = model.layer("mtp.layers.0", projected, model.config.mtp.window, -1)
        hidden = model.norm("mtp.norm", hidden)
        logits = linear(hidden, head)
        length = inputs.shape[1] - 1 - depth
        mtp_loss = cross_entropy(logits[:, :length].flatten(0, 1), labels[:, :length].flatten())
        loss = loss + model.config.mtp.loss_scale / mtp_depth * mtp_loss
        result.mtp_logits.append(logits.detach())
        result.losses.append(mtp_loss.item())
    loss.backward()
    result.gradients = {
        name: value.grad for name, value in model.weights.items() if value.grad is not None
    }
    result.experts, result.activations = model.experts, model.activations
    return result
