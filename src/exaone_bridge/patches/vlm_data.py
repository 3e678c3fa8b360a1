"""Adds EXAONE 4.5's collator, and datasets with images in a folder, to Megatron-Bridge's tables.

The tables are in modules that only training on images imports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exaone_bridge.models import FAMILIES
from exaone_bridge.patches.patch import patch_value
from exaone_bridge.schema.json_types import JSONMapping, JSONObject

__all__ = ["IN_FOLDER", "adapters", "collators", "in_folder"]

IN_FOLDER = "conversations_in_folder"
_MEDIA = ("image", "path", "video")


@patch_value(
    "megatron.bridge.data.collators.registry:_MODEL_COLLATE_SPECS",
    version="Megatron-Bridge 0.6.2",
    reason="The table from processor classes to collators has no entry for EXAONE 4.5, so that "
    "Megatron-Bridge's own recipes for image conversations raise.",
)
def collators(specs: JSONMapping) -> JSONObject:
    """Add our models' collators; examples without images need them too, for the chat template."""
    from megatron.bridge.data.collators import registry

    registry.resolve_model_collate.cache_clear()
    added = {
        processor: registry._ModelCollateSpec(
            collate.__module__, collate.__name__, required_for_all_examples=True
        )
        for family in FAMILIES
        if family.images is not None
        for processor, collate in family.images.collators().items()
    }
    return {**specs, **added}


@patch_value(
    "megatron.bridge.data.sources.hf_adapters:_ADAPTERS",
    version="Megatron-Bridge 0.6.2",
    reason="No adapter has the folder of the dataset, so that examples cannot name image files "
    "relative to it.",
)
def adapters(named: JSONMapping) -> JSONObject:
    """Add the adapter `in_folder`."""
    return {**named, IN_FOLDER: in_folder}


def in_folder(row: JSONMapping, options: JSONMapping) -> JSONObject:
    """Make the image and video paths of a dataset row absolute.

    Args:
        row: has `messages` or `conversation`, and may have `images` and `videos`.
        options: `root` is the folder that relative paths start from.

    Returns:
        The row without absent fields. Values that are not file names stay as they are: images
        themselves, URLs, and data URLs.
    """
    root = Path(options["root"])
    adapted = {key: value for key, value in row.items() if value is not None}
    for key in ("messages", "conversation"):
        if key in adapted:
            adapted[key] = [
                {**turn, "content": _with_paths(turn["content"], root)} for turn in adapted[key]
            ]
    for key in ("images", "videos"):
        if key in adapted:
            adapted[key] = [_absolute(value, root) for value in adapted[key]]
    return adapted


def _with_paths(content: Any, root: Path) -> Any:
    if isinstance(content, str):
        return content
    return [
        {key: _absolute(value, root) if key in _MEDIA else value for key, value in part.items()}
        for part in content
    ]


def _absolute(value: Any, root: Path) -> Any:
    if not isinstance(value, str) or "://" in value or value.startswith("data:"):
        return value
    return str(root / value)
