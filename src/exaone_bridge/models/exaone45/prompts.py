"""Random prompts with images and videos of noise, made without a processor or data.

Axes: N prompts, S sequence, P patches of all images of a prompt, C elements per patch, I images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exaone_bridge.models.exaone45.config import Exaone45ModelConfig
from exaone_bridge.schema.model_config import VisionConfig

__all__ = ["PromptPart", "image_prompts", "make_prompt"]

# Number of text tokens; or "image" or "video", and its patches in time, rows and columns.
PromptPart = int | tuple[str, tuple[int, int, int]]


def make_prompt(
    model_config: Exaone45ModelConfig,
    parts: Sequence[PromptPart],
    generator: torch.Generator,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Make a prompt from text, images and videos, in this order.

    Returns:
        Tokens [S], and the images as arguments of the model's `forward`: pixel_values [P, C],
        image_grid_thw [I, 3], and the same of videos.
    """
    vision = model_config.vision
    tokens: list[torch.Tensor] = []
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    pixels: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            tokens.append(_text(model_config, part, generator))
            continue
        kind, (time, rows, columns) = part
        patches = time * rows * columns
        placeholder = (
            model_config.image_token_id if kind == "image" else model_config.video_token_id
        )
        tokens.append(torch.full((patches // vision.merge_size**2,), placeholder))
        grids[kind].append((time, rows, columns))
        pixels[kind].append(_pixels(vision, patches, generator))
    images: dict[str, torch.Tensor] = {}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if grids[kind]:
            images[f"pixel_values{suffix}"] = torch.cat(pixels[kind])
            images[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
    return torch.cat(tokens), images


def _pixels(vision: VisionConfig, patches: int, generator: torch.Generator) -> torch.Tensor:
    """Draw noise [P, C] with a standard deviation of 1, like a processor's normalised pixels."""
    return torch.randn(patches, vision.patch_elements, generator=generator)


def _text(
    model_config: Exaone45ModelConfig, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw tokens [count] without placeholder tokens."""
    tokens = torch.randint(model_config.vocab_size, (count,), generator=generator)
    for placeholder in (model_config.image_token_id, model_config.video_token_id):
        tokens[tokens == placeholder] = (placeholder + 2) % model_config.vocab_size
    return tokens


def image_prompts(
    model_config: Exaone45ModelConfig, count: int, seed: int, length: int | None = None
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Make random prompts of one length, of four kinds in turn.

    These are: one image; three images of different sizes, at both ends of the prompt; a video and
    an image; and text only. Images are larger than a window of the vision encoder, and not a
    multiple of it.

    Args:
        model_config: the model's config.
        count: N.
        seed: of the random numbers.
        length: S; None: longer than the language model's sliding window. Prompts are longer than
            this if their images need it.

    Returns:
        Tokens [N, S], and the images of each prompt: see `make_prompt`.
    """
    generator = torch.Generator().manual_seed(seed)
    vision, side = model_config.vision, model_config.vision.merge_size
    window = max(1, vision.window_size // vision.patch_size // side)
    small, large = (1, side, 2 * side), (1, (window + 1) * side, (2 * window + 1) * side)
    kinds: list[list[PromptPart]] = [
        [5, ("image", large), 7],
        [("image", small), 3, ("image", large), 1, ("image", (1, 3 * side, side))],
        [2, ("video", (2, (window + 1) * side, side)), 2, ("image", small)],
        [9],
    ]
    prompts = [
        make_prompt(model_config, kinds[number % len(kinds)], generator) for number in range(count)
    ]
    if length is None:
        length = max((window or 0) for window in model_config.windows) * 2 + 9
    length = min(length, model_config.max_positions)
    length = max(length, *(len(tokens) for tokens, _ in prompts))
    padded = [
        torch.cat([tokens, _text(model_config, length - len(tokens), generator)])
        for tokens, _ in prompts
    ]
    return torch.stack(padded), [images for _, images in prompts]
