"""The Megatron-Core side: runs on every rank, with AutoBridge's own load and export.

Axes: N prompts, S tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.runtime.progress import Progress
from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.verification.activations.capture import Activations, megatron_hooks
from exaone_bridge.verification.activations.probe_points import Capture, ProbePoint
from exaone_bridge.verification.checks.digests import Digest
from exaone_bridge.verification.checks.gradients import Gradients
from exaone_bridge.verification.workflow.workload import Images, PromptBatch, Workload

if TYPE_CHECKING:
    from megatron.bridge import AutoBridge
    from megatron.core.transformer.module import MegatronModule

__all__ = [
    "MegatronResult",
    "capture_megatron",
    "export_gradients",
    "loss_step",
    "megatron_gradients",
    "merge_ranks",
    "run_megatron",
    "run_megatron_layerwise",
]


@dataclass(slots=True)
class MegatronResult:
    """What Megatron-Core computes for a workload.

    Attributes:
        model_config: config.json of the built model, in the spelling of the source's.
        activations: one for each batch; of one rank, its own layers only.
        gradients: of one training step, if the workload has it.
        digests: the exported tensors, if they were not written.
    """

    model_config: JSONMapping
    activations: list[Activations]
    gradients: Gradients | None = None
    digests: dict[str, Digest] = field(default_factory=dict)


def run_megatron(
    checkpoint: HFCheckpoint,
    megatron: Path | None,
    target: Path | None,
    workload: Workload,
    progress: Progress,
) -> MegatronResult:
    """Load a model on this rank, export it, and run a workload.

    A model is built once for each dtype. A further one, of an export that was just compared, is
    loaded from the Hugging Face folder.

    Args:
        checkpoint: the model as a Hugging Face folder.
        megatron: a Megatron checkpoint of the same model, to load the weights from; None: they are
            loaded from `checkpoint`.
        target: the folder to export to, which does not exist; None: no export.
    """
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, load_megatron

    bridge = AutoBridge.from_hf_pretrained(checkpoint.folder)
    layout, backend = workload.layout, workload.backend
    if megatron is None:
        progress.stage("HF -> Megatron-Core")
        model = build(bridge, layout, backend=backend, **workload.overrides)
    else:
        progress.stage("loading the Megatron checkpoint")
        model = load_megatron(bridge, megatron, layout, backend=backend)
    if target is not None:
        progress.stage("Megatron-Core -> HF")
        bridge.save_hf_pretrained(model, target, show_progress=False)
    result = MegatronResult(
        bridge._model_bridge.config_json_of(model[0].config, checkpoint.config), []
    )
    dtype = getattr(torch, workload.dtype)
    if _dtype(model) != dtype:
        del model
        model = build(bridge, layout, dtype=dtype, backend=backend, **workload.overrides)
    progress.stage("Megatron-Core's logits")
    result.activations = [
        capture_megatron(model, workload.points, batch) for batch in workload.batches
    ]
    if workload.gradient_batch is not None:
        progress.stage("Megatron-Core's gradients")
        if dtype != torch.float32 or workload.overrides:  # the loss without multi-token prediction
            del model
            model = build(bridge, layout, dtype=torch.float32, backend=backend)
        result.gradients = megatron_gradients(bridge, model, workload.gradient_batch)
    return result


def run_megatron_layerwise(
    checkpoint: HFCheckpoint, target: Path, workload: Workload, progress: Progress
) -> MegatronResult:
    """Load, export and run as `run_megatron` does, with the weights of one layer at a time.

    Args:
        target: a folder for everything but the weights; their digests are in the result.
    """
    from megatron.bridge import AutoBridge

    from exaone_bridge.bridge.hf_source import raw_config
    from exaone_bridge.bridge.save import write_files
    from exaone_bridge.checkpoint.hf.writer import write_config_json
    from exaone_bridge.verification.workflow.megatron_layerwise import LayerwiseMegatron

    bridge = AutoBridge.from_hf_pretrained(checkpoint.folder)
    progress.stage("HF -> Megatron-Core -> HF, layer by layer")
    own_dtype = getattr(torch, checkpoint.model_config.dtype)
    layerwise = LayerwiseMegatron(bridge, checkpoint, workload, own_dtype)
    digests = layerwise.round_trip()
    if torch.distributed.get_rank() == 0:
        write_files(bridge._model_bridge, bridge.hf_pretrained, target)
        write_config_json(target, raw_config(bridge.hf_pretrained))
    model_config = bridge._model_bridge.config_json_of(layerwise.model[0].config, checkpoint.config)
    progress.stage("Megatron-Core's logits, layer by layer")
    if _dtype(layerwise.model) != (dtype := getattr(torch, workload.dtype)):
        del layerwise
        gc.collect()
        layerwise = LayerwiseMegatron(bridge, checkpoint, workload, dtype)
    layerwise.load_when_run()
    activations = [
        capture_megatron(layerwise.model, workload.points, batch) for batch in workload.batches
    ]
    return MegatronResult(model_config, activations, digests=digests)


def _dtype(model: Sequence[MegatronModule]) -> torch.dtype:
    return next(model[0].parameters()).dtype


def merge_ranks(results: Sequence[MegatronResult]) -> MegatronResult:
    """Merge what all ranks have computed."""
    first = results[0]
    merged = []
    for runs in zip(*(result.activations for result in results), strict=True):
        logits = next(run.logits for run in runs if run.logits.numel())
        values = {name: value for run in runs for name, value in run.values.items()}
        merged.append(Activations(logits, values))
    return MegatronResult(
        first.model_config,
        merged,
        first.gradients,
        {name: digest for result in results for name, digest in result.digests.items()},
    )


def capture_megatron(
    model: list[MegatronModule], points: Sequence[ProbePoint], batch: PromptBatch
) -> Activations:
    """Run prompts of one length with Megatron-Core's schedule, and capture this rank's activations.

    Args:
        model: this rank's model chunks.

    Returns:
        Logits [N, S, V] on ranks of the last pipeline stage, empty elsewhere; the activations of
        this rank's layers.
    """
    from exaone_bridge.runtime.model import forward_logits

    count, length = batch.tokens.shape
    captured: dict[str, list[torch.Tensor]] = {}
    with megatron_hooks(model, points, captured):
        logits = forward_logits(model, batch.tokens, batch.images)
    vision = {point.hf for point in points if point.capture is Capture.PATCHES}
    values = {
        name: _images_before_videos(parts, batch.images)
        if name in vision
        else torch.cat(parts)[:count, :length]
        for name, parts in captured.items()
    }
    return Activations(torch.empty(0) if logits is None else logits.cpu(), values)


def _images_before_videos(calls: Sequence[torch.Tensor], images: Sequence[Images]) -> torch.Tensor:
    """Concatenate a vision encoder's outputs in Transformers' order.

    Transformers calls it once for the images of all prompts, and once for their videos;
    Megatron-Core for each prompt's images, then for its videos.

    Args:
        calls: [patches, features] of each call.

    Returns:
        [1, patches, features].
    """
    kinds = ("image", "video")
    order = [kind for each in images for kind in kinds if len(each.get(f"{kind}_grid_thw", ()))]
    outputs = list(zip(order, calls, strict=True))
    return torch.cat([value for kind in kinds for called, value in outputs if called == kind])[None]


def megatron_gradients(
    bridge: AutoBridge, model: list[MegatronModule], batch: PromptBatch
) -> Gradients:
    """Compute the gradients of the mean cross entropy, as a training step of Megatron-Core does.

    Of a model with a head they are those of the mean square of its logits. Nothing is dropped.

    It uses Megatron-Core's own schedule, DDP wrapper and `finalize_model_grads`. The weights of
    `model` are overwritten.

    Args:
        model: this rank's chunks, in fp32.
        batch: tokens [N, S + 1], N a multiple of pp and S one of 2 x tp x cp.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    config = get_model_config(model[0])
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    # As megatron/bridge/models/model_provider.py (0.6.2), _ddp_wrap: buckets in one chunk.
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    device = next(model[0].parameters()).device
    images = [
        {name: value.to(device) for name, value in each.items()} for each in batch.images
    ] or [{}] * len(batch.tokens)
    microbatches = list(zip(batch.tokens.to(device).split(1), images, strict=True))
    for chunk in wrapped:
        chunk.train()
        for module in chunk.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=loss_step,
        data_iterator=[iter(microbatches) for _ in wrapped]
        if len(wrapped) > 1
        else iter(microbatches),
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(microbatches),
        seq_length=batch.tokens.shape[1] - 1,
        micro_batch_size=1,
        forward_only=False,
    )
    return export_gradients(bridge, wrapped)


@torch.no_grad()
def export_gradients(bridge: AutoBridge, model: list[MegatronModule]) -> Gradients:
    """Export the gradients as if they were the weights, which they overwrite; frozen ones are zero.

    Args:
        model: this rank's chunks, in Megatron-Core's data-parallel wrapper.

    Returns:
        Hugging Face name -> fp32 gradient `[*weight.shape]` on the CPU, on every rank.
    """
    for chunk in model:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.main_grad)
            else:
                parameter.zero_()
    weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
    return {name: weight.clone().float() for name, weight in weights}


def loss_step(
    microbatches: Iterator[tuple[torch.Tensor, Images]], model: MegatronModule
) -> tuple[torch.Tensor, Any]:
    """Run a prompt [1, S + 1] through a pipeline stage, as Megatron-Core's schedules call it.

    Returns:
        The stage's output, and the function from it to the mean cross entropy of this rank's shard;
        Megatron-Core sums over the CP ranks.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config

    from exaone_bridge.modules.context_parallel import local_positions

    tokens, images = next(microbatches)
    group = parallel_state.get_context_parallel_group()
    local = local_positions(group.rank(), group.size(), tokens.shape[1] - 1, tokens.device)
    inputs, labels = tokens[:, :-1][:, local], tokens[:, 1:][:, local]
    if getattr(get_model_config(model), "head", None):
        logits = model(inputs, local[None], None, pool=False)
        return logits, lambda found: (found.square().mean(), {})
    output = model(inputs, local[None], None, labels=labels, **images)
    return output, lambda loss: (loss.mean() / group.size(), {"loss": loss.mean().detach()})
