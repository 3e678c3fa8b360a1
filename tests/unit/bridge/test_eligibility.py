"""Models that the reshard plan does not support use the code of Megatron-Bridge."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_tensors
from tests.helpers.unloaded import named_parameters, unloaded_model, unwrap_model

COLLECTIVES = (
    *("all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast"),
    *("broadcast_object_list", "gather", "gather_object", "scatter", "scatter_object_list"),
    *("reduce_scatter", "all_to_all", "send", "recv"),
)


class LogLines(logging.Handler):
    """Collects the log of the module that chooses between the plan and Megatron-Bridge's code."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.disable(logging.NOTSET)
        logger = logging.getLogger("exaone_bridge.bridge.eligibility")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _load_without_collectives(folder: Path, layout: Layout) -> list[str]:
    """Load by the reshard plan while every collective raises; return the log."""
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unloaded_model(bridge, layout)
    log = LogLines()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective")

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(torch.distributed, name, fail))
        bridge.load_hf_weights(model)
    return log.lines


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(ep=2, etp=2)], ids=str)
def test_load_uses_no_collective_and_logs_once(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    results = ForkLauncher(layout.ranks).all(
        _load_without_collectives, tiny("ernie45-300b"), layout
    )
    assert results[0] == ["Hugging Face -> Megatron-Core: by the reshard plan"]
    assert all(lines == [] for lines in results[1:])


def _with_adapters(bridge: Any, model: list[Any]) -> list[Any]:
    from megatron.bridge.peft.lora import LoRA

    return list(LoRA(dim=4, alpha=8, target_modules=["linear_proj"])(model, training=False))


def _without_folder(bridge: Any, model: list[Any]) -> list[Any]:
    from megatron.bridge.models.hf_pretrained.state import StateDict

    state = bridge.hf_pretrained.state
    bridge.hf_pretrained._state_dict_accessor = StateDict({name: state[name] for name in state})
    return model


def _fp8(bridge: Any, model: list[Any]) -> list[Any]:
    unwrap_model(model)[0].config.fp8_param = True
    return model


class _Quantized(torch.nn.Parameter):
    """A parameter of another type, as Transformer Engine's FP8 parameters are."""


def _quantized(bridge: Any, model: list[Any]) -> list[Any]:
    norm = unwrap_model(model)[0].decoder.final_layernorm
    norm.weight = _Quantized(norm.weight.detach())
    return model


NOT_SUPPORTED: dict[str, tuple[Callable[[Any, list[Any]], list[Any]], dict[str, Any], str]] = {
    "adapters": (_with_adapters, {}, "it has adapters"),
    "no folder": (_without_folder, {}, "the source is not a folder of safetensors files"),
    "FP8": (_fp8, {}, "its parameters may be FP8 or FP4"),
    "quantized": (_quantized, {}, "it has parameters of the type _Quantized"),
    "mismatches": (
        lambda bridge, model: model,
        {"allowed_mismatched_params": ["x"]},
        "parameters of other shapes are allowed",
    ),
}


def _load_unsupported(folder: Path, name: str) -> tuple[list[str], bool]:
    """Return the log, and whether all weights were loaded."""
    from megatron.bridge import AutoBridge

    change, options, _ = NOT_SUPPORTED[name]
    wanted = AutoBridge.from_hf_pretrained(folder)
    right = unloaded_model(wanted, Layout())
    wanted.load_hf_weights(right)
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = change(bridge, unloaded_model(bridge, Layout()))
    log = LogLines()
    bridge.load_hf_weights(model, **options)
    expected = named_parameters(right)
    found = {
        (chunk, name.replace(".to_wrap.", ".")): tensor
        for (chunk, name), tensor in named_parameters(model).items()
    }
    return log.lines, all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_unsupported_models_are_loaded_by_megatron_bridge(
    name: str, megatron_bridge: Any, tiny: Any
) -> None:
    ((lines, equal),) = ForkLauncher(1).all(_load_unsupported, tiny("exaone4"), name)
    reason = NOT_SUPPORTED[name][2]
    way = "Hugging Face -> Megatron-Core: by Megatron-Bridge's own code"
    assert lines == [f"{way}, because {reason}"]
    assert equal


def _reasons(folder: Path) -> list[str | None]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.bridge.eligibility import why_not_planned

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unloaded_model(bridge, Layout())
    model_bridge = bridge._model_bridge
    found = [why_not_planned(model_bridge, model)]
    model[0].ddp_config = SimpleNamespace(use_megatron_fsdp=True)
    found.append(why_not_planned(model_bridge, model))
    del model[0].ddp_config
    model_bridge.export_weight_dtype = "fp8"
    found.append(why_not_planned(model_bridge, model))
    return found


def test_fsdp_shards_and_fp8_exports_are_not_supported(megatron_bridge: Any, tiny: Any) -> None:
    ((plain, fsdp, fp8),) = ForkLauncher(1).all(_reasons, tiny("exaone4"))
    assert (plain, fsdp, fp8) == (
        None,
        "its parameters are FSDP shards",
        "FP8 weights are requested",
    )


def _uneven(folder: Path, target: Path) -> tuple[list[str], list[int]]:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unloaded_model(
        bridge,
        Layout(pp=2),
        num_layers_in_first_pipeline_stage=3,
        num_layers_in_last_pipeline_stage=5,
    )
    log = LogLines()
    bridge.load_hf_weights(model)
    bridge.save_hf_pretrained(model, target, show_progress=False)
    return log.lines, [layer.layer_number for layer in unwrap_model(model)[0].decoder.layers]


def test_uneven_pipeline_loads_by_the_plan_and_saves_by_megatron_bridge(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """The export is complete or absent, whichever code writes it."""
    results = ForkLauncher(2).all(_uneven, tiny("exaone4"), tmp_path / "output")
    assert [layers for _, layers in results] == [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert results[0][0] == [
        "Hugging Face -> Megatron-Core: by the reshard plan",
        "Megatron-Core -> Hugging Face: by Megatron-Bridge's own code, "
        "because its pipeline stages are uneven",
    ]
    assert compare_tensors(tiny("exaone4"), tmp_path / "output").passed
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
