"""Megatron-Core's side a layer at a time: its own whole model, whose weights come and go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.digests import Digest, digest_stream
from exaone_bridge.verification.workflow.transformers_layerwise import Reader

__all__ = ["LayerwiseMegatron"]


class LayerwiseMegatron:
    """A Megatron-Core model whose parameters are filled through Megatron-Bridge's own conversion, group by group.

    Until a parameter is filled its memory is only promised by the operating system; emptying it takes the promise anew.

    Args:
        bridge: an AutoBridge of the Hugging Face folder.
        dtype: of the parameters.
        overrides: further fields of the provider.
    """

    def __init__(
        self,
        bridge: Any,
        source: HFCheckpoint,
        layout: Layout,
        backend: str,
        dtype: torch.dtype,
        overrides: Mapping[str, Any],
    ) -> None:

        provider = bridge.to_megatron_provider(load_weights=False)
        fields = layout.provider_overrides() | {
            "backend": backend,
            "pipeline_dtype": dtype,
            "autocast_dtype": dtype,
            "perform_initialization": False,
        }
        provider.apply_overrides_and_finalize(dtype, fields | dict(overrides))
        cpu = not torch.cuda.is_available()
        self.model = provider.provide_distributed_model(
            wrap_with_ddp=False, use_cpu_initialization=cpu
        )
        self.converter = bridge._model_bridge
        self.hf = bridge.hf_pretrained
        self.weights = _State(Reader(source), self.hf.config)
        self.groups = self._tasks()

    def _tasks(self) -> dict[str, list[Any]]:
        """The host's tasks by layer; each outside the layers by itself."""
        groups: dict[str, list[Any]] = {}
        for task in self.converter.build_conversion_tasks(self.hf, self.model):
            layer = re.match(r"decoder\.layers\.(\d+)\.", task.global_param_name)
            groups.setdefault(
                layer[1] if layer else f"outside {task.global_param_name}", []
            ).append(task)
        return groups

    @torch.no_grad()
    def fill(self, tasks: Sequence[Any]) -> None:
        """Hugging Face -> this rank's parameters."""
        for task in tasks:
            for weight in self.converter.stream_weights_hf_to_megatron(
                self.weights, self.model, [task]
            ):
                _put(task.param_weight, weight.weight, task.param_name)

    @torch.no_grad()
    def empty(self, tasks: Sequence[Any]) -> None:
        """Give the memory back."""
        for task in tasks:
            if task.param_weight is not None:
                task.param_weight.data = torch.empty_like(task.param_weight.data)

    def round_trip(self) -> dict[str, Digest]:
        """Every tensor to Megatron-Core and back, a layer at a time."""
        found: dict[str, Digest] = {}
        # A mapping that has imported does not ask other pipeline stages what it has learnt, and they would wait: the
        # way back has mappings of its own, as in the host's export.
        back = self._tasks()
        for name, tasks in self.groups.items():
            self.fill(tasks)
            found |= digest_stream(
                self.converter.stream_weights_megatron_to_hf(
                    self.model, self.hf, cpu=True, show_progress=False, conversion_tasks=back[name]
                )
            )
            self.empty(tasks)
        return found

    def stream_layers(self) -> None:
        """From now on each layer is filled when it runs; what is outside the layers is filled at once."""
        from megatron.core.utils import unwrap_model

        for name, tasks in self.groups.items():
            if name.startswith("outside"):
                self.fill(tasks)
        self.converter._broadcast_shared_embeddings(self.model)
        for chunk in unwrap_model(self.model):
            for layer in chunk.decoder.layers:
                tasks = self.groups[str(layer.layer_number - 1)]
                layer.register_forward_pre_hook(lambda *_, mine=tasks: self.fill(mine))
                layer.register_forward_hook(lambda *_, mine=tasks: self.empty(mine))


def _put(parameter: torch.Tensor, value: torch.Tensor, name: str) -> None:
    """The value takes the parameter's place; nothing is copied where it is of the right kind already."""
    if value.shape != parameter.shape:  # copy_ would broadcast
        raise ValueError(
            f"{name}: has shape {list(parameter.shape)}, and was given {list(value.shape)}"
        )
    if (value.dtype, value.device) == (parameter.dtype, parameter.device):
        parameter.data = value.contiguous()
    else:
        parameter.data.copy_(value)


class _State:
    """What the host's stream asks of a Hugging Face model."""

    def __init__(self, state: Reader, config: Any) -> None:
        self.state, self.config = state, config
