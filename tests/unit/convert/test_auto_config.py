"""AutoBridge.from_auto_config: a Megatron checkpoint and a reference model, without its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_files,
    compare_tensors,
)
from tests.helpers.alone import run_alone


def _export(megatron: Path, source: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    AutoBridge.from_auto_config(str(megatron), str(source)).export_ckpt(
        megatron, target, show_progress=False, strict=True
    )


@pytest.mark.parametrize("name", ["exaone4", "ernie45-lists", "exaone45", "exaone-moe"])
def test_export_ckpt_has_all_tensors_and_files_of_the_reference(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str
) -> None:
    """As the conversion script of Megatron-Bridge calls it, also with passthrough tensors."""
    source, exported = tiny(name), tmp_path / "exported"
    import_checkpoint(source, tmp_path / "megatron", Layout())
    run_alone(_export, tmp_path / "megatron", source, exported)
    expected = read_json(source / "config.json")
    for check in (
        compare_tensors(source, exported),
        compare_configs(expected, read_json(exported / "config.json")),
        compare_files(source, exported),
    ):
        assert check.passed, f"{check.name}: {check.details}"


def _exported_names(megatron: Path, source: Path) -> set[str]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import load_megatron

    model = load_megatron(AutoBridge.from_hf_pretrained(source), megatron, Layout())
    bridge = AutoBridge.from_auto_config(str(megatron), str(source))
    return {name for name, _ in bridge.export_hf_weights(model, show_progress=False)}


def test_a_reference_without_its_tensors_is_an_error(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("ernie45"), source)
    import_checkpoint(source, tmp_path / "megatron", Layout())
    names = ForkLauncher().first(_exported_names, tmp_path / "megatron", source)
    assert sum(name.startswith("model.mtp_") for name in names) == 12
    (source / "model.safetensors").unlink()
    with pytest.raises(AssertionError, match="_export failed"):
        run_alone(_export, tmp_path / "megatron", source, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
