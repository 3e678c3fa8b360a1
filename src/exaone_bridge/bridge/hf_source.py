"""What a Hugging Face model consists of beside its weights, as its author wrote it.

Transformers normalises a config when it reads it; an export keeps the author's spelling, and every
file as it is.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.schema.hf_spelling import apply_changes, in_both_spellings
from exaone_bridge.schema.json_types import JSONObject

__all__ = ["hf_config_dict", "raw_config"]


def hf_config_dict(hf_config: Any) -> JSONObject:
    """Return a Transformers config as `save_pretrained` writes it, without the version."""
    config = hf_config if isinstance(hf_config, Mapping) else json.loads(hf_config.to_json_string())
    return {key: value for key, value in config.items() if key != "transformers_version"}


def raw_config(hf_pretrained: Any, folder: str | Path | None = None) -> JSONObject:
    """Return config.json as its author spelled it, with what was changed in memory since.

    Args:
        hf_pretrained: Megatron-Bridge's wrapper of a Transformers model, or a config.
        folder: where config.json is; None: where `hf_pretrained` was read.

    Returns:
        The file's content with the changes; the config in both spellings if there is no file.
    """
    config = getattr(hf_pretrained, "config", hf_pretrained)
    now = hf_config_dict(config)
    path = _config_file(hf_pretrained, config, folder)
    if path is None or isinstance(config, Mapping):
        return in_both_spellings(now)
    raw = read_json(path)
    if raw.get("model_type") != now.get("model_type"):  # another model was put in its place
        return in_both_spellings(now)
    # Transformers completes the objects that it is given.
    return apply_changes(raw, hf_config_dict(type(config).from_dict(copy.deepcopy(raw))), now)


def _config_file(hf_pretrained: Any, config: Any, folder: str | Path | None) -> Path | None:
    """Find config.json in the model's folder, or in the cache of the Hugging Face Hub."""
    name = folder or getattr(hf_pretrained, "model_name_or_path", None)
    name = name or getattr(config, "name_or_path", None)
    if not name:
        return None
    if Path(name).is_dir():
        path = Path(name) / "config.json"
        return path if path.is_file() else None
    found = cached_file(
        str(name),
        "config.json",
        revision=getattr(config, "_commit_hash", None),
        cache_dir=getattr(hf_pretrained, "init_kwargs", {}).get("cache_dir"),
        local_files_only=True,  # the config has been read, so the file is there
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)
