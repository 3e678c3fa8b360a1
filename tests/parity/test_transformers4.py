"""Transformers 4.57 computes the same logits of an export as of its source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.cli import read_config
from tests.helpers.environments import UV, make_environment, run
from tests.helpers.spelling import spell_as_published

MODELS = ("exaone4", "exaone4-1.2b", "ernie45-dense", "ernie45-300b")
LOGITS = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4.57."), transformers.__version__
found = {}
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        found[folder] = model(torch.arange(3, 60)[None]).logits.double()
first, *others = found.values()
print(json.dumps([(first - other).abs().max().item() for other in others]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(UV).exists(), reason="uv is not installed"),
]


@pytest.fixture(scope="module")
def transformers4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with Transformers 4.57 and this environment's torch."""
    return make_environment(tmp_path_factory.mktemp("envs") / "env", "transformers==4.57.6")


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_an_export_are_those_of_its_source(
    name: str, transformers4: Path, megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    source, exported, alone = tmp_path / "source", tmp_path / "exported", tmp_path / "alone"
    shutil.copytree(tiny(name), source)
    spell_as_published(source)
    import_checkpoint(source, tmp_path / "megatron", Layout())
    export_checkpoint(tmp_path / "megatron", exported)
    assert read_config(exported) == read_config(source)
    shutil.copytree(source, alone)  # as if there were no config to keep the spelling of
    model = HFCheckpoint.open(source).model
    write_config_json(alone, model.family.write_hf_config(model.config, {}))
    printed = run(transformers4, "-c", LOGITS, source, exported, alone)
    assert json.loads(printed.splitlines()[-1]) == [0.0, 0.0]
