"""A narrow vision encoder with the published patches, windows and blocks, against Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.exaone45 import changed

PUBLISHED = {
    "patch_size": 14,
    "window_size": 112,
    "depth": 28,
    "fullatt_block_indexes": [6, 13, 20, 27],
    "num_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 64,
}
# Images of 224 x 308 pixels and of less than a window, and a video of four frames.
GRIDS = [[1, 16, 22], [1, 4, 6], [2, 10, 8]]


def _pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """Return patches of random images, normalised by CLIP's mean and deviation, and their grids."""
    grid = torch.tensor(GRIDS)
    shape = int(grid.prod(-1).sum()), 3, 2 * 14 * 14
    patches = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.481, 0.458, 0.408]), torch.tensor([0.269, 0.261, 0.276])
    return ((patches / 255 - mean[:, None]) / std[:, None]).flatten(1), grid


def _hf_features(folder: Path, attention: str) -> torch.Tensor:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    pixels, grid = _pixels()
    with torch.no_grad():
        return model.model.visual.eval()(pixels, grid_thw=grid).pooler_output


def _megatron_features(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, torch.dtype]:
    from megatron.bridge import AutoBridge
    from megatron.core.utils import unwrap_model

    from exaone_bridge.runtime.model import build

    model = build(AutoBridge.from_hf_pretrained(folder), Layout(), dtype=dtype)
    visual = unwrap_model(model)[0].visual.eval()
    pixels, grid = _pixels()
    with torch.no_grad():
        features = visual(pixels, grid_thw=grid).pooler_output
    return features, visual.rotary_pos_emb.inv_freq.dtype


@pytest.fixture(scope="module")
def folder(megatron_bridge: Any, tiny: Any) -> Path:
    fields = {f"vision_config__{field}": value for field, value in PUBLISHED.items()}
    return tiny("exaone45", **changed(**fields))


def test_fp32_features_equal_those_of_transformers(folder: Path) -> None:
    found, _ = ForkLauncher().first(_megatron_features, folder, torch.float32)
    for attention in ("eager", "sdpa"):
        expected = ForkLauncher().first(_hf_features, folder, attention)
        assert (found - expected).abs().max() <= 1e-5
        assert expected.std() > 0.1


def test_bf16_model_keeps_the_rope_angles_in_fp32(folder: Path) -> None:
    """Megatron-Core's wrapper for bf16 casts buffers; Transformers keeps the angles in fp32."""
    found, dtype = ForkLauncher().first(_megatron_features, folder, torch.bfloat16)
    expected = ForkLauncher().first(_hf_features, folder, "sdpa")
    assert found.dtype == torch.bfloat16
    assert dtype == torch.float32
    assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
