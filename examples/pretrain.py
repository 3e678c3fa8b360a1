"""Pretraining with a recipe and Megatron-Bridge's own loop, on mock data.

    torchrun --nproc-per-node 1 examples/pretrain.py --save /tmp/run --iters 10 --save-every 5
    torchrun --nproc-per-node 1 examples/pretrain.py --save /tmp/more --iters 20 --load /tmp/run
    torchrun --nproc-per-node 8 examples/pretrain.py --recipe exaone4_1p2b_pretrain_config --save /tmp/run

The first makes a miniature for one GPU and leaves losses and Megatron checkpoints; with --export, a Hugging Face
folder too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common import arguments, bridge_of, configured, show, start, steps


def main(
    argv: list[str] | None = None, adjust: Callable[[Any], None] | None = None, at_end: Any = None
) -> None:
    """Run; tests adjust the configuration, and look at the model in the end."""
    parser = arguments(__doc__, "exaone4_tiny_pretrain_config")
    parser.add_argument("--export", action="store_true", help="write --save/exported in the end")
    options = parser.parse_args(argv)
    config = configured(options)
    if adjust is not None:
        adjust(config)
    show(config)
    if options.dry_run:
        return
    options.save.mkdir(parents=True, exist_ok=True)

    def finish(model: list[Any]) -> None:
        if options.export:
            bridge_of(config, options.hf_path).save_hf_pretrained(
                model, options.save / "exported", show_progress=False
            )
        if at_end is not None:
            at_end(model)

    # The weights in --hf-path are where training starts, so there the host wants a fine-tuning run's checks.
    start(config, steps(options, finish), fine_tune=options.hf_path is not None)


if __name__ == "__main__":
    main()
