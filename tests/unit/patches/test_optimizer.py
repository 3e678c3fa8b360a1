"""Megatron-Core's distributed optimizer with parameters of two dtypes, and FP8 initial values."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout


def _train_and_save(folder: Any, patched: bool) -> dict[str, list[bool]]:
    """Train a bf16 model for a step.

    Returns:
        Parameter name -> whether each saved state of it has its size, and its values.
    """
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not patched:
        replaced = DistributedOptimizer._build_optimizer_group_ranges.__func__
        DistributedOptimizer._build_optimizer_group_ranges = classmethod(replaced.__wrapped__)
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
    """Should this fail, Megatron-Core has fixed it, and `patches/optimizer.py` can go."""
    (found,) = ForkLauncher(1).all(_train_and_save, tiny("ernie45", dtype="bfloat16"), False)
    assert [name for name, checks in found.items() if not all(checks)]


def _load_with_init_value(folder: Any, layout: Layout) -> tuple[bool, bool, str]:
    """Load a model in which one parameter has an initial value, as FP8 parameters have.

    Returns:
        Whether the initial value is the loaded weight, whether the parameter is, and what the
        bridge keeps of the unrounded weights.
    """
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
    init_value = parameter.get_high_precision_init_val()
    kept_state = getattr(bridge._model_bridge, "unquantized_state_dict", None)
    return torch.equal(init_value, right.bfloat16()), torch.equal(parameter, right), str(kept_state)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2, vpp=2)], ids=str)
def test_initial_values_of_fp8_parameters_are_the_loaded_ones(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    for init_value_is_loaded, loaded, kept in ForkLauncher(layout.ranks).all(
        _load_with_init_value, tiny("exaone4"), layout
    ):
        assert loaded
        assert init_value_is_loaded
        assert kept == "None"
