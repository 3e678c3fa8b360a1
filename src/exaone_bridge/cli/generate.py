"""The command `generate`: continues a prompt with Megatron-Core, and prints the text as it grows.

Standard output has the text alone; stages go to standard error.
"""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.cli.model_files import model_files
from exaone_bridge.cli.show import quiet
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models import family_of
from exaone_bridge.runtime.launch import choose_launcher, is_rank_zero
from exaone_bridge.runtime.progress import NoProgress
from exaone_bridge.schema.parallel_layout import Layout

if TYPE_CHECKING:
    import torch

__all__ = ["generate", "read_dtype"]


class _Printed(NoProgress):
    def __init__(self) -> None:
        self._out = sys.stdout  # under torchrun sys.stdout is redirected while Megatron-Core runs

    def stage(self, text: str) -> None:
        if is_rank_zero():
            print(f"generate: {text}", file=sys.stderr, flush=True)

    def output(self, text: str) -> None:
        if is_rank_zero():
            self._out.write(text)
            self._out.flush()


def generate(options: Namespace, layout: Layout) -> None:
    """Continue a prompt greedily; the options are those that `cli.arguments` defines.

    Raises:
        UnsupportedConfig: images without a conversation or for a model that takes none, or a dtype
            of a Megatron checkpoint.
        BridgeError: the model cannot be loaded.
    """
    if options.image and options.chat is None:
        wanted = "together with --chat"
        raise UnsupportedConfig("--image", got="--prompt", wanted=wanted, where="command line")
    dtype = read_dtype(options.dtype)
    template = {} if options.thinking is None else {"enable_thinking": options.thinking}
    progress = _Printed()
    quiet()
    with (
        choose_launcher(layout.ranks) as launcher,
        model_files(options.source, launcher, dtype=options.dtype) as (folder, megatron),
    ):
        if options.image:
            _check_takes_images(folder / "config.json")
        progress.stage("importing Megatron-Core (half a minute)")
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
            dtype=dtype,
            most=options.max_new_tokens,
        )
        launcher.all(work, progress=progress)
    if is_rank_zero():
        print(flush=True)


def _check_takes_images(config_json: Path) -> None:
    family = family_of(read_json(config_json).get("architectures"), where=str(config_json))
    if family.images is None:
        wanted = "left out: this model takes none"
        raise UnsupportedConfig("--image", got=family.name, wanted=wanted, where="command line")


def read_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of an option that the parser has checked; None: the checkpoint's."""
    if name is None:
        return None
    import torch

    return getattr(torch, name)


def _messages(options: Namespace) -> str | list[dict[str, Any]]:
    if options.chat is None:
        return str(options.prompt)
    if not options.image:
        return [{"role": "user", "content": options.chat}]
    parts = [{"type": "image"} for _ in options.image]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": options.chat}]}]
