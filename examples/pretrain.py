"""Pretrain with a recipe and Megatron-Bridge's training loop, on mock data.

    torchrun --nproc-per-node 1 examples/pretrain.py --save /tmp/run --iters 10 --save-interval 5
    torchrun --nproc-per-node 1 examples/pretrain.py --save /tmp/more --iters 20 --load /tmp/run
    torchrun --nproc-per-node 8 examples/pretrain.py --recipe exaone4_1p2b_pretrain_config \\
        --save /tmp/run

The default recipe is a tiny model for one GPU. The script saves losses and Megatron checkpoints;
`exaone-bridge export /tmp/run/checkpoints HF_PATH` converts one to a Hugging Face directory.
"""

from __future__ import annotations

import argparse

from common import build_config, make_parser, run
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ConfigContainer


def configure(argv: list[str] | None = None) -> tuple[argparse.Namespace, ConfigContainer]:
    options = make_parser(__doc__, "exaone4_tiny_pretrain_config").parse_args(argv)
    return options, build_config(options)


def main(options: argparse.Namespace, config: ConfigContainer, *callbacks: Callback) -> None:
    run(config, options, *callbacks)


if __name__ == "__main__":
    main(*configure())
