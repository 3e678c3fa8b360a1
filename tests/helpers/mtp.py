"""Multi-token prediction (MTP) of EXAONE 4.5: a reference in plain torch, and Megatron-Core.

Transformers does not build these layers. At depth d the reference normalises the last hidden state
and the embedding of the token d positions ahead, concatenates them (embedding first), projects
them, and runs one EXAONE 4.0 layer, the final MTP norm and the model's own output layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from exaone_bridge.modules.collectives import all_gather_cat, all_gather_sequence
from exaone_bridge.modules.context_parallel import local_positions
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.training import device, full_sequence_step, mean_over_cp, train_megatron

SCALE = 0.1  # mtp_loss_scaling_factor


@dataclass
class MTPResult:
    """Logits, losses and gradients of one implementation.

    Attributes:
        logits: fp32 [N, S, V] of each depth; empty on ranks without the last pipeline stage.
        losses: mean cross entropy of each depth, unscaled; empty on the same ranks.
        gradients: Hugging Face name -> gradient of loss + SCALE x mean of the depths' losses.
        differing: names of exported tensors that differ from the source.
    """

    logits: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    differing: set[str] = field(default_factory=set)


def random_tokens(
    vocab_size: int = 387, count: int = 2, length: int = 41, seed: int = 3
) -> torch.Tensor:
    """Return [count, length] tokens without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (count, length), generator=generator)


def _norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the RMS norm, computed in fp32 as `Exaone4RMSNorm` does."""
    fp32 = hidden.float()
    scale = torch.rsqrt(fp32.square().mean(-1, keepdim=True) + eps)
    return weight * (fp32 * scale).to(hidden.dtype)


def _shift(tokens: torch.Tensor) -> torch.Tensor:
    """Return the next token of each position [N, S], and 0 after the last."""
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1))


def _mean_over_ranks(
    logits: torch.Tensor, labels: torch.Tensor, length: int, cp: int
) -> torch.Tensor:
    """Return the mean over CP ranks of their mean cross entropy of the first `length` positions.

    Megatron-Core averages on each rank (`process_mtp_loss`, 0.19.2), and then over the ranks. This
    differs from the mean over all tokens, because the last rank's shard has fewer of them.
    """
    means = []
    for rank in range(cp):
        local = local_positions(rank, cp, logits.shape[1], logits.device)
        local = local[local < length]
        means.append(
            torch.nn.functional.cross_entropy(
                logits[:, local].flatten(0, 1), labels[:, local].flatten()
            )
        )
    return torch.stack(means).mean()


def mtp_of_reference(
    folder: Path,
    tokens: torch.Tensor,
    depth: int,
    like_layer: int = 0,
    dtype: torch.dtype = torch.float32,
    cp: int = 1,
) -> MTPResult:
    """Compute multi-token prediction with Transformers' modules.

    Args:
        folder: the Hugging Face folder of the model.
        tokens: [N, S + 1].
        depth: the number of tokens that are predicted after the next one.
        like_layer: the decoder layer whose window and RoPE the MTP layer has.
        dtype: the data type of parameters and arithmetic.
        cp: the number of context-parallel ranks, over which losses are averaged.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.exaone4.modeling_exaone4 import Exaone4DecoderLayer

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).to(device())
    language, config = model.model.language_model, model.config.text_config
    weights = {
        name.removeprefix("mtp."): torch.nn.Parameter(value.to(device(), dtype))
        for name, value in load_file(folder / "model.safetensors").items()
        if name.startswith("mtp.")
    }
    layers = []
    for number in range(1 if config.mtp_share_layers else depth):
        layer = Exaone4DecoderLayer(config, like_layer).to(device(), dtype)
        layer.load_state_dict(
            {name: weights[f"layers.{number}.{name}"] for name in layer.state_dict()}
        )
        layers.append(layer)
    tokens = tokens.to(device())
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1], device=tokens.device)[None]
    is_sliding = layers[0].self_attn.is_sliding
    make_mask = create_sliding_window_causal_mask if is_sliding else create_causal_mask
    hidden = language(input_ids=inputs, use_cache=False).last_hidden_state
    loss = torch.nn.functional.cross_entropy(
        model.lm_head(hidden).float().flatten(0, 1), labels.flatten()
    )
    angles = language.rotary_emb(hidden, positions)
    result, eps = MTPResult(), config.rms_norm_eps
    for number in range(depth):
        inputs, labels = _shift(inputs), _shift(labels)
        embedded = language.embed_tokens(inputs)
        embedded = _norm(embedded, weights["pre_fc_norm_embedding.weight"], eps)
        hidden = _norm(hidden, weights["pre_fc_norm_hidden.weight"], eps)
        projected = torch.cat((embedded, hidden), -1) @ weights["fc.weight"].T
        mask = make_mask(
            config=config, inputs_embeds=projected, attention_mask=None, past_key_values=None
        )
        layer = layers[number % len(layers)]
        output = layer(projected, attention_mask=mask, position_embeddings=angles)
        hidden = _norm(output, weights["norm.weight"], eps)
        logits = model.lm_head(hidden).float()
        mtp_loss = _mean_over_ranks(logits, labels, inputs.shape[1] - 1 - number, cp)
        loss = loss + SCALE / depth * mtp_loss
        result.logits.append(logits.detach().cpu())
        result.losses.append(mtp_loss.item())
    loss.backward()
    gradients = {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }
    gradients |= {
        f"mtp.{name}": value.grad for name, value in weights.items() if value.grad is not None
    }
    for number, layer in enumerate(layers):
        gradients |= {
            f"mtp.layers.{number}.{name}": value.grad for name, value in layer.named_parameters()
        }
    result.gradients = {name: value.float().cpu() for name, value in gradients.items()}
    return result


def mtp_of_megatron(
    folder: Path,
    layout: Layout,
    tokens: torch.Tensor,
    depth: int,
    overrides: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> MTPResult:
    """Run Megatron-Core on this rank; see `MTPResult` for what only the last pipeline stage has."""
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.core.utils import unwrap_model

    from exaone_bridge.runtime.model import build

    overrides = {"mtp_num_layers": depth} | overrides
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout, **overrides)
    source = load_file(folder / "model.safetensors")
    exported = {
        name: value.clone()
        for name, value in bridge.export_hf_weights(model, cpu=True, show_progress=False)
    }
    assert exported.keys() == source.keys()
    differing = {name for name, value in exported.items() if not torch.equal(value, source[name])}
    vocab_size = model[0].config.vocab_size
    del model
    outputs: list[torch.Tensor] = []  # of the output layer: each prompt's depths, then its logits

    def keep_outputs(model: list[Any]) -> None:
        for chunk in unwrap_model(model):
            if chunk.post_process:
                chunk.output_layer.register_forward_hook(
                    lambda _, __, output: outputs.append(output[0].detach().clone())
                )

    MTPLossLoggingHelper.tracker.clear()
    batches = [(prompt, {}) for prompt in tokens.split(1)]
    run = train_megatron(
        folder,
        layout,
        batches,
        forward_step=full_sequence_step,
        dtype=dtype,
        inspect=keep_outputs,
        **overrides,
    )
    result = MTPResult(gradients=run.gradients, differing=differing)
    if outputs:
        tp_group = parallel_state.get_tensor_model_parallel_group()
        cp_group = parallel_state.get_context_parallel_group()
        logits = [
            all_gather_sequence(all_gather_cat(output, tp_group, dim=-1), cp_group, dim=0)
            .transpose(0, 1)[..., :vocab_size]
            .float()
            .cpu()
            for output in outputs
        ]
        result.logits = [torch.cat(logits[number :: depth + 1]) for number in range(depth)]
        losses = mean_over_cp(MTPLossLoggingHelper.tracker["loss_values"])
        result.losses = (losses / len(batches)).tolist()
    return result
