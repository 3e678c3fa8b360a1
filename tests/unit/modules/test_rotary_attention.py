"""Attention with RoPE in fp32 leaves the layers alone that have no RoPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout


def _logits(folder: Path) -> torch.Tensor:
    """On a rank: the logits [1, S, V] of a prompt, on the torch backend."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    model = build(AutoBridge.from_hf_pretrained(folder), Layout(), backend="torch")
    logits = forward_logits(model, torch.arange(40)[None])
    assert logits is not None
    return logits


def test_layers_without_rope_stay_without(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 the class has the logits of its parent, which drops the angles of such layers."""
    from exaone_bridge.models.exaone4 import layer_spec
    from exaone_bridge.modules.rotary_attention import Fp32RotarySelfAttention

    folder, launcher = tiny("exaone4"), ForkLauncher()
    expected = launcher.first(_logits, folder)
    monkeypatch.setattr(layer_spec, "SelfAttention", Fp32RotarySelfAttention)
    assert (launcher.first(_logits, folder) - expected).abs().max() <= 1e-5
