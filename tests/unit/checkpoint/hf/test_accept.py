"""Folders that differ from their config without a change of value are accepted, others are not."""

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
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.hf_files import FOLLOW_LINKS
from tests.helpers.damage import WEIGHTS, set_config

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.layers.1.self_attn.q_norm.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def bf16(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def bf16_in_fp32(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16().float() for name, tensor in tensors.items()}


def with_head(change: float = 0.0, to: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    def add(tensors: Tensors) -> Tensors:
        head = tensors[EMBEDDING].clone()
        head[3, 5] += change
        return {**tensors, HEAD: head.to(to)}

    return add


def fp32_norms(exact: bool) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        found = bf16(tensors)
        norms = bf16_in_fp32(tensors) if exact else tensors
        return {name: norms[name] if "norm" in name else found[name] for name in found}

    return change


def transformers_frequencies(folder: Path) -> torch.Tensor:
    """Return what Transformers' own module computes for this config."""
    from transformers import AutoConfig
    from transformers.models.exaone4.modeling_exaone4 import Exaone4RotaryEmbedding

    return Exaone4RotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq.clone()


@pytest.fixture
def changed(tiny: Any, tmp_path: Path) -> Callable[..., Path]:
    """Return `changed(name, change, **fields)`: a copy with other tensors and config fields."""

    def make(name: str, change: Callable[[Tensors], Tensors], **fields: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny(name), folder)
        set_config(**fields)(folder)
        tensors = {key: value.clone() for key, value in change(load_file(folder / WEIGHTS)).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16], ids=str)
def test_equal_output_layer_of_a_tied_model_is_left_out(changed: Any, to: torch.dtype) -> None:
    change = with_head(to=to)
    folder = changed("exaone4-1.2b", lambda tensors: change(bf16_in_fp32(tensors)))
    checkpoint = HFCheckpoint.open(folder)
    assert HEAD not in checkpoint.tensors and checkpoint.unexpected == {}
    (note,) = checkpoint.notes
    assert note == f"{HEAD} equals {EMBEDDING}, to which it is tied, and is left out"


def test_other_output_layer_of_a_tied_model_is_rejected_with_the_difference(changed: Any) -> None:
    folder = changed("exaone4-1.2b", with_head(0.25))
    with pytest.raises(CheckpointError) as caught:
        HFCheckpoint.open(folder)
    assert f"{HEAD} differs from {EMBEDDING}" in str(caught.value)
    assert "most at [3, 5], by 0.25;" in str(caught.value)
    assert "tie_word_embeddings false" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling", ["default", "llama3"])
def test_frequencies_of_the_config_are_left_out(
    changed: Any, tiny: Any, dtype: torch.dtype, scaling: str
) -> None:
    rope = {"rope_type": scaling, "rope_theta": 1e6}
    if scaling == "llama3":
        rope |= {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 64}
    plain = changed("exaone4", dict, rope_parameters=rope)
    found = transformers_frequencies(plain).to(dtype)
    tensors = load_file(plain / WEIGHTS)
    save_file({**tensors, INV_FREQ: found}, plain / WEIGHTS, metadata={"format": "pt"})
    checkpoint = HFCheckpoint.open(plain)
    assert INV_FREQ not in checkpoint.tensors and "frequencies" in checkpoint.notes[0]
    set_config(rope_parameters=rope | {"rope_theta": 2e6})(plain)
    with pytest.raises(CheckpointError, match=r"inv_freq differs from .* most at \[\d+\], by"):
        HFCheckpoint.open(plain)


def test_missing_dtype_is_that_of_the_weights(changed: Any) -> None:
    checkpoint = HFCheckpoint.open(changed("exaone4", bf16, dtype=...))
    assert checkpoint.model_config.dtype == checkpoint.config["dtype"] == "bfloat16"
    assert "that of the weights, bfloat16" in checkpoint.notes[0]


def test_exact_casts_are_made_wherever_the_tensor_is_read(changed: Any) -> None:
    folder = changed("exaone4", fp32_norms(exact=True), dtype="bfloat16")
    checkpoint = HFCheckpoint.open(folder)
    (note,) = checkpoint.notes
    assert "and 32 more: cast from F32 to BF16" in note
    expected = load_file(folder / WEIGHTS)[NORM]
    assert expected.dtype == torch.float32
    assert checkpoint.tensors[NORM].nbytes == expected.nbytes // 2
    part = torch.empty(3, dtype=torch.bfloat16)
    checkpoint.read_into(NORM, part, 2 * part.itemsize)
    for found, wanted in (
        (checkpoint.read(NORM), expected),
        (checkpoint.view(NORM), expected),
        (part, expected[2:5]),
    ):
        assert found.dtype == torch.bfloat16 and torch.equal(found.float(), wanted)
    checkpoint.release(NORM)


@pytest.mark.parametrize("change", [fp32_norms(exact=False), dict], ids=["norms", "all"])
def test_cast_that_changes_a_value_is_rejected_with_the_difference(
    changed: Any, change: Callable[[Tensors], Tensors]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        HFCheckpoint.open(changed("exaone4", change, dtype="bfloat16"))
    assert "differs from itself in BF16" in str(caught.value)
    assert "most at [" in str(caught.value) and "write dtype float32" in str(caught.value)


def test_router_in_bf16_is_cast_to_the_fp32_that_transformers_keeps(changed: Any) -> None:
    folder = changed("ernie45", bf16, dtype="bfloat16")
    checkpoint = HFCheckpoint.open(folder)
    gate = "model.layers.1.mlp.gate.weight"
    assert checkpoint.tensors[gate].dtype == "F32"
    assert torch.equal(checkpoint.read(gate), load_file(folder / WEIGHTS)[gate].float())
    assert "cast from BF16 to F32" in checkpoint.notes[0]


def test_bf16_weights_are_read_as_the_fp32_of_the_config(changed: Any) -> None:
    folder = changed("exaone4", bf16)
    checkpoint = HFCheckpoint.open(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}


def test_links_that_leave_the_folder_are_followed_on_request(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny("exaone4"), folder := tmp_path / "model")
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match="follow its links with --follow-links"):
        HFCheckpoint.open(folder)
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    assert len(HFCheckpoint.open(folder).tensors) == len(load_file(tmp_path / "blob"))


def test_import_says_which_files_lead_out_of_the_folder(tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny("exaone4"), folder := tmp_path / "model")
    (folder / "tokenizer.json").rename(tmp_path / "blob")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")
    (note,) = import_checkpoint(folder, tmp_path / "megatron", dry_run=True).notes
    assert "links that lead out of the folder are not copied (tokenizer.json)" in note
