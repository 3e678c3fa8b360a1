"""The planned load against the host's own loader with our mappings, bit by bit, on every rank; and its fallbacks."""

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

from exaone_bridge.errors import BridgeError
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_files, compare_tensors


def unwrap_model(model: list[Any]) -> list[Any]:
    from megatron.core.utils import unwrap_model as unwrap

    return list(unwrap(model))


FULL = "full_attention"
LLAMA = {"num_hidden_layers": 8, "layer_types": [FULL] * 8}
EVEN = [Layout(), Layout(tp=4), Layout(tp=2, pp=2, vpp=2), Layout(pp=4, vpp=2)]
EXPERTS = [Layout(tp=2, ep=4, etp=1), Layout(pp=2, ep=2, etp=2)]
CASES = [
    *(("exaone4", {}, None, layout) for layout in EVEN),
    *(("exaone4-1.2b", LLAMA | {"dtype": "bfloat16"}, None, layout) for layout in EVEN),
    ("exaone4-1.2b", LLAMA | {"dtype": "bfloat16"}, torch.float32, Layout(tp=2)),
    ("exaone4", {"dtype": "float16"}, None, Layout(tp=2)),
    *(
        ("ernie45", {"dtype": "bfloat16", "use_bias": True}, None, layout)
        for layout in [*EVEN[:2], *EXPERTS]
    ),
    *(("ernie45-300b", {"use_bias": True}, None, layout) for layout in [*EVEN[2:], *EXPERTS]),
    ("ernie45-dense", {"use_bias": True}, None, Layout(tp=2, pp=2)),
]


def unfilled(
    bridge: Any, layout: Layout, dtype: torch.dtype | None = None, **fields: Any
) -> list[Any]:
    """A model at this layout whose weights are not the checkpoint's."""

    provider = bridge.to_megatron_provider(load_weights=False)
    dtype = dtype or provider.params_dtype
    fields = (
        layout.provider_overrides() | {"pipeline_dtype": dtype, "autocast_dtype": dtype} | fields
    )
    provider.apply_overrides_and_finalize(dtype, fields)
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def everything(model: list[Any]) -> dict[tuple[int, str], torch.Tensor]:
    from exaone_bridge.bridge.eligibility import parameters_of

    return {(chunk, name): tensor for chunk, name, tensor in parameters_of(model)}


def _both_ways(
    folder: Path, work: Path, layout: Layout, dtype: torch.dtype | None
) -> tuple[int, list[Any], Any]:
    """How many tensors this rank has, those in which the two loads differ (NaN before either), and why not planned."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

    from exaone_bridge.bridge.eligibility import why_not

    found = []
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unfilled(bridge, layout, dtype)
    for load in (None, bridge.load_hf_weights):
        with torch.no_grad():
            for tensor in everything(model).values():
                tensor.fill_(float("nan"))
        if load is not None:
            load(model)
        else:
            MegatronModelBridge.load_weights_hf_to_megatron(
                bridge._model_bridge, bridge.hf_pretrained, model
            )
        found.append({key: tensor.detach().clone() for key, tensor in everything(model).items()})
    generic, planned = found
    assert planned.keys() == generic.keys()
    AutoBridge.save_hf_weights.__wrapped__(bridge, model, work / "generic", show_progress=False)
    bridge.save_hf_pretrained(model, work / "planned", show_progress=False)
    differ = [key for key in planned if not torch.equal(planned[key], generic[key])]
    return len(planned), differ, why_not(bridge._model_bridge, model)


@pytest.mark.parametrize(("name", "fields", "dtype", "layout"), CASES, ids=str)
def test_loads_and_exports_are_the_hosts(
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    name: str,
    fields: dict[str, Any],
    dtype: torch.dtype | None,
    layout: Layout,
) -> None:
    source = tiny(name, **fields)
    results = ForkLauncher(layout.ranks).all(_both_ways, source, tmp_path, layout, dtype)
    assert [(differ, why) for _, differ, why in results] == [([], None)] * layout.ranks
    assert all(count > 8 for count, _, _ in results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generic", "planned"]
    same = compare_tensors(tmp_path / "generic", tmp_path / "planned")
    assert same.passed, same.details
    files = compare_files(source, tmp_path / "planned")
    assert files.passed, files.details
    if dtype is None:
        assert compare_tensors(source, tmp_path / "planned").passed


# --- which way --------------------------------------------------------------------------------------------------------

COLLECTIVES = (
    "all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast", "broadcast_object_list", "gather",
    "gather_object", "scatter", "scatter_object_list", "reduce_scatter", "all_to_all", "send", "recv",
)  # fmt: skip


class Said(logging.Handler):
    """What one module logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.disable(logging.NOTSET)
        logger = logging.getLogger("exaone_bridge.bridge.eligibility")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _load_without_a_word_to_others(folder: Path, layout: Layout) -> list[str]:
    """The planned load where every collective raises; what the log says."""
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unfilled(bridge, layout)
    said = Said()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective")

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(torch.distributed, name, refuse))
        bridge.load_hf_weights(model)
    return said.lines


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(ep=2, etp=2)], ids=str)
def test_the_load_waits_for_nobody_and_says_its_way_once(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    results = ForkLauncher(layout.ranks).all(
        _load_without_a_word_to_others, tiny("ernie45-300b"), layout
    )
    assert results[0] == ["Hugging Face -> Megatron-Core: by the plan of copies"]
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
    unwrap_model(model)[0].config.fp8 = "hybrid"
    return model


class _Quantized(torch.nn.Parameter):
    """As Transformer Engine's FP8 parameters are: a type of its own."""


def _quantized(bridge: Any, model: list[Any]) -> list[Any]:
    norm = unwrap_model(model)[0].decoder.final_layernorm
    norm.weight = _Quantized(norm.weight.detach())
    return model


OTHERS: dict[str, tuple[Callable[[Any, list[Any]], list[Any]], dict[str, Any], str]] = {
    "adapters": (_with_adapters, {}, "it has adapters"),
    "no folder": (_without_folder, {}, "the source is no folder of safetensors files"),
    "FP8": (_fp8, {}, "its parameters may be FP8 or FP4"),
    "quantized": (_quantized, {}, "it has parameters of the type _Quantized"),
    "mismatches": (
        lambda bridge, model: model,
        {"allowed_mismatched_params": ["x"]},
        "parameters of other shapes are allowed",
    ),
}


def _load_the_hosts_way(folder: Path, name: str) -> tuple[list[str], bool]:
    """What the log says, and whether every weight is there."""
    from megatron.bridge import AutoBridge

    change, options, _ = OTHERS[name]
    wanted = AutoBridge.from_hf_pretrained(folder)
    right = unfilled(wanted, Layout())
    wanted.load_hf_weights(right)
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = change(bridge, unfilled(bridge, Layout()))
    said = Said()
    bridge.load_hf_weights(model, **options)
    expected = everything(right)
    found = {
        (chunk, name.replace(".to_wrap.", ".")): tensor
        for (chunk, name), tensor in everything(model).items()
    }
    return said.lines, all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_plan_does_not_cover_goes_the_hosts_way(
    name: str, megatron_bridge: Any, tiny: Any
) -> None:
    ((lines, equal),) = ForkLauncher(1).all(_load_the_hosts_way, tiny("exaone4"), name)
    assert lines == [
        f"Hugging Face -> Megatron-Core: by Megatron-Bridge's own code, because {OTHERS[name][2]}"
    ]
    assert equal


def _fsdp_and_others(folder: Path) -> list[str | None]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.bridge.eligibility import why_not

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unfilled(bridge, Layout())
    ours = bridge._model_bridge
    found = [why_not(ours, model)]
    model[0].ddp_config = SimpleNamespace(use_megatron_fsdp=True)
    found.append(why_not(ours, model))
    del model[0].ddp_config
    ours.export_weight_dtype = "fp8"
    found.append(why_not(ours, model))
    return found


def test_fsdp_shards_and_fp8_exports_are_not_planned(megatron_bridge: Any, tiny: Any) -> None:
    ((plain, fsdp, fp8),) = ForkLauncher(1).all(_fsdp_and_others, tiny("exaone4"))
    assert (plain, fsdp, fp8) == (
        None,
        "its parameters are FSDP shards",
        "FP8 weights are asked for",
    )


def _uneven(folder: Path, target: Path) -> tuple[list[str], list[int]]:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unfilled(
        bridge,
        Layout(pp=2),
        num_layers_in_first_pipeline_stage=3,
        num_layers_in_last_pipeline_stage=5,
    )
    said = Said()
    bridge.load_hf_weights(model)
    bridge.save_hf_pretrained(model, target, show_progress=False)
    return said.lines, [layer.layer_number for layer in unwrap_model(model)[0].decoder.layers]


def test_a_pipeline_that_is_cut_unevenly(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    """Loaded by plan, each rank for the layers it has; exported the host's way, and still whole or not at all."""
    results = ForkLauncher(2).all(_uneven, tiny("exaone4"), tmp_path / "output")
    assert [layers for _, layers in results] == [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert results[0][0] == [
        "Hugging Face -> Megatron-Core: by the plan of copies",
        "Megatron-Core -> Hugging Face: by Megatron-Bridge's own code, because its pipeline is cut unevenly",
    ]
    assert compare_tensors(tiny("exaone4"), tmp_path / "output").passed
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


# --- strict -----------------------------------------------------------------------------------------------------------


def _load_into(folder: Path, layout: Layout, fields: dict[str, Any], change: str) -> None:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unfilled(bridge, layout, **fields)
    mlp = unwrap_model(model)[0].decoder.layers[0].mlp
    if (
        torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    ):  # one rank's fault is found there
        if change == "more":
            mlp.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
        if change == "less":
            del mlp.linear_fc1.weight
    bridge.load_hf_weights(model)


OTHER_MODELS: dict[str, tuple[dict[str, Any], str, str]] = {
    "fewer layers": (
        {"num_layers": 6, "window_attn_skip_freq": None, "no_rope_freq": None},
        "",
        "has the layers",
    ),
    "more layers": (
        {"num_layers": 10, "window_attn_skip_freq": None, "no_rope_freq": None},
        "",
        "has the layers",
    ),
    "another width": ({"ffn_hidden_size": 128}, "", "and the configuration makes it"),
    "one less": (
        {},
        "less",
        r"missing keys \(decoder\.layers\.4\.mlp\.linear_fc1\.weight\)",
    ),
    "one more": ({}, "more", r"unexpected keys \(decoder\.layers\.4\.mlp\.extra\)"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_model_that_is_not_the_configurations_is_refused(
    name: str, megatron_bridge: Any, tiny: Any
) -> None:
    fields, change, says = OTHER_MODELS[name]
    with pytest.raises(BridgeError, match=says):
        ForkLauncher(2).all(_load_into, tiny("exaone4"), Layout(pp=2), fields, change)


# --- where it is written ----------------------------------------------------------------------------------------------


def _save_twice(folder: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unfilled(bridge, Layout(tp=2))
    bridge.save_hf_weights(model, target / "random", show_progress=False)
    bridge.load_hf_weights(model)
    bridge.save_hf_weights(model, target / "there", show_progress=False)
    bridge.save_hf_pretrained(model, target / "random", show_progress=False)


def test_a_folder_that_is_there_gets_the_new_weights_and_keeps_the_rest(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """AutoBridge's calls may write into a folder again; each file takes its name when all of them are whole."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    ForkLauncher(2).all(_save_twice, tiny("exaone4"), tmp_path)
    for name in ("random", "there"):
        assert compare_tensors(tiny("exaone4"), tmp_path / name).passed
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["random", "there"]
