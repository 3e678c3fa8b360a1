"""`benchmarks/train_images.py` counts the operations of the vision encoder that torch counts."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from exaone_bridge.models.exaone45.config import read_hf_config
from tests.helpers.exaone45 import CONFIG
from tests.helpers.paths import ROOT


# A window has six patches: the border of an image of 16 patches crosses windows.
@pytest.mark.parametrize("side", [12, 16])
def test_operations_of_an_image_equal_those_that_torch_counts(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Exaone4_5_VisionConfig
    from transformers.models.exaone4_5.modeling_exaone4_5 import Exaone4_5_VisionModel

    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    benchmark = importlib.import_module("train_images")
    vision = read_hf_config(CONFIG).vision
    config = Exaone4_5_VisionConfig(
        **{key: value for key, value in CONFIG["vision_config"].items() if key != "dtype"}
    )
    vision_encoder = Exaone4_5_VisionModel._from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counted:
        features = vision_encoder(
            torch.randn(side * side, vision.patch_elements),
            grid_thw=torch.tensor([[1, side, side]]),
        )
        features.pooler_output.sum().backward()
    assert counted.get_total_flops() == benchmark.operations_of_image(vision, side)
