"""Measure a training step of EXAONE 4.5 with images, and the same in Transformers.

    python benchmarks/train_images.py --model exaone45-33b-4-layers --seq 8192 --images 2 --side 64

The model has published widths and a few layers and vision blocks. All parameters are trained, those
of the vision encoder included. Multi-token prediction, which Transformers does not build, is off on
both sides. Tokens per second include the placeholder tokens of images. Floating-point operations
include the vision encoder: 2 per parameter and patch in its linear layers, and for its attention
the keys of a patch's window, or of the image in blocks with full attention; three times that for
forward and backward, but twice for the patch embedding, because pixels have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch  # before transformer_engine: the two bring different versions of cuDNN
from measures import config_of
from measures import operations as text_operations
from train_step import arguments, measure_options, single_rank

from exaone_bridge.models.exaone45.config import read_hf_config
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.model_config import VisionConfig


def _truncate(layers: int, blocks: int) -> dict[str, Any]:
    """Return the published config with the first layers and the first vision blocks only."""
    config = CONFIGS["exaone45_33b"]
    language, vision = config["text_config"], config["vision_config"]
    return config | {
        "text_config": language
        | {"num_hidden_layers": layers, "layer_types": language["layer_types"][:layers]},
        "vision_config": vision
        | {
            "depth": blocks,
            "fullatt_block_indexes": [at for at in vision["fullatt_block_indexes"] if at < blocks],
        },
    }


# The first blocks up to one with full attention; the 33B has four times as many blocks, and sixteen
# times as many layers.
MODELS: dict[str, dict[str, Any]] = {
    "exaone45-33b-4-layers": _truncate(4, 7),
    "exaone45-33b-8-layers": _truncate(8, 7),
}


@dataclass(frozen=True)
class Batch:
    """Tokens [B, S + 1], pixels of all images, their grids [images, 3]; images of one sequence."""

    tokens: torch.Tensor
    pixels: torch.Tensor
    grids: torch.Tensor
    images: int

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels, "image_grid_thw": self.grids}


def batch_of(
    config: Any, seq: int, mbs: int, images: int, side: int, device: str = "cuda"
) -> Batch:
    """Return random tokens with square images of noise, evenly spread over each sequence.

    Raises:
        SystemExit: the images leave no room for text.
    """
    model_config = read_hf_config(config.to_dict())
    placeholders = side * side // model_config.vision.merge_size**2
    if side % model_config.vision.merge_size or images * placeholders > seq:
        raise SystemExit(
            f"{images} images of {side} x {side} patches are {images * placeholders} tokens; a "
            f"sequence has {seq}, and a side is a multiple of {model_config.vision.merge_size}"
        )
    tokens = torch.randint(model_config.vocab_size, (mbs, seq + 1), device=device)
    for taken in (model_config.image_token_id, model_config.video_token_id):
        tokens[tokens == taken] = model_config.video_token_id + 1
    for number in range(images):
        start = number * (seq // images)
        tokens[:, start : start + placeholders] = model_config.image_token_id
    pixels = torch.randn(
        mbs * images * side * side,
        model_config.vision.patch_elements,
        device=device,
        dtype=torch.bfloat16,
    )
    grids = torch.tensor([[1, side, side]] * (mbs * images), device=device)
    return Batch(tokens, pixels, grids, images)


def operations_of_image(vision: VisionConfig, side: int) -> float:
    """Return the operations of the vision encoder, forward and backward, for one square image."""
    patches = side * side
    per_window = vision.window_size // vision.patch_size  # patches along a window's side
    windows = [min(per_window, side - start) for start in range(0, side, per_window)]
    in_window = sum(
        (rows * columns) ** 2 for rows in windows for columns in windows
    )  # queries x keys, of all windows
    per_patch = (
        vision.depth
        * vision.hidden_size
        * (vision.qkv_size + vision.hidden_size + 3 * vision.ffn_size)
    )
    joined = vision.hidden_size * vision.merge_size**2
    merger = patches // vision.merge_size**2 * (joined * joined + joined * vision.out_size)
    full = len(vision.full_attention)
    attention = 4 * vision.hidden_size * (full * patches**2 + (vision.depth - full) * in_window)
    embedding = 2 * patches * vision.patch_elements * vision.hidden_size
    return 3 * (2 * (per_patch * patches + merger) + attention) + 2 * embedding


def operations(config: Any, seq: int, images: int, side: int) -> float:
    """Return the operations of forward and backward of one sequence with its images."""
    model_config = read_hf_config(config.to_dict())
    return text_operations(config.get_text_config(), seq) + images * operations_of_image(
        model_config.vision, side
    )


def megatron(config: Any, batch: Batch, overrides: dict[str, Any]) -> Callable[[], None]:
    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    provider.apply_overrides_and_finalize(torch.bfloat16, overrides)
    cpu = batch.tokens.device.type == "cpu"
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=cpu)
    model.train()
    tokens, labels = batch.tokens[:, :-1].contiguous(), batch.tokens[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(tokens, positions, None, labels=labels, **batch.arguments).float().mean().backward()

    return step


def transformers(config: Any, batch: Batch, overrides: dict[str, Any]) -> Callable[[], None]:
    from transformers import AutoModelForImageTextToText

    with torch.device(batch.tokens.device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).train()
    tokens, labels = batch.tokens[:, :-1].contiguous(), batch.tokens[:, 1:].contiguous()
    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(
            tokens, labels=tokens, shift_labels=labels, use_cache=False, **batch.arguments
        ).loss.backward()

    return step


VARIANTS: dict[str, tuple[Callable[..., Callable[[], None]], dict[str, Any]]] = {
    "megatron": (megatron, {}),
    "megatron-frozen-vision": (megatron, {"freeze_vision_model": True}),
    "transformers": (transformers, {}),
}


def main() -> None:
    parser = arguments(__doc__, MODELS, "exaone45-33b-4-layers")
    parser.add_argument("--images", type=int, default=2, help="of each sequence")
    parser.add_argument(
        "--side", type=int, default=64, help="of an image, in patches; four patches are a token"
    )
    options = parser.parse_args()

    with single_rank():
        config = config_of(MODELS[options.model])
        batch = batch_of(config, options.seq, options.mbs, options.images, options.side)

        def needs(config: Any, seq: int) -> float:
            return operations(config, seq, options.images, options.side)

        share = 1 - text_operations(config.get_text_config(), options.seq) / needs(
            config, options.seq
        )
        placeholders = int((batch.tokens == config.image_token_id).sum())
        print(
            f"{options.model}, {options.mbs} x {options.seq} tokens, {placeholders} of them for "
            f"{len(batch.grids)} images; "
            f"the vision encoder has {share:.0%} of the operations"
        )
        measure_options(options, config, variants=VARIANTS, batch=batch, needs=needs)


if __name__ == "__main__":
    main()
