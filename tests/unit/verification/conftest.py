"""What the tests of the verification share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.verification.activations.probe_points import probe_points
from exaone_bridge.verification.workflow.transformers import capture_transformers, load
from exaone_bridge.verification.workflow.workload import PromptBatch, random_prompts
from tests.helpers.reference import Reference


@pytest.fixture(scope="package")
def reference(tiny: Any) -> Reference:
    """The tiny model with sliding windows, and two prompts of 21 tokens; not to be changed."""
    checkpoint = HFCheckpoint.open(tiny("exaone4"))
    points, tokens = probe_points(checkpoint.mappings), random_prompts(387, 2, 21)
    model = load(checkpoint.folder, torch.float32)
    activations = capture_transformers(model, points, PromptBatch(tokens))
    return Reference(checkpoint.model_config, points, tokens, activations)


@pytest.fixture
def other(tiny: Any, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    shutil.copytree(tiny("exaone4"), tmp_path / "other")
    return tmp_path / "other"
