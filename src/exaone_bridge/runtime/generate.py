"""Greedy generation by a Megatron-Core model at any layout.

Each token is computed from the whole sequence, as in training. Megatron-Core's key-value cache is
not used: it does not support sliding windows together with full-attention layers without RoPE on
every backend, and the point of generating here is to see what the model that was converted or
trained does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from transformers import AutoProcessor, GenerationConfig, TextStreamer

from exaone_bridge.errors import CheckpointError
from exaone_bridge.runtime.model import Images, forward_logits, load_model
from exaone_bridge.runtime.progress import Progress
from exaone_bridge.runtime.tokenizer import load_tokenizer
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["generate", "greedy_tokens"]


def greedy_tokens(
    model: list[MegatronModule],
    prompt: torch.Tensor,
    images: Images | None = None,
    *,
    stop: Collection[int] = (),
    most: int,
) -> Iterator[int]:
    """Yield the most probable next token, again and again; the same tokens on every rank.

    Args:
        model: this rank's chunks.
        prompt: token ids [S] int64, the same on every rank.
        images: the pixel values and grids of the prompt's images.
        stop: tokens that end the generation; they are yielded.
        most: the number of tokens that ends it.
    """
    device = next(model[0].parameters()).device
    last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    tokens = prompt[None].cpu()
    for _ in range(most):
        logits = forward_logits(model, tokens, [images] if images else (), at=tokens.shape[1] - 1)
        chosen = torch.zeros(1, dtype=torch.int64, device=device)
        if logits is not None:
            chosen.copy_(logits[0, -1].argmax())
        dist.broadcast(chosen, src=last_stage, group=group)
        token = int(chosen)
        yield token
        if token in stop:
            return
        tokens = torch.cat([tokens, chosen.cpu()[None]], dim=1)


def generate(
    hf_folder: Path,
    megatron: Path | None,
    messages: str | list[dict[str, Any]],
    layout: Layout,
    *,
    images: Sequence[Path] = (),
    template: dict[str, Any],
    backend: str,
    dtype: torch.dtype | None,
    most: int,
    progress: Progress,
) -> list[int]:
    """Continue a prompt greedily, on every rank; rank 0 reports the text as it grows.

    Args:
        hf_folder: config, tokenizer and, without `megatron`, weights.
        megatron: a Megatron checkpoint, to load the weights from.
        messages: a plain prompt, or a conversation for the chat template.
        layout: of the model.
        images: the files of the conversation's images.
        template: further arguments of the chat template.
        backend: `auto`, `transformer_engine` or `torch`.
        dtype: of the weights; None: the checkpoint's.
        most: tokens at most.
        progress: is told of the stages and of each piece of text.

    Returns:
        The generated token ids.

    Raises:
        CheckpointError: the folder has no tokenizer, or no chat template for a conversation.
    """
    tokenizer, prompt, pixels = _read_prompt(hf_folder, messages, images, template)
    progress.stage("loading the model")
    model = load_model(hf_folder, megatron, layout, dtype=dtype, backend=backend)
    progress.stage("generating")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: progress.output(text)
    found = []
    stop = _stop_tokens(hf_folder, tokenizer)
    for token in greedy_tokens(model, prompt, pixels, stop=stop, most=most):
        found.append(token)
        if dist.get_rank() == 0:
            streamer.put(torch.tensor([token]))
    if dist.get_rank() == 0:
        streamer.end()
    return found


def _read_prompt(
    folder: Path,
    messages: str | list[dict[str, Any]],
    images: Sequence[Path],
    template: dict[str, Any],
) -> tuple[Any, torch.Tensor, Images | None]:
    """Return tokenizer, token ids [S] and the arguments of `forward` with the images."""
    tokenizer = load_tokenizer(folder)
    if isinstance(messages, str):
        return tokenizer, tokenizer(messages, return_tensors="pt").input_ids[0], None
    if tokenizer.chat_template is None:
        raise CheckpointError(
            folder, "the tokenizer has no chat template", remedy="give a plain prompt (--prompt)"
        )
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **template
    )
    if not images:
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return tokenizer, tokens, None
    from PIL import Image

    inputs = AutoProcessor.from_pretrained(folder, trust_remote_code=False)(
        text=[text], images=[Image.open(path) for path in images], return_tensors="pt"
    )
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    return tokenizer, inputs["input_ids"][0], pixels


def _stop_tokens(folder: Path, tokenizer: Any) -> set[int]:
    """Return the tokens that end a generation, of generation_config.json or the tokenizer."""
    stop = tokenizer.eos_token_id
    if (folder / "generation_config.json").is_file():
        stop = GenerationConfig.from_pretrained(folder).eos_token_id or stop
    return {stop} if isinstance(stop, int) else set(stop or ())
