"""Checks the indexed data sets that a pretraining run is to read, before it reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.patches.patch import patch

__all__ = ["check_blend", "validate"]

_SPLITS = ("training", "validation", "test")


@patch(
    "megatron.bridge.training.config:ConfigContainer.validate",
    version="Megatron-Bridge 0.6.2",
    reason="It does not look at the data, and Megatron-Core 0.19.2 counts epochs without end where "
    "a split has no document.",
)
def validate(original: Callable[..., None], self: Any) -> None:
    """Validate the config of a run; with our models, check its data first.

    Raises:
        UnsupportedConfig: see `check_blend`.
    """
    from exaone_bridge.modules.provider import ExactGPTModelProvider

    if isinstance(self.model, ExactGPTModelProvider):
        check_blend(self.dataset)
    original(self)


def check_blend(dataset: Any) -> None:
    """Check that the files of a blend are there, and that its split leaves none of them empty.

    Megatron-Core 0.19.2 counts epochs without end where a split has no document
    (`datasets/gpt_dataset.py`, `_get_num_epochs`).

    Args:
        dataset: the config of a data set; others than Megatron-Bridge's GPTDatasetConfig have no
            blend, and files in object storage are not read. `data_path` is a prefix, or weights and
            prefixes in turn; `blend` is a list of prefixes and one of their weights.

    Raises:
        UnsupportedConfig: a file is missing, or a split has no document.
    """
    from megatron.core.datasets.object_storage_utils import is_object_storage_path

    paths = getattr(dataset, "data_path", None)
    paths = paths.split() if isinstance(paths, str) else paths or []
    blend = getattr(dataset, "blend", None)
    if blend is not None:
        if not (len(blend) == 2 and isinstance(blend[0], list | tuple)):
            raise UnsupportedConfig(
                "dataset.blend",
                got=blend,
                wanted="[[PREFIX, ...], [WEIGHT, ...]], or [[PREFIX, ...], null]",
                where="ConfigContainer",
                remedy="dataset.data_path takes a prefix, or [WEIGHT, PREFIX, ...]",
            )
        paths = blend[0]
    for path in map(str, paths):
        is_weight = path.replace(".", "", 1).isdecimal()
        if is_weight or is_object_storage_path(path):  # from there Megatron-Core copies the index
            continue
        if not (Path(f"{path}.idx").is_file() and Path(f"{path}.bin").is_file()):
            raise UnsupportedConfig(
                "dataset.data_path" if blend is None else "dataset.blend",
                got=path,
                wanted="the prefix of a .bin and an .idx file",
                where="ConfigContainer",
                remedy="make them with examples/tokenize_text.py",
            )
        if dataset.split is not None:
            _check_split(path, dataset.split)


def _check_split(path: str, split: str) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = len(IndexedDataset(path).sequence_lengths)
    bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for name, part in zip(_SPLITS, bounds, strict=True):
        if part is not None and round(part[0] * documents) == round(part[1] * documents):
            raise UnsupportedConfig(
                "dataset.split",
                got=split,
                wanted=f"a split that leaves {name} some of the {documents} documents of {path}",
                where="ConfigContainer",
                remedy="with \"dataset.split='100,0,0'\" there is no validation",
            )
