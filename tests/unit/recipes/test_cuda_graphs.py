"""Recipes with CUDA graphs: what is chosen, that Megatron-Bridge accepts it, and its memory."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models import family_of
from exaone_bridge.recipes import RECIPES, recipe
from exaone_bridge.recipes.checked_plan import check_plan
from exaone_bridge.recipes.cuda_graphs import CudaGraphs, choose_cuda_graphs
from exaone_bridge.recipes.memory import estimate
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.recipes.training_plans import training_plan
from tests.helpers.recipes import transformer_engine_backend, validate

_PARTS = "attn, mlp, moe_router, moe_preprocess"


def _choose(model: str, stage: str, packed: bool = False, **overrides: Any) -> CudaGraphs:
    overrides = {"cuda_graphs": "full-iteration"} | overrides
    config = family_of(CONFIGS[model]["architectures"], where=model).describe(CONFIGS[model]).config
    plan = training_plan(model, stage, 80).with_overrides(**overrides)
    return choose_cuda_graphs(config, plan, stage, packed=packed, images="_vl_" in model)


@pytest.mark.parametrize(
    ("model", "stage", "packed", "overrides", "chosen"),
    [
        ("exaone4_1p2b", "pretrain", False, {}, "full-iteration"),
        ("exaone4_1p2b", "pretrain", False, {"cuda_graphs": "layers"}, "layers"),
        ("exaone4_1p2b", "pretrain", False, {"cuda_graphs": "off"}, "off"),
        ("exaone4_1p2b", "64k_pretrain", False, {}, "full-iteration"),  # CP
        ("exaone4_1p2b", "pretrain", False, {"recompute": True}, "full-iteration"),
        (
            "exaone4_1p2b",
            "pretrain",
            False,
            {"recompute": True, "cuda_graphs": "layers"},
            "off: layers that are recomputed as a whole cannot be captured one by one",
        ),
        (
            "exaone4_32b",
            "pretrain",
            False,
            {},
            "layers: pipeline stages synchronise with the CPU when they exchange activations",
        ),
        (
            "exaone4_32b",
            "pretrain",
            False,
            {"recompute": True},
            "off: pipeline stages synchronise with the CPU when they exchange activations, and "
            "layers that are recomputed as a whole cannot be captured one by one",
        ),
        ("exaone45_33b", "sft", False, {"pad_samples": True, "pp": 1}, "full-iteration"),
        (
            "exaone45_33b",
            "sft",
            False,
            {"pad_samples": True, "pp": 1, "cp": 2},
            "layers: the positions of each batch are read on the CPU",
        ),
        ("exaone4_1p2b", "sft", False, {}, "off: the lengths of samples that are not padded vary"),
        ("exaone4_1p2b", "sft", False, {"pad_samples": True}, "full-iteration"),
        ("exaone4_1p2b", "peft", False, {"pad_samples": True}, "full-iteration"),
        (
            "exaone4_1p2b",
            "sft",
            True,
            {},
            "layers (mlp): the lengths of packed sequences are read on the CPU",
        ),
        ("exaone4_1p2b", "peft", True, {"cuda_graphs": "layers"}, "layers (mlp)"),
        (
            "ernie45_21b_a3b",
            "pretrain",
            False,
            {},
            f"layers ({_PARTS}): all-to-all needs the experts' token counts on the CPU",
        ),
        (
            "ernie45_21b_a3b",
            "sft",
            True,
            {"cuda_graphs": "layers"},
            "layers (mlp, moe_router, moe_preprocess)",
        ),
        ("ernie45_tiny", "pretrain", False, {}, "full-iteration"),  # EP1
        (
            "ernie45_tiny",
            "pretrain",
            False,
            {"gpus": 2, "tp": 2, "sp": True},
            f"layers ({_PARTS}): all-to-all needs the experts' token counts on the CPU",
        ),
        (
            "ernie45_tiny",
            "pretrain",
            False,
            {"precision": "fp8"},
            f"layers ({_PARTS}): FP8 products of experts need their token counts on the CPU",
        ),
        ("exaone4_1p2b", "pretrain", False, {"precision": "fp8"}, "full-iteration"),
        (
            "ernie45_tiny",
            "peft",
            False,
            {"pad_samples": True},
            f"layers ({_PARTS}): adapters on experts would need their token counts on the CPU",
        ),
        (
            "exaone45_vl_33b",
            "peft",
            False,
            {},
            "off: the lengths of samples that are not padded vary",
        ),
        (
            "exaone45_vl_33b",
            "peft",
            False,
            {"pad_samples": True},
            "layers: images have sizes of their own",
        ),
        ("exaone45_vl_33b", "sft", False, {"cuda_graphs": "layers"}, "layers"),  # PP pads
        (
            "exaone45_vl_33b",
            "sft",
            True,
            {},
            "off: the lengths of batches with images that are packed vary",
        ),
    ],
)
def test_the_most_that_can_be_captured_is_chosen(
    model: str, stage: str, packed: bool, overrides: dict[str, Any], chosen: str
) -> None:
    assert str(_choose(model, stage, packed, **overrides)) == chosen


def test_dense_mlps_are_a_part_only_of_models_that_have_them() -> None:
    config = family_of(CONFIGS["ernie45_tiny"]["architectures"], where="").describe(
        CONFIGS["ernie45_tiny"] | {"moe_layer_start_index": 0}
    )
    plan = training_plan("ernie45_tiny", "pretrain", 80).with_overrides(cuda_graphs="layers")
    graphs = choose_cuda_graphs(config.config, plan, "pretrain", packed=False, images=False)
    assert graphs.modules == ("attn", "moe_router", "moe_preprocess")


@pytest.mark.parametrize("kind", ["layers", "full-iteration"])
@pytest.mark.parametrize("name", RECIPES)
def test_megatron_bridge_accepts_every_recipe_with_graphs(
    name: str,
    kind: str,
    megatron_bridge: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The validation of `pretrain` passes, and one line says why less than asked is captured."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, logger="exaone_bridge"):
        config = recipe(name)(gpu_memory_gb=141, cuda_graphs=kind)
    is_captured = config.model.cuda_graph_impl != "none"
    assert config.model.use_te_rng_tracker == config.rng.te_rng_tracker == is_captured
    lines = [line.getMessage() for line in caplog.records if "CUDA graphs" in line.getMessage()]
    if config.peft is not None:
        config.checkpoint.pretrained_checkpoint = str(tmp_path)
    with transformer_engine_backend():
        validate(config, monkeypatch)
    model = config.model
    impl = {"none": "off", "transformer_engine": "layers", "full_iteration": "full-iteration"}
    assert len(lines) == (impl[model.cuda_graph_impl] != kind)
    if model.cuda_graph_impl == "full_iteration":
        assert not config.ddp.check_for_nan_in_grad
        assert model.pipeline_model_parallel_size == model.expert_model_parallel_size == 1
    else:
        assert config.ddp.check_for_nan_in_grad
    if model.recompute_granularity == "full":
        assert model.cuda_graph_impl in ("none", "full_iteration")
    if getattr(config.dataset, "enable_offline_packing", False):
        assert model.cuda_graph_impl in ("none", "transformer_engine")
        assert "attn" not in [part.name for part in model.cuda_graph_modules]
        assert model.cuda_graph_impl == "none" or model.cuda_graph_modules


def test_graphs_are_off_unless_requested(megatron_bridge: Any) -> None:
    config = recipe("exaone4_1p2b_pretrain_config")()
    assert config.model.cuda_graph_impl == "none" and not config.rng.te_rng_tracker
    assert config.rerun_state_machine.check_for_nan_in_loss and config.ddp.check_for_nan_in_grad
    with pytest.raises(UnsupportedConfig, match="cuda_graphs is 'all', and must be one of 'off'"):
        recipe("exaone4_1p2b_pretrain_config")(cuda_graphs="all")


@pytest.mark.parametrize(("rank", "has_te"), [("0", False), ("1", False), ("0", True)])
def test_graphs_are_off_on_a_gpu_without_transformer_engine(
    rank: str,
    has_te: bool,
    megatron_bridge: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One rank says so."""
    from exaone_bridge.modules import backend

    monkeypatch.setenv("RANK", rank)
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(backend, "TRANSFORMER_ENGINE", backend.TORCH if has_te else None),
        caplog.at_level(logging.WARNING, logger="exaone_bridge"),
    ):
        config = recipe("exaone4_1p2b_pretrain_config")(cuda_graphs="layers")
    assert (config.model.cuda_graph_impl != "none") == config.rng.te_rng_tracker == has_te
    line = "CUDA graphs: off: Transformer Engine is not installed"
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ([line] if rank == "0" and not has_te else [])


def test_samples_are_padded_on_request(megatron_bridge: Any) -> None:
    for name in ("exaone4_tiny_sft_config", "exaone4_tiny_chat_sft_config"):
        dataset = recipe(name)(pad_samples=True, cuda_graphs="full-iteration").dataset
        assert dataset.dataset_kwargs["pad_to_max_length"]
        assert not (recipe(name)().dataset.dataset_kwargs or {}).get("pad_to_max_length")
    assert recipe("exaone45_vl_tiny_sft_config")(pad_samples=True).dataset.pad_to_max_length


def test_checkpoint_of_a_run_with_graphs_builds_without_a_gpu(megatron_bridge: Any) -> None:
    """The torch backend turns graphs off, and run_config.yaml keeps what was requested."""
    model = recipe("ernie45_tiny_pretrain_config")(cuda_graphs="layers").model
    model.finalize()
    assert model.cuda_graph_impl == "none" and not model.use_te_rng_tracker
    assert model.cuda_graph_modules == []
    assert model.to_cfg_dict()["cuda_graph_impl"] == "transformer_engine"
    assert len(model.to_cfg_dict()["cuda_graph_modules"]) == 4


@pytest.mark.parametrize(
    ("field", "value"), [("mtp_num_layers", 2), ("moe_enable_routing_replay", True)]
)
def test_replay_that_would_compute_something_else_is_rejected(
    field: str, value: Any, megatron_bridge: Any
) -> None:
    model = recipe("k_exaone_tiny_pretrain_config")(cuda_graphs="layers").model
    setattr(model, field, value)
    model.mtp_depth = 1
    with transformer_engine_backend(), pytest.raises(UnsupportedConfig, match=f"{field} is"):
        model.finalize()


@pytest.mark.parametrize(("kind", "repeated"), [("full-iteration", True), ("layers", False)])
def test_mtp_of_several_tokens_is_captured_where_no_graph_is_replayed_twice(
    kind: Any, repeated: bool, megatron_bridge: Any
) -> None:
    model = recipe("k_exaone_tiny_pretrain_config")(cuda_graphs=kind).model
    model.mtp_num_layers, model.mtp_use_repeated_layer = 2, repeated
    model._check_replay()


def test_memory_of_graphs() -> None:
    """Static buffers of each layer in flight, and bf16 gradients."""
    description = family_of(CONFIGS["exaone4_32b"]["architectures"], where="").describe(
        CONFIGS["exaone4_32b"]
    )
    plan = training_plan("exaone4_32b", "sft", 141)  # TP8, SP, 8192 tokens
    none = estimate(description, plan)
    layers = estimate(description, plan, graphs=CudaGraphs("layers"))
    buffers = 64 * 4 * 2 * 5120 * 8192 / 8
    gradients = (none.gradients - 4 * (2 * 102400 * 5120 / 8 + 5120)) / 2  # those of layers
    assert none.graphs == 0
    assert layers.graphs == pytest.approx(buffers + gradients)
    assert layers.total - none.total == layers.graphs
    full = estimate(description, plan, graphs=CudaGraphs("full-iteration"))
    assert full.graphs == 28 * 8192 * plan.num_microbatches
    two_stages = replace(plan, layout=replace(plan.layout, pp=2), gpus=16)
    piped = estimate(description, two_stages, graphs=CudaGraphs("layers"))
    assert piped.graphs - buffers == pytest.approx(gradients / 2)  # half, twice in flight
    chunks = replace(plan, layout=replace(plan.layout, pp=2, vpp=2), gpus=16)
    piped = estimate(description, chunks, graphs=CudaGraphs("layers"))
    assert piped.graphs - 5 / 4 * buffers == pytest.approx(gradients / 2)  # of 16 layers, five
    padded = replace(plan, cuda_graphs="layers", pad_samples=True)
    checked = check_plan("exaone4_32b", "sft", 141, CONFIGS["exaone4_32b"], padded)
    assert checked.memory == layers
