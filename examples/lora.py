"""LoRA or DoRA on text, with Megatron-Bridge's adapters.

    torchrun --nproc-per-node 1 examples/lora.py --save /tmp/lora --iters 50
    torchrun --nproc-per-node 1 examples/lora.py --recipe exaone4_1p2b_peft_config \\
        --hf-path HF_PATH --save /tmp/lora

The adapter is saved to --save/adapter, for `peft.PeftModel.from_pretrained`, and the model with the
adapter merged to --save/merged. Data and model are those of sft.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import OnTrainEnd, build_config, make_parser, run
from data import prepare, write_text
from megatron.bridge import AutoBridge
from megatron.bridge.peft.base import PEFT
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ConfigContainer


def configure(argv: list[str] | None = None) -> tuple[argparse.Namespace, ConfigContainer]:
    parser = make_parser(__doc__, "exaone4_tiny_peft_config")
    parser.add_argument("--data", type=Path, help="training.jsonl and validation.jsonl")
    parser.add_argument("--packed", action="store_true", help="several samples per sequence")
    parser.add_argument("--scheme", choices=("lora", "dora"), default="lora")
    options = parser.parse_args(argv)
    prepare(options, write_text)
    return options, build_config(
        options, peft_scheme=options.scheme, dataset_root=options.data, packed=options.packed
    )


def export(bridge: AutoBridge, model: list[Any], peft: PEFT, hf_path: Path, output: Path) -> None:
    """Save the adapter alone, and the model with the adapter merged into its weights."""
    bridge.save_hf_adapter(model, output / "adapter", peft, str(hf_path), show_progress=False)
    bridge.save_hf_pretrained(model, output / "merged", show_progress=False)


def main(options: argparse.Namespace, config: ConfigContainer, *callbacks: Callback) -> None:
    bridge = AutoBridge.from_hf_pretrained(options.hf_path)

    def finish(model: list[Any]) -> None:
        export(bridge, model, config.peft, options.hf_path, options.save)

    run(config, options, OnTrainEnd(finish), *callbacks)


if __name__ == "__main__":
    main(*configure())
