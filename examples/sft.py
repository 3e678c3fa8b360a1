"""Supervised fine-tuning on real text, from a Hugging Face folder and back to one.

    torchrun --nproc-per-node 1 examples/sft.py --save /tmp/sft --iters 50
    torchrun --nproc-per-node 8 examples/sft.py --recipe exaone4_1p2b_sft_config --hf-path FOLDER --save /tmp/sft

Questions and answers are the docstrings of Python's standard library, unless --data names a folder with training.jsonl
and validation.jsonl. Without --hf-path the recipe's model is made with random weights, and a tokenizer trained on the
same text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import arguments, bridge_of, show, start, steps, to_fine_tune, write_dataset


def main(argv: list[str] | None = None, adjust: Callable[[Any], None] | None = None) -> None:
    """Run; tests adjust the configuration."""
    parser = arguments(__doc__, "exaone4_tiny_sft_config")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--packed", action="store_true", help="several examples to a sequence")
    options = parser.parse_args(argv)
    config = to_fine_tune(options, write_dataset)
    if adjust is not None:
        adjust(config)
    show(config)
    if options.dry_run:
        return

    def export(model: list[Any]) -> None:
        bridge_of(config, options.hf_path).save_hf_pretrained(
            model, options.save / "exported", show_progress=False
        )

    start(config, steps(options, export), fine_tune=True)


if __name__ == "__main__":
    main()
