"""A blend of tokenized sources reaches Megatron-Core's data set, or is rejected before it hangs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.runtime.fork import ForkLauncher
from tests.helpers.cli import Cli

RECIPE = "exaone4_tiny_pretrain_config"


@pytest.fixture
def prefixes(megatron_bridge: Any, tmp_path: Path) -> list[str]:
    """Two indexed data sets: 12 documents of 300 times token 7, and 12 of token 8."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    found = [str(tmp_path / name) for name in ("a", "b")]
    for prefix, token in zip(found, (7, 8), strict=True):
        builder = IndexedDatasetBuilder(f"{prefix}.bin")
        for _ in range(12):
            builder.add_document(torch.full((300,), token), [300])
        builder.finalize(f"{prefix}.idx")
    return found


def _read(overrides: list[str], cache: Path) -> tuple[list[int | None], Counter[int]]:
    """On a rank: the lengths of Megatron-Core's data sets, and the tokens of the training one."""
    from megatron.bridge.data.loaders import get_train_valid_test_num_samples
    from megatron.bridge.data.utils import get_dataset_provider

    from exaone_bridge.cli.train_settings import apply_overrides
    from exaone_bridge.recipes import recipe

    config = recipe(RECIPE)()
    apply_overrides(config, ["train.train_iters=50", *overrides])
    config.validation.eval_global_batch_size = config.train.global_batch_size
    config.dataset.path_to_cache = str(cache)
    config.dataset.tokenizer = type("Tokenizer", (), {"eod": 0, "unique_identifiers": {}})()
    config.dataset.finalize()
    splits = get_dataset_provider(config.dataset)(
        get_train_valid_test_num_samples(config), config.dataset
    )
    tokens = Counter(int(splits[0][index]["tokens"][0]) for index in range(len(splits[0])))
    return [None if split is None else len(split) for split in splits], tokens


@pytest.mark.parametrize(
    "form", ["dataset.data_path=[0.3,{},0.7,{}]", "dataset.blend=[[{},{}],[3,7]]"]
)
def test_blend_has_its_weights(form: str, prefixes: list[str], cli: Cli, tmp_path: Path) -> None:
    overrides = [form.format(*prefixes), "dataset.split='80,20,0'"]
    run = cli("train", RECIPE, *overrides, "--dry-run")
    assert run.code == 0 and "are accepted" in run.out, run.err
    lengths, tokens = ForkLauncher(1).first(_read, overrides, tmp_path / "cache")
    assert lengths[0] is not None and lengths[1] is not None and lengths[2] is None
    assert tokens.keys() == {7, 8} and abs(tokens[7] / tokens.total() - 0.3) < 0.01


def test_split_without_documents_is_rejected(prefixes: list[str], cli: Cli) -> None:
    """Megatron-Core would count epochs without end."""
    run = cli("train", RECIPE, f"dataset.data_path={prefixes[0]}", "--dry-run")
    assert run.code == 2
    assert "a split that leaves validation some of the 12 documents of " + prefixes[0] in run.err
    split = "dataset.split='100,0,0'"
    assert split in run.err
    assert cli("train", RECIPE, f"dataset.data_path={prefixes[0]}", split, "--dry-run").code == 0


@pytest.mark.parametrize("field", ["data_path", "blend"])
def test_megatron_bridges_loops_reject_the_split_too(field: str, prefixes: list[str]) -> None:
    """`pretrain(config, ...)` validates the config before it builds the data sets."""
    from exaone_bridge.recipes import recipe

    config = recipe(RECIPE)()
    setattr(config.dataset, field, prefixes[0] if field == "data_path" else (prefixes, [3, 7]))
    with pytest.raises(UnsupportedConfig, match="leaves validation some of the 12 documents"):
        config.validate()


def test_data_in_object_storage_are_not_looked_for(megatron_bridge: Any) -> None:
    from exaone_bridge.patches.blend import check_blend
    from exaone_bridge.recipes import recipe

    config = recipe(RECIPE)()
    config.dataset.data_path = "s3://bucket/news"
    check_blend(config.dataset)
