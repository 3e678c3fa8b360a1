"""Conversations with images in Megatron-Bridge's data path: our collators, and data sets in a folder.

The host looks up by the name of the processor's class how conversations become a batch, in a table of its own
(`megatron/bridge/data/collators/registry.py`, 0.6.2) that has none for EXAONE 4.5: its own recipes for it end there.
Rows are adapted by a name in another (`megatron/bridge/data/sources/hf_adapters.py`), of which none knows where a data
set lies. Ours are entered at the end of these modules' import: who trains on words never imports them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exaone_bridge.models import FAMILIES
from exaone_bridge.patches.import_hook import after_import

__all__ = ["IN_FOLDER", "conversations_when_imported", "in_folder"]

IN_FOLDER = "conversations_in_folder"
_COLLATORS = "megatron.bridge.data.collators.registry"
_ADAPTERS = "megatron.bridge.data.sources.hf_adapters"
_MEDIA = ("image", "path", "video")


def conversations_when_imported() -> None:
    """Enter ours as soon as the host's tables are there; doing it again is harmless."""
    after_import(_COLLATORS, _enter_collators)
    after_import(_ADAPTERS, _enter_adapter)


def _enter_collators() -> None:
    registry: Any = sys.modules[_COLLATORS]
    for family in FAMILIES:
        collators = {} if family.images is None else family.images.collators()
        for processor, collate in collators.items():
            # Words without images too: the host knows no chat template of ours.
            spec = registry._ModelCollateSpec(
                collate.__module__, collate.__name__, required_for_all_examples=True
            )
            registry._MODEL_COLLATE_SPECS[processor] = spec
    registry.resolve_model_collate.cache_clear()


def _enter_adapter() -> None:
    adapters: Any = sys.modules[_ADAPTERS]
    adapters._ADAPTERS[IN_FOLDER] = in_folder


def in_folder(row: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A row with `messages` (or `conversation`) whose images and videos are found from `options["root"]` on.

    What is no name of a file is left as it is: an image itself, an address, or what Arrow fills in for an absent field.
    """
    root = Path(options["root"])
    found = {key: value for key, value in row.items() if value is not None}
    for key in ("messages", "conversation"):
        if key in found:
            found[key] = [
                {**turn, "content": _located(turn["content"], root)} for turn in found[key]
            ]
    for key in ("images", "videos"):
        if key in found:
            found[key] = [_path(value, root) for value in found[key]]
    return found


def _located(content: Any, root: Path) -> Any:
    if isinstance(content, str):
        return content
    return [
        {key: _path(value, root) if key in _MEDIA else value for key, value in part.items()}
        for part in content
    ]


def _path(value: Any, root: Path) -> Any:
    if not isinstance(value, str) or "://" in value or value.startswith("data:"):
        return value
    return str(root / value)
