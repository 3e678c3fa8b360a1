"""Writes `config.json`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from exaone_bridge.schema.json_types import JSONMapping

__all__ = ["write_config_json"]


def write_config_json(folder: Path, config: JSONMapping) -> None:
    """Write `config.json` as `save_pretrained` does: sorted keys, and Transformers' version."""
    text = json.dumps(
        {**config, "transformers_version": version("transformers")}, indent=2, sort_keys=True
    )
    (folder / "config.json").write_text(text + "\n")
