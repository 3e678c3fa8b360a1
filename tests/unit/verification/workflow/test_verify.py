"""`exaone_bridge.verify`: one model, or two; and that each of its checks can fail."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import exaone_bridge
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification import verify
from exaone_bridge.verification.checks.generation import CHATS
from exaone_bridge.verification.self_test.fault import changed_model
from tests.helpers.reports import statuses

# --- the public name ------------------------------------------------------------------------------


def test_verify_is_a_function_of_the_package() -> None:
    """It stays one, whatever modules are imported; without torch."""
    program = (
        "import sys, exaone_bridge; from exaone_bridge.verification.report.report import Report; "
        "assert type(exaone_bridge.verify).__name__ == 'function' and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- one model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [("exaone4", Layout(tp=2, sp=True, cp=2)), ("ernie45", Layout(pp=2, ep=2))],
    ids=str,
)
def test_every_check_passes(name: str, layout: Layout, megatron_bridge: Any, tiny: Any) -> None:
    report = exaone_bridge.verify(tiny(name), layout=layout, gradients=True)
    assert report.passed, report.failures()
    assert report.folder == str(tiny(name)) and report.other_folder == report.revision == ""
    assert report.device and report.host == platform.node()
    assert abs(time.time() - datetime.fromisoformat(report.date).timestamp()) < 3600
    names = ("tensors", "config", "files", "generation", "logits", "gradients")
    assert tuple(statuses(report)) == names
    assert report.check("generation").metrics["prompts"] == ["plain", *CHATS]
    for check in ("logits", "gradients"):
        metrics = report.check(check).metrics
        assert 0 < metrics["relative"] < metrics["threshold"] / 3
    assert report.tensors.keys() == HFCheckpoint.open(tiny(name)).tensors.keys()
    layers = {each.layer for each in report.activations}
    assert layers == {None, *range(report.model["num_layers"])}


@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_half_precision(name: str, megatron_bridge: Any, tiny: Any) -> None:
    folder = tiny(name, dtype="bfloat16")
    report = verify(folder, dtype="bfloat16", generation=False)
    assert report.passed, report.failures()
    assert 0.5 < report.check("logits").metrics["relative"] <= 1.1

    def negate(model: Any) -> None:
        from megatron.core.utils import unwrap_model

        unwrap_model(model)[0].decoder.layers[2].self_attention.linear_proj.weight.neg_()

    with changed_model(negate):
        report = verify(folder, dtype="bfloat16", generation=False)
    assert statuses(report)["logits"] == "failed" and report.first_diverging_layer == "2"


def test_gradients_that_are_not_summed_fail(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TP rank has some heads only: else the gradients of QK norms are partial."""
    import megatron.core.distributed as distributed

    monkeypatch.setattr(distributed, "finalize_model_grads", lambda *_, **__: None)
    report = verify(tiny("exaone4"), layout=Layout(tp=2), quick=True, gradients=True)
    assert statuses(report) == dict.fromkeys(("tensors", "config", "files", "logits"), "passed") | {
        "gradients": "failed"
    }
    assert "_norm.weight differs" in report.check("gradients").details


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_transformers_computes_differently_is_converted_but_not_run(
    megatron_bridge: Any, tiny: Any, stream: bool
) -> None:
    folder = tiny("exaone-moe-2")
    layout = Layout(pp=2, ep=2)
    report = verify(folder, layout=layout, gradients=True, stream=stream)
    assert report.passed and report.round_trip_passed
    assert statuses(report) == dict.fromkeys(("tensors", "config", "files"), "passed") | (
        dict.fromkeys(("generation", "logits", "gradients"), "not run")
    )
    for name in ("generation", "logits", "gradients"):
        reason = "Transformers ignores sliding_windows and swiglu_limits"
        assert report.check(name).details == reason
    assert report.max_logit_difference != report.max_logit_difference  # NaN


def test_two_models_that_transformers_computes_differently_are_compared_on_disk(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny("exaone-moe-2"), other)
    edit(other, lambda tensors: tensors["model.norm.weight"].mul_(2))
    report = verify(tiny("exaone-moe-2"), other)
    assert not report.passed
    assert (statuses(report)["tensors"], statuses(report)["logits"]) == ("failed", "not run")


# --- two models -----------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_copy_is_equal(megatron_bridge: Any, tiny: Any, other: Path) -> None:
    report = exaone_bridge.verify(tiny("exaone4"), other)
    assert report.passed and report.other == "other" and report.max_logit_difference == 0
    assert set(statuses(report)) == {"tensors", "config", "files", "generation", "logits"}


def test_another_layer_is_located(megatron_bridge: Any, tiny: Any, other: Path) -> None:
    edit(other, lambda tensors: tensors["model.layers.4.mlp.up_proj.weight"].mul_(1.01))
    report = verify(tiny("exaone4"), other, generation=False)
    assert not report.passed and str(report.divergence).startswith(
        "hidden states diverge at layer 4, mlp"
    )


def test_a_model_that_cannot_run_fails(megatron_bridge: Any, tiny: Any, other: Path) -> None:
    edit(other, lambda tensors: tensors.pop("model.layers.4.mlp.up_proj.weight"))
    report = verify(tiny("exaone4"), other)
    assert statuses(report) == {
        "tensors": "failed",
        "config": "passed",
        "files": "passed",
        "logits": "failed",
    }
    assert "model.layers.4.mlp.up_proj.weight" in report.check("logits").details


def test_another_vocabulary_fails(megatron_bridge: Any, tiny: Any) -> None:
    report = verify(tiny("exaone4"), tiny("exaone4", vocab_size=400))
    assert "400 tokens" in report.check("logits").details and not report.passed


def test_a_folder_that_cannot_be_read_is_bad_input(tiny: Any, other: Path) -> None:
    (other / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="too short"):
        verify(tiny("exaone4"), other)
