"""Captures the activations of both models in one form: [N, S, features], fp32, on the CPU.

Axes: N prompts, B prompts of a microbatch, S tokens of a prompt, T tokens of a batch, D head size,
E experts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from exaone_bridge.verification.activations.probe_points import Capture, ProbePoint

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.utils.hooks import RemovableHandle

__all__ = ["Activations", "megatron_hooks", "transformers_hooks"]

Keep = Callable[[ProbePoint, torch.Tensor, torch.Tensor | None], None]


@dataclass(slots=True)
class Activations:
    """The activations of one model for prompts of one length.

    Attributes:
        logits: [N, S, V].
        values: name of the probe point -> [N, S, features], in execution order on the reference
            side; of a vision encoder [1, patches, features], images before videos.
        amplification: name -> relative change of the activation for a relative change of one in the
            embeddings; of the reference only.
        stable: bool [N, S]; False from the first token of a prompt on where rounding decides which
            expert is chosen. None: every token is stable.
    """

    logits: torch.Tensor
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    amplification: dict[str, float] = field(default_factory=dict)
    stable: torch.Tensor | None = None


def routing_weights(
    indices: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand the weights of the chosen experts over all experts.

    Args:
        indices: the chosen experts [T, k].
        weights: their weights [T, k].
        num_experts: E.

    Returns:
        Weights [T, E], zero where an expert is not chosen, and a bool mask [T, E] of the chosen
        ones.
    """
    zeros = torch.zeros(indices.shape[0], num_experts, device=indices.device)
    chosen = torch.zeros_like(zeros, dtype=torch.bool).scatter(1, indices, True)
    return zeros.scatter(1, indices, weights.detach().float()), chosen


def _main_output(output: Any) -> torch.Tensor:
    """Return the tensor that a module outputs; of a vision encoder, the features of the tokens."""
    features: torch.Tensor | None = getattr(output, "pooler_output", None)
    if features is not None:
        return features
    return output[0] if isinstance(output, tuple) else output


def merge_heads(value: torch.Tensor, norm_input: torch.Tensor, length: int) -> torch.Tensor:
    """Merge the heads of a per-head norm's output, whichever of heads and tokens comes first.

    EXAONE 4.0 normalises after the transposition, [N, heads, S, D], and Qwen3 before it,
    [N, S, heads, D]. The token axis has `length` entries. If there are as many heads, the strides
    of the input tell: it is a view of the projection's output, in which the heads of a token are
    adjacent.

    Args:
        value: the norm's output [N, heads, S, D] or [N, S, heads, D].
        norm_input: the norm's input, of the same shape.
        length: S.

    Returns:
        [N, S, heads * D].

    Raises:
        ValueError: neither axis has `length` entries.
    """
    first, second = value.shape[1:3]
    if length not in (first, second):
        raise ValueError(f"A norm of heads outputs {list(value.shape)} for {length} tokens.")
    if first == second:
        heads_first = norm_input.stride(1) < norm_input.stride(2)
    else:
        heads_first = second == length
    return (value.transpose(1, 2) if heads_first else value).flatten(2)


@contextlib.contextmanager
def transformers_hooks(
    model: torch.nn.Module, points: Iterable[ProbePoint], length: int, keep: Keep
) -> Iterator[None]:
    """Call `keep(point, activation, chosen)` for every probe point while Transformers runs.

    The activation is [N, S, features] (of a vision encoder [patches, features]); `chosen` is a bool
    mask [N, S, E] of the chosen experts for a router, else None.

    Args:
        length: S.
    """
    modules = dict(model.named_modules())

    def hook(point: ProbePoint) -> Callable[..., None]:
        def capture(_: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            value = _main_output(output)
            if value.ndim == 4:
                value = merge_heads(value, arguments[0] if arguments else value, length)
            keep(point, value.detach(), None)

        return capture

    def router_hook(point: ProbePoint) -> Callable[..., None]:
        # The output of routers differs between models and versions of Transformers; the arguments
        # of their experts (hidden states, indices, weights) do not.
        def capture(experts: Any, arguments: tuple[Any, ...]) -> None:
            _, indices, weights = arguments
            both = routing_weights(indices, weights, experts.num_experts)
            keep(point, *(each.view(-1, length, experts.num_experts) for each in both))

        return capture

    handles = []
    for point in points:
        if point.hf not in modules:
            continue
        if point.capture is Capture.ROUTER:
            experts = modules[f"{point.hf.rpartition('.')[0]}.experts"]
            handles.append(experts.register_forward_pre_hook(router_hook(point)))
        else:
            handles.append(modules[point.hf].register_forward_hook(hook(point)))
    with _removed(handles):
        yield


@contextlib.contextmanager
def megatron_hooks(
    model: Sequence[MegatronModule],
    points: Iterable[ProbePoint],
    into: dict[str, list[torch.Tensor]],
) -> Iterator[None]:
    """Append every activation of this rank's model chunks while Megatron-Core runs.

    Each microbatch appends [B, S, features]; a vision encoder appends [patches, features] for the
    images of a microbatch, and again for its videos. With TP, activations that are sharded by heads
    are left out.

    Args:
        model: this rank's model chunks.
        into: name of the probe point -> what was captured.
    """
    from megatron.core.utils import get_model_config, unwrap_model

    config = get_model_config(model[0])
    sharded = config.tensor_model_parallel_size > 1
    points = [point for point in points if not (point.head_sharded and sharded)]
    handles = []
    for chunk in unwrap_model(model):
        modules = _modules_by_global_layer(chunk)
        for point in points:
            further_calls = 0
            if point.sublayer == "embedding":
                if not chunk.pre_process:
                    continue  # the embedding of multi-token prediction on the last stage
                # Multi-token prediction embeds again after the decoder, once for each depth.
                further_calls = (config.mtp_num_layers or 0) if chunk.post_process else 0
            if (module := modules.get(point.megatron)) is not None:
                handles.append(_hook(module, point, config, into, further_calls))
    with _removed(handles):
        yield


@contextlib.contextmanager
def _removed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _modules_by_global_layer(chunk: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return name -> module, with global layer numbers: a chunk numbers its layers from zero."""
    global_numbers = {
        f"decoder.layers.{local}": layer.layer_number - 1
        for local, layer in enumerate(chunk.decoder.layers)
    }
    modules = {}
    for name, module in chunk.named_modules():
        parts = name.split(".")
        if (number := global_numbers.get(".".join(parts[:3]))) is not None:
            name = ".".join(["decoder.layers", str(number), *parts[3:]])
        modules[name] = module
    return modules


def _hook(
    module: torch.nn.Module,
    point: ProbePoint,
    config: TransformerConfig,
    into: dict[str, list[torch.Tensor]],
    further_calls: int,
) -> RemovableHandle:
    """Attach a hook to a module; it ignores `further_calls` calls after each that counts."""
    from exaone_bridge.runtime.model import over_context

    counts = itertools.cycle((True, *(False,) * further_calls))

    def capture(_: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if not next(counts):
            return
        if point.capture is Capture.PATCHES:
            value = _main_output(output).detach().float().cpu()
        else:
            value = over_context(_megatron_value(module, point, arguments, output, config), dim=0)
            # [S, B, ...] -> [B, S, features]; cloned, because residuals are added in place.
            value = value.detach().flatten(2).transpose(0, 1).float().cpu().clone()
        into.setdefault(point.hf, []).append(value)

    return module.register_forward_hook(capture)


def _megatron_value(
    module: torch.nn.Module,
    point: ProbePoint,
    arguments: tuple[Any, ...],
    output: Any,
    config: TransformerConfig,
) -> torch.Tensor:
    """Return the activation [S, B, ...] of a module, of the full sequence but for CP."""
    value = _main_output(output)
    match point.capture:
        case Capture.INPUT:
            return _unsharded(arguments[0], config)
        case Capture.FUSED_NORM:
            hidden = _unsharded(arguments[0], config)
            return torch.nn.functional.rms_norm(
                hidden, hidden.shape[-1:], module.layer_norm_weight, module.eps
            )
        case Capture.QUERY | Capture.KEY | Capture.VALUE:
            return _query_key_or_value(value, point.capture, config)
        case Capture.ROUTER:
            return _unsharded(value.reshape(-1, arguments[0].shape[1], value.shape[-1]), config)
        case _:
            bias = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(bias, torch.Tensor) and bias.ndim == 1:  # added with the residual, later
                value = value + bias
            return value if point.head_sharded else _unsharded(value, config)


def _query_key_or_value(
    fused: torch.Tensor, capture: Capture, config: TransformerConfig
) -> torch.Tensor:
    """Slice a fused QKV projection, which interleaves by KV group: its queries, its key, its value.

    Args:
        fused: [S, B, groups * (queries per group + 2) * D].

    Returns:
        [S, B, features].
    """
    groups = config.num_query_groups
    queries = config.num_attention_heads // groups
    heads = fused.view(*fused.shape[:2], groups, queries + 2, config.kv_channels)
    slices = {
        Capture.QUERY: slice(0, queries),
        Capture.KEY: slice(-2, -1),
        Capture.VALUE: slice(-1, None),
    }
    return heads[..., slices[capture], :].flatten(2)


def _unsharded(value: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """Gather the sequence axis (the first) of a value that sequence parallelism shards."""
    if not config.sequence_parallel:
        return value
    from megatron.core import parallel_state

    from exaone_bridge.modules.collectives import all_gather_cat

    return all_gather_cat(value, parallel_state.get_tensor_model_parallel_group(), dim=0)
