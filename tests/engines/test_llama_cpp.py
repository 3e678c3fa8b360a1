"""llama.cpp computes Transformers' logits from our exports, converted by its own converter.

The compiled package stays in uv's cache, so that only the first run compiles.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exaone_bridge.schema.layer_schedule import FULL, SLIDING
from tests.conftest import TINY_CONFIGS
from tests.engines.exports import write_export
from tests.helpers.adapters import hf_logits
from tests.helpers.environments import UV, make_environment, run

VERSION = "0.3.36"
PACKAGE = f"llama-cpp-python=={VERSION}"
# The converter's own requirements, and those of llama_cpp.
PACKAGES = ("transformers==4.57.6", "sentencepiece", "protobuf", "pyyaml", "diskcache", "requests")
BUILD = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF"}
DRIVER = Path(__file__).with_name("llama_cpp_driver.py")
PROMPT = 300  # tokens
MAX_DIFFERENCE = 1e-4
# llama.cpp's EXAONE 4 has hidden_size / heads for the size of a head, and sliding windows and
# layers without RoPE in models of exactly 64 layers (src/models/exaone4.cpp).
HEADS: dict[str, Any] = {"head_dim": 16}
HYBRID = HEADS | {
    "num_hidden_layers": 64,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 16,
}
# For ERNIE, llama.cpp takes intermediate_size / KV heads for the size of the shared experts, which
# is right for the published 21B, and expects experts in every layer after the dense ones.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "EXAONE 4.0 1.2B": ("exaone4-1.2b", HEADS),
    "EXAONE 4.0 32B": ("exaone4", HYBRID),
    "EXAONE 4.5": ("exaone45", {"text_config": TINY_CONFIGS["exaone45"]["text_config"] | HYBRID}),
    "K-EXAONE 236B": ("exaone-moe", {}),
    "ERNIE 4.5 0.3B": ("ernie45-dense", {}),
    "ERNIE 4.5 21B": ("ernie45", {"moe_intermediate_size": 24}),
    "ERNIE 4.5 300B": ("ernie45-300b", {"moe_layer_interval": 1}),
}
SHALLOW = "EXAONE 4.0 32B of 8 layers"
TWO_WINDOWS = "K-EXAONE 2.0"
LIMITS = {SHALLOW: ("exaone4", HEADS), TWO_WINDOWS: ("exaone-moe-2", {})}

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(3 * 3600),
    pytest.mark.skipif(not Path(UV).exists(), reason="uv is not installed"),
]


@pytest.fixture(scope="module")
def work(megatron_bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with each model's export, its tokens, and llama.cpp's logits or error."""
    folder = tmp_path_factory.mktemp("llama-cpp")
    python = make_environment(folder / "env", *PACKAGES)
    run(UV, "pip", "install", "--quiet", "--python", python, "--no-deps", PACKAGE, env=BUILD)
    only_source = ["--no-deps", "--no-binary", "llama-cpp-python"]
    run(python, "-m", "pip", "download", "--quiet", *only_source, "-d", folder, PACKAGE)
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    models = []
    for name, (tiny, fields) in (MODELS | LIMITS).items():
        models.append(write_export(folder / name, tiny, fields))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(100, 340, (PROMPT,), generator=generator)
        np.save(folder / name / "tokens.npy", tokens.numpy())
    run(python, DRIVER, source, *models)
    return folder


def difference(folder: Path) -> float:
    """Return the largest difference of the logits to Transformers'."""
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    expected = hf_logits(folder / "source", tokens[None])[0].numpy()
    found = np.load(folder / "logits.npy")
    assert found.shape == expected.shape == (PROMPT, TINY_CONFIGS["exaone4"]["vocab_size"])
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, work: Path) -> None:
    found = difference(work / name)
    print(f"\n{name}: {found:.1e}")
    assert found <= MAX_DIFFERENCE


def test_windows_and_layers_without_rope_are_ignored_in_other_depths(work: Path) -> None:
    """docs/engines.md says so; this also shows that the comparison can fail."""
    found = difference(work / SHALLOW)
    print(f"\n{SHALLOW}: {found:.1e}")
    assert found > 1


def test_llama_cpp_does_not_load_windows_of_several_sizes(work: Path) -> None:
    assert "Failed to load model" in (work / TWO_WINDOWS / "error.txt").read_text()
