"""Megatron-Core's model layer by layer: weights are loaded before a layer runs, and freed after."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from exaone_bridge.bridge.eligibility import local_model
from exaone_bridge.bridge.save import shard_groups
from exaone_bridge.checkpoint.dtypes import SAFETENSORS_NAMES
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.reshard.load import LocalModel, fill_params, match_params, plan_local
from exaone_bridge.checkpoint.reshard.plan import LocalParam
from exaone_bridge.checkpoint.reshard.save import as_on_disk, gather_hf_tensors
from exaone_bridge.runtime.model import build
from exaone_bridge.verification.checks.digests import Digest
from exaone_bridge.verification.workflow.workload import Workload

if TYPE_CHECKING:
    from megatron.bridge import AutoBridge

__all__ = ["LayerwiseMegatron"]

_EMBEDDING = "embedding.word_embeddings.weight"

Parameters = list[tuple[LocalParam, torch.Tensor]]


class LayerwiseMegatron:
    """A Megatron-Core model, loaded and exported layer by layer with the plan AutoBridge uses.

    The operating system gives memory to a parameter when it is first written; a freed parameter
    gets new memory.
    """

    def __init__(
        self, bridge: AutoBridge, checkpoint: HFCheckpoint, workload: Workload, dtype: torch.dtype
    ) -> None:
        """Build the model with its weights unset.

        Args:
            dtype: of the parameters.
        """
        self.model = build(
            bridge,
            workload.layout,
            dtype=dtype,
            backend=workload.backend,
            load_weights=False,
            perform_initialization=False,
            **workload.overrides,
        )
        self._bridge = bridge._model_bridge
        self._tensors = checkpoint.tensors
        self._dtype = dtype
        description = self._bridge.describe(bridge.hf_pretrained, self.model)
        self._shapes = description.hf_shapes
        local = local_model(self.model)
        self._plan = plan_local(description, local)
        own, embedding = _without_mtp_embedding(local)
        self._outside: list[Parameters] = []  # each parameter by itself
        self._layers: dict[int, Parameters] = {}
        for parameter, tensor in match_params(self._plan, own):
            if parameter.indices:
                self._layers.setdefault(parameter.indices[0], []).append((parameter, tensor))
            else:
                self._outside.append([(parameter, tensor)])
        if embedding is not None:
            part = next(each for each in self._plan.params if each.mapping.megatron == _EMBEDDING)
            chunk, shard = len(local.layers) - 1, part.shard(local.rank)
            replica = LocalParam(chunk, _EMBEDDING, part, (), shard, True)
            self._outside.append([(replica, embedding)])

    def round_trip(self) -> dict[str, Digest]:
        """Load every layer, and digest what an export of it writes.

        Returns:
            Digests of the tensors that this rank would write.
        """
        dense, expert = shard_groups()
        order = {id(part): number for number, part in enumerate(self._plan.params)}
        found: dict[str, Digest] = {}
        for parameters in (*self._outside, *self._layers.values()):
            fill_params(parameters, self._tensors)
            for parameter, tensor in parameters:
                if parameter.is_tied_copy:
                    continue
                group = expert if parameter.param.is_expert else dense
                tensor = as_on_disk(parameter, tensor, self._dtype)
                dtype = SAFETENSORS_NAMES[tensor.dtype]
                position = order[id(parameter.param)]
                for name, pieces in gather_hf_tensors(parameter, tensor, group, position):
                    digest = hashlib.sha256()
                    for piece in pieces:
                        digest.update(piece)
                    found[name] = Digest(dtype, self._shapes[name], digest.hexdigest())
            _free(parameters)
        return found

    def load_when_run(self) -> None:
        """Load everything outside the layers, and from now on each layer when it runs."""
        from megatron.core.utils import unwrap_model

        for parameters in self._outside:
            fill_params(parameters, self._tensors)
        for chunk in unwrap_model(self.model):
            for layer in chunk.decoder.layers:
                parameters = self._layers[layer.layer_number - 1]
                layer.register_forward_pre_hook(lambda *_, own=parameters: self._fill(own))
                layer.register_forward_hook(lambda *_, own=parameters: _free(own))

    def _fill(self, parameters: Parameters) -> None:
        fill_params(parameters, self._tensors)


def _without_mtp_embedding(local: LocalModel) -> tuple[LocalModel, torch.Tensor | None]:
    """Separate the embedding that multi-token prediction has on the last stage, which no plan has.

    Returns:
        The model without it, and the embedding; None if this rank has none.
    """
    key = len(local.layers) - 1, _EMBEDDING
    if local.rank.pp == 0 or key not in local.parameters:
        return local, None
    others = {name: tensor for name, tensor in local.parameters.items() if name != key}
    return dataclasses.replace(local, parameters=others), local.parameters[key]


@torch.no_grad()
def _free(parameters: Sequence[tuple[LocalParam, torch.Tensor]]) -> None:
    for _, tensor in parameters:
        tensor.data = torch.empty_like(tensor.data)
