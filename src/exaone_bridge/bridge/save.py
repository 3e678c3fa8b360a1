"""AutoBridge's saving calls, for our architectures: by the plan of copies, and under the final name only at the end.

`AutoBridge.save_hf_weights` (`models/conversion/auto_bridge.py`, 0.6.2) gathers every tensor on every rank and writes
final names in place; `save_hf_pretrained` and `export_ckpt` end in it. Models that the plan does not cover go its way.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from exaone_bridge.bridge import eligibility
from exaone_bridge.checkpoint.reshard.save import Group, into, save, together
from exaone_bridge.schema.model_family import ModelDescription

__all__ = ["save_by_plan"]


def save_by_plan(architectures: Collection[str]) -> None:
    """Teach AutoBridge; doing it again is harmless."""
    from megatron.bridge import AutoBridge

    if hasattr(AutoBridge.save_hf_weights, "_exaone_bridge"):
        return
    weights, pretrained = AutoBridge.save_hf_weights, AutoBridge.save_hf_pretrained

    def ours(bridge: Any) -> bool:
        config = getattr(bridge.hf_pretrained, "config", bridge.hf_pretrained)
        return bool(set(getattr(config, "architectures", None) or ()) & set(architectures))

    @functools.wraps(weights)
    def save_weights(self: Any, model: Any, path: str | Path, *args: Any, **kwargs: Any) -> None:
        if not ours(self) or not dist.is_initialized():
            return weights(self, model, path, *args, **kwargs)
        into(Path(path), lambda folder: write(self, model, folder, args, kwargs))

    def write(
        self: Any, model: Any, folder: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        model = model if isinstance(model, list) else [model]
        why = _everyones(_why_not(self, model, args, kwargs))
        eligibility.say_once("Megatron-Core -> Hugging Face", why)
        if why is None:
            _save(self, model, folder)
        else:
            weights(self, model, folder, *args, **kwargs)

    @functools.wraps(pretrained)
    def save_pretrained(self: Any, model: Any, path: str | Path, *args: Any, **kwargs: Any) -> None:
        if (
            not ours(self)
            or not dist.is_initialized()
            or _everyones("there" if Path(path).exists() else None)
        ):
            return pretrained(self, model, path, *args, **kwargs)

        def both(folder: Path) -> None:
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            # Rank 0 writes the artifacts and may fail alone: all ranks learn of it before they gather weights.
            self.save_hf_weights = lambda _model, _path, *args, **kwargs: calls.append(
                (args, kwargs)
            )
            try:
                with together():
                    pretrained(self, model, folder, *args, **kwargs)
            finally:
                del self.save_hf_weights
            for rest in calls:
                write(self, model, folder, *rest)

        into(Path(path), both)

    save_weights._exaone_bridge = True  # type: ignore[attr-defined]
    AutoBridge.save_hf_weights, AutoBridge.save_hf_pretrained = save_weights, save_pretrained


def _why_not(
    bridge: Any, model: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    if kwargs.get("weight_dtype") is not None or len(args) > 5:
        return "another type of weights is asked for"
    if (why := eligibility.why_not(bridge._model_bridge, model)) is not None:
        return why
    return None if eligibility.place_of(model).even else "its pipeline is cut unevenly"


def _everyones(why: str | None) -> str | None:
    """The first rank's reason that has one: all ranks go the same way."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, why)
    return next((reason for reason in reasons if reason is not None), None)


def _save(auto_bridge: Any, model: list[Any], folder: Path) -> None:
    bridge = auto_bridge._model_bridge
    model_config, mappings, files, passthrough = bridge.to_be_saved(auto_bridge.hf_pretrained)
    save(
        folder,
        ModelDescription(bridge.FAMILY, model_config, mappings),
        eligibility.place_of(model),
        dtype=unwrap_model(model)[0].config.params_dtype,
        dense=Group(
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        ),
        expert=Group(
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_data_parallel_rank(),
            parallel_state.get_expert_data_parallel_world_size(),
        ),
        files=files,
        passthrough=passthrough,
    )
