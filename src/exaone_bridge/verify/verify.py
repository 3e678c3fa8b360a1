"""Verifies a Hugging Face folder: its round trip through Megatron-Core, and its logits against Transformers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.checkpoint.convert import drain, shards_like
from exaone_bridge.checkpoint.headers import read_json
from exaone_bridge.checkpoint.source import check_layout, open_source
from exaone_bridge.checkpoint.writer import write_hf_folder
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.parts.layout import Layout
from exaone_bridge.verify.folders import compare_configs, compare_files, compare_tensors
from exaone_bridge.verify.logits import compare_logits, prompts, reference_logits
from exaone_bridge.verify.report import Report

__all__ = ["prompt_length", "verify"]

_LONGEST = 512  # positions of a prompt that a laptop computes in a minute


def prompt_length(windows: tuple[int | None, ...]) -> int:
    """Long enough that the window's edge is met at many positions, where that is affordable; else 64."""
    longest = max((window for window in windows if window is not None), default=0)
    return 4 * longest + 9 if 4 * longest + 9 <= _LONGEST else 64


def _verify_rank(
    source: Path, target: Path, layout: Layout, backend: str, files: Mapping[str, str], tokens: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor | None, dict[int, torch.Tensor]]:
    """Export to `target`, then run: the source's config as Transformers writes it, logits, hidden states by layer."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.host.bridge_base import config_mapping
    from exaone_bridge.host.model import build, forward_logits
    from exaone_bridge.host.world import emit

    bridge = AutoBridge.from_hf_pretrained(source)
    source_config = config_mapping(bridge.hf_pretrained.config)
    emit("HF -> Megatron-Core")
    model = build(bridge, layout, backend=backend)
    emit("Megatron-Core -> HF")
    weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
    config = bridge._model_bridge.megatron_to_hf_config(model[0].config)
    drain(weights, lambda stream: write_hf_folder(target, stream, files, config, source))
    if next(model[0].parameters()).dtype != torch.float32:
        del model
        model = build(bridge, layout, dtype=torch.float32, backend=backend)
    emit("Megatron-Core's logits")
    return (source_config, *forward_logits(model, tokens))


def verify(
    source_folder: Path,
    layout: Layout,
    *,
    backend: str = "auto",
    tolerance: float = 1e-4,
    count: int = 2,
    length: int | None = None,
    on_event: Callable[[int, Any], None] | None = None,
) -> Report:
    """Check that a model survives Megatron-Core: tensors, configuration and files after a round trip, and logits.

    Args:
        source_folder: a Hugging Face folder.
        layout: ranks are processes on this machine.
        tolerance: on the absolute difference of logits, computed in fp32.
        count, length: of the prompts; length None: past the window where affordable.
        on_event: called with (rank, stage) while it works.

    Raises:
        BridgeError: bad input; see `open_source`.
    """
    from exaone_bridge.host.registration import supported
    from exaone_bridge.host.world import run_ranks

    started = time.perf_counter()
    if not 0 <= tolerance < float("inf"):
        raise UnsupportedConfig("tolerance", got=tolerance, wanted="a finite number, zero or more", where="verify")
    source_folder = source_folder.resolve()
    source = open_source(source_folder)
    check_layout(source.facts, layout)
    supported()
    report = Report(source_folder.name, source.parameters, str(layout))
    tokens = prompts(source.facts.vocab_size, count, length or prompt_length(source.facts.windows))
    if on_event is not None:
        on_event(0, "Transformers' logits")
    (reference,) = run_ranks(reference_logits, 1, source_folder, tokens)
    with tempfile.TemporaryDirectory(prefix="exaone_bridge-") as work:
        target = Path(work) / source_folder.name
        target.mkdir()
        arguments = (source_folder.absolute(), target, layout, backend, shards_like(source), tokens)
        results = run_ranks(_verify_rank, layout.ranks, *arguments, on_event=on_event)
        report.checks += [
            compare_tensors(source_folder, target),
            compare_configs(results[0][0], read_json(target / "config.json")),
            compare_files(source_folder, target),
        ]
    logits = next(result[1] for result in results if result[1] is not None)
    layers = {layer: hidden for result in results for layer, hidden in result[2].items()}
    difference = compare_logits(reference, (logits, layers), tolerance)
    report.checks.append(difference.check(tolerance))
    report.max_logit_difference = difference.maximum
    report.first_differing_layer = "-" if difference.first_layer is None else str(difference.first_layer)
    report.seconds = time.perf_counter() - started
    return report
