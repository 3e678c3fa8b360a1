"""Damages of a Hugging Face folder that several test files use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.2.self_attn.q_proj.weight"
Damage = Callable[[Path], object]


def set_config(**fields: object) -> Damage:
    """Change config.json; a field set to `...` is taken out."""

    def damage(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **fields}
        kept = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage
