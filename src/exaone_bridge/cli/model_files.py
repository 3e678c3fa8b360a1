"""The files of a model that is given by a Hugging Face folder or a Megatron checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from exaone_bridge.checkpoint.hf.diagnose import check_is_hf_folder
from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.checkpoint.megatron.run_config import read_run_config
from exaone_bridge.convert.source_files import assets_of, files_of, source_config
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone4.head_config import HEADS
from exaone_bridge.runtime.launch import Launcher, is_rank_zero
from exaone_bridge.schema.hf_files import copy_companion_files
from exaone_bridge.schema.iterations import choose_iteration, is_megatron_checkpoint

__all__ = ["model_files"]


@contextlib.contextmanager
def model_files(
    source: Path, launcher: Launcher, *, dtype: str | None
) -> Iterator[tuple[Path, Path | None]]:
    """Yield a folder of a language model, and the iteration of a Megatron checkpoint.

    Of a Megatron checkpoint the folder is temporary and has no weights; the iteration is None for a
    Hugging Face folder.

    Args:
        source: the folder or checkpoint.
        launcher: makes the temporary folder.
        dtype: the requested one; a Megatron checkpoint is loaded in its own.

    Raises:
        CheckpointError: the source does not exist or is damaged.
        UnsupportedConfig: the model has a head, or a dtype is requested of a Megatron checkpoint.
    """
    if not is_megatron_checkpoint(source):
        check_is_hf_folder(source, remedy="name a Hugging Face folder or a Megatron checkpoint")
        _check_language_model(source)
        yield source, None
        return
    if dtype is not None:
        raise UnsupportedConfig(
            "--dtype",
            got=dtype,
            wanted="left out with a Megatron checkpoint, which is loaded in its own dtype",
            where="command line",
        )
    iteration, _ = choose_iteration(source)
    provider = read_run_config(iteration)
    with launcher.folder() as folder:
        if is_rank_zero():
            assets = assets_of(source)
            write_config_json(folder, provider.hf_config(source_config(assets)))
            if (files := files_of(assets, iteration, None)) is not None:
                copy_companion_files(files, folder)
        _check_language_model(folder)
        yield folder, iteration


def _check_language_model(folder: Path) -> None:
    path = folder / "config.json"
    if path.is_file() and HEADS.keys() & set(names := read_json(path).get("architectures") or ()):
        raise UnsupportedConfig(
            "architectures",
            got=names,
            wanted="a language model, because a head predicts no next token",
            where=str(path),
        )
