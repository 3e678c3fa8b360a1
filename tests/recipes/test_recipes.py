"""Every recipe is built and validated as the host's training loop does it, at its own world size; wrong ones refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.recipes import RECIPES, recipe
from exaone_bridge.recipes.plans import plan_of

CASES = [(name, memory) for name in RECIPES for memory in (80, 141)]


@pytest.fixture(scope="module")
def anything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is there: PEFT wants to know where the weights are, and reads none of them in `validate`."""
    return tmp_path_factory.mktemp("pretrained")


def _validated(config: Any, gpus: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `pretrain` does to a configuration before it touches a GPU; only the number of ranks is made up."""
    from megatron.bridge.training.config import runtime_config_update

    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    monkeypatch.setenv("RANK", "0")
    for name in config.env_vars:
        monkeypatch.setenv(name, str(config.env_vars[name]))
    runtime_config_update(config)
    return config


@pytest.mark.parametrize(("name", "memory"), CASES)
def test_recipe(
    host: Any, anything: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, memory: int
) -> None:
    monkeypatch.chdir(tmp_path)
    model, stage = RECIPES[name]
    plan = plan_of(model, stage, memory)
    config = recipe(name)(gpu_memory_gb=memory)
    if stage == "peft":
        config.checkpoint.pretrained_checkpoint = str(anything)
    _validated(config, plan.gpus, monkeypatch)
    assert config.data_parallel_size == plan.dp
    assert config.model.seq_length == config.dataset.seq_length == plan.seq_length
    assert config.model.bf16 and config.model.params_dtype is torch.bfloat16
    assert config.ddp.grad_reduce_in_fp32 and config.ddp.use_distributed_optimizer
    assert config.model.sequence_parallel == (config.model.tensor_model_parallel_size > 1)
    assert (config.peft is not None) == (stage == "peft")
    if config.model.num_moe_experts:
        assert config.model.moe_router_enable_expert_bias == ("pretrain" in stage)
        assert config.model.moe_aux_loss_coeff == 0.0
