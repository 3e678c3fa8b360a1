"""AutoBridge, import, export and inspect of models with a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import exaone_bridge
from exaone_bridge.errors import UnsupportedConfig, UnsupportedLayout
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.run import Session, run
from tests.helpers.adapters import make_peft, randomize, save_adapter
from tests.helpers.heads import ANSWER, FIELDS, SEQUENCE, TOKEN, head_folder
from tests.helpers.parity import assert_same_folder

TOKENS = torch.randint(1, 387, (1, 20), generator=torch.Generator().manual_seed(5))


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


@pytest.mark.parametrize(
    ("architecture", "trains_head"),
    [(SEQUENCE, False), (SEQUENCE, True), (TOKEN, True), (ANSWER, False)],
)
def test_adapter_of_a_model_with_a_head_is_merged_and_loads_in_peft(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, architecture: str, trains_head: bool
) -> None:
    """Merged and in PEFT, the logits are those of Megatron-Core; AutoBridge saves both too.

    The head is frozen, unless it is trained with the adapter.
    """
    folder = head_folder(tiny, architecture)
    trained = ForkLauncher(2).all(_adapted_logits, folder, trains_head, tmp_path)[0]
    exaone_bridge.export_checkpoint(folder, tmp_path / "merged", adapter=tmp_path / "run")
    adapter = tmp_path / "peft"
    exaone_bridge.export_checkpoint(folder, adapter, adapter=tmp_path / "run", peft=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert bool(config["modules_to_save"]) == trains_head
    base = ForkLauncher(1).first(_transformers_logits, folder, None)
    assert (trained - base).abs().max() > 1e-2
    for found in (
        ForkLauncher(1).first(_transformers_logits, tmp_path / "merged", None),
        ForkLauncher(1).first(_transformers_logits, tmp_path / "saved", None),
        ForkLauncher(1).first(_transformers_logits, folder, adapter),
        ForkLauncher(1).first(_transformers_logits, folder, tmp_path / "saved for PEFT"),
    ):
        assert (trained - found).abs().max() <= 1e-4


def _adapted_logits(folder: Path, trains_head: bool, work: Path) -> torch.Tensor:
    """On a rank: save an adapter with random values, and return the logits of TOKENS with it."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    peft, bridge = make_peft("LoRA"), AutoBridge.from_hf_pretrained(folder)
    model = peft(build(bridge, Layout(tp=2, sp=True)), training=True)
    head = model[0].output_layer
    assert not any(each.requires_grad for each in head.parameters())
    randomize(model)
    if trains_head:
        for parameter in head.requires_grad_(True).parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    save_adapter(model, peft, work / "run")
    bridge.save_hf_adapter(model, work / "saved for PEFT", peft, show_progress=False)
    bridge.save_hf_pretrained(model, work / "saved", show_progress=False)
    model[0].eval()  # no dropout before the head
    with torch.no_grad():
        output: torch.Tensor = model[0](TOKENS, torch.arange(TOKENS.shape[1])[None], None)
    return output


def _transformers_logits(folder: Path, adapter: Path | None) -> torch.Tensor:
    from peft import PeftModel

    from exaone_bridge.verification.workflow.transformers import load

    model = load(folder, torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        output = model(TOKENS, use_cache=False)
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], -1)
    return torch.as_tensor(output.logits)


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

    with (
        pytest.raises(UnsupportedConfig, match="a head predicts no next token"),
        model_files(head_folder(tiny, SEQUENCE), ForkLauncher(), dtype=None),
    ):
        pass
