"""verl, NeMo-RL and slime send exact weights: their own calls, in workers that they would spawn.

Nothing in a worker imports exaone_bridge; EXAONE_BRIDGE_AUTOLOAD=1 does. Two spawned processes run
all calls of all models at TP 2 and TP 1 (`tests/helpers/rl_worker.py`).
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from exaone_bridge.models.auto_class import auto_class
from exaone_bridge.patches import listed_config_fields
from tests.conftest import TINY_CONFIGS
from tests.helpers import rl_worker
from tests.helpers.autoload import environment_with_pth

pytestmark = pytest.mark.slow
MODELS = ("exaone4", "exaone4-1.2b", "ernie45", "ernie45-dense", "exaone45", "exaone-moe")
Weights = dict[str, torch.Tensor]
LAYOUTS = (2, 1)


def _bf16(name: str) -> dict[str, Any]:
    """Return a tiny config with bf16 as the dtype of the full model, and of each of its parts."""
    text = json.dumps(TINY_CONFIGS[name]).replace('"float32"', '"bfloat16"')
    return dict(json.loads(text))


@pytest.fixture(scope="module")
def jobs(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, rl_worker.Job]:
    """Run the workers on every model."""
    folder = tmp_path_factory.mktemp("rl")
    made = {}
    for name in MODELS:
        first, second = (tiny(name, seed=seed, **_bf16(name)) for seed in (0, 1))
        (folder / name).mkdir()
        made[name] = rl_worker.Job(
            has_experts=name in ("ernie45", "exaone-moe"),
            first=first,
            second=second,
            output=folder / name,
        )
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment_with_pth(folder / "site").items():
            patch.setenv(key, value)
        patch.setenv("EXAONE_BRIDGE_AUTOLOAD", "1")
        torch.multiprocessing.spawn(
            rl_worker.main, args=(str(folder / "store"), list(made.values())), nprocs=2
        )
    return made


def _received(
    job: rl_worker.Job, round_: str, *frameworks: str, layouts: tuple[int, ...] = LAYOUTS
) -> Weights:
    """Return what an engine receives in a round: the same on all ranks, at all layouts."""
    first: Weights | None = None
    for framework, tp, rank in itertools.product(frameworks, layouts, range(2)):
        weights = load_file(job.output / f"{framework}-tp{tp}-{round_}-{rank}.safetensors")
        first = weights if first is None else first
        assert weights.keys() == first.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, first[name]) and weight.dtype is first[name].dtype, name
    assert first
    return first


def _transformers(config_of: Path, folder: Path, weights: Weights | None = None) -> Any:
    """Load Transformers' model of a folder, or with weights that must be all that it wants."""
    listed_config_fields.from_dict.apply()  # Transformers does not read ERNIE's lists
    if weights is not None:
        folder.mkdir()
        shutil.copy(config_of / "config.json", folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if weights is not None:
        assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model


@pytest.mark.parametrize("name", MODELS)
def test_each_round_sends_what_transformers_has(
    jobs: dict[str, rl_worker.Job], name: str, tmp_path: Path
) -> None:
    """The second round reuses the conversion tasks of the first, for other weights."""
    job = jobs[name]
    for round_, source in (("first", job.first), ("second", job.second)):
        weights = _received(job, round_, "verl", "nemo-rl", "slime")
        expected = _transformers(source, source).state_dict()
        got = _transformers(source, tmp_path / round_, weights).state_dict()
        assert got.keys() == expected.keys()
        for key in expected:
            assert torch.equal(got[key], expected[key]), key


@pytest.mark.parametrize("tp", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_sent_beside_the_base_and_merged(
    jobs: dict[str, rl_worker.Job], name: str, tp: int, tmp_path: Path
) -> None:
    """The base has the source's weights; PEFT merges the adapters to what the merged export has."""
    job = jobs[name]
    base = _received(job, "base", "verl")
    plain = _received(job, "first", "verl")
    assert {key.replace(".base_layer", "") for key in base} == plain.keys()
    for key, weight in base.items():
        assert torch.equal(weight, plain[key.replace(".base_layer", "")]), key

    adapter = _received(job, "adapter", "verl", layouts=(tp,))
    modules = sorted({key.split(".")[-3] for key in adapter})
    layers = "layers" if name != "exaone45" else "language_model.layers"
    targets = rf".*{layers}\..*\.({'|'.join(modules)})"
    config = LoraConfig(
        r=rl_worker.LORA["rank"], lora_alpha=rl_worker.LORA["alpha"], target_modules=targets
    )
    peft = get_peft_model(_transformers(job.first, job.first), config)
    prefixed = {f"base_model.model.{key}": weight for key, weight in adapter.items()}
    loaded = set_peft_model_state_dict(peft, prefixed)
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    expected = peft.merge_and_unload().state_dict()
    weights = _received(job, "merged", "verl", layouts=(tp,))
    merged = _transformers(job.first, tmp_path / "merged", weights)
    before, changed = _transformers(job.first, job.first).state_dict(), 0
    for key, weight in merged.state_dict().items():
        changed += not torch.equal(weight, before[key])
        torch.testing.assert_close(weight, expected[key], rtol=2**-7, atol=2**-7)
    assert changed == len(adapter) // 2
