"""Conversations with images and videos -> a batch, for Megatron-Bridge's data path and its `vlm_step`.

The folder's own chat template and processor make the words; the host's helpers find the assistant's turns in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

from exaone_bridge.errors import VisionInputError

__all__ = ["exaone45_collate"]

_ASSISTANT, _END = "[|assistant|]", "[|endofturn|]"
_OTHERS = {role: f"[|{role}|]" for role in ("system", "user", "tool")}
_NO_THOUGHT = "\n<think>\n\n</think>\n\n"  # before an answer without reasoning: at inference it is in the prompt
_KINDS = {
    "image": ("image", "path", "url", "base64"),
    "video": ("video", "path", "url"),
}  # where a part may have it
_VISUAL = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def exaone45_collate(
    examples: Sequence[Mapping[str, Any]],
    processor: Any,
    *,
    visual_keys: object = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    sequence_length: int | None = None,
    pad_to_max_length: bool = False,
    pad_to_multiple_of: int = 128,
    enable_in_batch_packing: bool = False,
    in_batch_packing_pad_to_multiple_of: int = 1,
) -> dict[str, Any]:
    """A batch of these conversations. The loss is of the assistant's turns alone, with the words that end them.

    Args:
        examples: each with `conversation`, turns of `role` and `content`: words, or a list of parts of the types text,
            image and video. A part has its image in itself (`image`, `path`, `url`, `base64`), or else the next of the
            example's `images` (of its `videos`).
        processor: Transformers' `Exaone4_5_Processor`, with a chat template.
        visual_keys: which the host's Energon path passes to every model; this one needs all four.
        min_pixels, max_pixels: of an image; None: the processor's own.
        sequence_length: longer conversations are cut; None: they stay.
        pad_to_max_length: all to `sequence_length`; else to the longest, and a multiple of `pad_to_multiple_of`.
        enable_in_batch_packing: one after the other in one row, each to `in_batch_packing_pad_to_multiple_of`.

    Returns:
        input_ids, labels (-100 where nothing is learned), loss_mask and position_ids [B, S] ([1, all] when packed, with
        the lengths), and visual_inputs: the pixels and grids of the whole batch, in the order of their words.

    Raises:
        VisionInputError: a part without its image, an image without its part, or one that `sequence_length` would cut.
        ValueError: of the host's: no turn of the assistant, or none left.
    """
    boundaries = _boundaries(processor)
    pixels = {}
    if min_pixels or max_pixels:  # which the processor takes both or neither
        own = processor.image_processor.size
        pixels = {
            "min_pixels": min_pixels or own["shortest_edge"],
            "max_pixels": max_pixels or own["longest_edge"],
        }
    rows, visual = [], []
    for example in examples:
        row, seen = _row(example, processor, boundaries, pixels)
        _check_length(row, seen, processor, sequence_length)
        rows.append(row)
        visual.append(seen)
    pad = processor.tokenizer.pad_token_id or 0
    if enable_in_batch_packing:
        batch = build_mcore_thd_sequence_batch_from_rows(
            rows,
            sequence_length=sequence_length,
            pad_token_id=pad,
            ignore_index=IGNORE_INDEX,
            pad_to_multiple_of=in_batch_packing_pad_to_multiple_of,
        )
    else:
        fill = {"input_ids": pad, "labels": IGNORE_INDEX}
        batch = {
            name: pad_sequence(
                [row[name] for row in rows], batch_first=True, padding_value=fill.get(name, 0)
            )
            for name in rows[0]
        }
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).repeat(len(rows), 1)
        prepare_sequence_batch(
            batch,
            sequence_length=sequence_length,
            pad_to_max_length=pad_to_max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            pad_token_id=pad,
            ignore_index=IGNORE_INDEX,
        )
    parts = {name: [seen[name] for seen in visual if name in seen] for name in _VISUAL}
    batch["visual_inputs"] = GenericVisualInputs(
        **{name: torch.cat(each) for name, each in parts.items() if each}
    )
    return batch


def _boundaries(processor: Any) -> AssistantMaskBoundaryConfig:
    """Where the assistant's turns begin and end, in the template's own words."""
    tokenizer = processor.tokenizer
    return assistant_mask_boundary_config_from_markers(
        processor,
        assistant_start=_ASSISTANT,
        assistant_end=_END,
        role_start_markers=_OTHERS,
        trim_leading_token_ids=tokenize_text_without_special_tokens(tokenizer, "\n"),
        trim_leading_token_sequences=(
            tokenize_text_without_special_tokens(tokenizer, _NO_THOUGHT),
        ),
    )


def _row(
    example: Mapping[str, Any],
    processor: Any,
    boundaries: AssistantMaskBoundaryConfig,
    pixels: Mapping[str, int],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One conversation's words, labels, masks and positions [S], and its pixels and grids."""
    conversation, media = _opened(example)
    options = chat_template_kwargs_from_example(example)
    tokenizer = processor.tokenizer
    text = processor.apply_chat_template(conversation, tokenize=False, **options)
    plain = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    # The turns are found before places are multiplied: no image is prepared for that.
    skipped = torch.tensor([processor.image_token_id, processor.video_token_id])
    turns = {"conversation": conversation, **options}
    learned = build_assistant_loss_mask(
        turns, plain, tokenizer, skipped, boundary_config=boundaries
    )
    seen: dict[str, torch.Tensor] = {}
    if media["image"]:
        seen |= processor.image_processor(images=media["image"], return_tensors="pt", **pixels)
    if media["video"]:
        seen |= processor.video_processor(videos=media["video"], return_tensors="pt")
    repeats = torch.ones_like(plain)
    for kind, token in (("image", processor.image_token_id), ("video", processor.video_token_id)):
        grids = seen.get(f"{kind}_grid_thw", torch.empty(0, 3, dtype=torch.long))
        places = plain == token
        if int(places.sum()) != len(grids):
            raise VisionInputError(
                f"{kind}s: the chat template made {int(places.sum())} places of a conversation that has {len(grids)}; "
                f"name each in one part of type {kind}, and write no {_token(processor, kind)} into words."
            )
        repeats[places] = (
            grids.prod(-1) // getattr(processor, f"{kind}_processor").merge_size ** 2
            if len(grids)
            else 1
        )
    words = plain.repeat_interleave(repeats)
    labels, loss_mask = build_shifted_labels_and_loss_mask(
        words, learned.repeat_interleave(repeats), skipped
    )
    row = {
        "input_ids": words,
        "labels": labels,
        "loss_mask": loss_mask,
        "attention_mask": torch.ones_like(words),
        "position_ids": torch.arange(len(words)),
    }
    return row, {name: seen[name] for name in _VISUAL if name in seen}


def _token(processor: Any, kind: str) -> str:
    """The word that holds the places of this kind."""
    return str(getattr(processor, f"{kind}_token"))


def _opened(example: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """The conversation without what Arrow fills in for absent fields, and its images and videos in order."""
    waiting = {kind: list(example.get(f"{kind}s") or ()) for kind in _KINDS}
    media: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
    conversation = []
    for turn in example["conversation"]:
        content = turn["content"]
        if not isinstance(content, str):
            content = [_part(part, waiting, media) for part in content]
        conversation.append(
            {**{key: value for key, value in turn.items() if value is not None}, "content": content}
        )
    for kind, left in waiting.items():
        if left:
            raise VisionInputError(
                f"{kind}s: the example has {len(left)} more than its conversation has parts for."
            )
    return conversation, media


def _part(
    part: Mapping[str, Any], waiting: dict[str, list[Any]], media: dict[str, list[Any]]
) -> dict[str, Any]:
    kind = part.get("type")
    if kind not in _KINDS:
        return {key: value for key, value in part.items() if value is not None}
    inside = [part[key] for key in _KINDS[kind] if part.get(key) is not None]
    if not inside and not waiting[kind]:
        raise VisionInputError(
            f"{kind}s: a part of this type has none of {', '.join(_KINDS[kind])}, and the example's list `{kind}s` has "
            "no other left."
        )
    media[kind].append(inside[0] if inside else waiting[kind].pop(0))
    return {"type": kind}


def _check_length(
    row: Mapping[str, torch.Tensor], seen: Any, processor: Any, length: int | None
) -> None:
    """No feature's place may be cut off: the features are there, whole."""
    words = row["input_ids"]
    if not seen or length is None or len(words) <= length:
        return
    places = (words == processor.image_token_id) | (words == processor.video_token_id)
    if places[length:].any():
        raise VisionInputError(
            f"a conversation of {len(words)} words has images beyond the {length} that are kept; raise the sequence's "
            "length, lower the processor's max_pixels, or leave it out."
        )
