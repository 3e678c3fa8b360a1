"""A path that is not the checkpoint it was given for is rejected with its cause and what helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.diagnose import check_is_megatron_folder
from exaone_bridge.errors import BridgeError
from tests.helpers.damage import WEIGHTS, Damage, set_config

Tensors = dict[str, torch.Tensor]


def set_names(rename: Callable[[str], str]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = {rename(name): value for name, value in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def quantized(suffixes: dict[str, torch.dtype]) -> Damage:
    """Replace each linear's weight by the tensors that a quantizer writes."""

    def damage(folder: Path) -> None:
        found: Tensors = {}
        for name, tensor in load_file(folder / WEIGHTS).items():
            stem, linear, _ = name.partition("_proj.weight")
            if linear:
                parts = {end: torch.zeros(2, 2).to(dtype) for end, dtype in suffixes.items()}
                found |= {f"{stem}_proj.{end}": part for end, part in parts.items()}
            else:
                found[name] = tensor
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


AWQ = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}
FP8 = {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32}


def rename_weights(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            shutil.copyfile(folder / WEIGHTS, folder / name)
        (folder / WEIGHTS).unlink()

    return damage


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def megatron(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "iter_0000000").mkdir()
    (folder / "iter_0000000" / "run_config.yaml").write_text("")


def one_level_down(folder: Path) -> None:
    shutil.copytree(folder, folder / "EXAONE-4.0")
    (folder / "config.json").unlink()


CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "AWQ": (
        set_config(quantization_config={"quant_method": "awq", "bits": 4}),
        ("quantized (quantization_config: 'awq')", "use the model that was quantized"),
    ),
    "FP8": (
        set_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ("'fp8'", "FineGrainedFP8Config(dequantize=True)", "save_pretrained"),
    ),
    "AWQ without its config": (quantized(AWQ), ("weights are quantized; use the model",)),
    "FP8 without its config": (quantized(FP8), ("weights are quantized; save it in bf16",)),
    "torch.compile": (
        set_names(lambda name: f"_orig_mod.{name}"),
        ("91 missing keys", "91 keys are unexpected ('_orig_mod.", "model._orig_mod.save"),
    ),
    "data parallelism": (set_names(lambda name: f"module.{name}"), ("model.module.save",)),
    "PEFT": (set_names(lambda name: f"base_model.model.{name}"), ("merge_and_unload",)),
    "language part": (
        set_names(lambda name: name.replace("model.", "model.language_model.", 1)),
        ("vision-language model's language part", "the whole model"),
    ),
    "the only shard": (
        rename_weights("model-00001-of-00001.safetensors"),
        ("1 of 1 files", "no model.safetensors.index.json", "rename it to model.safetensors"),
    ),
    "one shard of three": (
        rename_weights("model-00002-of-00003.safetensors"),
        ("1 of 3 files", "copy the index and the other 2 files"),
    ),
    "shards without an index": (
        rename_weights("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("2 of 2 files", "copy the index of the model too"),
    ),
    "GGUF": (rename_weights("model-Q4_K_M.gguf"), ("GGUF file", "that it was made from")),
    "adapter": (adapter, ("is an adapter", "merge_and_unload")),
    "Megatron": (megatron, ("is a Megatron checkpoint", "`exaone-bridge export`")),
    "one level down": (one_level_down, ("its folder 'EXAONE-4.0' has one", "name ")),
    "EXAONE 3.5": (
        set_config(architectures=["ExaoneForCausalLM"], auto_map={"AutoConfig": "x.Y"}),
        ("ExaoneForCausalLM", "EXAONE 3.0 and 3.5 are other models"),
    ),
}


def rejection(path: Path) -> str:
    with pytest.raises(BridgeError) as caught:
        HFCheckpoint.open(path)
    text = str(caught.value)
    assert "download" not in text and "\n" not in text and text.endswith(".")
    return text


@pytest.mark.parametrize("name", CASES)
def test_folder_is_rejected_with_cause_and_remedy(name: str, tiny: Any, tmp_path: Path) -> None:
    damage, fragments = CASES[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    damage(folder)
    text = rejection(folder)
    for fragment in fragments:
        assert fragment in text, text


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("model.gguf", ("GGUF file", "a folder is wanted")),
        ("model.zip", ("is an archive", "unpack it")),
        ("model.safetensors", ("one file of a model", "name its folder")),
        ("notes", ("is a file", "name a Hugging Face model folder")),
    ],
)
def test_file_is_rejected_as_what_it_is(
    name: str, fragments: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("")
    text = rejection(tmp_path / name)
    assert "does not exist" not in text
    assert all(fragment in text for fragment in fragments), text


def test_hub_id_is_rejected_with_the_command_that_downloads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BridgeError, match="name of a model on the Hugging Face hub") as caught:
        HFCheckpoint.open(Path("LGAI-EXAONE/EXAONE-4.0-1.2B"))
    command = "hf download LGAI-EXAONE/EXAONE-4.0-1.2B --local-dir EXAONE-4.0-1.2B"
    assert command in str(caught.value)


def test_hugging_face_folder_is_no_megatron_checkpoint(tiny: Any) -> None:
    with pytest.raises(BridgeError, match=r"is a Hugging Face folder.*`exaone-bridge import`"):
        check_is_megatron_folder(tiny("exaone4"))


def test_remaining_faults_keep_their_remedy(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    config = json.loads((folder / "config.json").read_text())
    set_config(num_hidden_layers=9, layer_types=[*config["layer_types"], "full_attention"])(folder)
    with pytest.raises(BridgeError, match=r"11 missing keys.*check that config.json belongs"):
        HFCheckpoint.open(folder)
