"""The command `generate`: continues a prompt with Megatron-Core, and prints the text as it grows.

Standard output has the text alone; stages go to standard error.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.checkpoint.megatron.run_config import read_run_config
from exaone_bridge.cli.show import quiet
from exaone_bridge.convert.to_hf import assets_of
from exaone_bridge.errors import CheckpointError, UnsupportedConfig
from exaone_bridge.runtime.launch import Launcher, choose_launcher, is_rank_zero
from exaone_bridge.runtime.progress import NoProgress
from exaone_bridge.schema.dtypes import MODEL_DTYPES
from exaone_bridge.schema.hf_files import copy_companion_files
from exaone_bridge.schema.iterations import choose_iteration, is_megatron_checkpoint
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["generate"]


class _Printed(NoProgress):
    def stage(self, text: str) -> None:
        if is_rank_zero():
            print(f"generate: {text}", file=sys.stderr, flush=True)

    def output(self, text: str) -> None:
        if is_rank_zero():
            sys.stdout.write(text)
            sys.stdout.flush()


def generate(options: Namespace, layout: Layout) -> None:
    """Continue a prompt greedily; the options are those that `cli.arguments` defines.

    Raises:
        UnsupportedConfig: images without a conversation or with a model that takes none, or an
            unknown dtype.
        BridgeError: the model cannot be loaded.
    """
    if options.image and options.chat is None:
        wanted = "together with --chat"
        raise UnsupportedConfig("--image", got="--prompt", wanted=wanted, where="command line")
    if options.dtype is not None and options.dtype not in MODEL_DTYPES:
        raise UnsupportedConfig(
            "--dtype", got=options.dtype, known=MODEL_DTYPES, where="command line"
        )
    if not options.source.is_dir():
        raise CheckpointError(
            options.source,
            "this folder does not exist",
            remedy="name a Hugging Face folder or a Megatron checkpoint",
        )
    template = {} if options.thinking is None else {"enable_thinking": options.thinking}
    progress = _Printed()
    quiet()
    with (
        choose_launcher(layout.ranks) as launcher,
        _model_files(options.source, launcher) as (folder, megatron),
    ):
        progress.stage("importing Megatron-Core (half a minute)")
        import torch

        from exaone_bridge.runtime.generate import generate as run

        work = functools.partial(
            run,
            folder,
            megatron,
            _messages(options),
            layout,
            images=options.image,
            template=template,
            backend=options.backend,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            most=options.max_new_tokens,
        )
        launcher.all(work, progress=progress)
    if is_rank_zero():
        print(flush=True)


def _messages(options: Namespace) -> str | list[dict[str, Any]]:
    if options.chat is None:
        return str(options.prompt)
    if not options.image:
        return [{"role": "user", "content": options.chat}]
    parts = [{"type": "image"} for _ in options.image]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": options.chat}]}]


@contextlib.contextmanager
def _model_files(source: Path, launcher: Launcher) -> Iterator[tuple[Path, Path | None]]:
    """Yield a folder with config and tokenizer, and the iteration of a Megatron checkpoint."""
    if not is_megatron_checkpoint(source):
        yield source, None
        return
    iteration, _ = choose_iteration(source)
    with launcher.folder() as folder:
        if is_rank_zero():
            write_config_json(folder, read_run_config(iteration).hf_config())
            if (assets := assets_of(source)).is_dir():
                copy_companion_files(assets, folder)
        yield folder, iteration
