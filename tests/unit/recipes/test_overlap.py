"""What recipes overlap, what they overlap on request, and that it changes nothing but time."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.errors import UnsupportedConfig, UnsupportedLayout
from exaone_bridge.recipes import RECIPES, recipe
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.recipes import transformer_engine_backend, validate
from tests.helpers.training import train_megatron


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_overlaps_what_is_exact(name: str, megatron_bridge: Any) -> None:
    config = recipe(name)(gpu_memory_gb=141)
    model = config.model
    overlaps = model.tensor_model_parallel_size > 1 or model.context_parallel_size > 1
    assert ("CUDA_DEVICE_MAX_CONNECTIONS" in config.env_vars) == overlaps
    has_chunks = (model.virtual_pipeline_model_parallel_size or 1) > 1
    assert (model.overlap_p2p_comm, model.batch_p2p_comm) == (has_chunks, not has_chunks)
    assert config.ddp.overlap_grad_reduce and config.ddp.overlap_param_gather
    assert config.comm_overlap is None and not model.tp_comm_overlap
    assert not model.moe_shared_expert_overlap and model.cp_comm_type is None


@pytest.mark.parametrize("name", RECIPES)
def test_megatron_bridge_accepts_every_recipe_with_overlap(
    name: str, megatron_bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megatron.bridge.training import comm_overlap

    monkeypatch.chdir(tmp_path)
    model = recipe(name)(gpu_memory_gb=141).model
    requested: dict[str, Any] = {
        "tp_overlap": model.tensor_model_parallel_size > 1,
        "shared_expert_overlap": bool(model.moe_shared_expert_intermediate_size),
        "fuse_weight_gradients": "peft" not in name,
    }
    if "_vl_" in name:
        requested["pad_samples"] = True
    if model.context_parallel_size > 1:
        full = "a2a" if "1p2b" in name else "all_gather"  # the 32B has one KV head on a rank
        requested |= {"cp_full_attention": full, "cp_sliding_window": "all_gather"}
    config = recipe(name)(gpu_memory_gb=141, **requested)
    overlapped = ("overlap_grad_reduce", "overlap_param_gather", "align_param_gather")
    former = [getattr(config.ddp, field) for field in overlapped]
    if config.peft is not None:
        config.checkpoint.pretrained_checkpoint = str(tmp_path)
    with transformer_engine_backend(), mock.patch.object(comm_overlap, "HAVE_TE", True):
        validate(config, monkeypatch, replicas=2)
    model = config.model
    assert model.fuse_weight_gradients == requested["fuse_weight_gradients"]
    assert not model.gradient_accumulation_fusion  # which the output layer would need APEX for
    assert model.tp_comm_overlap == requested["tp_overlap"]
    assert model.moe_shared_expert_overlap == requested["shared_expert_overlap"]
    assert [getattr(config.ddp, field) for field in overlapped] == former
    has_chunks = (model.virtual_pipeline_model_parallel_size or 1) > 1
    assert (model.overlap_p2p_comm, model.batch_p2p_comm) == (has_chunks, not has_chunks)
    if model.context_parallel_size > 1:
        assert set(model.cp_comm_type) == {full}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("exaone4_1p2b_pretrain_config", {"tp_overlap": True}, "without tp more than 1 and sp"),
        (
            "exaone4_1p2b_pretrain_config",
            {"tp_overlap": True, "gpus": 2, "tp": 2, "sp": False},
            "without tp more than 1 and sp",
        ),
        ("exaone4_1p2b_pretrain_config", {"cp_full_attention": "a2a"}, "without cp more than 1"),
        (
            "exaone4_1p2b_64k_pretrain_config",
            {"cp": 16, "gpus": 16, "cp_full_attention": "a2a"},
            "cp_full_attention is a2a, and must be left out without a cp that divides",
        ),
        (
            "exaone4_1p2b_pretrain_config",
            {"shared_expert_overlap": True},
            "without shared experts in the model",
        ),
        ("exaone4_1p2b_peft_config", {"fuse_weight_gradients": True}, "off for adapters"),
        ("exaone45_vl_33b_peft_config", {"tp_overlap": True}, "lengths of microbatches vary"),
    ],
)
def test_overlap_that_cannot_be_is_rejected(
    name: str, overrides: dict[str, Any], message: str, megatron_bridge: Any
) -> None:
    with pytest.raises(UnsupportedLayout, match=message):
        recipe(name)(**overrides)


def test_layers_of_each_kind_have_their_exchange(megatron_bridge: Any) -> None:
    overrides = {"tp": 4, "pp": 4, "cp_full_attention": "p2p", "cp_sliding_window": "a2a", "cp": 2}
    config = recipe("exaone4_32b_128k_pretrain_config")(**overrides, seq_length=32768)
    assert config.model.cp_comm_type == ["a2a", "a2a", "a2a", "p2p"] * 16
    config.model.finalize()
    assert config.model.cp_comm_type == ["a2a", "a2a", "a2a", "p2p"] * 16
    for options in ({"cp_sliding_window": "all_gather"}, {"cp_full_attention": "p2p"}):
        config = recipe("exaone4_32b_128k_pretrain_config")(**options)
        assert config.model.cp_comm_type == ["all_gather", "all_gather", "all_gather", "p2p"] * 16


def test_windows_have_no_ring(megatron_bridge: Any) -> None:
    with pytest.raises(UnsupportedConfig, match="cp_sliding_window is 'p2p'"):
        recipe("exaone4_32b_128k_pretrain_config")(cp_sliding_window="p2p")


def _fusing_linears(folder: Path) -> set[str]:
    """On a rank: the linears that add to main gradients, where APEX would let all of them do so."""
    from megatron.bridge import AutoBridge
    from megatron.core.tensor_parallel import layers

    from exaone_bridge.modules.provider import ExactGPTModelProvider
    from exaone_bridge.runtime.model import build

    def keep(self: Any, fuse_weight_gradients: bool = True, **_: Any) -> None:
        """Override nothing: this test has the torch backend, which cannot fuse."""

    with (
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(ExactGPTModelProvider, "_override", keep),
    ):
        (model,) = build(
            AutoBridge.from_hf_pretrained(folder),
            Layout(),
            fuse_weight_gradients=True,
            apply_rope_fusion=False,
            cross_entropy_fusion_impl="native",
        )
    assert not model.config.gradient_accumulation_fusion
    return {
        name
        for name, module in model.named_modules()
        if getattr(module, "gradient_accumulation_fusion", False)
    }


def test_linears_of_layers_fuse_weight_gradients(megatron_bridge: Any, tiny: Any) -> None:
    fusing = ForkLauncher().first(_fusing_linears, tiny("exaone4"))
    assert {name.rpartition(".")[2] for name in fusing} == {
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    }
    assert "decoder.layers.0.mlp.linear_fc1" in fusing


def _gradients(
    folder: Path, layout: Layout, overlap: bool, lengths: list[int]
) -> dict[str, torch.Tensor]:
    tokens = torch.randint(387, (8, 1, 41), generator=torch.Generator().manual_seed(1))
    fields = {"overlap_p2p_comm": overlap, "batch_p2p_comm": not overlap}
    if len(set(lengths)) > 1:  # stages then exchange shapes too
        fields |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    batches = [(prompt[:, :length], {}) for prompt, length in zip(tokens, lengths, strict=True)]
    return train_megatron(folder, layout, batches, **fields).gradients


@pytest.mark.parametrize("lengths", [[41] * 8, [41, 33, 25, 41, 17, 41, 33, 29]], ids=str)
def test_overlapped_stages_have_the_gradients_of_one_stage(
    lengths: list[int], megatron_bridge: Any, tiny: Any
) -> None:
    """Bitwise, with two and four stages of two chunks, and without overlap; two always overlap."""
    layers = ["sliding_attention", "full_attention"] * 4
    folder = tiny("exaone4", num_hidden_layers=8, layer_types=layers)
    expected, *others = (
        {
            name: value
            for rank in ForkLauncher(pp).all(_gradients, folder, layout, overlap, lengths)
            for name, value in rank.items()
        }
        for pp, overlap in ((1, False), (2, True), (4, True), (4, False))
        for layout in [Layout(pp=pp, vpp=2 if pp > 1 else 1)]
    )
    assert len(expected) > 80
    for found in others:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
