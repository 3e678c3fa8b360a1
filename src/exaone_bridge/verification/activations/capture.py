"""What both sides compute at each place of the arithmetic, in one form: [N, S, features], fp32, on the CPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from exaone_bridge.verification.activations.probe_points import Capture, ProbePoint

__all__ = ["Activations", "hf_hooks", "megatron_hooks"]


@dataclass(slots=True)
class Activations:
    """One side's run over prompts of one length.

    Attributes:
        logits: [N, S, V].
        values: Hugging Face module -> [N, S, features], in the order of the arithmetic on Transformers' side; of a
            vision tower's, [1, patches, features], those of images first.
        amplification: place -> relative change there for a relative change of one in the embeddings; the reference's.
        stable: [N, S] bool; False from the first position on where rounding decides which expert is chosen.
    """

    logits: torch.Tensor
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    amplification: dict[str, float] = field(default_factory=dict)
    stable: torch.Tensor | None = None


def routing_weights(output: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, E] weights, zero where not chosen, and [T, E] bool, chosen, of a Transformers router's output."""
    chosen = next(item for item in output if not item.is_floating_point())
    floats = [
        item for item in output if item.is_floating_point()
    ]  # logits first, the chosen experts' weights last
    weights, experts = floats[-1], floats[0].shape[-1]
    whole = torch.zeros(chosen.shape[0], experts, device=chosen.device)
    picked = torch.zeros_like(whole, dtype=torch.bool).scatter(1, chosen, True)
    return whole.scatter(1, chosen, weights.float()), picked


def _tensor(output: Any) -> torch.Tensor:
    """What a module puts out, without what it returns beside it; of a vision tower, the words' features."""
    features: torch.Tensor | None = getattr(output, "pooler_output", None)
    if features is not None:
        return features
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def hf_hooks(
    model: torch.nn.Module,
    points: Iterable[ProbePoint],
    length: int,
    keep: Callable[[ProbePoint, torch.Tensor, Any], None],
) -> Iterator[None]:
    """Call `keep(point, output [N, S, features], chosen experts [N, S, E] or None)` as Transformers runs."""
    modules = dict(model.named_modules())

    def hook(point: ProbePoint) -> Any:
        def look(_: Any, __: Any, output: Any) -> None:
            if point.capture is Capture.ROUTER:
                weights, chosen = routing_weights(output)
                keep(
                    point,
                    weights.view(-1, length, weights.shape[-1]),
                    chosen.view(-1, length, weights.shape[-1]),
                )
                return
            value = _tensor(output)
            if value.ndim == 4:  # [N, heads, S, D]
                value = value.transpose(1, 2).flatten(2)
            keep(point, value.detach(), None)

        return look

    handles = [
        modules[point.hf].register_forward_hook(hook(point))
        for point in points
        if point.hf in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def megatron_hooks(
    model: list[Any], points: Iterable[ProbePoint], into: dict[str, list[torch.Tensor]]
) -> Iterator[None]:
    """Append each microbatch's value [B, S, features] at every point that this rank holds.

    A vision tower runs once for a microbatch's images and once for its videos: [patches, features] each.

    With tensor parallelism a rank holds some heads only: what lies between the projections of attention is left out.
    Multi-token prediction embeds words too, after the decoder and on the last stage: that is not looked at.
    """
    from megatron.core.utils import get_model_config, unwrap_model

    config = get_model_config(model[0])
    table = [
        point for point in points if not (point.heads and config.tensor_model_parallel_size > 1)
    ]
    handles = []
    for chunk in unwrap_model(model):
        modules = _by_global_number(chunk)
        for point in table:
            if point.sublayer == "embedding" and not chunk.pre_process:
                continue
            again = (
                config.mtp_num_layers or 0
                if point.sublayer == "embedding" and chunk.post_process
                else 0
            )
            if (module := modules.get(point.megatron)) is not None:
                handles.append(_watch(module, point, config, into, again))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_global_number(chunk: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """A chunk numbers its layers from zero: name -> module, by the layer's number in the whole model."""
    numbers = {
        f"decoder.layers.{here}": layer.layer_number - 1
        for here, layer in enumerate(chunk.decoder.layers)
    }
    found = {}
    for name, module in chunk.named_modules():
        parts = name.split(".")
        here = ".".join(parts[:3])
        found[
            ".".join(["decoder.layers", str(numbers[here]), *parts[3:]])
            if here in numbers
            else name
        ] = module
    return found


def _watch(
    module: torch.nn.Module,
    point: ProbePoint,
    config: Any,
    into: dict[str, list[torch.Tensor]],
    again: int = 0,
) -> Any:
    """Keep what this module puts out, less the `again` calls that follow each one for something else."""
    from exaone_bridge.runtime.model import over_context

    def keep(value: torch.Tensor) -> None:
        """[S, B, ...] -> [B, S, features]; a copy, because residuals are added in place."""
        value = over_context(value, dim=0)
        into.setdefault(point.hf, []).append(
            value.detach().flatten(2).transpose(0, 1).float().cpu().clone()
        )

    if point.capture is Capture.PATCHES:
        return module.register_forward_hook(
            lambda _, __, output: into.setdefault(point.hf, []).append(
                _tensor(output).detach().float().cpu()
            )
        )
    calls = itertools.cycle((True, *(False,) * again))

    def after(linear: Any, arguments: tuple[Any, ...], output: Any) -> None:
        if not next(calls):
            return
        value = _tensor(output)
        match point.capture:
            case Capture.INPUT:
                keep(_whole(arguments[0], config))
            case Capture.FUSED_NORM:
                hidden = _whole(arguments[0], config)
                keep(
                    torch.nn.functional.rms_norm(
                        hidden, hidden.shape[-1:], linear.layer_norm_weight, linear.eps
                    )
                )
            case Capture.QUERY | Capture.KEY | Capture.VALUE:
                keep(_part(value, point.capture, config))
            case Capture.ROUTER:
                batch = arguments[0].shape[1]
                keep(_whole(value.reshape(-1, batch, value.shape[-1]), config))
            case Capture.OUTPUT:
                bias = output[1] if isinstance(output, tuple) and len(output) > 1 else None
                if (
                    isinstance(bias, torch.Tensor) and bias.ndim == 1
                ):  # left to be added with the residual
                    value = value + bias
                keep(value if point.heads else _whole(value, config))

    return module.register_forward_hook(after)


def _part(fused: torch.Tensor, take: Capture, config: Any) -> torch.Tensor:
    """Queries, keys or values [S, B, features] of a projection whose heads lie group by group: queries, key, value."""
    groups = config.num_query_groups
    per_group = config.num_attention_heads // groups
    length, batch = fused.shape[:2]
    heads = fused.view(length, batch, groups, per_group + 2, config.kv_channels)
    which = {
        Capture.QUERY: slice(0, per_group),
        Capture.KEY: slice(-2, -1),
        Capture.VALUE: slice(-1, None),
    }[take]
    return heads[..., which, :].flatten(2)


def _whole(value: torch.Tensor, config: Any) -> torch.Tensor:
    """What sequence parallelism cuts along its first axis, whole; context parallelism's cut is mended after it."""
    if not config.sequence_parallel:
        return value
    from megatron.core import parallel_state

    from exaone_bridge.modules.collectives import all_gather_cat

    return all_gather_cat(value, parallel_state.get_tensor_model_parallel_group(), 0)
