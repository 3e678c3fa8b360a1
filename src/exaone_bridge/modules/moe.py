"""Mixture-of-experts layers for models whose other linears have biases.

Megatron-Core 0.19.2 has one switch, `add_bias_linear`, for all linears of a model. It gives biases
to router and routed experts too, and its shared experts reject it (`transformer/moe/
shared_experts.py`). Here router and routed experts never have biases, and shared experts may.

Axes: S sequence, B batch, H hidden.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.modules.backend import Backend
from exaone_bridge.modules.grouped_experts import AlltoAllTokenDispatcher, GroupedExperts

__all__ = ["BiasedSharedExpertMLP", "UnbiasedMoELayer", "moe_layer_builder"]


class UnbiasedMoELayer(MoELayer):
    """A MoELayer whose router, dispatcher and routed experts get a config without linear biases."""

    token_dispatcher: MoETokenDispatcher

    def __init__(
        self, config: TransformerConfig, submodules: MoESubmodules, **kwargs: object
    ) -> None:
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


def _with_bias(linear: type[torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    return lambda *args, **kwargs: linear(*args, **{**kwargs, "bias": True})


class BiasedSharedExpertMLP(SharedExpertMLP):
    """Shared experts whose linears have biases.

    Raises:
        UnsupportedConfig: overlap with the dispatcher, which would drop the second bias.
    """

    def __init__(
        self, *, config: TransformerConfig, submodules: MLPSubmodules, **kwargs: object
    ) -> None:
        if config.moe_shared_expert_overlap:
            raise UnsupportedConfig(
                "moe_shared_expert_overlap",
                got=True,
                wanted="off where shared experts have biases",
                where="provider",
            )
        submodules = dataclasses.replace(
            submodules,
            linear_fc1=_with_bias(submodules.linear_fc1),
            linear_fc2=_with_bias(submodules.linear_fc2),
        )
        super().__init__(config=config, submodules=submodules, **kwargs)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the shared experts: [S, B, H] -> [S, B, H].

        The parent drops the bias that `linear_fc2` returns instead of adding it.
        """
        output, bias = MLP.forward(self, hidden_states)
        return output if bias is None else output + bias


def moe_layer_builder(
    backend: Backend, router: type[Router], *, shared_bias: bool
) -> Callable[..., MoELayer]:
    """Make the builder that a TransformerLayer's `mlp` submodule is.

    The config's `moe_shared_expert_intermediate_size` decides whether there are shared experts
    (None: no).

    Args:
        backend: gives linears, activation and routed experts.
        router: the router's class.
        shared_bias: whether shared experts have biases.
    """
    linears = MLPSubmodules(backend.column_linear, backend.row_linear, backend.activation)
    shared = functools.partial(
        BiasedSharedExpertMLP if shared_bias else SharedExpertMLP, submodules=linears
    )
    submodules = MoESubmodules(
        experts=backend.build_experts(), shared_experts=shared, router=router
    )
    return functools.partial(UnbiasedMoELayer, submodules=submodules)
