"""Prompts with images and videos of noise, made on the spot: no processor, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exaone_bridge.models.exaone45.config import Exaone45ModelConfig
from exaone_bridge.schema.model_config import VisionConfig

__all__ = ["Piece", "image_prompts", "prompt_of"]

Piece = tuple[int, int, int] | int  # a grid of patches in time, rows and columns; or so many words


def prompt_of(
    model_config: Exaone45ModelConfig,
    pieces: Sequence[tuple[str, Piece]],
    generator: torch.Generator,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Words [S] of a prompt, and the arguments with its images.

    Args:
        pieces: in order; of the kinds "text", "image" and "video".
    """
    words, given = [], {"image": [], "video": []}  # type: ignore[var-annotated]
    for kind, piece in pieces:
        if isinstance(piece, int):
            words.append(_text(model_config, piece, generator))
            continue
        time, mappings, columns = piece
        features = time * mappings * columns // model_config.vision.merge_size**2
        words.append(
            torch.full(
                (features,),
                model_config.image_token_id if kind == "image" else model_config.video_token_id,
            )
        )
        given[kind].append(
            (
                torch.tensor(piece),
                _pixels(model_config.vision, time * mappings * columns, generator),
            )
        )
    arguments: dict[str, torch.Tensor] = {}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if given[kind]:
            grids, pixels = zip(*given[kind], strict=True)
            arguments |= {
                f"pixel_values{suffix}": torch.cat(pixels),
                f"{kind}_grid_thw": torch.stack(grids),
            }
    return torch.cat(words), arguments


def _pixels(vision: VisionConfig, patches: int, generator: torch.Generator) -> torch.Tensor:
    """[patches, elements of one]: as large as a processor's, which bring pixels to a deviation of about one."""
    return torch.randn(patches, vision.patch_elements, generator=generator)


def _text(
    model_config: Exaone45ModelConfig, count: int, generator: torch.Generator
) -> torch.Tensor:
    words = torch.randint(model_config.vocab_size, (count,), generator=generator)
    for token in (model_config.image_token_id, model_config.video_token_id):
        words[words == token] = (token + 2) % model_config.vocab_size
    return words


def image_prompts(
    model_config: Exaone45ModelConfig, count: int, seed: int, length: int | None = None
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Prompts of one length [N, S], and the images of each: one; several of different sizes, at both ends; a video;
    none; and so on.

    Images are larger than one window of the tower, and not a multiple of it.

    Args:
        length: positions S; None: past the language model's window. Images make it longer where they need to.
    """
    generator = torch.Generator().manual_seed(seed)
    side = model_config.vision.merge_size
    window = max(1, model_config.vision.window_size // model_config.vision.patch_size // side)
    small, large = (1, side, 2 * side), (1, (window + 1) * side, (2 * window + 1) * side)
    kinds: list[list[tuple[str, Piece]]] = [
        [("text", 5), ("image", large), ("text", 7)],
        [
            ("image", small),
            ("text", 3),
            ("image", large),
            ("text", 1),
            ("image", (1, 3 * side, side)),
        ],
        [("text", 2), ("video", (2, (window + 1) * side, side)), ("text", 2), ("image", small)],
        [("text", 9)],
    ]
    made = [
        prompt_of(model_config, kinds[number % len(kinds)], generator) for number in range(count)
    ]
    if length is None:
        length = max((window or 0) for window in model_config.windows) * 2 + 9
    length = max(min(length, model_config.max_positions), max(len(words) for words, _ in made))
    tokens = [
        torch.cat([words, _text(model_config, length - len(words), generator)]) for words, _ in made
    ]
    return torch.stack(tokens), [arguments for _, arguments in made]
