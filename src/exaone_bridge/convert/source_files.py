"""What a Megatron checkpoint has of the Hugging Face folder that it came from: config and files."""

from __future__ import annotations

from pathlib import Path

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.convert.extra_tensors import ASSETS
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.hf_files import has_tokenizer
from exaone_bridge.schema.json_types import JSONObject

__all__ = ["assets_of", "files_of", "source_config"]


def assets_of(megatron_folder: Path) -> Path:
    """Return the folder of what Megatron does not store: in the checkpoint or by an iteration."""
    beside = megatron_folder.absolute().parent / ASSETS
    inside = megatron_folder / ASSETS
    return beside if not inside.is_dir() and beside.is_dir() else inside


def files_of(assets: Path, iteration: Path, hf_source: str | Path | None) -> Path | None:
    """Return the folder of the files to copy: the requested one, or one of the checkpoint.

    Raises:
        CheckpointError: `hf_source` is not a folder.
    """
    if hf_source is not None:
        if not Path(hf_source).is_dir():
            raise CheckpointError(
                Path(hf_source),
                "this folder does not exist",
                remedy="name a Hugging Face model folder",
            )
        return Path(hf_source)
    # AutoBridge.import_ckpt and training write the tokenizer into the iteration.
    folders = [each for each in (assets, iteration / "tokenizer") if each.is_dir()]
    return next(filter(has_tokenizer, folders), None) or next(iter(folders), None)


def source_config(assets: Path) -> JSONObject | None:
    """Return config.json of the Hugging Face source that the checkpoint was imported from, if any.

    Raises:
        CheckpointError: It is not valid JSON.
    """
    path = assets / "config.json"
    return read_json(path) if path.is_file() else None
