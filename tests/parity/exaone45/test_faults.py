"""Planted faults of the tower and of what joins it to the language model: prompts with images tell each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.models.exaone45.config import read_hf_config
from exaone_bridge.models.exaone45.prompts import image_prompts
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.self_test.exaone45_faults import (
    join_in_another_order,
    leave_in_order_of_windows,
    narrow_windows,
    rotate_rows_for_columns,
    round_patches,
)
from exaone_bridge.verification.workflow.job import VerifyOptions
from exaone_bridge.verification.workflow.verify import verify
from tests.helpers.exaone45_cases import CONFIG, Images
from tests.helpers.fault_injection import build_with


def _epsilon(visual: Any) -> None:
    for module in visual.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-2


def _full_attention(visual: Any) -> None:
    visual.fullatt_block_indexes = [0, 2]


def _patch_order(visual: Any) -> None:
    """Rows and columns of the square that becomes one word."""

    def transposed(_: Any, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        pixels = arguments[0]
        return pixels.view(-1, 2, 2, pixels.shape[-1]).transpose(1, 2).reshape(pixels.shape)

    visual.patch_embed.register_forward_pre_hook(transposed)


def _key_heads(visual: Any) -> None:
    """The keys of one head for the queries of another."""
    for block in visual.blocks:
        keys = block.attn.qkv.weight[block.attn.q_dim : block.attn.q_dim + block.attn.kv_dim]
        keys.copy_(keys.view(2, -1, keys.shape[-1]).flip(0).reshape(keys.shape))


def _keys_for_values(visual: Any) -> None:
    for block in visual.blocks:
        both = block.attn.qkv.weight[block.attn.q_dim :]
        both.copy_(both.roll(block.attn.kv_dim, 0))


FAULTS: dict[str, Callable[[Any], None]] = {
    "epsilon": _epsilon,
    "window size": narrow_windows,
    "full-attention blocks": _full_attention,
    "patch order": _patch_order,
    "merger's patches swapped": join_in_another_order,
    "order of features": leave_in_order_of_windows,
    "key heads": _key_heads,
    "keys for values": _keys_for_values,
    "rows for columns": rotate_rows_for_columns,
    "patches in bfloat16": round_patches,
}


def _theirs(folder: Path, tokens: torch.Tensor, images: list[Images]) -> torch.Tensor:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return torch.cat(
            [
                model.eval()(one[None], **each).logits
                for one, each in zip(tokens, images, strict=True)
            ]
        )


def _ours(folder: Path, tokens: torch.Tensor, images: list[Images], fault: str) -> torch.Tensor:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    model = build(AutoBridge.from_hf_pretrained(folder), Layout())
    with torch.no_grad():
        FAULTS.get(fault, lambda visual: None)(model[0].visual)
    logits, _ = forward_logits(model, tokens, images)
    assert logits is not None
    return logits


@pytest.fixture(scope="module")
def compare(megatron_bridge: Any, tiny: Any) -> Callable[[str], float]:
    """The worst difference of logits with this fault."""
    folder = tiny("exaone45")
    tokens, images = image_prompts(read_hf_config(CONFIG), 3, seed=5)
    (expected,) = ForkLauncher(1).all(_theirs, folder, tokens, images)

    def run(fault: str) -> float:
        (found,) = ForkLauncher(1).all(_ours, folder, tokens, images, fault)
        return (found - expected).abs().max().item()

    return run


def test_no_fault(compare: Callable[[str], float]) -> None:
    assert compare("none") <= 1e-4


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_tower(compare: Callable[[str], float], fault: str) -> None:
    assert compare(fault) > 1e-3  # no fault hides near the tolerance


def test_features_in_the_wrong_places(
    compare: Callable[[str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from exaone_bridge.models.exaone45.model import Exaone45Model

    right = Exaone45Model._places

    def reversed_places(self: Any, *args: Any) -> Any:
        places, numbers = right(self, *args)
        return places, numbers.flip(0)

    monkeypatch.setattr(Exaone45Model, "_places", reversed_places)
    assert compare("none") > 1e-3


OF_WEIGHTS = {"merger's patches swapped", "key heads", "keys for values"}
BEGINS = {
    "epsilon": ("norm", "blocks.0.norm1"),
    "window size": ("norm", "blocks.0.norm1"),  # windows order the patches before the first block
    "full-attention blocks": ("attention", "blocks.0.attn"),
    "patch order": ("embedding", "patch_embed"),
    "merger's patches swapped": ("merger", "merger"),
    "order of features": ("features", ""),
    "key heads": ("attention", "blocks.0.attn"),
    "keys for values": ("attention", "blocks.0.attn"),
    "rows for columns": ("attention", "blocks.0.attn"),
    "patches in bfloat16": ("embedding", "patch_embed"),
}


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("fault", FAULTS)
def test_verify_tells_where(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """What the command line runs has images in its prompts, and looks into the tower."""
    build_with(lambda model: FAULTS[fault](model[0].visual))(monkeypatch)
    report = verify(tiny("exaone45"), Layout(), VerifyOptions(count=2))
    failing = ["tensors", "logits"] if fault in OF_WEIGHTS else ["logits"]
    assert [
        check.name for check in report.checks if not check.passed
    ] == failing and report.divergence is not None
    sublayer, module = BEGINS[fault]
    assert report.divergence.sublayer == f"vision {sublayer}"
    assert report.divergence.name == ".".join(filter(None, ["model.visual", module]))
    assert f"hidden states diverge at vision {sublayer} (" in report.failures()
