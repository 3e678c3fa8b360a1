"""`exaone_bridge.verify(...)`: its ways, and that each of its checks can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import exaone_bridge
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.errors import BridgeError, CheckpointError
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification import verify
from exaone_bridge.verification.activations.probe_points import probe_points
from exaone_bridge.verification.checks.generation import (
    CHATS,
    Generated,
    compare_generation,
    generate,
)
from exaone_bridge.verification.checks.logits import prompts
from exaone_bridge.verification.report.report import Report
from exaone_bridge.verification.self_test.fault import changed_mappings, changed_model
from exaone_bridge.verification.workflow.layerwise import is_layerwise
from exaone_bridge.verification.workflow.transformers import capture_transformers, load
from exaone_bridge.verification.workflow.transformers_layerwise import (
    Reader,
    layerwise_transformers,
)


def statuses(report: Report) -> dict[str, str]:
    return {check.name: check.status.value for check in report.checks}


# --- the public name ------------------------------------------------------------------------------------------------


def test_verify_is_a_function_of_the_package() -> None:
    """It stays one, whatever modules are imported; without torch."""
    program = (
        "import sys, exaone_bridge; from exaone_bridge.verification.report.report import Report; "
        "assert type(exaone_bridge.verify).__name__ == 'function' and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- a model alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [("exaone4", Layout(tp=2, sp=True, cp=2)), ("ernie45", Layout(pp=2, ep=2))],
    ids=str,
)
def test_every_check_of_a_model_holds(
    name: str, layout: Layout, megatron_bridge: Any, tiny: Any
) -> None:
    report = exaone_bridge.verify(tiny(name), layout=layout, gradients=True)
    assert report.passed, report.failures()
    assert set(statuses(report)) == {
        "tensors",
        "config",
        "files",
        "logits",
        "generation",
        "gradients",
    }
    assert report.check("generation").metrics["prompts"] == ["plain", *CHATS]
    assert (
        0
        < report.check("logits").metrics["relative"]
        < report.check("logits").metrics["threshold"] / 3
    )
    assert (
        0
        < report.check("gradients").metrics["relative"]
        < report.check("gradients").metrics["threshold"] / 3
    )
    assert report.tensors.keys() == HFCheckpoint.open(tiny(name)).tensors.keys()
    assert {place.layer for place in report.activations} == {
        None,
        *range(report.model["num_layers"]),
    }


@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_half_precision(
    name: str, megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_gradients_that_are_not_summed_differ(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms of queries and keys see some heads on each rank: without the last step their gradients are partial."""
    import megatron.core.distributed as distributed

    monkeypatch.setattr(distributed, "finalize_model_grads", lambda *_, **__: None)
    report = verify(tiny("exaone4"), layout=Layout(tp=2), quick=True, gradients=True)
    assert statuses(report) == dict.fromkeys(("tensors", "config", "files", "logits"), "passed") | {
        "gradients": "failed"
    }
    assert "_norm.weight differs" in report.check("gradients").details


# --- layer by layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b", "ernie45", "ernie45-300b"])
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_streamed_transformers_is_transformers(
    name: str, dtype: str, megatron_bridge: Any, tiny: Any
) -> None:
    source = HFCheckpoint.open(tiny(name, dtype=dtype))
    points, tokens = probe_points(source.mappings), prompts(387, 2, 30)
    expected = capture_transformers(load(source.folder, torch.float32), points, tokens)
    model = layerwise_transformers(source, torch.float32)
    found = capture_transformers(model, points, tokens)
    assert torch.equal(found.logits, expected.logits) and list(found.values) == list(
        expected.values
    )
    assert all(torch.equal(found.values[each], expected.values[each]) for each in expected.values)
    layers = [value for each, value in model.named_parameters() if ".layers." in each]
    assert layers and all(value.is_meta for value in layers)  # nothing of them is held


def test_a_reader_reads_what_safetensors_reads(tiny: Any) -> None:
    folder = tiny("ernie45", dtype="bfloat16")
    reader, expected = (
        Reader(HFCheckpoint.open(folder)),
        load_file(folder / "model.safetensors"),
    )
    assert reader.keys() == expected.keys() and len(reader) == len(expected)
    assert all(
        torch.equal(reader[name], value) and reader[name].dtype == value.dtype
        for name, value in expected.items()
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [("exaone4", Layout(tp=2, pp=2)), ("exaone4-1.2b", Layout(pp=2)), ("ernie45", Layout(ep=2))],
    ids=str,
)
def test_layer_by_layer_holds_at_any_layout(
    name: str, layout: Layout, megatron_bridge: Any, tiny: Any
) -> None:
    report = exaone_bridge.verify(tiny(name), layout=layout, stream=True)
    assert report.passed, report.failures()
    assert statuses(report) == dict.fromkeys(("tensors", "config", "files", "logits"), "passed") | {
        "generation": "not run"
    }


def test_layer_by_layer_sees_a_table_that_is_wrong(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    def swap(mapping: Any) -> Any:
        return (
            dataclasses.replace(mapping, hf=mapping.hf[::-1])
            if "linear_fc1.weight" in mapping.megatron
            else mapping
        )

    with changed_mappings(EXAONE4, swap):
        report = verify(tiny("exaone4"), stream=True, quick=True)
    assert statuses(report)["tensors"] == "passed" and statuses(report)["logits"] == "failed"
    assert report.divergence is not None and (
        report.divergence.layer,
        report.divergence.sublayer,
    ) == (
        0,
        "mlp",
    )


def test_layer_by_layer_sees_a_bit(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.bridge.models.conversion.param_mapping import RowParallelMapping

    right = RowParallelMapping.megatron_to_hf

    def flip(self: Any, *args: Any) -> dict[str, torch.Tensor]:
        found = right(self, *args)
        return {
            name: (value.view(torch.int32) ^ 1).view(torch.float32)
            if "layers.6.mlp" in name
            else value
            for name, value in found.items()
        }

    monkeypatch.setattr(RowParallelMapping, "megatron_to_hf", flip)
    report = verify(tiny("exaone4"), stream=True, quick=True)
    assert {name for name, verdict in statuses(report).items() if verdict == "failed"} == {
        "tensors"
    }
    assert report.check("tensors").details == "model.layers.6.mlp.down_proj.weight differs"


def test_only_large_models_are_streamed_unasked(tiny: Any) -> None:
    assert [is_layerwise(tiny("exaone4"), wish) for wish in (None, True, False)] == [
        False,
        True,
        False,
    ]


# --- one model against another --------------------------------------------------------------------------------------


@pytest.fixture
def other(tiny: Any, tmp_path: Path) -> Path:
    shutil.copytree(tiny("exaone4"), tmp_path / "other")
    return tmp_path / "other"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_copy_is_equal(megatron_bridge: Any, tiny: Any, other: Path) -> None:
    report = exaone_bridge.verify(tiny("exaone4"), other)
    assert report.passed and report.other == "other" and report.max_logit_difference == 0
    assert set(statuses(report)) == {"tensors", "config", "files", "generation", "logits"}


def test_another_layer_is_found(megatron_bridge: Any, tiny: Any, other: Path) -> None:
    edit(other, lambda tensors: tensors["model.layers.4.mlp.up_proj.weight"].mul_(1.01))
    report = verify(tiny("exaone4"), other, generation=False)
    assert not report.passed and str(report.divergence).startswith(
        "hidden states diverge at layer 4, mlp"
    )


def test_a_model_that_cannot_run_differs(megatron_bridge: Any, tiny: Any, other: Path) -> None:
    edit(other, lambda tensors: tensors.pop("model.layers.4.mlp.up_proj.weight"))
    report = verify(tiny("exaone4"), other)
    assert statuses(report) == {
        "tensors": "failed",
        "config": "passed",
        "files": "passed",
        "logits": "failed",
    }
    assert "model.layers.4.mlp.up_proj.weight" in report.check("logits").details


def test_another_vocabulary_differs(megatron_bridge: Any, tiny: Any) -> None:
    report = verify(tiny("exaone4"), tiny("exaone4", vocab_size=400))
    assert "400 words" in report.check("logits").details and not report.passed


def test_a_folder_that_cannot_be_read_is_bad_input(tiny: Any, other: Path) -> None:
    (other / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="too short"):
        verify(tiny("exaone4"), other)


# --- generation -----------------------------------------------------------------------------------------------------


def test_generation_is_compared_prompt_by_prompt() -> None:
    before = {
        "plain": Generated((1, 2), (3, 4)),
        "chat": Generated((5,), (6,)),
        "tools": Generated(template_error="no tools"),
    }
    assert compare_generation(before, dict(before)).passed
    assert "tools (refused by the template)" in compare_generation(before, dict(before)).summary
    faults = {
        "plain: word 1 is 4, then 9": {"plain": Generated((1, 2), (3, 9))},
        "chat: the template makes another prompt": {"chat": Generated((7,), (6,))},
        "tools: the template makes another prompt": {"tools": Generated(template_error="no roles")},
    }
    for where, change in faults.items():
        check = compare_generation(before, before | change)
        assert not check.passed and check.details == where
    assert not compare_generation(before, {"plain": before["plain"]}).passed


def test_a_template_may_refuse_a_conversation(tiny: Any, other: Path) -> None:
    template = other / "chat_template.jinja"
    template.write_text(
        "{%- if tools %}{{ raise_exception('no tools here') }}{%- endif %}" + template.read_text()
    )
    found = generate(load(other, torch.float32), other, [1, 2, 3])
    assert [name for name, each in found.items() if each.template_error] == [
        "chat, tools",
        "chat, tool called",
    ]
    assert (
        found["chat, tools"].template_error == "no tools here"
        and len(found["chat"].tokens) == len(found["plain"].tokens) == 8
    )
    assert found["chat"].prompt != found["chat, thinking"].prompt


def test_a_folder_without_a_tokenizer_has_one_prompt(tiny: Any, other: Path) -> None:
    for path in [*other.glob("tokenizer*"), *other.glob("chat*")]:
        path.unlink()
    assert list(generate(load(other, torch.float32), other, [1, 2, 3])) == ["plain"]


# --- torchrun's world -----------------------------------------------------------------------------------------------


def _as_torchrun(*models: Path, **options: Any) -> dict[str, str]:
    """On a rank: as if torchrun had started it."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    report = verify(*models, layout=Layout(tp=2), count=1, **options)
    assert report.passed, report.failures()
    return statuses(report)


def _streaming(*models: Path) -> dict[str, str]:
    return _as_torchrun(*models, stream=True)


@pytest.mark.parametrize("run", [_as_torchrun, _streaming])
def test_ranks_that_are_there_already_are_used(
    run: Callable[..., Any], megatron_bridge: Any, tiny: Any
) -> None:
    from exaone_bridge.runtime.fork import ForkLauncher

    first, second = ForkLauncher(2).all(run, tiny("exaone4"))
    assert first == second and first["logits"] == first["tensors"] == "passed"


@pytest.mark.slow
def test_a_megatron_checkpoint_in_torchruns_world(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """Ranks can fork none of their own: a process that does exports it, and both ranks see what it wrote."""
    from exaone_bridge.convert.convert import import_checkpoint
    from exaone_bridge.runtime.fork import ForkLauncher

    import_checkpoint(tiny("exaone4"), tmp_path / "megatron", Layout())
    first, second = ForkLauncher(2).all(_as_torchrun, tiny("exaone4"), tmp_path / "megatron")
    assert (
        first
        == second
        == dict.fromkeys(["tensors", "config", "files", "logits", "generation"], "passed")
    )


def _apart(folder: Path) -> list[str]:
    """On a rank: what a process of its own raises, and what its end looks like."""
    import torch.distributed as dist

    from exaone_bridge.convert.convert import export_checkpoint
    from exaone_bridge.runtime.launch import choose_launcher

    os.environ |= {
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_PORT": "1",
    }
    said, launcher = [], choose_launcher()
    for target, arguments in (
        (export_checkpoint, (folder / "nowhere", folder / "out")),
        (os._exit, (3,)),
    ):
        with pytest.raises(BridgeError) as refused:
            launcher.subprocess(target, *arguments)
        said.append(f"{type(refused.value).__name__}: {refused.value}")
    assert (
        launcher.subprocess(os.getenv, "MASTER_PORT")
        is launcher.subprocess(os.getenv, "RANK")
        is None
    )
    assert launcher.subprocess(os.path.basename, "a/b") == "b"
    return said


def test_a_process_of_its_own_answers_every_rank(megatron_bridge: Any, tmp_path: Path) -> None:
    from exaone_bridge.runtime.fork import ForkLauncher

    first, second = ForkLauncher(2).all(_apart, tmp_path)
    assert first == second
    assert first[0].startswith("CheckpointError") and str(tmp_path / "nowhere") in first[0]
    assert first[1] == "RankFailure: the process of _exit ended with 3: "
