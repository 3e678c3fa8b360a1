"""Builds, loads and runs Megatron-Core models on all ranks, through AutoBridge."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config
from torch.distributed.checkpoint.api import CheckpointException

from exaone_bridge.errors import CheckpointError
from exaone_bridge.modules.collectives import all_gather_cat, all_gather_sequence
from exaone_bridge.modules.context_parallel import local_positions
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.parallel_layout import Layout

__all__ = [
    "build",
    "forward_logits",
    "forward_losses",
    "load_megatron",
    "load_model",
    "over_context",
]


# A checkpoint is not used as its run was trained: prompts have any length, and there is no wrapper
# with main gradients. None in place of "", which the provider makes of it, would leave the
# checkpoint's value.
_FOR_INFERENCE: JSONObject = {
    "cuda_graph_impl": "none",
    "fp8": "",
    "fp8_param": False,
    "moe_router_padding_for_quantization": False,
    "fuse_weight_gradients": False,
}
# A prompt's pixel values and grids, by the names of the model's arguments.
Images = dict[str, torch.Tensor]


def build(
    bridge: AutoBridge,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    load_weights: bool = True,
    **overrides: Any,
) -> list[MegatronModule]:
    """Build a model from a Hugging Face model, on the CPU where there is no GPU.

    Args:
        bridge: the Hugging Face model.
        layout: the parallel layout.
        dtype: of parameters and arithmetic; None: the checkpoint's.
        backend: `auto`, `transformer_engine` or `torch`.
        load_weights: False: the weights stay as they were initialised.
        overrides: further fields of the provider.

    Returns:
        This rank's chunks.

    Raises:
        BridgeError: the layout, the config or the checkpoint is not supported or damaged.
    """
    provider = bridge.to_megatron_provider(load_weights=load_weights)
    dtype = dtype or provider.params_dtype
    fields = layout.provider_overrides() | {
        "backend": backend,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
    }
    provider.apply_overrides_and_finalize(dtype, fields | overrides)
    return provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=not torch.cuda.is_available()
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def load_megatron(
    bridge: AutoBridge, path: Path, layout: Layout, *, backend: str = "auto"
) -> list[MegatronModule]:
    """Load a Megatron checkpoint at any layout and backend.

    Returns:
        This rank's chunks.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    try:
        return bridge.load_megatron_model(
            path,
            mp_overrides=layout.provider_overrides() | {"backend": backend} | _FOR_INFERENCE,
        )
    except (
        CheckpointException,
        CheckpointingException,
        OSError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        failures = getattr(error, "failures", None) or {0: (error, None)}  # torch's, by rank
        cause = next(iter(failures.values()))[0]
        raise CheckpointError(
            path,
            f"the checkpoint cannot be loaded ({_first_line(cause)})",
            remedy="restore the missing or truncated files",
        ) from error


def load_model(
    hf_folder: Path,
    megatron: Path | None,
    layout: Layout,
    *,
    dtype: torch.dtype | None,
    backend: str,
) -> list[MegatronModule]:
    """Load a model from a Hugging Face folder, or its weights from a Megatron checkpoint.

    Args:
        hf_folder: config and, without `megatron`, weights.
        megatron: a Megatron checkpoint of the same model, whose dtype is kept.
        layout: the parallel layout.
        dtype: of a model from the Hugging Face folder; None: the folder's.
        backend: `auto`, `transformer_engine` or `torch`.

    Returns:
        This rank's chunks.

    Raises:
        BridgeError: as `build` and `load_megatron`.
    """
    bridge = AutoBridge.from_hf_pretrained(hf_folder)
    if megatron is not None:
        return load_megatron(bridge, megatron, layout, backend=backend)
    return build(bridge, layout, dtype=dtype, backend=backend)


def _gathered(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return all_gather_cat(tensor, parallel_state.get_tensor_model_parallel_group(), dim)


def over_context(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Gather [..., S / cp, ...] from all context-parallel ranks to [..., S, ...], S along `dim`."""
    return all_gather_sequence(tensor, parallel_state.get_context_parallel_group(), dim)


@dataclass(frozen=True, slots=True)
class _Microbatch:
    """One prompt: tokens [1, S], and labels [1, S] where losses are wanted in place of logits."""

    tokens: torch.Tensor
    images: Images
    labels: torch.Tensor | None = None


def _run_stage(
    batches: Iterator[_Microbatch], model: MegatronModule, vocab_size: int, at: int | None
) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    group = parallel_state.get_context_parallel_group()
    length, device = batch.tokens.shape[1], batch.tokens.device
    positions = local_positions(group.rank(), group.size(), length, device)
    labels = None if batch.labels is None else batch.labels[:, positions]
    has_head = bool(getattr(get_model_config(model), "head", None))
    further = {"pool": False} if has_head else batch.images
    output = model(batch.tokens[:, positions], positions[None], None, labels=labels, **further)

    def collect(tensor: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
        found = over_context(tensor, dim=1)
        if batch.labels is not None or has_head:  # a head is not sharded over TP
            return found.float().cpu()
        if at is not None:
            found = found[:, at : at + 1]
        return _gathered(found, dim=-1)[..., :vocab_size].float().cpu()

    return output, collect


def forward_logits(
    model: list[MegatronModule],
    tokens: torch.Tensor,
    images: Sequence[Images] = (),
    *,
    at: int | None = None,
) -> torch.Tensor | None:
    """Run Megatron-Core's schedule over prompts of equal length, one prompt in each microbatch.

    Args:
        model: this rank's chunks.
        tokens: [N, S] int64, the same on every rank.
        images: the images of each prompt; empty: no prompt has any.
        at: the only position whose logits are computed; None: all are.

    Returns:
        The logits [N, S, V], or [N, 1, V] at one position, in fp32 on ranks of the last pipeline
        stage, None elsewhere; of a model with a head those of every token, before pooling.
    """
    return _forward(model, tokens, images, at=at)


def forward_losses(model: list[MegatronModule], tokens: torch.Tensor) -> torch.Tensor | None:
    """Run prompts of equal length, and compute the cross entropy of each next token.

    Args:
        model: this rank's chunks.
        tokens: [N, S + 1] int64, the same on every rank.

    Returns:
        The cross entropy [N, S] in nats, fp32, on ranks of the last pipeline stage, None elsewhere.
    """
    return _forward(model, tokens[:, :-1], labels=tokens[:, 1:])


@torch.no_grad()
def _forward(
    model: list[MegatronModule],
    tokens: torch.Tensor,
    images: Sequence[Images] = (),
    *,
    labels: torch.Tensor | None = None,
    at: int | None = None,
) -> torch.Tensor | None:
    config = get_model_config(model[0])
    count, length = tokens.shape
    # Interleaved stages require a multiple of pp microbatches, sequence parallelism a multiple of
    # tp positions, context parallelism two chunks for each rank. Attention is causal, so padding at
    # the end changes no earlier position.
    extra_prompts = -count % config.pipeline_model_parallel_size
    tp, cp = config.tensor_model_parallel_size, config.context_parallel_size
    extra_positions = -length % (2 * tp * cp)
    device = next(model[0].parameters()).device

    def padded(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes = (0, extra_positions, 0, extra_prompts)
        return torch.nn.functional.pad(values, sizes).to(device).split(1)

    prompts = padded(tokens)
    inputs = [{name: value.to(device) for name, value in each.items()} for each in images]
    inputs += [{}] * (len(prompts) - len(inputs))
    targets = [None] * len(prompts) if labels is None else padded(labels)
    batches = list(map(_Microbatch, prompts, inputs, targets))
    for chunk in model:
        chunk.eval()
    outputs = get_forward_backward_func()(
        forward_step_func=functools.partial(_run_stage, vocab_size=config.vocab_size, at=at),
        data_iterator=[iter(batches) for _ in model] if len(model) > 1 else iter(batches),
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(batches),
        seq_length=length + extra_positions,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return torch.cat(outputs)[:count, :length] if outputs else None
