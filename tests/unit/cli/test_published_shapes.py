"""K-EXAONE's published shapes without weights: the plan, `inspect` and `import --dry-run`."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from exaone_bridge.checkpoint.hf.headers import TensorSpec
from exaone_bridge.checkpoint.hf.shards import ShardWriter, assign_files, shard_layout, write_index
from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.checkpoint.reshard.plan import check_layout, reshard_plan
from exaone_bridge.checkpoint.reshard.validate import validate_plan
from exaone_bridge.models.exaone_moe import EXAONE_MOE, EXAONE_MOE_WITH_MTP
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.dtypes import SAFETENSORS_DTYPES
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.cli import Cli

MTP = {
    "num_nextn_predict_layers": 1,
    "mtp_layer_types": ["full_attention"],
    "mtp_sliding_windows": [0],
}


@pytest.mark.parametrize(
    ("name", "layout", "tensors"),
    [
        ("k_exaone_236b_a23b", Layout(tp=4, pp=4, ep=8), 18_688),
        ("k_exaone_2_750b_a37b", Layout(tp=4, pp=6, ep=16), 59_396),
    ],
)
def test_plan_of_every_tensor_is_a_bijection(name: str, layout: Layout, tensors: int) -> None:
    """Multi-token prediction is built, so that its 15 tensors are planned too."""
    model = EXAONE_MOE_WITH_MTP.describe(CONFIGS[name] | MTP)
    check_layout(model.config, layout)
    totals = validate_plan(reshard_plan(model, layout), model.hf_shapes)
    assert totals.tensors == tensors == len(model.hf_shapes)
    assert totals.padding == 0


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the 236B: true headers, config and index, and files without data."""
    config = CONFIGS["k_exaone_236b_a23b"] | MTP
    model = EXAONE_MOE.describe(config)
    dtype = model.config.dtype
    specs = [
        TensorSpec(each.name, SAFETENSORS_DTYPES[each.dtype(dtype)], each.shape(model.dims))
        for each in (*model.hf_tensors.values(), *model.passthrough_tensors)
    ]
    layout = shard_layout(specs, assign_files({spec.name: spec.nbytes for spec in specs}))
    folder = tmp_path_factory.mktemp("published") / "k-exaone-236b"
    folder.mkdir()
    ShardWriter.create(folder, layout).close()
    write_index(folder, layout)
    write_config_json(folder, config)
    files = list(folder.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 474e9
    assert sum(file.stat().st_blocks * 512 for file in files) < 50e6
    return folder


def test_published_folder_is_inspected_in_seconds(cli: Cli, sparse: Path) -> None:
    started = time.perf_counter()
    done = cli("inspect", sparse)
    seconds = time.perf_counter() - started
    assert done.code == 0, done.err
    assert "237,099,669,632 in 18688 tensors" in done.out
    assert seconds < 2  # 0.3 s on an idle core


def test_published_folder_is_imported_in_a_dry_run(
    cli: Cli, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has room for it here, because a dry run checks that too."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    done = cli(
        *("import", sparse, tmp_path / "megatron", "--dry-run"),
        *("--tp", 4, "--pp", 4, "--ep", 8),
    )
    assert done.code == 0, done.err
    assert "18688 tensors, 474.20 GB would be written" in done.out
    assert not (tmp_path / "megatron").exists()
