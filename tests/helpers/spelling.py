"""Configs as publishers spell them: with the keys of Transformers 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def in_old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config of Transformers 5 with `rope_theta`, `rope_scaling` and `torch_dtype`."""
    old = dict(config)
    if "rope_parameters" in old:
        rope = dict(old.pop("rope_parameters"))
        old["rope_theta"] = rope.pop("rope_theta")
        old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    return {
        key: in_old_spelling(value) if key.endswith("_config") else value
        for key, value in old.items()
    }


def spell_as_published(folder: Path) -> dict[str, Any]:
    """Rewrite config.json of a folder in the old spelling, and return it."""
    path = folder / "config.json"
    config = in_old_spelling(json.loads(path.read_text())) | {"transformers_version": "4.54.0"}
    path.write_text(json.dumps(config))
    return config
