"""Megatron-Core's distributed optimizer with parameters of two types; FP8 parameters after a load."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout


def _train_and_save(folder: Any, ours: bool) -> dict[str, list[bool]]:
    """Parameter name -> whether the state saved for it has its size, after a step of a bf16 model."""
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not ours:
        fixed = DistributedOptimizer._build_optimizer_group_ranges.__func__
        DistributedOptimizer._build_optimizer_group_ranges = classmethod(fixed.__wrapped__)
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.apply_overrides_and_finalize(torch.bfloat16, {})
    (model,) = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=True),
        use_cpu_initialization=True,
    )
    settings = OptimizerConfig(
        lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(settings, [model])
    for parameter in model.parameters():
        parameter.main_grad.normal_()
    optimizer.step()
    found: dict[str, list[bool]] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter in part.model_param_group_index_map:
            states = part._get_main_param_and_optimizer_states(parameter)
            found[names[parameter]] = [
                value.numel() == parameter.numel()
                for value in states.values()
                if value.ndim  # not the step count
            ]
            if all(found[names[parameter]]):
                found[names[parameter]].append(
                    torch.equal(
                        states["param"].bfloat16().flatten(),
                        parameter.detach().bfloat16().flatten(),
                    )
                )
    return found


def test_states_are_saved_under_their_own_parameter(megatron_bridge: Any, tiny: Any) -> None:
    folder = tiny("ernie45", dtype="bfloat16")
    (found,) = ForkLauncher(1).all(_train_and_save, folder, True)
    assert any("router.weight" in name for name in found)
    wrong = [name for name, checks in found.items() if not all(checks)]
    assert not wrong


def test_megatron_cores_own_order_is_wrong(megatron_bridge: Any, tiny: Any) -> None:
    """Should this fail, Megatron-Core has mended it, and `patches/optimizer.py` can go."""
    (found,) = ForkLauncher(1).all(_train_and_save, tiny("ernie45", dtype="bfloat16"), False)
    assert [name for name, checks in found.items() if not all(checks)]


def _remembered_after_load(folder: Any, layout: Layout) -> tuple[bool, bool, str]:
    """Transformer Engine's contract on one parameter: is what it remembers the weight that was loaded?"""
    from megatron.bridge import AutoBridge
    from megatron.core.utils import unwrap_model

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout)
    parameter = next(
        parameter
        for name, parameter in unwrap_model(model[0]).named_parameters()
        if "linear_fc1" in name
    )
    parameter._high_precision_init_val = torch.full_like(
        parameter, float("nan"), dtype=torch.bfloat16
    )
    parameter.get_high_precision_init_val = MethodType(
        lambda self: self._high_precision_init_val, parameter
    )
    right = parameter.detach().clone()
    with torch.no_grad():
        parameter.zero_()
    bridge.load_hf_weights(model)
    remembered = parameter.get_high_precision_init_val()
    kept_state = getattr(bridge._model_bridge, "unquantized_state_dict", None)
    return torch.equal(remembered, right.bfloat16()), torch.equal(parameter, right), str(kept_state)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2, vpp=2)], ids=str)
def test_fp8_parameters_remember_what_was_loaded(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    for remembered, loaded, kept in ForkLauncher(layout.ranks).all(
        _remembered_after_load, tiny("exaone4"), layout
    ):
        assert loaded
        assert remembered
        assert kept == "None"
