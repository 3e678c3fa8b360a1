"""LoRA (or DoRA) on real text, with Megatron-Bridge's own adapters; exported alone in PEFT's format, and merged.

    torchrun --nproc-per-node 1 examples/lora.py --save /tmp/lora --iters 50
    torchrun --nproc-per-node 1 examples/lora.py --recipe exaone4_1p2b_peft_config --hf-path FOLDER --save /tmp/lora

Leaves --save/adapter (peft.PeftModel.from_pretrained) and --save/merged (transformers). Data as in sft.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import arguments, bridge_of, show, start, steps, to_fine_tune, write_dataset


def export(bridge: Any, model: list[Any], peft: Any, base: Path, output: Path) -> None:
    """The trained adapters alone, and the whole model with the adapters in its weights."""
    bridge.save_hf_adapter(model, output / "adapter", peft, str(base), show_progress=False)
    bridge.save_hf_pretrained(model, output / "merged", show_progress=False)


def main(argv: list[str] | None = None, adjust: Callable[[Any], None] | None = None) -> None:
    """Run; tests adjust the configuration."""
    parser = arguments(__doc__, "exaone4_tiny_peft_config")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--packed", action="store_true", help="several examples to a sequence")
    parser.add_argument("--scheme", choices=("lora", "dora"), default="lora")
    options = parser.parse_args(argv)
    config = to_fine_tune(options, write_dataset, peft_scheme=options.scheme)
    if adjust is not None:
        adjust(config)
    show(config)
    if options.dry_run:
        return

    def finish(model: list[Any]) -> None:
        export(
            bridge_of(config, options.hf_path), model, config.peft, options.hf_path, options.save
        )

    start(config, steps(options, finish), fine_tune=True)


if __name__ == "__main__":
    main()
