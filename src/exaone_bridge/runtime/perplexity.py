"""The perplexity of a text, by a Megatron-Core model at any layout and by Transformers.

The text is split into windows of equal length that do not overlap; the first token of each window
is given, and the others are predicted. The perplexity is exp of their mean cross entropy.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from exaone_bridge.errors import CheckpointError, UnsupportedConfig
from exaone_bridge.models.auto_class import auto_class
from exaone_bridge.runtime.model import forward_losses, load_model
from exaone_bridge.runtime.progress import Progress
from exaone_bridge.runtime.tokenizer import load_tokenizer
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["Perplexity", "megatron_perplexity", "read_windows", "transformers_perplexity"]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The mean cross entropy of a text.

    Attributes:
        loss: in nats per token.
        tokens: how many tokens were predicted.
        seconds: of the forward passes; the first one, which warms up, included.
    """

    loss: float
    tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return math.exp(self.loss)

    @property
    def tokens_per_second(self) -> float:
        """Return the predicted tokens divided by the seconds."""
        return self.tokens / max(self.seconds, 1e-9)


def read_windows(folder: Path, text: Path, length: int) -> torch.Tensor:
    """Split a text into windows of tokens; what is left over at the end is not used.

    Args:
        folder: with the tokenizer.
        text: a file in UTF-8.
        length: predicted tokens of a window.

    Returns:
        Token ids [N, length + 1] int64.

    Raises:
        CheckpointError: the folder has no tokenizer, or the text cannot be read.
        UnsupportedConfig: the text is shorter than one window.
    """
    tokenizer = load_tokenizer(folder)
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            text, f"cannot be read ({error})", remedy="name a text file in UTF-8"
        ) from error
    tokens = tokenizer(content, add_special_tokens=False, return_tensors="pt").input_ids[0]
    count = len(tokens) // (length + 1)
    if not count:
        wanted = f"less than the {len(tokens)} tokens of the text"
        raise UnsupportedConfig("--length", got=length, wanted=wanted, where="command line")
    return tokens[: count * (length + 1)].view(count, length + 1)


def megatron_perplexity(
    hf_folder: Path,
    megatron: Path | None,
    text: Path,
    length: int,
    layout: Layout,
    *,
    backend: str,
    dtype: torch.dtype | None,
    progress: Progress,
) -> Perplexity:
    """Compute the perplexity with Megatron-Core, on every rank.

    Args:
        hf_folder: config, tokenizer and, without `megatron`, weights.
        megatron: a Megatron checkpoint, to load the weights from.
        text: a file in UTF-8.
        length: predicted tokens of a window.
        layout: of the model.
        backend: `auto`, `transformer_engine` or `torch`.
        dtype: of the weights; None: the checkpoint's.
        progress: is told of the stages.

    Raises:
        BridgeError: from `read_windows`, or the model cannot be loaded.
    """
    windows = read_windows(hf_folder, text, length)
    progress.stage("loading the Megatron-Core model")
    model = load_model(hf_folder, megatron, layout, dtype=dtype, backend=backend)
    progress.stage(f"Megatron-Core, {windows[:, 1:].numel():,} tokens")
    started, total = time.perf_counter(), torch.zeros(1, dtype=torch.float64)
    batch = layout.pp  # prompts of a pass: as many as keep every stage busy once
    for part in windows.split(batch):
        if (losses := forward_losses(model, part)) is not None:
            total += losses.double().sum()
    total = total.to(next(model[0].parameters()).device)
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(total, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return _result(total.item(), windows, started)


@torch.no_grad()
def transformers_perplexity(
    hf_folder: Path,
    text: Path,
    length: int,
    *,
    dtype: torch.dtype | None,
    progress: Progress,
) -> Perplexity:
    """Compute the perplexity with Transformers, on one rank; the arguments are those above.

    Raises:
        BridgeError: from `read_windows`.
    """
    from transformers import AutoConfig

    windows = read_windows(hf_folder, text, length)
    progress.stage("loading Transformers' model")
    auto = auto_class(AutoConfig.from_pretrained(hf_folder, trust_remote_code=False))
    model = auto.from_pretrained(hf_folder, dtype=dtype or "auto", trust_remote_code=False).eval()
    if torch.cuda.is_available():
        model.cuda()
    progress.stage(f"Transformers, {windows[:, 1:].numel():,} tokens")
    started, total = time.perf_counter(), 0.0
    for window in windows.split(1):
        tokens = window.to(model.device)
        logits = model(tokens[:, :-1]).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
    return _result(total, windows, started)


def _result(total: float, windows: torch.Tensor, started: float) -> Perplexity:
    count = windows[:, 1:].numel()
    return Perplexity(total / count, count, time.perf_counter() - started)
