"""Multi-token prediction of EXAONE 4.5 on both sides, for tests: the formula, and Megatron-Core's layers.

Transformers does not build it. The formula is written here: the hidden state after the final norm and the embedding
of the word after next's predecessor, each normalised, embedding first, projected, through one EXAONE 4.0 layer with the
rule of the first decoder layer, normalised, and through the model's own output layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from exaone_bridge.modules.context_parallel import local_positions
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.exaone45_cases import device, forward_backward, gathered_over_tp, over_words

SCALE = 0.1


@dataclass
class Predicted:
    """What one side made of the prompts.

    Attributes:
        logits: [N, S, V] fp32 of each depth; empty on a rank without the last stage.
        losses: mean cross entropy of each depth, unscaled; empty likewise.
        gradients: by Hugging Face name, of loss + SCALE x mean of the depths' losses.
        differing: names whose export is not the source, bit by bit.
    """

    logits: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    differing: set[str] = field(default_factory=set)


def prompts_of(
    vocab_size: int = 387, count: int = 2, length: int = 41, seed: int = 3
) -> torch.Tensor:
    """[count, length] words, without the padding word."""
    return torch.randint(
        1, vocab_size, (count, length), generator=torch.Generator().manual_seed(seed)
    )


def _norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In fp32, whatever the type (`Exaone4RMSNorm`)."""
    whole = hidden.float()
    return weight * (whole * torch.rsqrt(whole.square().mean(-1, keepdim=True) + eps)).to(
        hidden.dtype
    )


def _next(tokens: torch.Tensor) -> torch.Tensor:
    """One further, zero after the last."""
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1))


def _mean_of_means(logits: torch.Tensor, aims: torch.Tensor, kept: int, cp: int) -> torch.Tensor:
    """Cross entropy of the first `kept` positions: Megatron-Core takes each rank's mean over the words that rank has
    (`process_mtp_loss`), and data parallelism the mean of those. One of N words more or less on a rank is 1/N of it."""
    means = []
    for rank in range(cp):
        mine = local_positions(rank, cp, logits.shape[1], logits.device)
        mine = mine[mine < kept]
        means.append(
            torch.nn.functional.cross_entropy(
                logits[:, mine].flatten(0, 1), aims[:, mine].flatten()
            )
        )
    return torch.stack(means).mean()


def formula(
    folder: Path,
    whole: torch.Tensor,
    depth: int,
    rule: int = 0,
    dtype: torch.dtype = torch.float32,
    cp: int = 1,
) -> Predicted:
    """By Transformers' modules in this type.

    Args:
        whole: [N, S + 1].
        rule: the decoder layer whose window and RoPE the prediction layer has.
        cp: ranks that share each prompt, for the losses' means.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.exaone4.modeling_exaone4 import Exaone4DecoderLayer

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).to(device())
    language, config = model.model.language_model, model.config.text_config
    disk = {
        name.removeprefix("mtp."): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    disk = {
        name: value.to(device(), dtype)
        for name, value in disk.items()
        if not name.startswith(("model.", "lm_"))
    }
    own = {name: torch.nn.Parameter(value) for name, value in disk.items()}
    layers = []
    for number in range(1 if config.mtp_share_layers else depth):
        layer = Exaone4DecoderLayer(config, rule).to(device(), dtype)
        inside = {name.removeprefix(f"layers.{number}."): value for name, value in own.items()}
        layer.load_state_dict({name: inside[name] for name in layer.state_dict()})
        layers.append(layer)
    whole = whole.to(device())
    tokens, labels = whole[:, :-1], whole[:, 1:]
    positions = torch.arange(tokens.shape[1], device=whole.device)[None]
    masking = (
        create_sliding_window_causal_mask if layers[0].self_attn.is_sliding else create_causal_mask
    )
    hidden = language(input_ids=tokens, use_cache=False).last_hidden_state
    loss = torch.nn.functional.cross_entropy(
        model.lm_head(hidden).float().flatten(0, 1), labels.flatten()
    )
    angles = language.rotary_emb(hidden, positions)
    found = Predicted()
    words, aims = tokens, labels
    for number in range(depth):
        words, aims = _next(words), _next(aims)
        embedded = _norm(
            language.embed_tokens(words), own["pre_fc_norm_embedding.weight"], config.rms_norm_eps
        )
        before = _norm(hidden, own["pre_fc_norm_hidden.weight"], config.rms_norm_eps)
        joined = torch.cat((embedded, before), -1) @ own["fc.weight"].T
        mask = masking(
            config=config, inputs_embeds=joined, attention_mask=None, past_key_values=None
        )
        out = layers[number % len(layers)](joined, attention_mask=mask, position_embeddings=angles)
        hidden = _norm(out, own["norm.weight"], config.rms_norm_eps)
        logits = model.lm_head(hidden).float()
        kept = tokens.shape[1] - 1 - number
        each = _mean_of_means(logits, aims, kept, cp)
        loss = loss + SCALE / depth * each
        found.logits.append(logits.detach().cpu())
        found.losses.append(each.item())
    loss.backward()
    gradients = {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }
    gradients |= {
        f"mtp.{name}": value.grad for name, value in own.items() if value.grad is not None
    }
    for number, layer in enumerate(layers):
        gradients |= {
            f"mtp.layers.{number}.{name}": value.grad for name, value in layer.named_parameters()
        }
    found.gradients = {name: value.float().cpu() for name, value in gradients.items()}
    return found


def ours(
    folder: Path,
    layout: Layout,
    whole: torch.Tensor,
    depth: int,
    overrides: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Predicted:
    """On a rank, by Megatron-Core; everything but `logits` and `losses` everywhere."""
    from megatron.bridge import AutoBridge
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.core.utils import unwrap_model

    from exaone_bridge.runtime.model import build, over_context

    overrides = {"mtp_num_layers": depth} | overrides
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout, **overrides)
    source = load_file(folder / "model.safetensors")
    exported = {
        name: value.clone()
        for name, value in bridge.export_hf_weights(model, cpu=True, show_progress=False)
    }
    assert exported.keys() == source.keys()
    found = Predicted(
        differing={name for name, value in exported.items() if not torch.equal(value, source[name])}
    )
    vocab_size = model[0].config.vocab_size
    del model
    seen: list[torch.Tensor] = []

    def look(model: list[Any]) -> None:
        for chunk in unwrap_model(model):
            if chunk.post_process:
                chunk.output_layer.register_forward_hook(
                    lambda _, __, output: seen.append(output[0].detach().clone())
                )

    MTPLossLoggingHelper.tracker.clear()
    data = [(one, {}) for one in whole.split(1)]
    _, found.gradients, _ = forward_backward(folder, layout, data, overrides, look, dtype)
    each = depth + 1  # calls of the output layer for one prompt: its depths, then the model itself
    whole_vocab = [over_context(gathered_over_tp(output), dim=0).transpose(0, 1) for output in seen]
    logits = [torch.cat(whole_vocab[number::each]) for number in range(depth if seen else 0)]
    found.logits = [each[..., :vocab_size].float().cpu() for each in logits]
    if seen:
        found.losses = (
            over_words(MTPLossLoggingHelper.tracker["loss_values"]) / len(data)
        ).tolist()
    return found
