"""Mixture-of-experts layers in models whose other linears have biases.

Megatron-Core has one switch, `add_bias_linear`, for all linears of a model; it gives router and experts a bias too, and
its shared experts refuse it. Here router and routed experts never have one, and shared experts have it where asked.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.modules.backend import Backend
from exaone_bridge.modules.grouped_experts import AlltoAllTokenDispatcher, GroupedExperts

__all__ = ["BiasedSharedExpertMLP", "UnbiasedMoELayer", "moe_builder"]


class UnbiasedMoELayer(MoELayer):
    """A MoELayer whose router, dispatcher and routed experts see a config without linear biases."""

    token_dispatcher: Any

    def __init__(self, config: TransformerConfig, submodules: MoESubmodules, **kwargs: Any) -> None:
        if config.add_bias_linear:
            config = copy.copy(config)
            config.add_bias_linear = False
        super().__init__(config, submodules=submodules, **kwargs)
        if isinstance(self.experts, GroupedExperts) and AlltoAllTokenDispatcher.can_replace(
            self.token_dispatcher
        ):
            self.token_dispatcher = AlltoAllTokenDispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=self.config,
                pg_collection=kwargs.get("pg_collection") or get_default_pg_collection(),
            )
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)


def _biased(linear: type) -> Any:
    return lambda *args, **kwargs: linear(*args, **{**kwargs, "bias": True})


class BiasedSharedExpertMLP(SharedExpertMLP):
    """Shared experts whose projections have biases: [S, B, H] -> [S, B, H].

    Raises:
        UnsupportedConfig: overlap with the dispatcher, which would drop the last bias.
    """

    def __init__(
        self, *, config: TransformerConfig, submodules: MLPSubmodules, **kwargs: Any
    ) -> None:
        if config.moe_shared_expert_overlap:
            raise UnsupportedConfig(
                "moe_shared_expert_overlap",
                got=True,
                wanted="off where shared experts have biases",
                where="provider",
            )
        fc1, fc2 = _biased(submodules.linear_fc1), _biased(submodules.linear_fc2)
        submodules = dataclasses.replace(submodules, linear_fc1=fc1, linear_fc2=fc2)
        super().__init__(config=config, submodules=submodules, **kwargs)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The parent drops the bias that `linear_fc2` leaves to be added."""
        output, bias = MLP.forward(self, hidden_states)
        return output if bias is None else output + bias


def moe_builder(backend: Backend, router: type, *, shared_bias: bool) -> Any:
    """What TransformerLayer builds its `mlp` from: `router`, the backend's routed experts, shared experts.

    Whether there are shared experts is the config's `moe_shared_expert_intermediate_size`: None for none.
    """
    linears = MLPSubmodules(backend.column_linear, backend.row_linear, backend.activation)
    shared = functools.partial(
        BiasedSharedExpertMLP if shared_bias else SharedExpertMLP, submodules=linears
    )
    submodules = MoESubmodules(
        experts=backend.build_experts(), shared_experts=shared, router=router
    )
    return functools.partial(UnbiasedMoELayer, submodules=submodules)
