"""Multi-token prediction of EXAONE 4.5: logits, loss and gradients against the formula, round trips, layouts.

Transformers does not build it. The reference is written here: the hidden state after the final norm and the embedding
of the word after next's predecessor, each normalised, embedding first, projected, through one EXAONE 4.0 layer with the
rule of the first decoder layer, normalised, and through the model's own output layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exaone45_cases import changed
from safetensors.torch import load_file
from training import relative_difference

from exaone_bridge.checkpoint.convert import export_checkpoint
from exaone_bridge.checkpoint.headers import read_json
from exaone_bridge.errors import CheckpointError, UnsupportedConfig
from exaone_bridge.host.world import run_ranks
from exaone_bridge.parts.layout import Layout
from exaone_bridge.verify.folders import compare_configs

SCALE = 0.1


def _tokens(seed: int = 3) -> torch.Tensor:
    return torch.randint(1, 387, (2, 41), generator=torch.Generator().manual_seed(seed))


def _norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * weight


def _next(tokens: torch.Tensor) -> torch.Tensor:
    """One further, zero after the last."""
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1))


def reference(folder: Path, depth: int, rule: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits [N, S, V] of each depth, and gradients of loss + scale x mean of the depths' losses.

    Args:
        rule: the decoder layer whose window and RoPE the prediction layer has.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.exaone4.modeling_exaone4 import Exaone4DecoderLayer

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    language, config = model.model.language_model, model.config.text_config
    disk = {name.removeprefix("mtp."): value for name, value in load_file(folder / "model.safetensors").items()}
    own = {name: torch.nn.Parameter(value) for name, value in disk.items() if not name.startswith(("model.", "lm_"))}
    layers = []
    for number in range(1 if config.mtp_share_layers else depth):
        layer = Exaone4DecoderLayer(config, rule)
        inside = {name.removeprefix(f"layers.{number}."): value for name, value in own.items()}
        layer.load_state_dict({name: inside[name] for name in layer.state_dict()})
        layers.append(layer)
    whole = _tokens()
    tokens, labels = whole[:, :-1], whole[:, 1:]
    positions = torch.arange(tokens.shape[1])[None]
    masking = create_sliding_window_causal_mask if layers[0].self_attn.is_sliding else create_causal_mask
    hidden = language(input_ids=tokens, use_cache=False).last_hidden_state
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels.flatten())
    angles = language.rotary_emb(hidden, positions)
    logits, words, aims = [], tokens, labels
    for number in range(depth):
        words, aims = _next(words), _next(aims)
        embedded = _norm(language.embed_tokens(words), own["pre_fc_norm_embedding.weight"], config.rms_norm_eps)
        before = _norm(hidden, own["pre_fc_norm_hidden.weight"], config.rms_norm_eps)
        joined = torch.cat((embedded, before), -1) @ own["fc.weight"].T
        mask = masking(config=config, inputs_embeds=joined, attention_mask=None, past_key_values=None)
        out = layers[number % len(layers)](joined, attention_mask=mask, position_embeddings=angles)
        hidden = _norm(out, own["norm.weight"], config.rms_norm_eps)
        logits.append(model.lm_head(hidden))
        kept = tokens.shape[1] - 1 - number
        each = torch.nn.functional.cross_entropy(logits[-1][:, :kept].flatten(0, 1), aims[:, :kept].flatten())
        loss = loss + SCALE / depth * each
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    gradients |= {f"mtp.{name}": value.grad for name, value in own.items() if value.grad is not None}
    for number, layer in enumerate(layers):
        gradients |= {f"mtp.layers.{number}.{name}": value.grad for name, value in layer.named_parameters()}
    return [each.detach() for each in logits], gradients


def ours(
    folder: Path, layout: Layout, depth: int, overrides: dict[str, Any]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], set[str]]:
    """On a rank: logits of each depth (last stage), gradients by name, and names that differ from the source."""
    from exaone45_cases import forward_backward, gathered_over_tp
    from megatron.bridge import AutoBridge
    from megatron.core.utils import unwrap_model

    from exaone_bridge.host.model import build

    overrides = {"mtp_num_layers": depth} | overrides
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout, **overrides)
    source = load_file(folder / "model.safetensors")
    exported = {name: value.clone() for name, value in bridge.export_hf_weights(model, cpu=True, show_progress=False)}
    assert exported.keys() == source.keys()
    differing = {name for name, value in exported.items() if not torch.equal(value, source[name])}
    seen: list[torch.Tensor] = []
    whole = _tokens()

    def look(model: list[Any]) -> None:
        for chunk in unwrap_model(model):
            if chunk.post_process:
                chunk.output_layer.register_forward_hook(lambda _, __, output: seen.append(output[0].detach().clone()))

    data = [(one, {}) for one in whole.split(1)]
    _, gradients, _ = forward_backward(folder, layout, data, overrides, look)
    each = depth + 1  # calls of the output layer for one prompt: its depths, then the model itself
    logits = [
        torch.cat([gathered_over_tp(seen[start + number]).transpose(0, 1) for start in range(0, len(seen), each)])
        for number in range(depth if seen else 0)
    ]
    return [each[..., :387] for each in logits], gradients, differing


def _compare(folder: Path, layout: Layout, depth: int, overrides: dict[str, Any], rule: int = 0) -> float:
    """The worst difference of logits; everything else is asserted."""
    ((expected, gradients),) = run_ranks(reference, 1, folder, depth, rule)
    results = run_ranks(ours, layout.ranks, folder, layout, depth, overrides)
    last = [logits for logits, _, _ in results if logits]
    assert last
    worst = max(
        (mine - theirs)[:, : -1 - number].abs().max().item()  # the last positions have no next word
        for logits in last
        for number, (mine, theirs) in enumerate(zip(logits, expected, strict=True))
    )
    for _, found, differing in results:
        assert not differing
        if worst <= 1e-4:
            assert {name for name in gradients if relative_difference(found[name], gradients[name]) > 1e-4} == set()
            assert all(gradients[name].any() for name in found if name.startswith("mtp."))
    return worst


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True), Layout(tp=2, pp=2)], ids=str)
def test_logits_loss_and_gradients(host: Any, tiny: Any, layout: Layout) -> None:
    assert _compare(tiny("exaone45"), layout, 1, {}) <= 1e-4


@pytest.mark.parametrize("shared", [True, False])
def test_two_words_further(host: Any, tiny: Any, shared: bool) -> None:
    fields = changed(text_config__num_nextn_predict_layers=2, text_config__mtp_share_layers=shared)
    if shared:
        assert _compare(tiny("exaone45", **fields), Layout(), 2, {}) <= 1e-4
    else:  # `mtp.fc` and the norms are one on disk, and Megatron-Core has them once a layer
        with pytest.raises(UnsupportedConfig, match="mtp_share_layers"):
            run_ranks(ours, 1, tiny("exaone45", **fields), Layout(), 2, {})


def test_another_rule(host: Any, tiny: Any) -> None:
    """All positions and no RoPE, like a global layer of the decoder."""
    other = {"mtp_windowed": False, "mtp_rotated": False}
    assert _compare(tiny("exaone45"), Layout(), 1, other, rule=3) <= 1e-4


def _train_and_save(folder: Path, target: Path, layout: Layout, mtp: int | None) -> None:
    """Change every parameter, and save."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.host.model import build

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout, mtp_num_layers=mtp)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.add_(1.0)
    bridge.save_megatron_model(model, target)


def _export_through_autobridge(source: Path, megatron: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.host.model import load_megatron

    bridge = AutoBridge.from_hf_pretrained(source)
    model = load_megatron(bridge, megatron, Layout())
    assert model[0].config.mtp_num_layers == 1
    bridge.save_hf_pretrained(model, target, show_progress=False)


def test_what_was_trained_is_exported(host: Any, tiny: Any, tmp_path: Path) -> None:
    """From a checkpoint with multi-token prediction built, by the command line's way and by AutoBridge's."""
    source = tiny("exaone45")
    run_ranks(_train_and_save, 4, source, tmp_path / "megatron", Layout(tp=2, pp=2), 1)
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    run_ranks(_export_through_autobridge, 1, source, tmp_path / "megatron", tmp_path / "autobridge")
    before = load_file(source / "model.safetensors")
    for folder in (tmp_path / "exported", tmp_path / "autobridge"):
        after = load_file(folder / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value + 1.0) for name, value in before.items())
        assert compare_configs(read_json(source / "config.json"), read_json(folder / "config.json")).holds


def test_what_was_not_built_is_carried(host: Any, tiny: Any, tmp_path: Path) -> None:
    source = tiny("exaone45")
    run_ranks(_train_and_save, 1, source, tmp_path / "megatron", Layout(), None)
    with pytest.raises(CheckpointError, match="travel beside the model"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    export_checkpoint(tmp_path / "megatron", tmp_path / "dropped", drop_carried=True)
    assert not any(name.startswith("mtp.") for name in load_file(tmp_path / "dropped/model.safetensors"))
    text = read_json(tmp_path / "dropped/config.json")["text_config"]
    assert text["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("frozen", ["freeze_mtp_model", "freeze_language_model"])
def test_frozen(host: Any, tiny: Any, frozen: str) -> None:
    """Each is frozen alone; the other learns."""
    ((_, gradients, _),) = run_ranks(ours, 1, tiny("exaone45"), Layout(), 1, {frozen: True})
    moved = {name.startswith("mtp.") for name, value in gradients.items() if value.any() and ".visual." not in name}
    assert moved == {frozen == "freeze_language_model"}


def _swapped(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    right = MultiTokenPredictionLayer._concat_embeddings
    patch.setattr(MultiTokenPredictionLayer, "_concat_embeddings", lambda self, a, b: right(self, b, a))
    return {}


FAULTS = {
    "hidden state before embedding": _swapped,
    "no RoPE": lambda patch: {"mtp_rotated": False},
    "no window": lambda patch: {"mtp_windowed": False},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(host: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    assert _compare(tiny("exaone45"), Layout(), 1, FAULTS[fault](monkeypatch)) > 1e-3
