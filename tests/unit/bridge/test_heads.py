"""AutoBridge, import, export and inspect of models with a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import exaone_bridge
from exaone_bridge.errors import UnsupportedConfig, UnsupportedLayout
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.run import Session, run
from tests.helpers.heads import ANSWER, FIELDS, SEQUENCE, TOKEN, head_folder
from tests.helpers.parity import assert_same_folder


@pytest.mark.parametrize("architecture", FIELDS)
def test_import_and_export_keep_every_bit(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, architecture: str
) -> None:
    """The Megatron checkpoint alone is enough, and AutoBridge computes the same from it."""
    folder = head_folder(tiny, architecture)
    megatron, exported = tmp_path / "megatron", tmp_path / "exported"
    exaone_bridge.import_checkpoint(folder, megatron, tp=2, pp=2, workers=1)
    exaone_bridge.export_checkpoint(megatron, exported)
    assert_same_folder(folder, exported)
    if architecture == TOKEN:
        report = run(Session(source=megatron, layout=Layout(tp=2, sp=True)))
        assert report.passed, report.failures()


def test_inspect_shows_the_head(tiny: Any) -> None:
    found = exaone_bridge.inspect(head_folder(tiny, TOKEN), tp=2, pp=2)
    assert "score.weight" in str(found.to_dict())


@pytest.mark.parametrize("architecture", FIELDS)
def test_the_model_of_the_wrapper_has_the_head(
    megatron_bridge: Any, tiny: Any, architecture: str
) -> None:
    """AutoBridge loads Transformers' model only when it is asked for it."""
    from megatron.bridge import AutoBridge

    folder = head_folder(tiny, architecture)
    assert AutoBridge.can_handle(folder)
    model = AutoBridge.from_hf_pretrained(folder, torch_dtype=torch.float32).hf_pretrained.model
    assert type(model).__name__ == architecture
    assert next(model.parameters()).dtype == torch.float32


def test_other_architectures_with_a_head_stay_unsupported(megatron_bridge: Any) -> None:
    from megatron.bridge import AutoBridge
    from transformers import LlamaConfig

    config = LlamaConfig(architectures=["LlamaForSequenceClassification"])
    assert not AutoBridge.supports(config)


def test_context_parallelism_is_rejected(megatron_bridge: Any, tiny: Any) -> None:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(head_folder(tiny, ANSWER))
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.context_parallel_size = 2
    with pytest.raises(UnsupportedLayout, match="pooling needs the full sequence"):
        provider.finalize()


def test_commands_that_need_an_output_layer_reject_a_head(tiny: Any) -> None:
    """`generate` and `perplexity` find their model so."""
    from exaone_bridge.cli.model_files import model_files
    from exaone_bridge.runtime.fork import ForkLauncher

    with (
        pytest.raises(UnsupportedConfig, match="a head predicts no next token"),
        model_files(head_folder(tiny, SEQUENCE), ForkLauncher(), dtype=None),
    ):
        pass
