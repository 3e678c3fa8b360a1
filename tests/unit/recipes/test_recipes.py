"""Recipes are valid for Megatron-Bridge at their own world size, and reject what cannot work."""

from __future__ import annotations

import inspect
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import exaone_bridge.recipes
from exaone_bridge.errors import CheckpointError, UnsupportedConfig, UnsupportedLayout
from exaone_bridge.models import family_of
from exaone_bridge.recipes import RECIPES, recipe
from exaone_bridge.recipes.memory import GB, RESERVE, estimate, estimate_stages
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.recipes.table import plan_table
from exaone_bridge.recipes.training_plan import PlanOverrides, TrainingPlan
from exaone_bridge.recipes.training_plans import ADAPTER_RANK, TRAINING_PLANS, training_plan
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.hf_config import language_config
from exaone_bridge.schema.model_family import ModelDescription
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.paths import ROOT

CASES = [
    (model, stage, gpu_memory_gb)
    for model, stage in TRAINING_PLANS
    for gpu_memory_gb in TRAINING_PLANS[model, stage]
    if "tiny" not in model or gpu_memory_gb == 80
]
# Recipes for conversations have the plans of those without `chat_`.
STAGES = [
    *TRAINING_PLANS,
    *(
        (model, f"chat_{stage}")
        for model, stage in TRAINING_PLANS
        if stage in ("sft", "peft") and "_vl_" not in model
    ),
]
# Parameters of the published models in billions, from their model cards.
BILLIONS = {
    "exaone4_1p2b": 1.28,
    "exaone4_32b": 32.0,
    "exaone45_33b": 33.8,  # the card says 33
    "exaone45_vl_33b": 33.8,
    "ernie45_0p3b": 0.36,
    "ernie45_21b_a3b": 21.8,
    "ernie45_300b_a47b": 300.5,
    "k_exaone_236b_a23b": 236.57,  # without multi-token prediction, which has 0.53 more
    "k_exaone_2_750b_a37b": 748.83,  # from the published bytes; without it too
}


def _describe(model: str) -> ModelDescription:
    return family_of(CONFIGS[model]["architectures"], where=model).describe(CONFIGS[model])


def _validate(config: Any, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate a config as `pretrain` does before it uses a GPU, with a made-up world size."""
    from megatron.bridge.training.config import runtime_config_update

    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    monkeypatch.setenv("RANK", "0")
    for name, value in config.env_vars.items():  # monkeypatch removes them after the test
        monkeypatch.setenv(name, str(value))
    runtime_config_update(config)


@pytest.mark.parametrize(("model", "stage", "gpu_memory_gb"), CASES)
def test_recipe_config_is_valid_and_matches_its_plan(
    megatron_bridge: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    stage: str,
    gpu_memory_gb: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = training_plan(model, stage, gpu_memory_gb)
    config = recipe(f"{model}_{stage}_config")(gpu_memory_gb=gpu_memory_gb)
    if stage == "peft":
        config.checkpoint.pretrained_checkpoint = str(tmp_path)  # must exist; is not read yet
    _validate(config, plan.gpus, monkeypatch)
    provider = config.model
    assert config.data_parallel_size == plan.dp
    assert provider.seq_length == config.dataset.seq_length == plan.seq_length
    assert provider.bf16 and provider.params_dtype is provider.pipeline_dtype is torch.bfloat16
    assert config.ddp.grad_reduce_in_fp32
    assert config.ddp.use_distributed_optimizer and config.optimizer.use_distributed_optimizer
    assert config.ddp.overlap_grad_reduce and config.ddp.overlap_param_gather
    assert provider.sequence_parallel == (provider.tensor_model_parallel_size > 1)
    assert (config.peft is not None) == (stage == "peft")
    vocab_size = language_config(CONFIGS[model])["vocab_size"]
    assert provider.vocab_size == config.tokenizer.vocab_size == vocab_size
    assert not config.tokenizer.use_tokenizer_vocab_size
    assert provider.calculate_per_token_loss == (stage in ("sft", "peft"))
    if model.startswith("exaone45"):
        assert provider.freeze_vision_model and not provider.freeze_language_model
        assert provider.freeze_vision_projection == ("_vl_" not in model)
    # Fusions that this machine's backend turns off are requested again for a GPU.
    requested = provider.to_cfg_dict()
    assert requested["cross_entropy_loss_fusion"] and requested["bias_activation_fusion"]
    if provider.num_moe_experts:
        assert requested["moe_grouped_gemm"] and requested["moe_permute_fusion"]
        assert requested["moe_token_dispatcher_type"] == "alltoall"
        assert provider.moe_router_enable_expert_bias == ("pretrain" in stage)
        balancing = ("none", 0.0)
        if model.startswith("k_exaone") and "pretrain" in stage:  # arXiv 2601.01739: both at once
            balancing = ("seq_aux_loss", 1e-4)
            assert provider.moe_router_bias_update_rate == 1e-4
        loss = (provider.moe_router_load_balancing_type, provider.moe_aux_loss_coeff)
        assert loss == balancing
    # The model is the published one, and so is the config that an export writes.
    exported = megatron_bridge[CONFIGS[model]["architectures"][0]].megatron_to_hf_config(provider)
    read = family_of(exported["architectures"], where=model).read_hf_config
    assert read(exported) == read(CONFIGS[model])


@pytest.mark.parametrize(
    ("model", "stage"), [key for key in TRAINING_PLANS if "tiny" not in key[0]]
)
def test_plan_divides_the_model_and_fits_the_gpu(model: str, stage: str) -> None:
    """TP stays within a node, and a larger GPU needs no more GPUs."""
    description = _describe(model)
    for gpu_memory_gb, plan in TRAINING_PLANS[model, stage].items():
        plan.check(description.config)
        assert plan.layout.tp <= 8 and plan.layout.ep * plan.layout.expert_tp <= 64
        adapter_rank = ADAPTER_RANK if stage == "peft" else 0
        memory = estimate(description, plan, adapter_rank=adapter_rank)
        assert memory.total <= gpu_memory_gb * GB
        assert min(memory.parameters, memory.gradients, memory.optimizer, memory.activations) > 0
    assert TRAINING_PLANS[model, stage][141].gpus <= TRAINING_PLANS[model, stage][80].gpus


@pytest.mark.parametrize("model", BILLIONS)
def test_parameter_count_equals_the_published_number(model: str) -> None:
    description = _describe(model)
    count = sum(math.prod(shape) for shape in description.hf_shapes.values())
    assert count / 1e9 == pytest.approx(BILLIONS[model], rel=0.01)
    one_gpu = TrainingPlan(gpus=1, layout=Layout(), seq_length=4096, global_batch_size=1)
    memory = estimate(description, one_gpu)
    expected = (2 * count, 4 * count, 12 * count)
    assert (memory.parameters, memory.gradients, memory.optimizer) == expected


def _count_local_parameters(hf_path: Path, layout: Layout) -> int:
    """On a rank: count the parameters and expert biases of the Megatron-Core model."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    model = build(AutoBridge.from_hf_pretrained(hf_path), layout)
    tensors = [parameter for chunk in model for parameter in chunk.parameters()]
    tensors += [
        buffer
        for chunk in model
        for name, buffer in chunk.named_buffers()
        if name.endswith("expert_bias")
    ]
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("exaone4", Layout(tp=2, pp=2, vpp=2, sp=True)),
        ("exaone4-1.2b", Layout(pp=2)),
        ("ernie45-300b", Layout(ep=2, pp=2)),
    ],
    ids=str,
)
def test_parameters_per_stage_equal_megatron_cores(
    megatron_bridge: Any, tiny: Any, name: str, layout: Layout
) -> None:
    hf_path = tiny(name, vocab_size=388)
    config = json.loads((hf_path / "config.json").read_text())
    description = family_of(config["architectures"], where=name).describe(config)
    plan = TrainingPlan(
        gpus=layout.ranks, layout=layout, seq_length=64, global_batch_size=2 * layout.ranks
    )
    counts = ForkLauncher(layout.ranks).all(_count_local_parameters, hf_path, layout)
    stages = estimate_stages(description, plan)
    assert {stage.parameters for stage in stages} == {2 * count for count in counts}


def test_activations_follow_korthikanti() -> None:
    """Korthikanti et al. 2022, table 2: SP shards all of a layer; full recomputation keeps 2sbh."""
    description = _describe("exaone4_32b")
    model_config = description.config
    plan = TrainingPlan(gpus=8, layout=Layout(), seq_length=4096, global_batch_size=8)

    def activations(**overrides: Any) -> float:
        """Activations of the layers, without the logits."""
        other = plan.with_overrides(**overrides)
        tokens = other.seq_length * other.micro_batch_size / other.cp
        logits = 8 * tokens * model_config.vocab_size / other.layout.tp
        return estimate(description, other).activations - logits

    layers = activations()
    tp, tp_with_sp = activations(tp=8), activations(tp=8, sp=True)
    assert tp_with_sp == pytest.approx(layers / 8)
    assert tp_with_sp < tp < layers
    assert activations(cp=4) == pytest.approx(layers / 4)
    assert activations(micro_batch_size=2, global_batch_size=16) == pytest.approx(2 * layers)
    inputs = model_config.num_layers * 2 * 4096 * model_config.hidden_size
    one_layer = layers / model_config.num_layers
    assert activations(recompute=True) == pytest.approx(inputs + one_layer)

    # The first stage stores as many microbatches as there are stages: as much as without PP.
    def first_stage(**overrides: Any) -> float:
        return estimate(description, plan.with_overrides(**overrides)).activations

    assert first_stage(pp=8, global_batch_size=8) == pytest.approx(layers)
    interleaved = first_stage(pp=8, vpp=2, global_batch_size=64)
    assert interleaved == pytest.approx(layers * (1 + 7 / 16))  # 1 + (p - 1) / (p m)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("exaone4_1p2b_pretrain_config", {"tp": 3}, "tp is 3"),
        ("exaone4_1p2b_pretrain_config", {"pp": 4}, "pp x vpp is 4 x 1"),
        ("exaone4_1p2b_pretrain_config", {"gpus": 6, "tp": 4, "sp": True}, "gpus is 6"),
        ("exaone4_1p2b_pretrain_config", {"gpus": 1, "tp": 2, "sp": True}, "gpus is 1"),
        ("exaone4_1p2b_pretrain_config", {"global_batch_size": 100}, "global_batch_size is 100"),
        ("exaone4_1p2b_pretrain_config", {"ep": 2}, "ep is 2"),
        ("exaone4_1p2b_pretrain_config", {"cp": 4, "seq_length": 4100}, "seq_length is 4100"),
        (
            "exaone4_1p2b_pretrain_config",
            {"seq_length": 131072},
            "at most the model's 65536 positions",
        ),
        ("exaone4_1p2b_pretrain_config", {"seq_length": 65536}, "memory of a GPU is 80 GB"),
        ("exaone4_32b_sft_config", {"gpus": 8, "pp": 1}, "memory of a GPU is 80 GB"),
        ("exaone4_32b_pretrain_config", {"global_batch_size": 4}, "num_microbatches is 1"),
        ("exaone4_32b_pretrain_config", {"micro_batch_size": 0}, "micro_batch_size is 0"),
        ("ernie45_21b_a3b_pretrain_config", {"ep": 5}, "ep is 5"),
        ("ernie45_21b_a3b_pretrain_config", {"tp": 2}, "sp is off"),
        ("ernie45_21b_a3b_pretrain_config", {"gpus": 12, "global_batch_size": 12}, "gpus is 12"),
        ("ernie45_300b_a47b_pretrain_config", {"pp": 8}, "pp x vpp is 8 x 2"),
    ],
)
def test_recipe_with_impossible_sizes_raises(
    megatron_bridge: Any, name: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedLayout) as caught:
        recipe(name)(**overrides)
    assert message in str(caught.value)


def test_recipe_is_an_exported_function_with_a_signature() -> None:
    """Every plan has a recipe of its name; recipes are pickled by reference."""
    assert set(RECIPES) == {f"{model}_{stage}_config" for model, stage in STAGES}
    assert set(exaone_bridge.recipes.__all__) == {"RECIPES", "recipe", *RECIPES}
    for model, stage in STAGES:
        name = f"{model}_{stage}_config"
        function = getattr(exaone_bridge.recipes, name)
        assert pickle.loads(pickle.dumps(function)) is function is recipe(name)
        parameters = inspect.signature(function).parameters
        assert ("peft_scheme" in parameters) == stage.endswith("peft")
        assert ("packed" in parameters) == stage.endswith(("sft", "peft"))
        assert ("last_turn" in parameters) == stage.startswith("chat")
        if "packed" in parameters:
            assert parameters["packed"].default == (not re.search("_tiny|_vl_", model))
        assert function.__doc__ and ("positions" in function.__doc__) == ("k_" in stage)


@pytest.mark.parametrize(("model", "stage"), STAGES)
def test_recipe_calls_the_builder_with_its_own_plan(
    monkeypatch: pytest.MonkeyPatch, model: str, stage: str
) -> None:
    calls = []
    from exaone_bridge.recipes import build

    for builder in build.__all__:
        monkeypatch.setattr(build, builder, lambda *args, name=builder: calls.append((name, *args)))
    recipe(f"{model}_{stage}_config")(gpu_memory_gb=141, hf_path="path", tp=2)
    builder = "pretrain_config" if "pretrain" in stage else f"{stage}_config"
    ((name, *arguments),) = calls
    assert (name, arguments[0], arguments[-1]) == (builder, model, {"tp": 2})
    assert "path" in arguments and 141 in arguments and (stage in arguments) == ("train" in stage)


def test_plan_overrides_are_the_fields_of_plan_and_layout() -> None:
    fields = TrainingPlan.__dataclass_fields__.keys() | Layout.__dataclass_fields__.keys()
    assert PlanOverrides.__annotations__.keys() == fields - {"layout"}


def test_recipe_with_wrong_arguments_raises(megatron_bridge: Any) -> None:
    with pytest.raises(UnsupportedConfig, match="gpu_memory_gb is 96, and must be one of 80, 141"):
        recipe("exaone4_1p2b_sft_config")(gpu_memory_gb=96)
    for scheme in ("ia3", 3):
        with pytest.raises(UnsupportedConfig, match=f"peft_scheme is {scheme!r}"):
            recipe("exaone4_1p2b_peft_config")(scheme)
    with pytest.raises(UnsupportedConfig, match="tpp is 2, and must be one of 'cp'"):
        recipe("exaone4_1p2b_sft_config")(tpp=2)
    with pytest.raises(UnsupportedConfig, match="recipe is 'exaone5_config'"):
        recipe("exaone5_config")
    with pytest.raises(UnsupportedConfig, match="one of 'exaone4_1p2b_sft_config'") as caught:
        recipe("exaone4_1p2b_sft")
    assert "ernie45_tiny" not in str(caught.value)
    with pytest.raises(CheckpointError, match="recipes download nothing"):
        recipe("exaone4_1p2b_sft_config")(hf_path="LGAI-EXAONE/EXAONE-4.0-1.2B")


def test_hf_path_gives_config_tokenizer_and_weights(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    hf_path = tiny("exaone4-1.2b")
    (tmp_path / "training.jsonl").write_text('{"input": "a", "output": "b"}\n')
    config = recipe("exaone4_tiny_peft_config")("dora", hf_path=hf_path, dataset_root=tmp_path)
    assert config.model.num_layers == 6 and config.model.hf_config["tie_word_embeddings"]
    assert config.tokenizer.tokenizer_type == "HuggingFaceTokenizer"
    assert config.tokenizer.tokenizer_model == str(hf_path)
    assert config.checkpoint.pretrained_checkpoint == str(hf_path)
    assert type(config.peft).__name__ == "DoRA"
    assert config.dataset.dataset_root == str(tmp_path)
    # There is no validation.jsonl.
    assert not config.dataset.do_validation and config.validation.eval_iters == 0


def test_documented_table_is_current() -> None:
    """docs/recipes.md shows the output of `python -m exaone_bridge.recipes`."""
    assert RESERVE == 8 * GB
    assert plan_table() in (ROOT / "docs" / "recipes.md").read_text()
