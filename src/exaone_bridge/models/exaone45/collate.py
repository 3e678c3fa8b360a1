"""Collate function for conversations with images and videos, for Megatron-Bridge's `vlm_step`.

The chat template and the processor of the Hugging Face directory make tokens and pixels;
Megatron-Bridge's helpers find the assistant's turns.

Axes: B batch, S sequence, P patches of all images, I images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.data.collators.sequence import prepare_sequence_batch
from megatron.bridge.data.conversation_processing import (
    AssistantMaskBoundaryConfig,
    assistant_mask_boundary_config_from_markers,
    build_assistant_loss_mask,
    build_shifted_labels_and_loss_mask,
    chat_template_kwargs_from_example,
    tokenize_text_without_special_tokens,
)
from megatron.bridge.data.datasets.utils import IGNORE_INDEX
from megatron.bridge.data.packing.in_batch import build_mcore_thd_sequence_batch_from_rows
from megatron.bridge.training.utils.visual_inputs import GenericVisualInputs
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from exaone_bridge.errors import VisionInputError
from exaone_bridge.schema.json_types import JSONMapping, JSONObject

__all__ = ["exaone45_collate"]

_ASSISTANT_START, _TURN_END = "[|assistant|]", "[|endofturn|]"
_OTHER_ROLES = {role: f"[|{role}|]" for role in ("system", "user", "tool")}
# Before an answer without reasoning; at inference it is part of the prompt.
_EMPTY_THINKING = "\n<think>\n\n</think>\n\n"
# The keys in which a content part may have its image or video.
_MEDIA_KEYS = {
    "image": ("image", "path", "url", "base64"),
    "video": ("video", "path", "url"),
}
_VISUAL_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass(frozen=True, slots=True)
class _Sample:
    """One conversation.

    Attributes:
        sequence: input_ids, labels, loss_mask, attention_mask and position_ids, [S] each.
        visual: pixels [P, elements per patch] and grids [I, 3], by the names in `_VISUAL_INPUTS`.
    """

    sequence: dict[str, torch.Tensor]
    visual: dict[str, torch.Tensor]


def exaone45_collate(
    examples: Sequence[JSONMapping],
    processor: ProcessorMixin,
    *,
    visual_keys: object = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    sequence_length: int | None = None,
    pad_to_max_length: bool = False,
    pad_to_multiple_of: int = 128,
    enable_in_batch_packing: bool = False,
    in_batch_packing_pad_to_multiple_of: int = 1,
) -> JSONObject:
    """Make a batch from conversations. The loss covers the assistant's turns and their end tokens.

    Args:
        examples: each with `conversation`, a list of turns with `role` and `content`: a string, or
            a list of parts of type text, image or video. A part has its image under `image`,
            `path`, `url` or `base64`, or takes the next one of the example's `images` (`videos`).
        processor: Transformers' `Exaone4_5_Processor`, with a chat template.
        visual_keys: ignored; Megatron-Bridge's Energon path passes it to every model.
        min_pixels, max_pixels: limits of an image's size; None: the processor's own.
        sequence_length: maximum number of tokens; longer conversations are truncated.
        pad_to_max_length: pad to `sequence_length`; otherwise to the longest conversation, rounded
            up to a multiple of `pad_to_multiple_of`.
        pad_to_multiple_of: see `pad_to_max_length`.
        enable_in_batch_packing: concatenate all conversations into one sequence, each padded to a
            multiple of `in_batch_packing_pad_to_multiple_of`.
        in_batch_packing_pad_to_multiple_of: see `enable_in_batch_packing`.

    Returns:
        input_ids, labels (-100 where the loss is ignored), loss_mask and position_ids, [B, S] each
        ([1, sum of S] with the sequence lengths if packed), and visual_inputs: pixels and grids of
        the full batch, in the order of their placeholder tokens.

    Raises:
        VisionInputError: the image parts and the images do not match, or `sequence_length` would
            truncate an image.
        ValueError: from Megatron-Bridge: there is no assistant turn, or none within the limit.
    """
    boundaries = _assistant_boundaries(processor)
    size: dict[str, int] = {}
    if min_pixels or max_pixels:  # the processor needs both or neither
        default = processor.image_processor.size
        size = {
            "min_pixels": min_pixels or default["shortest_edge"],
            "max_pixels": max_pixels or default["longest_edge"],
        }
    samples = [_prepare_sample(example, processor, boundaries, size) for example in examples]
    for sample in samples:
        _check_images_fit(sample, processor, sequence_length)
    sequences = [sample.sequence for sample in samples]
    pad_token_id = processor.tokenizer.pad_token_id or 0
    if enable_in_batch_packing:
        batch = build_mcore_thd_sequence_batch_from_rows(
            sequences,
            sequence_length=sequence_length,
            pad_token_id=pad_token_id,
            ignore_index=IGNORE_INDEX,
            pad_to_multiple_of=in_batch_packing_pad_to_multiple_of,
        )
    else:
        padding = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
        batch = {
            name: pad_sequence(
                [sequence[name] for sequence in sequences],
                batch_first=True,
                padding_value=padding.get(name, 0),
            )
            for name in sequences[0]
        }
        length = batch["input_ids"].shape[1]
        batch["position_ids"] = torch.arange(length).repeat(len(sequences), 1)
        prepare_sequence_batch(
            batch,
            sequence_length=sequence_length,
            pad_to_max_length=pad_to_max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            pad_token_id=pad_token_id,
            ignore_index=IGNORE_INDEX,
        )
    visual = {
        name: torch.cat([sample.visual[name] for sample in samples if name in sample.visual])
        for name in _VISUAL_INPUTS
        if any(name in sample.visual for sample in samples)
    }
    batch["visual_inputs"] = GenericVisualInputs(**visual)
    return batch


def _assistant_boundaries(processor: ProcessorMixin) -> AssistantMaskBoundaryConfig:
    """Return the markers of the chat template between which the assistant's turns are."""
    tokenizer = processor.tokenizer
    return assistant_mask_boundary_config_from_markers(
        processor,
        assistant_start=_ASSISTANT_START,
        assistant_end=_TURN_END,
        role_start_markers=_OTHER_ROLES,
        trim_leading_token_ids=tokenize_text_without_special_tokens(tokenizer, "\n"),
        trim_leading_token_sequences=(
            tokenize_text_without_special_tokens(tokenizer, _EMPTY_THINKING),
        ),
    )


def _prepare_sample(
    example: JSONMapping,
    processor: ProcessorMixin,
    boundaries: AssistantMaskBoundaryConfig,
    size: Mapping[str, int],
) -> _Sample:
    """Tokenize a conversation, and process its images and videos."""
    conversation, media = _split_media(example)
    options = chat_template_kwargs_from_example(example)
    tokenizer = processor.tokenizer
    text = processor.apply_chat_template(conversation, tokenize=False, **options)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    placeholders = {"image": processor.image_token_id, "video": processor.video_token_id}
    ignored = torch.tensor(list(placeholders.values()))
    # The mask is computed before placeholder tokens are repeated, so that it needs no images.
    loss_mask = build_assistant_loss_mask(
        {"conversation": conversation, **options},
        tokens,
        tokenizer,
        ignored,
        boundary_config=boundaries,
    )
    visual: dict[str, torch.Tensor] = {}
    if media["image"]:
        visual |= processor.image_processor(images=media["image"], return_tensors="pt", **size)
    if media["video"]:
        visual |= processor.video_processor(videos=media["video"], return_tensors="pt")
    repeats = torch.ones_like(tokens)
    for kind, token_id in placeholders.items():
        is_placeholder = tokens == token_id
        grid = visual.get(f"{kind}_grid_thw", torch.empty(0, 3, dtype=torch.long))
        if (count := int(is_placeholder.sum())) != len(grid):
            raise VisionInputError(
                f"{kind} placeholders: the chat template yields {count} tokens with "
                f"{kind}_token_id={token_id} for {len(grid)} {kind}s; the counts must match (use "
                f"one part of type {kind!r} for each, and no {getattr(processor, f'{kind}_token')} "
                "in text)."
            )
        if len(grid):
            merge_size = getattr(processor, f"{kind}_processor").merge_size
            repeats[is_placeholder] = grid.prod(-1) // merge_size**2
    input_ids = tokens.repeat_interleave(repeats)
    labels, loss_mask = build_shifted_labels_and_loss_mask(
        input_ids, loss_mask.repeat_interleave(repeats), ignored
    )
    sequence = {
        "input_ids": input_ids,
        "labels": labels,
        "loss_mask": loss_mask,
        "attention_mask": torch.ones_like(input_ids),
        "position_ids": torch.arange(len(input_ids)),
    }
    return _Sample(sequence, {name: visual[name] for name in _VISUAL_INPUTS if name in visual})


def _split_media(
    example: JSONMapping,
) -> tuple[list[JSONObject], dict[str, list[Any]]]:
    """Split an example into its conversation without media, and its images and videos in order.

    The conversation is also without the None that Arrow fills in for absent fields.
    """
    unused = {kind: list(example.get(f"{kind}s") or ()) for kind in _MEDIA_KEYS}
    media: dict[str, list[Any]] = {kind: [] for kind in _MEDIA_KEYS}
    conversation = []
    for turn in example["conversation"]:
        content = turn["content"]
        if not isinstance(content, str):
            content = [_take_media(part, unused, media) for part in content]
        conversation.append(_without_none(turn) | {"content": content})
    for kind, rest in unused.items():
        if rest:
            raise VisionInputError(
                f"{kind}s: the example's list `{kind}s` has {len(rest)} more than its conversation "
                f"has parts of type {kind!r} for; add parts, or shorten the list."
            )
    return conversation, media


def _take_media(
    part: JSONMapping, unused: dict[str, list[Any]], media: dict[str, list[Any]]
) -> JSONObject:
    """Return a content part without its image or video, which is moved to `media`."""
    kind = part.get("type")
    if kind not in _MEDIA_KEYS:
        return _without_none(part)
    values = [part[key] for key in _MEDIA_KEYS[kind] if part.get(key) is not None]
    if not values and not unused[kind]:
        keys = ", ".join(_MEDIA_KEYS[kind])
        raise VisionInputError(
            f"{kind}s: a part of type {kind!r} has none of the keys {keys}, and the example's list "
            f"`{kind}s` has no other left; give the part one of them."
        )
    media[kind].append(values[0] if values else unused[kind].pop(0))
    return {"type": kind}


def _without_none(fields: JSONMapping) -> JSONObject:
    return {key: value for key, value in fields.items() if value is not None}


def _check_images_fit(
    sample: _Sample, processor: ProcessorMixin, sequence_length: int | None
) -> None:
    """Check that truncation removes no placeholder token: its feature would remain."""
    input_ids = sample.sequence["input_ids"]
    if not sample.visual or sequence_length is None or len(input_ids) <= sequence_length:
        return
    beyond = input_ids[sequence_length:]
    if ((beyond == processor.image_token_id) | (beyond == processor.video_token_id)).any():
        raise VisionInputError(
            f"a conversation of {len(input_ids)} tokens has images beyond the {sequence_length} "
            "that are kept; raise sequence_length, lower the processor's max_pixels, or drop it."
        )
