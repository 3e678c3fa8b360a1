"""Recipes in FP8: that Megatron-Bridge accepts them, and what is rejected."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.errors import UnsupportedConfig, UnsupportedLayout
from exaone_bridge.models import family_of
from exaone_bridge.recipes import RECIPES, recipe
from exaone_bridge.recipes.memory import estimate
from exaone_bridge.recipes.precision import check_sizes
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.recipes.training_plans import training_plan
from tests.helpers.recipes import transformer_engine_backend, validate


@pytest.mark.parametrize("precision", ["fp8", "fp8-blockwise"])
@pytest.mark.parametrize("name", RECIPES)
def test_megatron_bridge_accepts_every_recipe_in_fp8(
    name: str,
    precision: Any,
    megatron_bridge: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With CUDA graphs of layers too; one plan needs more memory."""
    monkeypatch.chdir(tmp_path)
    options = {"precision": precision, "cuda_graphs": "layers"}
    if name.startswith("ernie45_300b") and "peft" in name:
        with pytest.raises(UnsupportedLayout, match="memory of a GPU is 141 GB"):
            recipe(name)(gpu_memory_gb=141, **options)
        options |= {"gpus": 16, "ep": 16}
    config = recipe(name)(gpu_memory_gb=141, **options)
    if config.peft is not None:
        config.checkpoint.pretrained_checkpoint = str(tmp_path)
    with transformer_engine_backend():
        validate(config, monkeypatch)
    model = config.model
    assert model.fp8 == "hybrid" and model.bf16 and model.params_dtype is torch.bfloat16
    assert model.fp8_recipe == {"fp8": "tensorwise", "fp8-blockwise": "blockwise"}[precision]
    assert not (model.fp8_param or config.ddp.fp8_param_gather)
    assert not (model.fp8_dot_product_attention or model.fp8_multi_head_attention)
    assert model.first_last_layers_bf16 == (precision == "fp8")
    assert config.ddp.grad_reduce_in_fp32 and config.optimizer.bf16


def test_recipes_train_in_bf16_unless_asked(megatron_bridge: Any) -> None:
    assert recipe("exaone4_32b_sft_config")().mixed_precision == "bf16_mixed"
    with pytest.raises(UnsupportedConfig, match="precision is 'fp4', and must be one of 'bf16'"):
        recipe("exaone4_32b_sft_config")(precision="fp4")


@pytest.mark.parametrize(
    ("model", "changes", "overrides", "size"),
    [
        ("exaone4_tiny", {}, {"seq_length": 72}, "seq_length x micro_batch_size / cp"),
        ("exaone4_tiny", {}, {"seq_length": 80, "cp": 2}, "seq_length x micro_batch_size / cp"),
        ("exaone4_tiny", {}, {"seq_length": 72, "micro_batch_size": 2}, None),
        ("exaone4_tiny", {"hidden_size": 72}, {}, "hidden_size"),
        ("exaone4_tiny", {"head_dim": 24}, {"tp": 4}, "heads / tp x head_dim"),
        ("exaone4_tiny", {"head_dim": 24}, {"tp": 2}, None),
        (
            "exaone4_tiny",
            {"head_dim": 12, "num_key_value_heads": 1},
            {},
            "the QKV projection of a TP rank",
        ),
        (
            "exaone4_tiny",
            {"head_dim": 24, "num_key_value_heads": 1},
            {"tp": 2},
            None,
        ),  # a whole one
        ("exaone4_tiny", {"intermediate_size": 136}, {}, "intermediate_size / tp"),
        ("exaone4_tiny", {"intermediate_size": 144}, {"tp": 2}, "intermediate_size / tp"),
        ("ernie45_tiny", {"moe_intermediate_size": 40}, {}, "moe_intermediate_size / etp"),
        ("ernie45_tiny", {"moe_intermediate_size": 48}, {"etp": 2}, "moe_intermediate_size / etp"),
        (
            "ernie45_tiny",
            {"moe_intermediate_size": 48, "moe_num_shared_experts": 1},
            {"tp": 2, "etp": 1},
            "the size of shared experts / tp",
        ),
        ("ernie45_tiny", {"moe_layer_start_index": 0, "intermediate_size": 136}, {}, None),
    ],
)
def test_sizes_that_fp8_does_not_take_are_rejected(
    model: str, changes: dict[str, int], overrides: dict[str, Any], size: str | None
) -> None:
    fields = CONFIGS[model] | changes
    config = family_of(fields["architectures"], where="").describe(fields).config
    plan = training_plan(model, "pretrain", 80).with_overrides(
        **{"seq_length": 64, "micro_batch_size": 1} | overrides, precision="fp8"
    )
    check_sizes(config, replace(plan, precision="bf16"))
    rejects = pytest.raises(UnsupportedLayout, match=f"{re.escape(size)} is") if size else None
    with rejects or contextlib.nullcontext():
        check_sizes(config, plan)


@pytest.mark.parametrize(
    ("precision", "capability", "has_te", "message"),
    [
        ("fp8", (8, 0), True, r"compute capability \(8, 0\), below \(8, 9\)"),
        ("fp8-blockwise", (8, 9), True, r"below \(9, 0\)"),
        ("fp8", (9, 0), False, "without Transformer Engine"),
        ("fp8", (9, 0), True, None),
    ],
)
def test_machine_without_fp8_is_rejected(
    precision: Any,
    capability: tuple[int, int],
    has_te: bool,
    message: str | None,
    megatron_bridge: Any,
) -> None:
    """Megatron-Core would train in bf16 without Transformer Engine, and say nothing.

    The question starts CUDA, so the variables that CUDA reads are set before.
    """
    from exaone_bridge.modules import backend

    def read_capability() -> tuple[int, int]:
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
        return capability

    engine = backend.TORCH if has_te else None
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", read_capability),
        mock.patch.dict(os.environ),
        mock.patch.object(backend, "TRANSFORMER_ENGINE", engine),
    ):
        if message is None:
            recipe("exaone4_1p2b_pretrain_config")(precision=precision)
            return
        with pytest.raises(UnsupportedConfig, match=message):
            recipe("exaone4_1p2b_pretrain_config")(precision=precision)


def test_checkpoint_of_a_run_in_fp8_builds_without_a_gpu(megatron_bridge: Any) -> None:
    """The torch backend computes in bf16, and run_config.yaml keeps what was requested."""
    config = recipe("ernie45_tiny_pretrain_config")(precision="fp8")
    config.mixed_precision.finalize()
    config.mixed_precision.setup(config.model, config.optimizer, config.ddp)
    assert config.model.fp8 == "hybrid"
    config.model.fp8_param = config.model.fuse_weight_gradients = True
    config.model.finalize()
    assert config.model.fp8 is None
    assert not (config.model.fp8_param or config.model.fuse_weight_gradients)
    assert config.model.to_cfg_dict()["fp8"] == "hybrid"


@pytest.mark.parametrize("field", ["fp8_multi_head_attention", "fp8_output_proj"])
def test_fp8_that_our_modules_would_break_is_rejected(field: str, megatron_bridge: Any) -> None:
    model = recipe("exaone4_tiny_pretrain_config")().model
    model.fp8 = "hybrid"
    setattr(model, field, True)
    with transformer_engine_backend(), pytest.raises(UnsupportedConfig, match=f"{field} is True"):
        model.finalize()


def test_memory_of_fp8_has_two_more_copies_of_the_weights() -> None:
    description = family_of(CONFIGS["exaone4_32b"]["architectures"], where="").describe(
        CONFIGS["exaone4_32b"]
    )
    plan = training_plan("exaone4_32b", "sft", 141)  # TP8
    bf16 = estimate(description, plan).parameters
    fp8 = estimate(description, plan.with_overrides(precision="fp8")).parameters
    in_vocabulary = 2 * 2 * 102400 * 5120 / 8 + 2 * 5120  # in bf16: both, and the last norm
    assert fp8 - bf16 == pytest.approx(bf16 - in_vocabulary)
