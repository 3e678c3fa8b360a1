"""Tiny EXAONE 4.0 models with a head, and runs of them in Transformers and in Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout

SEQUENCE = "Exaone4ForSequenceClassification"
TOKEN = "Exaone4ForTokenClassification"
ANSWER = "Exaone4ForQuestionAnswering"
LABELS = ["person", "place", "date", "sum", "other"]

FIELDS: dict[str, dict[str, Any]] = {
    SEQUENCE: {"id2label": {"0": "reward"}, "label2id": {"reward": 0}},
    TOKEN: {
        "id2label": {str(label): name for label, name in enumerate(LABELS)},
        "label2id": {name: label for label, name in enumerate(LABELS)},
        "classifier_dropout": 0.5,
    },
    ANSWER: {},
}


def head_folder(tiny: Callable[..., Path], architecture: str, **fields: Any) -> Path:
    """Make a tiny model with a head, of EXAONE 4.0 32B's layers."""
    fields = FIELDS[architecture] | fields
    return tiny("exaone4", architectures=[architecture], **fields)


def run_transformers(folder: Path, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Return the output of each batch, in a process of its own."""
    return ForkLauncher().first(_transformers, folder, batches)


def _transformers(folder: Path, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    from exaone_bridge.verification.workflow.transformers import load

    model = load(folder, torch.float32)
    with torch.no_grad():
        return [_output(model(**batch, use_cache=False)) for batch in batches]


def _output(result: Any) -> torch.Tensor:
    if "start_logits" in result:
        return torch.stack([result.start_logits, result.end_logits], -1)
    logits: torch.Tensor = result.logits
    return logits


def run_megatron(
    folder: Path, layout: Layout, batches: list[dict[str, torch.Tensor]], **options: Any
) -> list[list[torch.Tensor]]:
    """Return the outputs of every rank; the layout has one pipeline stage."""
    return ForkLauncher(layout.ranks).all(_megatron, folder, layout, batches, options)


def _megatron(
    folder: Path, layout: Layout, batches: list[dict[str, torch.Tensor]], options: dict[str, Any]
) -> list[torch.Tensor]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), layout, dtype=torch.float32)
    model.train(options.pop("training", False))
    with torch.no_grad():
        return [
            model(
                batch["input_ids"],
                torch.arange(batch["input_ids"].shape[1])[None],
                batch.get("attention_mask"),
                **options,
            )
            for batch in batches
        ]
