"""Supervised fine-tuning on text, from a Hugging Face directory to another one.

    torchrun --nproc-per-node 1 examples/sft.py --save /tmp/sft --iters 50
    torchrun --nproc-per-node 8 examples/sft.py --recipe exaone4_1p2b_sft_config \\
        --hf-path HF_PATH --save /tmp/sft

The trained model is saved to --save/exported. Without --data, the script trains on questions and
answers made from the docstrings of Python's standard library. Without --hf-path, it starts from the
recipe's model with random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import OnTrainEnd, build_config, make_parser, run
from data import prepare, write_text
from megatron.bridge import AutoBridge
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ConfigContainer


def configure(argv: list[str] | None = None) -> tuple[argparse.Namespace, ConfigContainer]:
    parser = make_parser(__doc__, "exaone4_tiny_sft_config")
    parser.add_argument("--data", type=Path, help="training.jsonl and validation.jsonl")
    parser.add_argument("--packed", action="store_true", help="several samples per sequence")
    options = parser.parse_args(argv)
    prepare(options, write_text)
    return options, build_config(options, dataset_root=options.data, packed=options.packed)


def main(options: argparse.Namespace, config: ConfigContainer, *callbacks: Callback) -> None:
    bridge = AutoBridge.from_hf_pretrained(options.hf_path)

    def export(model: list[Any]) -> None:
        bridge.save_hf_pretrained(model, options.save / "exported", show_progress=False)

    run(config, options, OnTrainEnd(export), *callbacks)


if __name__ == "__main__":
    main(*configure())
