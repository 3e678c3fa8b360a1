"""vLLM's loaders fill every parameter from our exports, and its models compute the same logits.

There is no GPU: `vllm_driver.py` says what is computed in its place.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.exports import write_export
from tests.helpers.adapters import hf_logits
from tests.helpers.environments import UV, make_environment, run
from tests.helpers.exaone_moe import run_reference

PACKAGES = ("vllm==0.33.0", "transformers==5.20.0")
# What vLLM requires for CUDA and for media, gigabytes that its models do not import.
WITHOUT = (
    "fastsafetensors",
    "flashinfer-python",
    "humming-kernels",
    "instanttensor",
    "numba",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl",
    "nvtx",
    "opencv-python-headless",
    "pynvvideocodec",
    "quack-kernels",
    "tilelang",
    "tokenspeed-mla",
    "torchcodec",
)
DRIVER = Path(__file__).with_name("vllm_driver.py")
PROMPT = 300  # tokens
MAX_DIFFERENCE = 1e-4
# vLLM 0.33 looks for the vocabulary's size in EXAONE 4.5's outer config (`exaone4_5_mtp.py`).
FIELDS = {"EXAONE 4.5": {"vocab_size": 387}}
MODELS = {
    "EXAONE 4.0 1.2B": "exaone4-1.2b",
    "EXAONE 4.0 32B": "exaone4",
    "EXAONE 4.5": "exaone45",
    "K-EXAONE 236B": "exaone-moe",
    "K-EXAONE 2.0": "exaone-moe-2",
    "ERNIE 4.5 0.3B": "ernie45-dense",
    "ERNIE 4.5 21B": "ernie45",
    "ERNIE 4.5 300B": "ernie45-300b",
}
# The classes of multi-token prediction, which are loaded and not run.
DRAFTERS = {
    "EXAONE 4.5": "Exaone4_5_MTP",
    "K-EXAONE 236B": "ExaoneMoeMTP",
    "K-EXAONE 2.0": "ExaoneMoeMTP",
    "ERNIE 4.5 21B": "ErnieMTP",
}
# Damage to an export of EXAONE 4.0 32B.
RENAMED, NO_WINDOW, NO_ROPE = "a tensor renamed", "no sliding_window", "no rope_scaling"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path(UV).exists(), reason="uv is not installed"),
]


@pytest.fixture(scope="module")
def work(megatron_bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with each model's export, its tokens, and vLLM's logits or error."""
    folder = tmp_path_factory.mktemp("vllm")
    python = make_environment(folder / "env", *PACKAGES, without=WITHOUT)
    models = [
        write_export(folder / name, tiny, FIELDS.get(name, {})) for name, tiny in MODELS.items()
    ]
    for name in DRAFTERS:
        (folder / name / "drafter.txt").touch()
    for damage in (RENAMED, NO_WINDOW, NO_ROPE):
        shutil.copytree(folder / "EXAONE 4.0 32B", folder / damage)
        damage_export(folder / damage / "exported", damage)
        models.append(folder / damage)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, 340, (PROMPT,), generator=generator)
    for model in models:
        np.save(model / "tokens.npy", tokens.numpy())
    run(python, DRIVER, *models)
    return folder


def damage_export(folder: Path, damage: str) -> None:
    if damage == RENAMED:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.self_attn.query_norm.weight"] = tensors.pop(
            "model.layers.1.self_attn.q_norm.weight"
        )
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        del config[damage.removeprefix("no ")]
        (folder / "config.json").write_text(json.dumps(config))


def difference(folder: Path) -> float:
    """Return the largest difference of the logits to the reference's for the source."""
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))[None]
    if folder.name == "K-EXAONE 2.0":  # Transformers ignores its windows and clamps
        with_next = torch.nn.functional.pad(tokens, (0, 1))  # it computes a loss too
        expected = run_reference(folder / "source", with_next).logits.detach()
    else:
        expected = hf_logits(folder / "source", tokens)
    found = np.load(folder / "logits.npy")
    assert found.shape == expected.shape[1:]
    return float(np.abs(found - expected[0].numpy()).max())


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_filled_and_logits_are_those_of_the_source(
    name: str, work: Path
) -> None:
    found = difference(work / name)
    print(f"\n{name}: {found:.1e}")
    assert found <= MAX_DIFFERENCE


@pytest.mark.parametrize("name", DRAFTERS)
def test_multi_token_prediction_gets_every_tensor(name: str, work: Path) -> None:
    assert not (work / name / "error.txt").exists(), (work / name / "error.txt").read_text()
    assert (work / name / "drafter.txt").read_text() == DRAFTERS[name]


def test_a_renamed_tensor_is_found(work: Path) -> None:
    error = (work / RENAMED / "error.txt").read_text()
    print(f"\n{RENAMED}: {error.splitlines()[-1][:200]}")
    assert "query_norm" in error


@pytest.mark.parametrize("damage", [NO_WINDOW, NO_ROPE])
def test_a_missing_key_of_the_config_is_found(damage: str, work: Path) -> None:
    found = difference(work / damage)
    print(f"\n{damage}: {found:.1e}")
    assert found > 0.1
