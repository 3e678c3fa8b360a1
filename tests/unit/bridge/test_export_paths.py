"""Every way to export, over every family: our own reader reads the export back.

The sources are spelled as publishers do. An export has the source's tensors, in the dtype that its
config.json says, and the source's config.json where no value has changed.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.alone import run_alone
from tests.helpers.cli import read_config, read_tensors
from tests.helpers.spelling import spell_as_published
from tests.helpers.unloaded import unloaded_model

FAMILIES = ["exaone4-1.2b", "exaone4", "ernie45", "ernie45-dense", "exaone45", "exaone-moe"]
BF16 = torch.bfloat16


def _model(bridge: Any, layout: Layout = Layout(), **options: Any) -> Any:  # noqa: B008
    model = unloaded_model(bridge, layout, **options)
    bridge.load_hf_weights(model)
    return model


def _pretrained(bridge: Any, target: Path, **options: Any) -> None:
    bridge.save_hf_pretrained(_model(bridge), target, show_progress=False, **options)


def _trained_in_bf16(bridge: Any, target: Path) -> None:
    bridge.save_hf_pretrained(_model(bridge, dtype=BF16), target, show_progress=False)


def _merged_lora(bridge: Any, target: Path) -> None:
    from megatron.bridge.peft.lora import LoRA

    lora = LoRA(dim=4, alpha=8, target_modules=["linear_proj"])
    bridge.save_hf_pretrained(lora(_model(bridge), training=False), target, show_progress=False)


def _uneven(bridge: Any, target: Path) -> None:
    fields = {"num_layers_in_first_pipeline_stage": 1}
    model = _model(bridge, Layout(pp=2), **fields)
    bridge.save_hf_pretrained(model, target, show_progress=False)


def _into_an_existing_folder(bridge: Any, target: Path) -> None:
    if torch.distributed.get_rank() == 0:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    torch.distributed.barrier()
    bridge.save_hf_pretrained(_model(bridge, dtype=BF16), target, show_progress=False)
    (target / "notes.txt").unlink()


def _weights(bridge: Any, target: Path) -> None:
    """Weights alone, beside what `save_artifacts` writes."""
    shutil.copytree(bridge.hf_pretrained.model_name_or_path, target)
    (target / "model.safetensors").unlink()
    bridge.save_hf_weights(_model(bridge), target, show_progress=False)


def _checkpoint(bridge: Any, target: Path) -> None:
    bridge.save_megatron_model(_model(bridge, dtype=BF16), target.with_name("megatron"))


def _export_ckpt(source: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.export_ckpt(target.with_name("megatron"), target, show_progress=False)


# How an export is made, the ranks it needs, and the dtype that it has.
PATHS: dict[str, tuple[Callable[..., None], int, str]] = {
    "save_hf_pretrained": (_pretrained, 1, "float32"),
    "strict=False": (functools.partial(_pretrained, strict=False), 1, "float32"),
    "weight_dtype": (functools.partial(_pretrained, weight_dtype=BF16), 1, "bfloat16"),
    "weight_dtype, strict=False": (
        functools.partial(_pretrained, weight_dtype=BF16, strict=False),
        1,
        "bfloat16",
    ),
    "trained in bf16": (_trained_in_bf16, 1, "bfloat16"),
    "merged LoRA": (_merged_lora, 1, "float32"),
    "uneven pipeline": (_uneven, 2, "float32"),
    "existing folder": (_into_an_existing_folder, 1, "bfloat16"),
    "save_hf_weights": (_weights, 1, "float32"),
    "export_ckpt": (_checkpoint, 1, "bfloat16"),
    "export": (_checkpoint, 1, "bfloat16"),
}


@pytest.fixture(scope="module")
def sources(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return `sources(name)`: a tiny model with more files than a tokenizer, as published."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("published") / name
        shutil.copytree(tiny(name), folder)
        spell_as_published(folder)
        (folder / "LICENSE").write_text("MIT\r\n")
        (folder / "tokenization_own.py").write_text("raise SystemExit\n")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
        return folder

    return make


def _export(path: Callable[..., None], source: Path, target: Path) -> None:
    import tempfile

    from megatron.bridge import AutoBridge

    tempfile.tempdir = None  # Megatron-Bridge opens a socket there: at most 107 characters
    path(AutoBridge.from_hf_pretrained(source), target)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("config.json", "model.safetensors")
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", PATHS)
def test_an_export_is_read_back(
    path: str, family: str, megatron_bridge: Any, sources: Any, tmp_path: Path
) -> None:
    export, ranks, dtype = PATHS[path]
    source, target = sources(family), tmp_path / "exported"
    ForkLauncher(ranks).all(_export, export, source, target)
    if path == "export":
        has_passthrough = bool(HFCheckpoint.open(source).passthrough)
        export_checkpoint(
            tmp_path / "megatron", target, hf_source=source, drop_passthrough=has_passthrough
        )
    if path == "export_ckpt":
        run_alone(_export_ckpt, source, target)
    exported = HFCheckpoint.open(target)  # raises where weights and config.json disagree
    tensors, expected = read_tensors(target), read_tensors(source)
    if path != "export":
        assert tensors.keys() == expected.keys()
        config = read_config(source)
        for each in (config, *(config.get(key, {}) for key in ("text_config", "vision_config"))):
            each |= {"torch_dtype": dtype} if "torch_dtype" in each else {}
        assert read_config(target) == config
    assert exported.model_config.dtype == dtype
    assert _files(target) == _files(source)
    for name, tensor in tensors.items():
        wanted = expected[name].to(tensor.dtype)
        assert torch.equal(tensor, wanted), name
    kept = exported.passthrough.keys() | exported.model.fp32_names
    found = {str(tensor.dtype) for name, tensor in tensors.items() if name not in kept}
    assert found == {f"torch.{dtype}"}


def test_a_config_without_a_source_has_both_spellings(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    ForkLauncher().all(_save_without_source, tiny("exaone4-1.2b"), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    rope = config["rope_parameters"]
    assert config["rope_theta"] == rope["rope_theta"]
    assert config["rope_scaling"] == {key: rope[key] for key in rope if key != "rope_theta"}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert "sliding_window_pattern" in config


def _save_without_source(source: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge
    from transformers import Exaone4Config

    bridge = AutoBridge.from_hf_pretrained(source)
    model = _model(bridge)
    config = Exaone4Config(**bridge.hf_pretrained.config.to_dict())
    config.name_or_path = ""
    AutoBridge.from_hf_config(config).save_hf_pretrained(model, target, show_progress=False)
