"""Writes `config.json`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from exaone_bridge.schema.json_types import JSONMapping

__all__ = ["write_config_json"]


def write_config_json(folder: Path, config: JSONMapping) -> None:
    """Write `config.json` with sorted keys, as `save_pretrained` does.

    The version of Transformers stays that of the config, whose spelling it names; a config without
    one gets the installed version.
    """
    written = {"transformers_version": version("transformers"), **config}
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
