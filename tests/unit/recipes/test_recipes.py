"""Every recipe is built and validated as the host's training loop does it, at its own world size; bad ones refused."""

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
from exaone_bridge.recipes.memory import GB, RESERVE, estimate, stages
from exaone_bridge.recipes.plan import Plan
from exaone_bridge.recipes.plans import ADAPTER_RANK, PLANS, plan_of
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.recipes.table import table
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.hf_config import language_config
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import hf_tensors
from tests.helpers.paths import ROOT

CASES = [
    (name, memory)
    for name, key in RECIPES.items()
    for memory in PLANS[key]
    if "tiny" not in name or memory == 80
]
# Parameters of the published models, as their cards have them, in billions.
BILLIONS = {
    "exaone4_1p2b": 1.28,
    "exaone4_32b": 32.0,
    "exaone45_33b": 33.8,  # the card says 33
    "exaone45_vl_33b": 33.8,
    "ernie45_0p3b": 0.36,
    "ernie45_21b_a3b": 21.8,
    "ernie45_300b_a47b": 300.5,
}


def _model_config(model: str) -> tuple[Any, Any]:
    family = family_of(CONFIGS[model]["architectures"], where=model)
    model_config = family.read_hf_config(CONFIGS[model])
    return family.mappings(model_config), model_config


def _validated(config: Any, gpus: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `pretrain` does to a configuration before it touches a GPU; only the number of ranks is made up."""
    from megatron.bridge.training.config import runtime_config_update

    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    monkeypatch.setenv("RANK", "0")
    for name, value in config.env_vars.items():  # so that they are gone after the test
        monkeypatch.setenv(name, str(value))
    runtime_config_update(config)
    return config


@pytest.mark.parametrize(("name", "memory"), CASES)
def test_recipe(
    megatron_bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, memory: int
) -> None:
    monkeypatch.chdir(tmp_path)
    model, stage = RECIPES[name]
    plan = plan_of(model, stage, memory)
    config = recipe(name)(gpu_memory_gb=memory)
    if stage == "peft":
        config.checkpoint.pretrained_checkpoint = str(
            tmp_path
        )  # must be there; nothing is read yet
    _validated(config, plan.gpus, monkeypatch)
    provider = config.model
    assert config.data_parallel_size == plan.dp
    assert provider.seq_length == config.dataset.seq_length == plan.seq_length
    assert provider.bf16 and provider.params_dtype is provider.pipeline_dtype is torch.bfloat16
    assert config.ddp.grad_reduce_in_fp32
    assert config.ddp.use_distributed_optimizer and config.optimizer.use_distributed_optimizer
    assert config.ddp.overlap_grad_reduce and config.ddp.overlap_param_gather
    assert provider.sequence_parallel == (provider.tensor_model_parallel_size > 1)
    assert (config.peft is not None) == (stage == "peft")
    assert (
        provider.vocab_size
        == language_config(CONFIGS[model])["vocab_size"]
        == config.tokenizer.vocab_size
    )
    assert not config.tokenizer.use_tokenizer_vocab_size
    assert provider.calculate_per_token_loss == (stage in ("sft", "peft"))
    if model.startswith("exaone45"):
        assert provider.freeze_vision_model and not provider.freeze_language_model
        assert provider.freeze_vision_projection == ("_vl_" not in model)
    wished = (
        provider.to_cfg_dict()
    )  # what this machine's backend had to switch off is on again on a GPU
    assert wished["cross_entropy_loss_fusion"] and wished["bias_activation_fusion"]
    if provider.num_moe_experts:
        assert wished["moe_grouped_gemm"] and wished["moe_permute_fusion"]
        assert wished["moe_token_dispatcher_type"] == "alltoall"
        assert provider.moe_router_enable_expert_bias == ("pretrain" in stage)
        assert (
            provider.moe_aux_loss_coeff == 0.0 and provider.moe_router_load_balancing_type == "none"
        )
    # The model is the published one, and so is the configuration that an export writes.
    exported = megatron_bridge[CONFIGS[model]["architectures"][0]].megatron_to_hf_config(provider)
    read = family_of(exported["architectures"], where=name).read_hf_config
    assert read(exported) == read(CONFIGS[model])


@pytest.mark.parametrize(("model", "stage"), [key for key in PLANS if "tiny" not in key[0]])
def test_plan_fits(model: str, stage: str) -> None:
    """Cut evenly, tp within a node, and within the GPU's memory; of the larger GPU no more are needed."""
    mappings, model_config = _model_config(model)
    for memory, plan in PLANS[model, stage].items():
        plan.check(model_config)
        assert plan.layout.tp <= 8 and plan.layout.ep * plan.layout.expert_tp <= 64
        needed = estimate(
            mappings, model_config, plan, adapter_rank=ADAPTER_RANK if stage == "peft" else 0
        )
        assert needed.total <= memory * GB
        assert min(needed.parameters, needed.gradients, needed.optimizer, needed.activations) > 0
    assert PLANS[model, stage][141].gpus <= PLANS[model, stage][80].gpus


@pytest.mark.parametrize("model", BILLIONS)
def test_parameters_are_the_published_number(model: str) -> None:
    mappings, model_config = _model_config(model)
    count = sum(
        math.prod(tensor.shape(model_config.dims)) for tensor in hf_tensors(mappings).values()
    )
    assert count / 1e9 == pytest.approx(BILLIONS[model], rel=0.01)
    one = Plan(gpus=1, layout=Layout(), seq_length=4096, global_batch=1)
    found = estimate(mappings, model_config, one)
    assert (found.parameters, found.gradients, found.optimizer) == (
        2 * count,
        4 * count,
        12 * count,
    )


def _held(folder: Path, layout: Layout) -> int:
    """On a rank: how many parameters it has."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    model = build(AutoBridge.from_hf_pretrained(folder), layout)
    return sum(
        parameter.numel() for chunk in model for name, parameter in chunk.named_parameters()
    ) + sum(
        buffer.numel()
        for chunk in model
        for name, buffer in chunk.named_buffers()
        if name.endswith("expert_bias")
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("exaone4", Layout(tp=2, pp=2, vpp=2, sp=True)),
        ("exaone4-1.2b", Layout(pp=2)),
        ("ernie45-300b", Layout(ep=2, pp=2)),
    ],
    ids=str,
)
def test_parameters_of_a_rank_are_the_models(
    megatron_bridge: Any, tiny: Any, name: str, layout: Layout
) -> None:
    """The formula's stages against what Megatron-Core builds there."""
    folder = tiny(name, vocab_size=388)
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config["architectures"], where=name)
    model_config = family.read_hf_config(config)
    plan = Plan(gpus=layout.ranks, layout=layout, seq_length=64, global_batch=2 * layout.ranks)
    built = ForkLauncher(layout.ranks).all(_held, folder, layout)
    assert {
        stage.parameters for stage in stages(family.mappings(model_config), model_config, plan)
    } == {2 * count for count in built}


def test_activations_follow_the_paper() -> None:
    """Korthikanti et al., table 2: t cuts a whole layer with sequence parallelism, a part without; recompute: 2sbh."""
    mappings, model_config = _model_config("exaone4_32b")
    one = Plan(gpus=8, layout=Layout(), seq_length=4096, global_batch=8)

    def layers(plan: Plan) -> float:
        logits = (
            8
            * plan.seq_length
            * plan.micro_batch
            * model_config.vocab_size
            / plan.layout.tp
            / plan.cp
        )
        return estimate(mappings, model_config, plan).activations - logits

    cut = {sp: layers(one.changed(tp=8, sp=sp)) for sp in (True, False)}
    assert cut[True] == pytest.approx(layers(one) / 8)
    assert cut[True] < cut[False] < layers(one)
    assert layers(one.changed(cp=4)) == pytest.approx(layers(one) / 4)
    assert layers(one.changed(micro_batch=2, global_batch=16)) == pytest.approx(2 * layers(one))
    kept = model_config.num_layers * 2 * 4096 * model_config.hidden_size
    assert layers(one.changed(recompute=True)) == pytest.approx(
        kept + layers(one) / model_config.num_layers
    )
    # The first stage of a pipeline keeps as many micro batches as there are stages: no less in all.
    first = estimate(mappings, model_config, one.changed(pp=8, global_batch=8)).activations
    assert first == pytest.approx(layers(one))
    interleaved = estimate(
        mappings, model_config, one.changed(pp=8, vpp=2, global_batch=64)
    ).activations
    assert interleaved == pytest.approx(layers(one) * (1 + 7 / 16))  # 1 + (p - 1) / (p m)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("exaone4_1p2b_pretrain_config", {"tp": 3}, "tp is 3"),
        ("exaone4_1p2b_pretrain_config", {"pp": 4}, "pp x vpp is 4 x 1"),
        ("exaone4_1p2b_pretrain_config", {"gpus": 6, "tp": 4, "sp": True}, "gpus is 6"),
        ("exaone4_1p2b_pretrain_config", {"gpus": 1, "tp": 2, "sp": True}, "gpus is 1"),
        ("exaone4_1p2b_pretrain_config", {"global_batch": 100}, "global_batch is 100"),
        ("exaone4_1p2b_pretrain_config", {"ep": 2}, "ep is 2"),
        ("exaone4_1p2b_pretrain_config", {"cp": 4, "seq_length": 4100}, "seq_length is 4100"),
        (
            "exaone4_1p2b_pretrain_config",
            {"seq_length": 131072},
            "at most the model's 65536 positions",
        ),
        ("exaone4_1p2b_pretrain_config", {"seq_length": 65536}, "memory of a GPU is 80 GB"),
        ("exaone4_32b_sft_config", {"gpus": 8, "pp": 1}, "memory of a GPU is 80 GB"),
        ("exaone4_32b_pretrain_config", {"global_batch": 4}, "micro batches is 1"),
        ("exaone4_32b_pretrain_config", {"micro_batch": 0}, "micro_batch is 0"),
        ("ernie45_21b_a3b_pretrain_config", {"ep": 5}, "ep is 5"),
        ("ernie45_21b_a3b_pretrain_config", {"tp": 2}, "sp is off"),
        ("ernie45_21b_a3b_pretrain_config", {"gpus": 12, "global_batch": 12}, "gpus is 12"),
        ("ernie45_300b_a47b_pretrain_config", {"pp": 8}, "pp x vpp is 8 x 2"),
    ],
)
def test_wrong_sizes_are_refused(
    megatron_bridge: Any, name: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedLayout) as caught:
        recipe(name)(**changes)
    assert said in str(caught.value)


def test_a_recipe_is_a_function_of_the_package(megatron_bridge: Any) -> None:
    """By its name, with its arguments and what it says of itself; by reference where it is sent to another process."""
    for name, (model, stage) in RECIPES.items():
        found = getattr(exaone_bridge.recipes, name)
        assert pickle.loads(pickle.dumps(found)) is found is recipe(name) and found.__name__ == name
        parameters = inspect.signature(found).parameters
        assert ("peft_scheme" in parameters) == (stage == "peft") and ("packed" in parameters) == (
            stage in ("sft", "peft")
        )
        assert "packed" not in parameters or parameters["packed"].default == (
            not re.search("_tiny|_vl_", model)
        )
        assert found.__doc__ and ("positions" in found.__doc__) == ("k_" in stage)


def test_wrong_arguments_are_refused(megatron_bridge: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedConfig, match="gpu_memory_gb is 96, and must be one of 80, 141"):
        recipe("exaone4_1p2b_sft_config")(gpu_memory_gb=96)
    with pytest.raises(UnsupportedConfig, match="peft_scheme is 'ia3'"):
        recipe("exaone4_1p2b_peft_config")("ia3")
    with pytest.raises(UnsupportedConfig, match="tpp is 2, and must be one of 'cp'"):
        recipe("exaone4_1p2b_sft_config")(tpp=2)
    with pytest.raises(UnsupportedConfig, match="recipe is 'exaone5_config'"):
        recipe("exaone5_config")
    with pytest.raises(CheckpointError, match="recipes download nothing"):
        recipe("exaone4_1p2b_sft_config")(hf_path="LGAI-EXAONE/EXAONE-4.0-1.2B")


def test_folder_gives_configuration_tokenizer_and_weights(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    folder = tiny("exaone4-1.2b")
    config = recipe("exaone4_tiny_peft_config")("dora", hf_path=folder, dataset_root=tmp_path)
    assert config.model.num_layers == 6 and config.model.hf_config["tie_word_embeddings"]
    assert config.tokenizer.tokenizer_type == "HuggingFaceTokenizer"
    assert (
        config.tokenizer.tokenizer_model == config.checkpoint.pretrained_checkpoint == str(folder)
    )
    assert type(config.peft).__name__ == "DoRA"
    assert config.dataset.dataset_root == str(tmp_path)


def test_documented_table() -> None:
    """docs/recipes.md shows what `python -m exaone_bridge.recipes` prints."""
    assert RESERVE == 8 * GB
    assert table() in (ROOT / "docs" / "recipes.md").read_text()
