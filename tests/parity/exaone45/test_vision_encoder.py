"""The tower at the published patch, window and full-attention blocks, narrow: its features are Transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.exaone45_cases import changed

PUBLISHED = {
    "patch_size": 14,
    "window_size": 112,
    "depth": 28,
    "fullatt_block_indexes": [6, 13, 20, 27],
    "num_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 64,
}
GRIDS = [
    [1, 16, 22],
    [1, 4, 6],
    [2, 10, 8],
]  # pixels: 224 x 308, one less than a window, a video of four frames


def _pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """As a processor makes them of random pictures: from 0 to 255, then the mean and deviation of CLIP."""
    grid = torch.tensor(GRIDS)
    pictures = torch.randint(
        0,
        256,
        (int(grid.prod(-1).sum()), 3, 2 * 14 * 14),
        generator=torch.Generator().manual_seed(0),
    )
    mean, std = torch.tensor([0.481, 0.458, 0.408]), torch.tensor([0.269, 0.261, 0.276])
    return ((pictures / 255 - mean[:, None]) / std[:, None]).flatten(1), grid


def _theirs(folder: Path, attention: str) -> torch.Tensor:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    pixels, grid = _pixels()
    with torch.no_grad():
        return model.model.visual.eval()(pixels, grid_thw=grid).pooler_output


def _ours(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, torch.dtype]:
    from megatron.bridge import AutoBridge
    from megatron.core.utils import unwrap_model

    from exaone_bridge.runtime.model import build

    visual = unwrap_model(build(AutoBridge.from_hf_pretrained(folder), Layout(), dtype=dtype))[
        0
    ].visual
    pixels, grid = _pixels()
    with torch.no_grad():
        return visual.eval()(
            pixels, grid_thw=grid
        ).pooler_output, visual.rotary_pos_emb.inv_freq.dtype


@pytest.fixture(scope="module")
def folder(megatron_bridge: Any, tiny: Any) -> Path:
    return tiny(
        "exaone45",
        **changed(**{f"vision_config__{field}": value for field, value in PUBLISHED.items()}),
    )


def test_features(folder: Path) -> None:
    ((found, _),) = ForkLauncher(1).all(_ours, folder, torch.float32)
    for attention in ("eager", "sdpa"):
        (expected,) = ForkLauncher(1).all(_theirs, folder, attention)
        assert (found - expected).abs().max() <= 1e-5
        assert expected.std() > 0.1


def test_angles_stay_in_fp32(folder: Path) -> None:
    """Megatron-Core's half-precision wrapper casts buffers; Transformers' own bf16 model has fp32 angles."""
    ((found, dtype),) = ForkLauncher(1).all(_ours, folder, torch.bfloat16)
    (expected,) = ForkLauncher(1).all(_theirs, folder, "sdpa")
    assert found.dtype == torch.bfloat16
    assert dtype == torch.float32
    assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
